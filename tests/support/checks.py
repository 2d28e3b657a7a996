"""What tests compare: up to rounding, bit for bit, untouched, and whole runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from support.nets import types_of

if TYPE_CHECKING:
    from mmengine.runner import Runner


#: Largest difference relative to the largest value, by precision: rounding and nothing else.
RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5}


def assert_same(actual: Tensor, expected: Tensor, hint: object = '', scale: float = 1.0) -> None:
    """Equal up to the rounding of the dtype, relative to the largest value."""
    assert actual.shape == expected.shape, (hint, actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (hint, actual.dtype, expected.dtype)
    size = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    difference = ((actual - expected).abs().max() / size).item()
    assert difference <= RELATIVE[expected.dtype] * scale, (hint, difference)


def assert_equal_states(first: dict, second: dict) -> None:
    """Two state dicts are the same, bit for bit."""
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_untouched(
    model: nn.Module, state: dict[str, Tensor], types: dict[str, type], skip: Iterable[str] = ()
) -> None:
    """The model has the modules, the keys in their order, and the values of before."""
    assert types_of(model) == types
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        if name not in skip:
            assert torch.equal(tensor, state[name]), name


def assert_same_run(first: Runner, second: Runner) -> None:
    """Two runners ended with the same weights, structure, scores, journal and momentum."""
    from support.runs import dyrep  # here: the other checks need torch alone

    assert_equal_states(first.model.state_dict(), second.model.state_dict())
    records = [dyrep(run)._record for run in (first, second)]
    assert records[0].journal == records[1].journal
    states = [dyrep(run)._saliency.state_dict() for run in (first, second)]
    assert states[0]['paths'] == states[1]['paths']
    assert all(torch.equal(states[0][key], states[1][key]) for key in ('sums', 'counts'))
    kept, other = (run.optim_wrapper.optimizer.state_dict() for run in (first, second))
    assert kept['param_groups'] == other['param_groups']
    assert kept['state'].keys() == other['state'].keys()
    for key, state in kept['state'].items():
        for name, value in state.items():
            same = (
                torch.equal(value, other['state'][key][name])
                if torch.is_tensor(value)
                else (value == other['state'][key][name])
            )
            assert same, (key, name)
