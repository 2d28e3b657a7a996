"""What tests compare: up to rounding, bit for bit, untouched, and whole runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

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


def assert_equal_data(expected: Any, actual: Any, path: str = '') -> int:
    """Nested plain data are the same, bit for bit; returns how many tensors were compared."""
    assert type(expected) is type(actual), path
    if isinstance(expected, Tensor):
        assert expected.dtype == actual.dtype, path
        assert torch.equal(expected, actual), path
        return 1
    if isinstance(expected, dict):
        assert list(expected) == list(actual), path
        pairs = [(f'{path}.{key}', value, actual[key]) for key, value in expected.items()]
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(actual), path
        both = zip(expected, actual, strict=True)
        pairs = [(f'{path}.{i}', *pair) for i, pair in enumerate(both)]
    else:
        assert expected == actual, path
        return 0
    return sum(assert_equal_data(first, second, name) for name, first, second in pairs)


def without_times(data: Any) -> Any:
    """``data`` without what a clock measured, which no two runs have in common."""
    if isinstance(data, dict):
        return {key: without_times(value) for key, value in data.items() if key != 'timing'}
    return [without_times(value) for value in data] if isinstance(data, list) else data


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
    hooks = [dyrep(run) for run in (first, second)]
    assert hooks[0].journal == hooks[1].journal
    assert_equal_data(*(hook.rule.state_dict() for hook in hooks))
    assert_equal_data(*(run.optim_wrapper.optimizer.state_dict() for run in (first, second)))
