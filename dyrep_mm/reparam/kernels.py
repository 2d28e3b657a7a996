"""Pure maths on kernels: every linear operation of a block as one convolution kernel.

A :class:`Kernel` is the pair ``(weight, bias)`` of a convolution with the geometry of the
conv that the block replaces: weight ``(out, in / groups, kh, kw)``, bias ``(out,)``. All
functions are differentiable and keep dtype and device (section 3 of the paper, Eq. 1-2, 6,
8, 10).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Kernel(NamedTuple):
    """One linear operation: ``weight`` (out, in / groups, kh, kw) and ``bias`` (out,)."""

    weight: Tensor
    bias: Tensor


#: In place of the bias of a kernel, where a branch gives one that has none.
NO_BIAS: Any = None


def make_kernel(weight: Tensor, bias: Tensor | None = None) -> Kernel:
    """Kernel of a conv that may have no bias."""
    return Kernel(weight, weight.new_zeros(weight.shape[0]) if bias is None else bias)


class Norm(NamedTuple):
    """A BN with given statistics and a factor behind it; every tensor is (channels,)."""

    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    unit: Tensor | None = None


class Stage(NamedTuple):
    """A linear operation, as a :class:`Kernel` if it has a bias, and the BN behind it if there is
    one."""

    weight: Tensor
    bias: Tensor | None = None
    norm: Norm | None = None


def precise(x: Tensor) -> torch.dtype:
    """Double precision, where the device of ``x`` has it."""
    return x.dtype if x.device.type == 'mps' else torch.float64


def is_recorded() -> bool:
    """Whether a trace, an export or a compiler records what runs: then operations of torch alone
    run, for a Function of our own means nothing to whoever reads the record."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def merge(paths: Iterable[Sequence[Stage]], size: Sequence[int], groups: int = 1) -> Kernel:
    """Sum of parallel paths as one kernel of ``size`` (kh, kw), each in its middle (Eq. 1, 2, 8).

    A path is a ``kxk``, or some ``1x1`` and then a ``kxk``, all with ``groups``: the ``1x1`` have
    weight (mid, in / groups, 1, 1), the ``kxk`` (out, mid / groups, kh, kw) or, one filter per
    channel, (mid, 1, kh, kw). All sizes are odd. Exact at the border too if the padding of the
    ``kxk`` holds what the ``1x1`` make of zeros, see :mod:`dyrep_mm.reparam.branches`.

    A step of training merges every block anew. So the norms of all paths fold at once, and one
    Function sums what is left into one buffer.
    """
    paths = [_shortened(path, groups) for path in paths]
    lasts = [path[-1] for path in paths]
    scales, bias, firsts = _fold(lasts, [path[0] for path in paths if len(path) > 1])
    behind = iter(firsts)
    terms = [
        _Term(last.weight, scale, *(next(behind) if len(path) > 1 else ()))
        for path, last, scale in zip(paths, lasts, scales, strict=True)
    ]
    run = _sum if is_recorded() else _Sum.apply
    return Kernel(*run(size, groups, bias, *(tensor for term in terms for tensor in term)))


def fold_bn(
    kernel: Kernel,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    unit: Tensor | None = None,
) -> Kernel:
    """Kernel of ``unit * BN(conv(x))`` with fixed statistics (Eq. 8); every BN tensor is (out,)."""
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma
    bias = (kernel.bias - mean) * scale
    if beta is not None:
        bias = bias + beta
    if unit is not None:  # last, so that a bias of zero stays zero
        scale, bias = scale * unit, bias * unit
    return Kernel(kernel.weight * _column(scale), bias)


def add(kernels: Iterable[Kernel], size: Sequence[int]) -> Kernel:
    """Sum of kernels, each in the middle of ``size`` (kh, kw): parallel branches (Eq. 2)."""
    return merge([[Stage(*kernel)] for kernel in kernels], size)


def chain(first: Kernel, second: Kernel, groups: int = 1) -> Kernel:
    """Kernel of ``second(first(x))``, a ``1x1`` and a ``kxk`` as in :func:`merge`."""
    return merge([[Stage(*first), Stage(*second)]], second.weight.shape[-2:], groups)


def _shortened(path: Sequence[Stage], groups: int) -> Sequence[Stage]:
    """``path`` with one ``1x1`` at most."""
    return path if len(path) <= 2 else (Stage(*merge([path[:-1]], (1, 1), groups)), path[-1])


def _fold(
    lasts: Sequence[Stage], firsts: Sequence[Stage]
) -> tuple[list[Tensor | None], Tensor | None, list[Kernel]]:
    """What biases and norms come to (Eq. 8): the scale behind each last stage, the sum of what is
    added behind these, and the kernel of each first stage."""
    ends = [stage for stage in lasts if stage.norm]
    stages = [*ends, *(stage for stage in firsts if stage.norm)]
    biases = [stage.bias for stage in lasts if not stage.norm and stage.bias is not None]
    scales: Iterator[Tensor] = iter(())
    shifts: Iterator[Tensor] = iter(())
    if stages:
        scale, shift = _scale_and_shift(stages)
        sizes = [len(stage.weight) for stage in stages]
        count = len(ends)
        scales = iter(scale.split(sizes))
        if ends:
            shift, *rest = shift.split([sum(sizes[:count]), *sizes[count:]])
            biases.append(shift if count == 1 else shift.view(count, -1).sum(0))
            shifts = iter(rest)
        else:
            shifts = iter(shift.split(sizes))
    return (
        [next(scales) if stage.norm else None for stage in lasts],
        sum(biases[1:], biases[0]) if biases else None,
        [
            Kernel(stage.weight * _column(next(scales)), next(shifts))
            if stage.norm
            else make_kernel(stage.weight, stage.bias)
            for stage in firsts
        ],
    )


def _scale_and_shift(stages: Sequence[Stage]) -> tuple[Tensor, Tensor]:
    """Scale and shift by which the norms change what is before them, one after another in two
    vectors: few operations, however many stages there are."""

    dtype = stages[0].weight.dtype

    def joined(vectors: Sequence[Tensor]) -> Tensor:
        return (torch.cat(list(vectors)) if len(vectors) > 1 else vectors[0]).to(dtype)

    def filled(vectors: Iterable[Tensor | None], fill: float) -> Tensor | None:
        pairs = list(zip(vectors, means, strict=True))
        if all(vector is None for vector, _ in pairs):
            return None
        given = [vector for vector, _ in pairs if vector is not None]
        if len(given) == len(pairs):
            return joined(given)
        blank = means[0].new_full((max(map(len, means)),), fill)
        return joined([blank[: len(mean)] if v is None else v for v, mean in pairs])

    norms = [stage.norm for stage in stages if stage.norm]
    means, variances, eps = [n.mean for n in norms], [n.var for n in norms], norms[0].eps
    if any(norm.eps != eps for norm in norms):
        variances, eps = [norm.var + norm.eps for norm in norms], 0.0
    scale = torch.rsqrt(joined(variances) + eps)
    gamma, beta = filled((n.gamma for n in norms), 1), filled((n.beta for n in norms), 0)
    unit = filled((n.unit for n in norms), 1)
    scale = scale if gamma is None else scale * gamma
    bias, mean = filled((stage.bias for stage in stages), 0), joined(means)
    mean = mean if bias is None else mean - bias
    beta = torch.zeros_like(mean) if beta is None else beta
    shift = torch.addcmul(beta, mean, scale, value=-1)
    return (scale, shift) if unit is None else (scale * unit, shift * unit)


class _Term(NamedTuple):
    """A summand of a kernel: ``scale`` (out,) times ``weight`` (out, wide, kh, kw) behind a ``1x1``
    with weight ``first`` (mid, narrow, 1, 1) and bias ``shift`` (mid,)."""

    weight: Tensor
    scale: Tensor | None = None
    first: Tensor | None = None
    shift: Tensor | None = None


def _is_filter(weight: Tensor, first: Tensor) -> bool:
    """The weight is one filter per channel: it and ``first`` multiply place by place."""
    return weight.shape[1] == 1 and len(weight) == len(first)


def _terms(tensors: Sequence[Any]) -> list[_Term]:
    """Terms from their tensors one after another, as a Function takes them."""
    return [_Term(*tensors[i : i + 4]) for i in range(0, len(tensors), 4)]


def _column(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1, 1)


def _middle(weight: Tensor, size: Sequence[int]) -> Tensor:
    """View of the ``size`` (kh, kw) in the middle of ``weight`` (..., kh, kw)."""
    for dim, k in zip((-2, -1), size, strict=True):
        if (n := weight.shape[dim]) != k:
            weight = weight.narrow(dim, (n - k) // 2, k)
    return weight


def _rows(weight: Tensor, groups: int) -> Tensor:
    """Copy of ``weight`` (out, wide, kh, kw) as matrices (groups, out / groups * kh * kw, wide)."""
    out, wide = weight.shape[:2]
    rows = weight.reshape(out, wide, -1).transpose(1, 2)
    return rows.clone(memory_format=torch.contiguous_format).view(groups, -1, wide)


def _unrows(rows: Tensor, like: Tensor) -> Tensor:
    """View of ``rows`` as :func:`_rows` makes them; out, kh and kw are those of ``like``."""
    out, _, kh, kw = like.shape
    return rows.reshape(out, kh, kw, rows.shape[-1]).permute(0, 3, 1, 2)


def _factors(term: _Term, groups: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Two factors of the weight of ``term``, or one, and its bias if it has one."""
    weight, scale, first, shift = term
    factor = None if scale is None else _column(scale)
    if first is None or shift is None:
        return weight, factor, None
    if _is_filter(weight, first):
        bias = shift * weight.sum((1, 2, 3))
        factor = first if factor is None else first * factor
    else:
        rows = _rows(weight, groups)
        bias = torch.bmm(rows, shift.view(groups, -1, 1)).view(len(weight), -1).sum(1)
        weight = _unrows(torch.bmm(rows, first.view(groups, rows.shape[-1], -1)), weight)
    return weight, factor, bias if scale is None else bias * scale


def _gradients(
    term: _Term, groups: int, grad: Tensor, bias_grad: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors of ``term`` from those of the sum."""
    weight, scale, first, shift = term
    grad = _middle(grad, weight.shape[-2:])
    by_weight = by_scale = by_first = by_shift = None
    if first is None or shift is None:
        if needed[0]:
            by_weight = grad if scale is None else grad * _column(scale)
        if needed[1]:
            by_scale = (grad * weight).sum((1, 2, 3))
    elif _is_filter(weight, first):
        planes = grad.reshape(len(weight), -1, weight.shape[-2:].numel())
        # First all gradients as if the scale were one.
        by_first = torch.bmm(planes, weight.view(len(weight), -1, 1)).unsqueeze(-1)
        by_shift = bias_grad * weight.sum((1, 2, 3))
        if needed[1]:
            by_scale = torch.addcmul((by_first * first).sum((1, 2, 3)), by_shift, shift)
        if needed[0]:
            by_weight = torch.bmm(first.view(len(first), 1, -1), planes).view(weight.shape)
            by_weight = by_weight + _column(bias_grad * shift)
        if scale is not None:
            by_first, by_shift = by_first * _column(scale), by_shift * scale
            by_weight = None if by_weight is None else by_weight * _column(scale)
    else:
        # In place: fresh memory of the size of a kernel costs more than what is computed in it.
        out, area = len(weight), weight.shape[-2:].numel()
        rows, grad = _rows(weight, groups), _rows(grad, groups)
        matrix = first.view(groups, rows.shape[-1], -1)
        by_rows = torch.bmm(grad, matrix.transpose(1, 2))
        outer = bias_grad.view(groups, -1, 1, 1) * shift.view(groups, 1, 1, -1)
        by_rows.view(groups, -1, area, rows.shape[-1]).add_(outer)
        buffer = rows * by_rows
        if needed[1]:
            by_scale = buffer.view(out, -1).sum(1)
        by_weight = buffer.view(weight.shape).copy_(_unrows(by_rows, weight))
        if scale is not None:
            rows.view(out, -1).mul_(scale[:, None])
            by_weight.mul_(_column(scale))
        rows = rows.transpose(1, 2)
        column = bias_grad[:, None].expand(-1, area).reshape(groups, -1, 1)
        by_first = torch.bmm(rows, grad).view(first.shape)
        by_shift = torch.bmm(rows, column).view(shift.shape)
    return by_weight, by_scale, by_first, by_shift


class _Sum(torch.autograd.Function):
    """Weight and bias of a sum of terms, each in the middle of ``size``: one buffer takes them all,
    nothing is padded, and the backward keeps no more than what the terms are made of.

    Args:
        size: (kh, kw).
        groups: Of all operations.
        bias: What the bias is besides (out,).
        tensors: Of all terms one after another.
    """

    @staticmethod
    def forward(
        size: Sequence[int], groups: int, bias: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        total: Any = None
        sums = [] if bias is None else [bias]
        for term in _terms(tensors):
            one, other, shift = _factors(term, groups)
            if total is None and other is None and one.shape[-2:] == size:
                total = one.clone(memory_format=torch.contiguous_format)
            else:
                if total is None:
                    narrow = one.shape[1] if other is None else max(one.shape[1], other.shape[1])
                    total = one.new_zeros(len(one), narrow, *size)
                place = _middle(total, one.shape[-2:])
                place.add_(one) if other is None else place.addcmul_(one, other)
            if shift is not None:
                sums.append(shift)
        if not sums:
            return total, one.new_zeros(len(one))
        # An output must not be an input.
        return total, sum(sums[1:], sums[0]) if len(sums) > 1 else sums[0].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.size, ctx.groups, _, *tensors = inputs
        ctx.shape = output[0].shape
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, bias_grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None, None, bias_grad if ctx.needs_input_grad[2] else None]
        if torch.is_grad_enabled():  # to be differentiated again
            return *grads, *_gradients_by_torch(ctx, grad, bias_grad)
        for term in _terms(ctx.saved_tensors):
            needed = ctx.needs_input_grad[len(grads) : len(grads) + 4]
            if any(needed):
                grads += _gradients(term, ctx.groups, grad, bias_grad, needed)
            else:
                grads += [None] * 4
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, bias: Tensor | None, *tangents: Tensor | None) -> tuple:
        # A term is linear in its weight, in its scale, and in the 1x1 before it.
        terms = []
        for term, change in zip(_terms(ctx.saved_tensors), _terms(tangents), strict=True):
            if change.weight is not None:
                terms.append(term._replace(weight=change.weight))
            if change.scale is not None:
                terms.append(term._replace(scale=change.scale))
            if change.first is not None or change.shift is not None:
                pairs: Any = zip(term[2:], change[2:], strict=True)
                terms.append(
                    _Term(*term[:2], *(torch.zeros_like(t) if c is None else c for t, c in pairs))
                )
        if bias is not None and not terms:
            return bias.new_zeros(ctx.shape), bias
        return _sum(ctx.size, ctx.groups, bias, *(tensor for term in terms for tensor in term))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, size: tuple, groups: int, *tensors: Tensor) -> tuple:
        # In place only what has the extra dimension can be added to.
        def run(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
            return _sum(size, groups, *tensors)

        return torch.vmap(run, in_dims[2:])(*tensors), (0, 0)


def _sum(
    size: Sequence[int], groups: int, bias: Tensor | None, *tensors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What :class:`_Sum` computes, of operations of torch alone."""
    total: Any = 0
    terms = _terms(tensors)
    if bias is None:
        bias = terms[0].weight.new_zeros(len(terms[0].weight))
    for term in terms:
        one, other, shift = _factors(term, groups)
        product = one if other is None else one * other
        rows, cols = ((n - k) // 2 for n, k in zip(size, product.shape[-2:], strict=True))
        total = total + F.pad(product, (cols, cols, rows, rows))
        bias = bias if shift is None else bias + shift
    return total, bias


def _gradients_by_torch(ctx: Any, grad: Tensor, bias_grad: Tensor) -> list[Tensor | None]:
    """Gradients of all tensors that ``ctx`` saved, differentiable."""
    tensors = ctx.saved_tensors
    places = [place for place, tensor in enumerate(tensors) if tensor is not None]

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        filled: list[Tensor | None] = [None] * len(tensors)
        for place, tensor in zip(places, given, strict=True):
            filled[place] = tensor
        return _sum(ctx.size, ctx.groups, None, *filled)

    _, pull = torch.func.vjp(run, *(tensors[place] for place in places))
    grads = dict(zip(places, pull((grad, bias_grad)), strict=True))
    return [grads.get(place) for place in range(len(tensors))]


def identity_weight(channels: int, groups: int, like: Tensor) -> Tensor:
    """Weight (channels, channels / groups, 1, 1) that copies its input."""
    narrow = channels // groups
    eye = torch.eye(narrow, dtype=like.dtype, device=like.device)
    return (eye.repeat(groups, 1) if groups > 1 else eye).view(channels, narrow, 1, 1)


def average_weight(channels: int, size: tuple[int, int], like: Tensor) -> Tensor:
    """Weight (channels, 1, kh, kw) of an average pooling, padding counted."""
    return like.new_full((channels, 1, *size), 1 / math.prod(size))
