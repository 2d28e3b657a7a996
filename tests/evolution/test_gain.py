"""What growing would gain, against random kernels, grown blocks, and steps of SGD."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from dyrep_mm import grow
from dyrep_mm.evolution.gain import EVERY, best_names, gains_of
from dyrep_mm.evolution.operations import operations_of
from dyrep_mm.evolution.rule import DyRepRule
from dyrep_mm.evolution.saliency import make_score
from dyrep_mm.reparam.branches import BRANCHES, OPERATIONS, fitting
from dyrep_mm.reparam.geometry import ConvSpec
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.tree import get_module
from support.nets import CONVS, GEOMETRIES, image, make_conv, make_net, make_norm

SCALE = 1e-4  # of what is grown: so small that the function stays the same


@pytest.mark.parametrize('geometry', range(len(GEOMETRIES)))
@pytest.mark.parametrize('name', BRANCHES)
def test_the_expected_square_over_random_kernels(name, geometry):
    """By the kernels that branches start with, their deviations those of white input."""
    conv = make_conv(**GEOMETRIES[geometry])
    spec = ConvSpec.of(conv)
    if BRANCHES[name].misfit(spec):
        pytest.skip('it does not fit')
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(conv.weight.shape, generator=generator).double() + 0.3
    expected = BRANCHES[name].reach(spec, grad).square().mean(1)
    assert expected.shape == (spec.out_channels,)
    found = []
    for _ in range(300):
        branch = BRANCHES[name](spec, make_norm, generator).double().eval()
        branch.assume_white_input()
        whole = torch.zeros_like(grad)
        kernel = branch.kernel().weight
        rows, cols = ((n - k) // 2 for n, k in zip(grad.shape[2:], kernel.shape[2:], strict=True))
        whole[:, :, rows : rows + kernel.shape[2], cols : cols + kernel.shape[3]] = kernel
        found.append((whole * grad).sum((1, 2, 3)).square())
    assert torch.stack(found).mean().item() == pytest.approx(expected.mean().item(), rel=0.2)


def loss_of(model, x):
    return model(x).square().sum(1).mean()


def slopes_after_growing(model, x, path, generator):
    """Derivatives of the loss by the importance of each branch of a block that is grown, (out,)."""
    block = grow(model, path, init_scale=SCALE, generator=generator)
    loss_of(model, x).backward()
    norms = {name: block.branches[name].bn for name in block.names[1:]}
    # In units of the importance, however the block may scale what its norms put out.
    return {name: norm.weight.grad * norm.weight.detach() / SCALE for name, norm in norms.items()}


@pytest.mark.parametrize('nested', [False, True])
def test_the_expected_square_in_grown_blocks(nested):
    """Groups, depthwise, strides, dilation, and convs inside of branches."""
    torch.manual_seed(0)
    model, x = make_net().eval(), image(4, 3, 11, 10)
    paths = CONVS
    if nested:
        grow(model, 'conv1', generator=torch.Generator().manual_seed(1), init_scale=0.5)
        paths = ('conv1.branches.kxk', 'conv1.branches.1x1-kxk.conv')
    loss_of(model, x).backward()
    for path in paths:
        conv, (operation,) = (
            get_module(model, path),
            operations_of(model, {path: OPERATIONS}).values(),
        )
        # A block inside a block grows in units of the conv that it holds.
        unit = conv.weight.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        slope, generator = conv.weight.grad * unit, torch.Generator()
        draws = [
            slopes_after_growing(copy.deepcopy(model), x, path, generator.manual_seed(seed))
            for seed in range(120)
        ]
        for name in draws[0]:
            expected = BRANCHES[name].reach(operation.spec, slope).square().mean(1)
            alive = expected > 1e-9 * expected.max()
            ratio = torch.stack([draw[name] for draw in draws]).square().mean(0) / expected
            # Nothing in the first two is random.
            exact = name == 'identity' or (name == '1x1-avg' and operation.spec.depthwise)
            assert ratio[alive].mean().item() == pytest.approx(1, rel=1e-2 if exact else 0.2)
            if not nested:
                gain = gains_of(dataclasses.replace(operation, names=(name,)))[name].item()
                assert gain == pytest.approx(expected.sum().item())


def test_a_step_lowers_the_loss_by_the_square():
    """The decrease that the gain is the expectation of."""
    torch.manual_seed(0)
    model, x, lr = make_net().eval(), image(4, 3, 11, 10), 1e-6
    for path in CONVS:
        grown = copy.deepcopy(model)
        slopes = slopes_after_growing(grown, x, path, torch.Generator().manual_seed(0))
        before = loss_of(grown, x).item()
        for name, slope in slopes.items():
            stepped = copy.deepcopy(grown)
            norm = get_module(stepped, path).branches[name].bn
            with torch.no_grad():
                unit = norm.weight / SCALE
                norm.weight.sub_(lr * slope * unit)
                after = loss_of(stepped, x).item()
            assert (before - after) / lr == pytest.approx(slope.square().sum().item(), rel=1e-2)


def test_the_mean_of_the_iterations_that_are_looked_at():
    model = make_net()
    operations = operations_of(model, candidates(model))
    score, looked_at = make_score('gain', operations), []
    for i in range(EVERY + 2):
        model.zero_grad()
        loss_of(model, image()).backward()
        score.gather()
        if i in (0, EVERY):
            looked_at.append({path: gains_of(o) for path, o in operations.items()})
    for path, gains in score.gains().items():
        first, second = (look[path] for look in looked_at)
        assert gains == pytest.approx({n: (first[n] + second[n]).item() / 2 for n in gains})


def test_the_score_is_what_all_branches_gain():
    model = make_net()
    loss_of(model, image()).backward()
    score = make_score('gain', operations_of(model, candidates(model)))
    score.gather()
    gains = score.gains()
    assert {path: list(values) for path, values in gains.items()} == {
        path: fitting(ConvSpec.of(get_module(model, path))) for path in CONVS
    }
    assert score.means() == {path: sum(values.values()) for path, values in gains.items()}


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_counts_nothing(bad):
    model = make_net()
    loss_of(model, image()).backward()
    score = make_score('gain', operations_of(model, candidates(model)))

    def gather(**more):
        for _ in range(EVERY):
            score.gather(**more)

    gather()
    before = score.means()
    model.conv1.weight.grad[0, 0, 0, 0] = bad
    gather()
    model.conv1.weight.grad.fill_(0.1)
    gather(found_inf=torch.tensor(1.0))
    assert score.means() == before
    gather()
    assert score.means() != before


def test_the_loss_scale_is_taken_out():
    model = make_net()
    scores = [make_score('gain', operations_of(model, candidates(model))) for _ in range(2)]
    loss_of(model, image()).backward()
    scores[0].gather()
    for parameter in model.parameters():
        parameter.grad *= 512.0
    scores[1].gather(torch.tensor(512.0))
    assert scores[1].means() == pytest.approx(scores[0].means())


@pytest.mark.parametrize(
    ('count', 'expected'),
    [(1, ['b']), (2, ['b', 'd']), (9, ['b', 'd', 'a', 'c']), (None, ['b', 'd'])],
)
def test_best_names(count, expected):
    assert best_names({'a': 1.0, 'b': 4.0, 'c': 0.5, 'd': 2.0}, count) == expected


@pytest.mark.parametrize('metric', ['gain', 'snip', 'random'])
@pytest.mark.parametrize('pick', [1, 3, 'best', None])
def test_a_conv_grows_to_the_branches_that_pay(metric, pick):
    model = make_net()
    rule = DyRepRule(metric, pick=pick, max_depth=2, grow_per_update=4, prune_threshold=None)
    rule.watch(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(model, image()).backward()
    rule.observe(optimizer)
    score = make_score('gain', operations_of(model, candidates(model)))
    score.gather()
    plan, gains = rule.decide(model, torch.Generator().manual_seed(0)), score.gains()
    assert plan.grow.keys() == set(CONVS)
    for path, names in plan.grow.items():
        fit = fitting(ConvSpec.of(get_module(model, path)))
        kept = fit if pick is None else best_names(gains[path], None if pick == 'best' else pick)
        assert names == ['kxk', *(name for name in fit if name in kept)]
        if metric == 'gain':
            assert plan.scores[path] == pytest.approx(sum(gains[path][name] for name in kept))


def test_picked_from_named_branches():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.BatchNorm2d(4)).double()
    rule = DyRepRule(
        'gain', branches=['1x1', '1xk'], pick=1, max_depth=1, grow_per_update=1, prune_threshold=0
    )
    rule.watch(model)
    conv.weight.grad = torch.zeros_like(conv.weight)
    conv.weight.grad[:, :, 1, 0] = 1.0  # only the row reaches it
    rule.observe(torch.optim.SGD(model.parameters(), 0.1))
    assert rule.decide(model, torch.Generator()).grow == {'0': ['kxk', '1xk']}
