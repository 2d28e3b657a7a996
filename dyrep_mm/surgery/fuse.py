"""A plain copy of a model with blocks, and the norms that take the biases."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.branches import kernel_of
from dyrep_mm.surgery.tree import depth_of, get_module, modes_kept, replace


def _biased(model: nn.Module) -> dict[str, nn.Module]:
    """What fusing may leave a bias on: outermost blocks, and convs that gained one."""
    return {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, Block) or getattr(module, 'gained_bias', False))
        and depth_of(model, path) == 0
    }


class _Uses(TorchDispatchMode):
    """Notes which watched tensors are used by anything but a norm, views and in-place changes
    included."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, str] = {}  # storage of an output -> path of its module
        self.kept: list[Tensor] = []  # alive, so that a storage means one output
        self.elsewhere: set[str] = set()
        self.in_norm = False

    def watch(self, path: str, output: Tensor) -> None:
        self.made[output.untyped_storage().data_ptr()] = path
        self.kept.append(output)

    def maker(self, value: Any) -> str | None:
        """Path of the module that made ``value``, if it is a watched tensor."""
        if not isinstance(value, Tensor):
            return None
        return self.made.get(value.untyped_storage().data_ptr())

    def note(self, values: Any) -> None:
        self.elsewhere.update(p for v in tree_leaves(values) if (p := self.maker(v)) is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.in_norm:
            self.note((args, kwargs))
        return func(*args, **(kwargs or {}))


def following_norms(
    model: nn.Module,
    paths: Iterable[str],
    inputs: Any,
    forward: Callable[[nn.Module, Any], Any],
) -> dict[str, list[_BatchNorm]]:
    """The BNs that take the outputs of the modules at ``paths``, found by watching one forward.

    A path is listed if every output of its module goes into BNs that take nothing else, and
    nowhere but there.
    """
    uses = _Uses()
    taken: dict[_BatchNorm, list[str | None]] = defaultdict(list)
    absorbed: dict[str, set[int]] = defaultdict(set)

    def on_output(path: str) -> Callable:
        return lambda _module, _args, output: uses.watch(path, output)

    def before_norm(norm: _BatchNorm, args: tuple) -> None:
        uses.in_norm = True
        path = uses.maker(args[0])
        taken[norm].append(path)
        if path is not None:
            absorbed[path].add(args[0].untyped_storage().data_ptr())

    def after_norm(*_: Any) -> None:
        uses.in_norm = False

    sources = {path: get_module(model, path) for path in paths}
    inside = {id(m) for source in sources.values() for m in source.modules()}
    handles = [m.register_forward_hook(on_output(path)) for path, m in sources.items()]
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            if id(norm) not in inside:
                handles.append(norm.register_forward_pre_hook(before_norm))
                handles.append(norm.register_forward_hook(after_norm))
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            with uses:
                result = forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    uses.note(result)

    norms: dict[str, list[_BatchNorm]] = defaultdict(list)
    unclear = set(uses.elsewhere)
    for norm, makers in taken.items():
        if len(set(makers)) > 1:
            unclear.update(path for path in makers if path is not None)
        elif makers[0] is not None:
            norms[makers[0]].append(norm)
    outputs = Counter(uses.made.values())
    return {
        path: found
        for path, found in norms.items()
        if path not in unclear and len(absorbed[path]) == outputs[path]
    }


@torch.no_grad()
def fuse(
    model: nn.Module,
    inputs: Any = None,
    *,
    forward: Callable[[nn.Module, Any], Any] = lambda model, inputs: model(inputs),
) -> nn.Module:
    """A plain copy of ``model``: every block is one conv again, the same in eval mode.

    Args:
        model: Is left alone.
        inputs: A tensor for one forward. With it the bias of a fused conv moves into the BN
            that follows (``running_mean -= bias``), so that the copy has the parameters of the
            model that never grew; without it, or where no BN follows, the bias stays on the
            conv.
        forward: How to call the model with ``inputs``.
    """
    fused = copy.deepcopy(model)
    biased = _biased(fused)
    norms = {} if inputs is None else following_norms(fused, biased, inputs, forward)
    for path, module in biased.items():
        conv = module.origin if isinstance(module, Block) else module
        had_bias = conv.bias is not None and not getattr(conv, 'gained_bias', False)
        dtype = conv.weight.dtype
        # In float64, so that the only rounding is that of the result.
        weight, bias = kernel_of(module.to(torch.float64))
        conv.to(dtype).weight.data = weight.to(dtype)
        if not had_bias:
            for norm in norms.get(path, ()):
                norm.running_mean.copy_(norm.running_mean.double() - bias)
            folded = path in norms or not bias.any()
            conv.bias = None if folded else nn.Parameter(bias.to(dtype))
            vars(conv).pop('gained_bias', None)
        else:
            conv.bias.data = bias.to(dtype)
        if not path:
            return conv
        replace(fused, path, conv)
    return fused
