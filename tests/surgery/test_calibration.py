"""Statistics of new branches, measured on batches; and that with them a training goes on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18, resnet50

from dyrep_mm.reparam.branches import BRANCHES
from dyrep_mm.surgery.calibration import calibrate
from dyrep_mm.surgery.optimizer import check_optimizer, sync_optimizer
from dyrep_mm.surgery.rewire import insert, rewire
from dyrep_mm.surgery.tree import blocks_of, get_module
from support.checks import assert_same, assert_untouched
from support.nets import SETS, image, make_net, norms_of, output_of, randomise, snapshot, types_of

#: Largest relative change of the training loss on the same batch when a conv grows.
LOSS_JUMP = 0.005


def batches(n=3):
    # Of different sizes, so that a mean over images is not a mean over batches.
    return [image(2 + i, 3, 12, 13) for i in range(n)]


def of_batch(y):
    return y.mean((0, 2, 3)), y.var((0, 2, 3))


def average(rows):
    """Mean over the batches of each of several statistics."""
    return [torch.stack(column).mean(0) for column in zip(*rows, strict=True)]


def normalised(y, eps=1e-5):
    mean, _ = of_batch(y)
    var = y.var((0, 2, 3), unbiased=False)
    return (y - mean.view(1, -1, 1, 1)) / (var + eps).sqrt().view(1, -1, 1, 1)


def test_equals_a_plain_loop():
    """Every statistic, computed with nothing but functional calls."""
    model, data = make_net(), batches()
    block = insert(model, {'stem': None})['stem']  # the input of the block is the batch itself
    calibrate(model, blocks_of(model), data, model)
    b = block.branches

    def pad(x):
        return F.pad(x, (2, 2, 2, 2))

    def conv(x, weight, padding=0):
        return F.conv2d(x, weight, None, 2, padding)

    formulas = {
        ('1x1', 'bn'): lambda x: conv(x, b['1x1'].conv.weight),
        ('1xk', 'bn'): lambda x: conv(x, b['1xk'].conv.weight, (0, 2)),
        ('kx1', 'bn'): lambda x: conv(x, b['kx1'].conv.weight, (2, 0)),
        ('1x1-kxk', 'pre_bn'): lambda x: F.conv2d(pad(x), b['1x1-kxk'].pre.weight),
        ('1x1-kxk', 'bn'): lambda x: conv(
            normalised(F.conv2d(pad(x), b['1x1-kxk'].pre.weight)), b['1x1-kxk'].conv.weight
        ),
        ('1x1-avg', 'pre_bn'): lambda x: F.conv2d(pad(x), b['1x1-avg'].pre.weight),
        ('1x1-avg', 'bn'): lambda x: F.avg_pool2d(
            normalised(F.conv2d(pad(x), b['1x1-avg'].pre.weight)), 5, 2
        ),
    }
    assert len(formulas) == len([n for branch in block.added for n in norms_of(branch)])
    with torch.no_grad():
        for (branch, norm), formula in formulas.items():
            mean, var = average([of_batch(formula(x)) for x in data])
            measured = getattr(b[branch], norm)
            assert_same(measured.running_mean, mean, (branch, norm))
            assert_same(measured.running_var, var, (branch, norm))
        std = torch.stack(
            [conv(x, model.stem.origin.weight, 2).var((0, 2, 3), unbiased=False) for x in data]
        )
        assert_same(block.origin_std, std.mean(0).sqrt())


def test_importance_is_relative_to_the_output():
    """A branch that starts at 0.01 puts out 0.01 of what the conv does."""
    model, data = make_net(), [image(16, 3, 24, 24)]
    block = insert(model, {'stem': None})['stem']
    with torch.no_grad():
        block.origin.weight.mul_(37)
        calibrate(model, blocks_of(model), data, model)
        block.settle(0.01)
        reference = block.branches['kxk'](data[0]).std((0, 2, 3))
        for name, branch in block.branches.items():
            if name != 'kxk':
                added = branch.unit.view(-1, 1, 1) * branch.train()(data[0])
                ratio = (added.std((0, 2, 3)) / reference).mean()
                assert ratio == pytest.approx(0.01, rel=0.1), name


def statistics(block):
    return {
        name: buffer.clone()
        for name, buffer in block.named_buffers()
        if 'kxk.' not in name.replace('1x1-kxk', '') and not name.endswith('.unit')
    }


def test_one_pass_measures_all_blocks():
    """Each as if it were alone: a block that is not settled must not disturb the next."""
    structure = {path: ['kxk', '1x1', '1x1-kxk'] for path in ('stem', 'conv1', 'conv2')}
    model, data = make_net(), batches()
    generator = torch.Generator().manual_seed(0)
    blocks = insert(model, structure, lambda _: generator)
    calibrate(model, blocks, data, model)
    for path, block in blocks.items():
        alone = make_net()
        twin = insert(alone, {path: structure[path]})[path]
        states = block.state_dict()
        twin.load_state_dict(states)
        calibrate(alone, {path: twin}, data, alone)
        for name, buffer in twin.named_buffers():
            assert_same(states[name].double(), buffer.double(), (path, name))


def test_measuring_again_forgets_the_first_time():
    model, data = make_net(), batches()
    block = insert(model, {'conv1': None})['conv1']
    calibrate(model, blocks_of(model), [x * 3 for x in data], model)
    other = statistics(block)
    for _ in range(2):
        calibrate(model, blocks_of(model), data, model)
        measured = statistics(block)
    fresh = make_net()
    twin = insert(fresh, {'conv1': None})['conv1']
    twin.load_state_dict(block.state_dict())
    for norm in norms_of(twin):
        norm.reset_running_stats()
    calibrate(fresh, blocks_of(fresh), data, fresh)
    for name, buffer in statistics(twin).items():
        assert_same(measured[name].double(), buffer.double(), name)
        assert 'tracked' in name or not torch.equal(measured[name], other[name])


def test_nested_blocks():
    model, data = make_net(), batches()
    inner = 'conv1.branches.1x1-kxk.conv'
    structure = {'conv1': ['kxk', '1x1-kxk'], inner: ['kxk', '1x1', 'kx1']}
    blocks = insert(model, structure)
    before = [statistics(block) for block in blocks.values()]
    calibrate(model, blocks, data, model)
    for block, old in zip(blocks.values(), before, strict=True):
        for name, buffer in statistics(block).items():
            if 'tracked' in name:
                assert buffer == len(data)
            else:
                assert not torch.equal(buffer, old[name]), name


def test_nothing_but_the_measured_changes():
    model = make_net()
    block = insert(model, {'conv1': None})['conv1']
    state = snapshot(model)
    names = {f'conv1.{name}' for name in statistics(block)}
    calibrate(model, blocks_of(model), batches(), model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) == (name not in names), name


def test_blocks_that_are_not_named_are_left_alone():
    model = make_net()
    first, second = insert(model, {'stem': None, 'conv1': None}).values()
    state = snapshot(first)
    calibrate(model, {'conv1': second}, batches(), model)
    assert all(torch.equal(t, state[n]) for n, t in first.state_dict().items())


@pytest.mark.parametrize('training', [True, False])
def test_restores_modes_and_momenta(training):
    model = make_net().train(training)
    model.bn2.train(not training)
    block = insert(model, {'conv1': None})['conv1']
    block.branches['1x1'].bn.momentum = 0.3
    modes = [module.training for module in model.modules()]
    momenta = [norm.momentum for norm in norms_of(model)]
    calibrate(model, blocks_of(model), batches(), model)
    assert [module.training for module in model.modules()] == modes
    assert [norm.momentum for norm in norms_of(model)] == momenta
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def fail(_):
        raise RuntimeError('the data set is gone')

    with pytest.raises(RuntimeError, match='gone'):
        calibrate(model, blocks_of(model), batches(), fail)
    assert [module.training for module in model.modules()] == modes
    assert [norm.momentum for norm in norms_of(model)] == momenta
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def counter(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_stops_behind_the_last_block():
    """What lies behind runs for the first batch only, what lies before for all."""
    model = make_net()
    blocks = insert(model, {'stem': None, 'conv1': None})
    before, last, behind = counter(model.stem_bn), counter(model.bn1), counter(model.fc)
    calibrate(model, blocks, batches(5), model)
    assert len(before) == 5
    assert len(last) == len(behind) == 1


def test_a_block_that_is_called_several_times():
    model = make_net()
    block = insert(model, {'stem': None})['stem']
    calls, behind = counter(model.stem), counter(model.fc)

    def forward(x):
        model(x)
        model(x + 1)

    calibrate(model, blocks_of(model), batches(4), forward)
    assert len(calls) == 8
    assert block.branches['1x1'].bn.num_batches_tracked == 8
    assert len(behind) == 2 + 3


def test_no_graph_is_kept():
    model = make_net()
    insert(model, {'conv1': None})
    outputs = []
    model.conv1.register_forward_hook(lambda m, a, output: outputs.append(output))
    calibrate(model, blocks_of(model), batches(), model)
    assert not any(output.requires_grad for output in outputs)
    assert all(p.grad is None for p in model.parameters())


def test_no_block_needs_no_batch():
    calibrate(make_net(), {}, iter(()), None)


def of_images(n):
    return image(n, 3, 12, 13)


@pytest.mark.parametrize(
    ('data', 'part', 'reason'),
    [
        ([], None, 'no training batch'),
        (batches(), 'stem', 'not called'),
        ([of_images(2), of_images(2) * float('nan')], None, 'not finite'),
        ([of_images(2) * float('inf')], None, 'not finite'),
        ([of_images(2), of_images(0)], None, 'less than two values'),
        ([of_images(2), image(1, 3, 2, 2)], None, 'less than two values'),
    ],
)
def test_what_cannot_be_measured_is_named_and_put_back(data, part, reason):
    """The others settle; the conv is what it was, without what was nested in its block."""
    model, inner = make_net().eval(), 'conv1.branches.1x1-kxk.conv'
    conv, state, x = model.conv1, snapshot(model), image()
    before, types = output_of(model, x), types_of(model)
    forward = get_module(model, part) if part else model
    reasons = {}

    def measure(blocks):
        reasons.update(calibrate(model, blocks, data, forward))
        return reasons

    grow = {'stem': ['1x1'], 'conv1': None, inner: ['1x1'], 'conv1.branches.kxk': []}
    standing = rewire(model, grow, measure=measure)
    assert set(reasons) >= {'conv1'}
    assert reason in reasons['conv1']
    assert set(standing) == set(blocks_of(model)) == {'stem'} - set(reasons)
    assert model.conv1 is conv
    assert conv.bias is None
    assert_same(output_of(model, x), before)
    if not standing:
        assert_untouched(model, state, types)


@pytest.mark.parametrize('names', [[n] for n in BRANCHES], ids=str)
def test_then_the_function_is_kept(names):
    model, x = make_net().eval(), image()
    with torch.no_grad():
        before = model(x)
        block = insert(model, {'conv1': names})['conv1']
        calibrate(model, blocks_of(model), batches(), model)
        block.settle(0.01)
        assert_same(model(x), before)


def test_input_on_which_a_batch_is_one_value_does_not_divide_by_zero():
    """A constant channel has no spread; the branch must still be usable."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False)).double()
    block = insert(model, {'0': None})['0']
    calibrate(model, blocks_of(model), [torch.zeros(2, 3, 8, 8).double()], model)
    block.settle(0.01)
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert get_module(model, '0').importances()


# The training goes on. In double precision: 50 layers with random norms amplify rounding, which
# differs between processors, by four orders of magnitude in a few steps.


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def train_loss(model, x, target):
    """Loss in train mode; the model is left as it was."""
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        return nn.functional.cross_entropy(twin(x), target).item()


OPTIMIZERS = {
    'sgd': lambda ps: torch.optim.SGD(ps, 1e-3, momentum=0.9),
    'adam': lambda ps: torch.optim.Adam(ps, 1e-4),
}


#: Largest part of a step's effect on the loss that growing may change, besides what the new
#: parameters' own step adds: the share of the output that the branches start with. Measured: up
#: to 0.0009, with AVX-512, AVX2 and SSE alike.
STEP_CHANGE = 0.01


def grow_in_training(model, path, names, optimizer, x, batches):
    grown = rewire(
        model,
        {path: names},
        generator=lambda _: torch.Generator().manual_seed(0),
        measure=lambda blocks: calibrate(model, blocks, batches, model),
    )
    sync_optimizer(optimizer, model)
    check_optimizer(optimizer, model)
    return grown[path]


def step(model, optimizer, x, target):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), target).backward()
    optimizer.step()


def check_growing(model, path, names, make_optimizer, x, target):
    """The "Growing" of a network in training: neither output, loss nor momentum jump, and the
    next step does what it does to a twin that stays plain.

    The optimizer makes short steps: the effect of a step must be nearly linear in the step.
    """
    model.train()
    optimizer = make_optimizer(model.parameters())
    for _ in range(2):
        step(model, optimizer, x, target)
    # The statistics of this batch, as after many iterations of training.
    for bn in norms_of(model):
        bn.reset_running_stats()
        bn.momentum = None
    with torch.no_grad():
        model(x)
    weight = get_module(model, path).weight
    state = optimizer.state[weight]
    values = {k: (v, v.clone()) for k, v in state.items() if v is not None}
    assert values
    output, loss = output_of(model, x), train_loss(model, x, target)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    known = set(model.parameters())

    block = grow_in_training(model, path, names, optimizer, x, [x])
    assert_same(output_of(model, x), output)
    assert abs(train_loss(model, x, target) - loss) <= LOSS_JUMP * loss
    assert block.origin.weight is weight
    assert optimizer.state[weight] is state
    for key, (tensor, value) in values.items():
        assert state[key] is tensor, key
        assert torch.equal(tensor, value), key
    new = {p: p.detach().clone() for p in model.parameters() if p not in known}
    step(model, optimizer, x, target)
    step(twin, twin_optimizer, x, target)
    with torch.no_grad():
        own = sum((p.grad * (p - before)).sum().item() for p, before in new.items())
    assert own < 0
    plain = train_loss(twin, x, target)
    difference = train_loss(model, x, target) - plain
    assert abs(difference - own) <= STEP_CHANGE * abs(plain - loss)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('names', SETS, ids=str)
def test_growing_a_small_net_in_training(names, optimizer):
    model = randomise(small_net().double())
    x, target = image(16, 3, 12, 12), torch.arange(16) % 10
    check_growing(model, '3', names, OPTIMIZERS[optimizer], x, target)


@pytest.fixture(scope='module')
def resnet():
    torch.manual_seed(0)
    return randomise(resnet50(num_classes=10).double())


@pytest.mark.parametrize('names', SETS, ids=str)
def test_growing_resnet50_in_training(resnet, names):
    model, path = copy.deepcopy(resnet), 'layer2.1.conv2'
    x, target = image(6, 3, 48, 48), torch.arange(6)

    def make_optimizer(parameters):
        return torch.optim.SGD(parameters, 1e-6, momentum=0.9)  # with random norms, steep

    check_growing(model, path, names, make_optimizer, x, target)


@pytest.mark.parametrize('names', SETS, ids=str)
def test_growing_resnet50_with_random_statistics(resnet, names):
    """Statistics that have nothing to do with the data: the worst case for calibration."""
    model, path = copy.deepcopy(resnet).train(), 'layer3.2.conv2'
    x, target = image(6, 3, 48, 48), torch.arange(6)
    output, loss = output_of(model, x), train_loss(model, x, target)
    rewire(model, {path: names}, measure=lambda blocks: calibrate(model, blocks, [x], model))
    assert_same(output_of(model, x), output)
    assert abs(train_loss(model, x, target) - loss) <= LOSS_JUMP * loss


def test_growing_everything_at_once_in_training():
    """Calibration of one block must not see what the others have not settled yet."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10).double().train()
    x, target = image(8, 3, 48, 48), torch.arange(8)
    for bn in norms_of(model):
        bn.momentum = None
    with torch.no_grad():
        model(x)
    output, loss = output_of(model, x), train_loss(model, x, target)
    everywhere = {path: ['kxk', *BRANCHES][:-1] for path in SQUARE}
    rewire(model, everywhere, measure=lambda blocks: calibrate(model, blocks, [x], model))
    assert_same(output_of(model, x), output)
    assert abs(train_loss(model, x, target) - loss) <= LOSS_JUMP * loss


SQUARE = [
    f'layer{stage}.{unit}.conv{conv}'
    for stage in (1, 2, 3, 4)
    for unit in (0, 1)
    for conv in (1, 2)
]
