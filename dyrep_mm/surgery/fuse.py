"""A plain copy of a model with blocks, or of its weights alone; norms take the biases."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyrep_mm.reparam.block import has_gained_bias, origin_of
from dyrep_mm.reparam.branches import kernel_of
from dyrep_mm.surgery.outputs import following_norms
from dyrep_mm.surgery.structure import altered
from dyrep_mm.surgery.tree import replace


@torch.no_grad()
def fused_state(
    model: nn.Module,
    norms: Mapping[str, Sequence[str]],
    state: Mapping[str, Tensor],
    prefix: str = '',
) -> tuple[OrderedDict[str, Tensor], list[str]]:
    """The ``state_dict`` of the plain model, the same function in eval mode; the model is not run
    and not changed.

    Every block is one weight (out, in / groups, kh, kw) again. Its bias (out,) goes into the conv's
    own, where the plain model has one, else into the norms that follow (``running_mean -= bias``);
    where none is known the conv gains one. It is computed in float64 on the CPU, and each result
    rounded once.

    Args:
        model: With blocks.
        norms: Paths of the norms that follow, by path, see
            :class:`dyrep_mm.surgery.outputs.OutputWatch`.
        state: Values for the tensors of ``model`` by name: its own, or those of an average. A block
            of which tensors are missing stays as it is.
        prefix: What the names in ``state`` start with.

    Returns:
        The state, in which what is the same in both models is the same tensor as in ``state``, and
        the paths of the convs that gain a bias.
    """
    path_of = {id(module): path for path, module in altered(model).items()}
    made: dict[str, dict[str, Tensor]] = {}  # by the first of the names that they replace
    gone: set[str] = set()
    means: dict[str, Tensor] = {}
    biased = []
    for at, module in model.named_modules(remove_duplicate=False):
        if id(module) not in path_of:
            continue
        start = f'{prefix}{at}.' if at else prefix
        names = [start + name for name in module.state_dict()]
        if not all(name in state for name in names):
            continue
        conv = origin_of(module)
        weight, bias = kernel_of(_with_values(module, state, start))
        inner = next(name for name, m in module.named_modules() if m is conv)
        like = state[start + (f'{inner}.weight' if inner else 'weight')]
        # A conv that only gained a bias has its weight still.
        parts = {f'{start}weight': like if module is conv else weight.to(like)}
        if conv.bias is not None and not has_gained_bias(conv):
            parts[f'{start}bias'] = bias.to(like)
        else:
            follow = [f'{prefix}{n}.running_mean' for n in norms.get(path_of[id(module)], ())]
            if follow and all(name in state for name in follow):
                for name in follow:
                    old = state[name]
                    means[name] = (old.to('cpu', torch.float64) - bias).to(old)
            elif bias.any():
                parts[f'{start}bias'] = bias.to(like)
                biased.append(at)
        made[names[0]] = parts
        gone.update(names)
    fused: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in state.items():
        fused.update(made.get(name, {}))
        if name not in gone:
            fused[name] = means.get(name, tensor)
    return fused, biased


def _with_values(module: nn.Module, state: Mapping[str, Tensor], prefix: str) -> nn.Module:
    """A shallow copy of ``module`` with the values that ``state`` has for it, in float64."""

    def exact(name: str, own: Tensor | None) -> Tensor | None:
        if own is None:
            return None
        value = state.get(prefix + name, own).detach().cpu()
        return value.double() if value.is_floating_point() else value

    twin = copy.copy(module)
    for table in ('_parameters', '_buffers'):
        vars(twin)[table] = {name: exact(name, t) for name, t in vars(module)[table].items()}
    vars(twin)['_modules'] = {
        name: None if child is None else _with_values(child, state, f'{prefix}{name}.')
        for name, child in module._modules.items()
    }
    return twin


@torch.no_grad()
def fuse(
    model: nn.Module,
    inputs: Any = None,
    *,
    forward: Callable[[nn.Module, Any], Any] = lambda model, inputs: model(inputs),
    norms: Mapping[str, Sequence[str]] | None = None,
) -> nn.Module:
    """A plain copy of ``model``: every block is one conv again, the same in eval mode.

    Args:
        model: Is left alone.
        inputs: A tensor for one forward. With it the bias of a fused conv moves into the BN
            that follows (``running_mean -= bias``), so that the copy has the parameters of the
            model that never grew; without it, or where no BN follows, the bias stays on the
            conv.
        forward: How to call the model with ``inputs``.
        norms: Paths of the BNs that follow, by path of the conv, where they are known; there is
            no forward then.
    """
    fused = copy.deepcopy(model)
    parts = altered(fused)
    if norms is None:
        norms = {} if inputs is None else following_norms(fused, parts, inputs, forward)
    tensors = {
        **dict(fused.named_parameters(remove_duplicate=False)),
        **dict(fused.named_buffers(remove_duplicate=False)),
    }
    state, _ = fused_state(fused, norms, tensors)
    for path, module in parts.items():
        conv, start = origin_of(module), f'{path}.' if path else ''
        conv.weight.data = state[f'{start}weight'].data
        bias = state.get(f'{start}bias')
        if conv.bias is not None and not has_gained_bias(conv):
            conv.bias.data = state[f'{start}bias']
        else:
            conv.bias = None if bias is None else nn.Parameter(bias)
            vars(conv).pop('gained_bias', None)
        for norm in norms.get(path, ()):
            fused.get_buffer(f'{norm}.running_mean').copy_(state[f'{norm}.running_mean'])
        if not path:
            return conv
        replace(fused, path, conv)
    return fused
