"""Small networks with random norms, single convs and blocks, and images for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyrep_mm import grow, prune
from dyrep_mm.reparam.block import MERGING_DEVICES, Block
from dyrep_mm.reparam.branches import BRANCHES, ORIGIN


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """All BNs of ``model``."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Give every BN random statistics, scale and shift, so that none is an identity."""
    for norm in norms_of(model):
        if norm.running_mean is not None:
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
        if norm.weight is not None:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-1, 1)
    return model


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random input that is not centred, so that a wrong bias or border shows."""
    return torch.randn(*(shape or (2, 3, 13, 14)), dtype=dtype) + 0.5


@torch.no_grad()
def output_of(model: nn.Module, x: Tensor) -> Tensor:
    """Output in eval mode; the modes are left as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return model(x)
    finally:
        for module, training in modes:
            module.training = training


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the whole state, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def types_of(model: nn.Module) -> dict[str, type]:
    """Type of every module, by path."""
    return {path: type(module) for path, module in model.named_modules()}


class Net(nn.Module):
    """Convs of many geometries, each followed by a BN of its own, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=1e-3, momentum=0.2)
        self.dw = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
        self.dw_bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)  # with a bias of its own
        self.bn2 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_bn(self.stem(x)))
        x = torch.relu(self.bn1(self.conv1(x)) + x)
        x = torch.relu(self.dw_bn(self.dw(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


CONVS = ('stem', 'conv1', 'dw', 'conv2')


def make_net(seed: int = 0, dtype: torch.dtype = torch.float64) -> Net:
    """A small network with random norms; the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise(Net().to(dtype))


def nest(model: Net) -> Net:
    """Blocks in blocks, three deep, with random norms, and one inner branch pruned."""
    grow(model, 'conv1')
    grow(model, 'conv1.branches.1x1-kxk.conv')
    grow(model, 'conv1.branches.1x1-kxk.conv.branches.kx1.conv', ['1x1', 'identity'])
    grow(model, 'conv1.branches.kxk', ['1x1', '1xk'])
    grow(model, 'stem', ['1xk', '1x1-avg'])
    randomise(model)
    prune(model, 'stem', ['1xk', '1x1-avg'])
    prune(model, 'conv1.branches.1x1-kxk.conv', ['1x1-avg'])
    grow(model, 'dw', ['identity', '1x1'])
    return randomise(model)


def make_pair(bias: bool = False, channels: int = 8) -> nn.Sequential:
    """One conv, ``0``, and its BN, ``1``."""
    conv = nn.Conv2d(4, channels, 3, padding=1, bias=bias)
    return randomise(nn.Sequential(conv, nn.BatchNorm2d(channels)).double())


#: Every branch alone, and all together.
SETS = [*([name] for name in BRANCHES), None]


#: Arguments of :func:`make_conv`: groups, strides, dilations, paddings, with and without a bias.
GEOMETRIES = [
    {},
    {'channels': (4, 6, 2), 'stride': (2, 2)},
    {'channels': (4, 4, 4), 'dilation': (2, 2), 'padding': (2, 2)},
    {'channels': (4, 8, 4), 'bias': True},
    {'kernel': (5, 3), 'padding': 'same', 'bias': True},
    {'kernel': (7, 7), 'padding': (1, 4)},
]


def make_norm(channels: int) -> nn.BatchNorm2d:
    """A BN in double precision."""
    return nn.BatchNorm2d(channels).double()


def make_conv(
    kernel=(3, 3), channels=(4, 4, 1), stride=(1, 1), dilation=(1, 1), padding=(1, 1), **k
) -> nn.Conv2d:
    """A conv in double precision; ``channels`` are the input's, the output's and the groups."""
    inner, outer, groups = channels
    k.setdefault('bias', False)
    return nn.Conv2d(inner, outer, kernel, stride, padding, dilation, groups, **k).double()


def make_block(conv: nn.Conv2d | None = None, names: list[str] | None = None) -> Block:
    """A block around ``conv`` with random norms; with all branches by default."""
    return randomise(Block(conv or make_conv(), names, make_norm))


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, blocks choose on the CPU what they choose on a GPU."""
    MERGING_DEVICES.remove('cpu')
    try:
        yield
    finally:
        MERGING_DEVICES.add('cpu')


def branchwise(block: Block, x: Tensor) -> Tensor:
    """The sum of what the branches put out, each computed by itself."""
    added = (branch(x) * branch.unit.view(-1, 1, 1) for branch in block.added)
    return sum(added, block.branches[ORIGIN](x))
