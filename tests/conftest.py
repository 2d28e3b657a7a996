"""What all tests share: determinism, tolerances, randomised norms and small networks."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

torch.set_num_threads(1)

#: Largest difference relative to the largest value, by precision: rounding and nothing else.
RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5}

#: Largest relative change of the training loss on the same batch when a conv grows.
LOSS_JUMP = 0.005


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_same(actual: Tensor, expected: Tensor, hint: object = '', scale: float = 1.0) -> None:
    """Equal up to the rounding of the dtype, relative to the largest value."""
    assert actual.shape == expected.shape, (hint, actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (hint, actual.dtype, expected.dtype)
    size = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    difference = ((actual - expected).abs().max() / size).item()
    assert difference <= RELATIVE[expected.dtype] * scale, (hint, difference)


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
def run(model: nn.Module, x: Tensor) -> Tensor:
    """Output in eval mode; the modes are left as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return model(x)
    finally:
        for module, training in modes:
            module.training = training


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


def make_pair(bias: bool = False, channels: int = 8) -> nn.Sequential:
    """One conv, ``0``, and its BN, ``1``."""
    conv = nn.Conv2d(4, channels, 3, padding=1, bias=bias)
    return randomise(nn.Sequential(conv, nn.BatchNorm2d(channels)).double())


def types_of(model: nn.Module) -> dict[str, type]:
    """Type of every module, by path."""
    return {path: type(module) for path, module in model.named_modules()}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the whole state, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(
    model: nn.Module, state: dict[str, Tensor], types: dict[str, type], skip: Iterable[str] = ()
) -> None:
    """The model has the modules, the keys in their order, and the values of before."""
    assert types_of(model) == types
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        if name not in skip:
            assert torch.equal(tensor, state[name]), name
