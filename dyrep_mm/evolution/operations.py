"""What a score sees of a conv that may grow: the function that the conv is a part of.

The ``kxk`` of a block is one term of a sum. The gradient of its weight is the gradient of the
merged kernel of the block, but its weight is not that kernel. A score that multiplies the two
would compare a part of one operation with the whole of another. So an operation is seen as
the kernel that a plain conv in its place would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.branches import ORIGIN, Branch, kernel_of
from dyrep_mm.reparam.geometry import ConvSpec
from dyrep_mm.reparam.kernels import add
from dyrep_mm.surgery.structure import Structure
from dyrep_mm.surgery.tree import get_module


@dataclass(frozen=True)
class Operation:
    """A conv that may grow.

    Attributes:
        weight: The parameter (out, in / groups, kh, kw); its ``grad`` is there in every iteration.
        spec: Geometry of the conv.
        names: What it would grow to, ``kxk`` first.
        beside: Merged weight, of the form of ``weight``, of the branches beside a ``kxk`` as it was
            when the interval began; None for any other conv.
        shares: Parameters (out,) of which each, times its gradient, is a share of the output of
            the operation times the gradient of that: the bias of the conv, scale and shift of
            the last norm of each branch beside it.
    """

    weight: nn.Parameter
    spec: ConvSpec
    names: tuple[str, ...]
    beside: Tensor | None = None
    shares: tuple[nn.Parameter, ...] = ()

    @property
    def grad(self) -> Tensor:
        """Gradient of the weight.

        Raises:
            DyRepError: there is none.
        """
        if self.weight.grad is None:
            raise DyRepError('an operation is scored by its gradient, and has none')
        return self.weight.grad

    def kernel(self) -> Tensor:
        """Weight of the plain conv that computes the same."""
        weight = self.weight.detach()
        return weight if self.beside is None else weight + self.beside


#: By path.
Operations = Mapping[str, Operation]


@torch.no_grad()
def operations_of(model: nn.Module, structure: Structure) -> dict[str, Operation]:
    """The convs of ``model`` at the paths of ``structure``, which says what they would grow to."""
    return {path: _operation(model, path, names) for path, names in structure.items()}


def _operation(model: nn.Module, path: str, names: Sequence[str]) -> Operation:
    conv = cast(nn.Conv2d, get_module(model, path))
    spec, inner = ConvSpec.of(conv), f'.branches.{ORIGIN}'
    branches: list[Branch] = []
    while path.endswith(inner):  # a block in the place of a kxk sums up with the one around it
        path = path.removesuffix(inner)
        branches += cast(Block, get_module(model, path)).added
    kernels = [kernel_of(branch) for branch in branches]
    beside = add(kernels, spec.kernel_size).weight.to(conv.weight) if branches else None
    shares = [conv.bias, *(p for branch in branches for p in (branch.bn.weight, branch.bn.bias))]
    parameters: Any = conv.weight, tuple(p for p in shares if p is not None)  # all are Parameters
    return Operation(parameters[0], spec, tuple(names), beside, parameters[1])


def besides_in(operations: Operations) -> dict[str, Tensor]:
    """A copy of what stands beside each operation, for a checkpoint."""
    besides = {path: operation.beside for path, operation in operations.items()}
    return {path: b.cpu().clone() for path, b in besides.items() if b is not None}


def restore_besides(operations: Operations, saved: Any) -> None:
    """Set what stands beside the operations to what it was when a checkpoint was made, of which
    those of 0.1.0 tell nothing.

    Raises:
        DyRepError: the data is malformed.
    """
    if saved is None:
        return
    if not isinstance(saved, Mapping):
        raise DyRepError('the scores of the checkpoint are malformed: beside')
    for path, own in ((path, operation.beside) for path, operation in operations.items()):
        if own is None:
            continue
        beside = saved.get(path)
        if not isinstance(beside, Tensor) or form_of(beside) != form_of(own):
            raise DyRepError(f'the scores of the checkpoint are malformed: beside {path}')
        own.copy_(beside)


def form_of(tensor: Tensor) -> tuple:
    """What two tensors must have in common for one to take the values of the other."""
    return tensor.shape, tensor.dtype, tensor.layout, tensor.is_meta
