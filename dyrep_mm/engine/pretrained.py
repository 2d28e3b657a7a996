"""Starts a module with the weights and the structure of a checkpoint: stage C to stage D."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dyrep_mm.engine.checkpoint import below, load_grown, load_strictly, weights_of
from dyrep_mm.engine.transaction import Transaction
from dyrep_mm.errors import DyRepError
from dyrep_mm.registry import WEIGHT_INITIALIZERS
from dyrep_mm.reparam.branches import ORIGIN, fitting
from dyrep_mm.reparam.geometry import pair
from dyrep_mm.surgery.copies import with_copies
from dyrep_mm.surgery.rewire import prune, restore
from dyrep_mm.surgery.structure import Structure, structure_of
from dyrep_mm.surgery.tree import blocks_of, get_module, in_scope, outermost

_MARK = '_dyrep_start'


@WEIGHT_INITIALIZERS.register_module()
class DyRepPretrained:
    """Starts a module with the weights of a checkpoint and with its branches, which go on
    training and evolving.

    mmengine initialises weights when the optimizer exists already, and other initialisers may
    still run: so this one reads the checkpoint and leaves a mark, and ``DyRepHook`` does what it
    says before the first iteration, in step with optimizer and EMA. Without the hook the first
    forward raises. As with mmengine's own ``Pretrained``, weights that are loaded afterwards
    (``load_from``, ``resume``) win.

    A branch that is not exact on a conv of other geometry, as an average pooling on a conv that
    became dilated, is absorbed by its conv and named in the log: the module then starts with the
    function that the fused weights would give.

    Args:
        checkpoint: Checkpoint file of a run with DyRep, as the run wrote it or published.
        prefix: What the names of the wanted part start with there, e.g. ``'backbone.'``.

    Raises:
        DyRepError: the file cannot be read or holds no structure, or what it holds below
            ``prefix`` does not fit the module.
    """

    def __init__(self, checkpoint: str | Path, prefix: str | None = None):
        self.checkpoint = checkpoint
        self.prefix = prefix and prefix.rstrip('.') + '.'

    def __call__(self, module: nn.Module) -> None:
        setattr(module, _MARK, Handover(self.checkpoint, self.prefix or '', module))


class Handover:
    """What :class:`DyRepPretrained` has read and leaves to the hook.

    Args:
        checkpoint: Where it comes from.
        prefix: Part of the names in it to take off; what has other names is not wanted.
        module: The plain module that it is for.

    Attributes:
        structure: With paths from ``module``; only what fits it.
        state: The ``state_dict`` of ``module`` with that structure.
        absorbed: Branches that do not fit, by path.
    """

    def __init__(self, checkpoint: str | Path, prefix: str, module: nn.Module):
        self.checkpoint = checkpoint
        loaded, structure = load_grown(checkpoint, advice="; type='Pretrained' starts from it")
        state = weights_of(loaded, prefix)
        # On a copy, since mmengine allows no new parameters while it initialises weights.
        copied = copy.deepcopy(module)
        try:
            self.absorbed = _give(copied, below(prefix, structure), state)
        except DyRepError as error:
            part = f'what starts with {prefix!r} in {checkpoint}' if prefix else checkpoint
            raise DyRepError(f'{part} cannot start a {type(module).__name__}: {error}') from None
        self.structure: Structure = structure_of(copied)
        self.state = copied.state_dict()
        self._guard = module.register_forward_pre_hook(_refuse)

    def carry_out(self, transaction: Transaction, path: str) -> str:
        """Give the module at ``path`` structure and weights; returns what to tell."""
        module = get_module(transaction.model, path)
        prefix = f'{path}.' if path else ''
        present = structure_of(transaction.model)
        outside = {p: names for p, names in present.items() if not in_scope(p, path)}
        inside = {prefix + p: names for p, names in self.structure.items()}
        transaction.restore({**outside, **with_copies(inside, transaction.copies)})
        module.load_state_dict(self.state)
        self.finish(module)
        return (
            f'{path or "the model"} starts from {self.checkpoint} with '
            f'{len(blocks_of(module))} blocks'
        ) + ''.join(
            f'; {prefix}{p}: {", ".join(names)} not exact here, absorbed by the conv'
            for p, names in self.absorbed.items()
        )

    def finish(self, module: nn.Module) -> None:
        """Take the mark and the guard away."""
        self._guard.remove()
        delattr(module, _MARK)


def handovers_in(model: nn.Module) -> dict[str, Handover]:
    """What initialisers have left to do in ``model``, by path."""
    return {path: vars(m)[_MARK] for path, m in model.named_modules() if _MARK in vars(m)}


def _refuse(module: nn.Module, _args: Any) -> None:
    raise DyRepError(
        f'{type(module).__name__} has init_cfg=dict(type="dyrep_mm.DyRepPretrained"), which '
        'needs custom_hooks=[dict(type="dyrep_mm.DyRepHook")] (interval=None to keep the structure)'
    )


def _give(
    module: nn.Module, structure: Structure, state: dict[str, Tensor]
) -> dict[str, list[str]]:
    """Give ``module`` structure and weights; returns the branches that it had to absorb."""
    convs = {path: conv for path, conv in _convs(module) if path in structure}
    geometry = {path: (pair(c.stride), pair(c.dilation)) for path, c in convs.items()}
    # Every branch is exact on a conv of stride and dilation 1.
    for conv in convs.values():
        conv.stride = conv.dilation = (1, 1)
    restore(module, structure, state)
    own = module.state_dict().keys()
    load_strictly(module, {name: state[name] for name in own if name in state}, 'this part')
    absorbed = {}
    for path, block in reversed(blocks_of(module).items()):
        stride, dilation = geometry[outermost(module, path)]
        spec = dataclasses.replace(block.spec, stride=stride, dilation=dilation)
        fits = [ORIGIN, *fitting(spec, block.names)]
        if unfit := [name for name in block.names if name not in fits]:
            prune(module, path, unfit)
            absorbed[path] = unfit
    return absorbed


def _convs(module: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    return [(path, m) for path, m in module.named_modules() if isinstance(m, nn.Conv2d)]
