"""Fixed norms of branches: growing and pruning change nothing in train mode, nor does measuring."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

import dyrep_mm
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.rule import weak_branches
from dyrep_mm.reparam.branches import OPERATIONS, fitting
from dyrep_mm.reparam.geometry import ConvSpec
from dyrep_mm.surgery.calibration import calibrate, remeasure
from dyrep_mm.surgery.rewire import adopt_statistics, rewire, set_branch_norm
from dyrep_mm.surgery.structure import structure_of
from dyrep_mm.surgery.tree import blocks_of
from support.checks import assert_same
from support.nets import CONVS, SETS, image, make_net, norms_of, output_of, snapshot

INNER = 'conv1.branches.1x1-kxk.conv'


def batches() -> list[torch.Tensor]:
    return [image(3, 3, 12, 13) for _ in range(3)]


def train_output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Output in train mode; the model is left as it was."""
    return copy.deepcopy(model).train()(x).detach()


def grow(model: nn.Module, path: str, names=None, branch_norm: str | None = 'fixed') -> None:
    """In training: measured on batches."""
    data = batches()
    rewire(
        model,
        {path: names},
        branch_norm=branch_norm,
        measure=lambda blocks: calibrate(model, blocks, data, model),
    )
    model.train()


@torch.no_grad()
def disturb(model: nn.Module) -> nn.Module:
    """What some iterations of training do to the parameters."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05 * parameter.std(correction=0).add(0.1))
    return model


@pytest.mark.parametrize('path', CONVS)
@pytest.mark.parametrize('names', SETS, ids=str)
def test_growing_and_pruning_are_exact_in_train_mode(path, names):
    model, x = make_net().train(), image(3, 3, 12, 13)
    before = train_output(model, x)
    if not fitting(ConvSpec.of(getattr(model, path)), names):
        pytest.skip('does not fit')
    grow(model, path, names)
    assert_same(train_output(model, x), before)
    disturb(model)
    before = train_output(model, x)
    block = blocks_of(model)[path]
    for name in block.names[1:]:
        dyrep_mm.prune(model, path, [name])
        assert_same(train_output(model, x), before)


def test_nested_growing_and_pruning_are_exact_in_train_mode():
    model, x = make_net().train(), image(3, 3, 12, 13)
    before = train_output(model, x)
    for path in ('conv1', INNER, f'{INNER}.branches.kx1.conv', 'conv1.branches.kxk', 'stem'):
        grow(model, path, branch_norm='fixed' if path in CONVS else None)
        assert_same(train_output(model, x), before, path)
    assert {block.branch_norm for block in blocks_of(model).values()} == {'fixed'}
    disturb(model)
    before = train_output(model, x)
    for path in reversed(list(structure_of(model))):
        if path in blocks_of(model):
            dyrep_mm.prune(model, path, blocks_of(model)[path].names[1:3])
            assert_same(train_output(model, x), before, path)


def test_all_at_once():
    model, x = make_net().train(), image(3, 3, 12, 13)
    before, data = train_output(model, x), batches()
    rewire(
        model,
        dict.fromkeys((*CONVS, INNER)),
        branch_norm='fixed',
        measure=lambda blocks: calibrate(model, blocks, data, model),
    )
    assert_same(train_output(model, x), before)


@pytest.mark.parametrize('names', SETS, ids=str)
def test_measuring_again_keeps_the_function(names):
    model, x = make_net().train(), image(3, 3, 12, 13)
    names = None if names is None else [*names, '1x1']
    for path in ('stem', 'conv1', *([INNER] if names is None else [])):
        grow(model, path, names if path != 'stem' else ['1x1-kxk', '1x1-avg'])
    disturb(model)
    with torch.no_grad():
        blocks_of(model)['conv1'].added[0].bn.weight[:3] = 0
    state, before = snapshot(model), train_output(model, x)
    modes = [module.training for module in model.modules()]
    copied = disturb(copy.deepcopy(model))
    before_copy = output_of(copied, x)
    remeasure(model, blocks_of(model), batches(), model)
    assert_same(train_output(model, x), before)
    assert modes == [module.training for module in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    own = tuple(f'{path}.branches.kxk' for path in blocks_of(model))
    for name, tensor in model.state_dict().items():
        last = name.rpartition('.')[2]
        kept = name.startswith(own) or 'branches' not in name or '.kxk.weight' in name
        if last.startswith('running') and '.branches.' in name and not kept:
            assert not torch.equal(tensor, state[name]), name
        if '.branches.' not in name and not name.endswith('origin_std'):
            assert torch.equal(tensor, state[name]), name
    for path, block in blocks_of(copied).items():
        adopt_statistics(block, blocks_of(model)[path])
    assert_same(output_of(copied, x), before_copy)


def test_what_is_measured_again():
    """The statistics that the norms would find, and with them the share of each branch."""
    model, data = make_net().train(), batches()
    grow(model, 'stem')
    disturb(model)
    block = model.stem
    remeasure(model, blocks_of(model), data, model)
    with torch.no_grad():
        outputs = [block.branches['kxk'](x) for x in data]
        std = torch.stack([y.var((0, 2, 3), correction=0) for y in outputs]).mean(0).sqrt()
        assert_same(block.origin_std, std)
        for name, branch in list(block.branches.items())[1:]:
            outputs = [branch(x) for x in data]
            var = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
            mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
            # Up to epsilon the scale of a norm is the deviation of what it puts out.
            size = branch.bn.weight.abs() * (branch.bn.running_var / var).sqrt()
            assert_same(size, (branch.bn.running_var + branch.bn.eps).sqrt(), name)
            assert_same(branch.bn.bias + 1, mean + 1, name)


def test_with_batch_statistics_the_output_of_the_conv_alone_is_measured():
    model, data = make_net().train(), batches()
    grow(model, 'conv1', branch_norm='batch')
    grow(model, 'conv1.branches.kxk', branch_norm=None)
    disturb(model)
    state = snapshot(model)
    remeasure(model, blocks_of(model), data, model)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, state[n])}
    assert changed == {'conv1.origin_std', 'conv1.branches.kxk.origin_std'}


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_what_cannot_be_measured_again_is_left_alone(bad):
    model = make_net().train()
    grow(model, 'stem')
    grow(model, 'conv1')
    state = snapshot(model)
    remeasure(model, blocks_of(model), [image(2, 3, 12, 13) * bad], model)
    remeasure(model, blocks_of(model), [], model)
    remeasure(model, blocks_of(model), [image(2, 3, 12, 13)], lambda x: None)
    remeasure(model, {}, [image(2, 3, 12, 13)], model)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_choosing():
    model = make_net().train()
    model.bn1.eval()
    for branch_norm in ('fixed', 'sampled'):
        dyrep_mm.expand(model, 'dbb', scope='conv2', branch_norm=branch_norm)
        dyrep_mm.grow(model, 'conv2.branches.1x1-kxk.conv')
        assert {b.branch_norm for b in blocks_of(model).values()} == {branch_norm}
        assert model.conv2.is_linear == (branch_norm == 'fixed')
        dyrep_mm.prune(model, 'conv2', model.conv2.names[1:])
    dyrep_mm.grow(model, 'conv1')
    dyrep_mm.grow(model, 'stem')
    assert model.conv1.branch_norm == 'batch'
    set_branch_norm(model, 'fixed')
    assert model.conv1.is_linear
    assert model.stem.is_linear
    set_branch_norm(model, 'batch')
    assert not any(norm.training for norm in norms_of(model.conv1))  # as bn1 beside it
    assert all(norm.training for norm in norms_of(model.stem))
    for call in (dyrep_mm.grow, dyrep_mm.expand):
        with pytest.raises(DyRepError, match='branch_norm must be one of'):
            call(model, 'dw' if call is dyrep_mm.grow else 'dbb', branch_norm='scale')
    assert set(structure_of(model)) == {'conv1', 'stem'}


# One and the same function, with a conv of another scale in front of a BN


def train_twin(scale: float, branch_norm: str) -> dict[str, float]:
    """Importances after some steps with the conv scaled; all else is the same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8, eps=1e-12),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8, eps=1e-12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).double()
    data = [image(8, 3, 10, 10) for _ in range(4)]
    targets = torch.randint(4, (4, 8))
    with torch.no_grad():
        model[3].weight.mul_(scale)
    rewire(
        model,
        {'3': None},
        branch_norm=branch_norm,
        generator=lambda _: torch.Generator().manual_seed(1),
        measure=lambda blocks: calibrate(model, blocks, data, model),
    )
    conv = model[3].origin.weight
    rest = [p for p in model.parameters() if p is not conv]
    # What a step does to a conv in front of a BN goes with the inverse square of its scale.
    groups = [{'params': rest}, {'params': [conv], 'lr': 0.5 * scale**2}]
    optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
    for step in range(12):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(data[step % 4]), targets[step % 4]).backward()
        optimizer.step()
    remeasure(model, blocks_of(model), data, model)
    return model[3].importances()


@pytest.mark.parametrize('branch_norm', ['batch', 'fixed', 'sampled'])
def test_importances_do_not_depend_on_the_scale_of_the_conv(branch_norm):
    twins = [train_twin(scale, branch_norm) for scale in (0.1, 0.3, 1, 3)]
    values = torch.tensor([list(twin.values()) for twin in twins], dtype=torch.float64)
    assert list(twins[0]) == list(OPERATIONS[1:])
    assert (values - 0.01).abs().max() > 0.005
    torch.testing.assert_close(values, values[2:3].expand(4, -1), rtol=1e-3, atol=0)
    for threshold in (values[2].std(correction=0).item() * f for f in (0.5, 2)):
        cuts = [weak_branches(twin, threshold) for twin in twins]
        assert cuts == cuts[:1] * 4
    assert weak_branches(twins[0], 0.0)


def test_the_training_loss_of_a_resnet_stays():
    """In double precision, the BNs of the model in train mode: growing the stem, depth, and what a
    residual ends in, measuring again, and pruning."""
    torch.manual_seed(0)
    model = resnet18(num_classes=5).double().train()
    x, target = image(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    data = [image(4, 3, 64, 64) for _ in range(2)]

    def loss() -> torch.Tensor:
        return F.cross_entropy(train_output(model, x), target)

    def assert_stays(before: torch.Tensor) -> None:
        assert_same(loss(), before, scale=100)  # what 18 layers make of rounding

    for grown in (['conv1', 'layer2.0.conv1'], ['layer4.1.conv2', 'layer2.0.conv1.branches.kxk']):
        before = loss()
        rewire(
            model,
            dict.fromkeys(grown),
            branch_norm='fixed',
            measure=lambda blocks: calibrate(model, blocks, data, model),
        )
        model.train()
        assert_stays(before)
        disturb(model)
        before = loss()
        remeasure(model, blocks_of(model), data, model)
        assert_stays(before)
    for path, block in reversed(blocks_of(model).items()):
        dyrep_mm.prune(model, path, block.names[1:4])
        assert_stays(before)
