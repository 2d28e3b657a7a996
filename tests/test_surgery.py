"""Growing, pruning, expanding and fusing whole models."""

import copy
import io
import json
import pickle

import pytest
import torch
from conftest import (
    CONVS,
    LOSS_JUMP,
    assert_same,
    assert_untouched,
    image,
    make_net,
    make_pair,
    norms_of,
    randomise,
    run,
    snapshot,
    types_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18, resnet50

from dyrep_mm import expand, fuse, grow, prune, structure_of
from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.branches import BRANCHES, ORIGIN, fitting
from dyrep_mm.reparam.geometry import ConvSpec
from dyrep_mm.surgery.calibration import calibrate
from dyrep_mm.surgery.candidates import candidates, survey
from dyrep_mm.surgery.optimizer import check_optimizer, sync_optimizer
from dyrep_mm.surgery.rewire import apply_structure, insert
from dyrep_mm.surgery.tree import (
    blocks_of,
    check_scope,
    depth_of,
    get_module,
    neighbour_norm,
    outermost,
)

SETS = [*([name] for name in BRANCHES), None]  # every branch alone, all together


def fits(model, path, names):
    return not names or names[0] in fitting(ConvSpec.of(get_module(model, path)))


# Growing and pruning


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('names', SETS, ids=str)
@pytest.mark.parametrize('path', CONVS)
def test_grow_then_prune_keeps_the_function(path, names, training):
    model, x = make_net().train(training), image()
    conv = get_module(model, path)
    weight, bias, before = conv.weight, conv.bias, run(model, x)
    if not fits(model, path, names):
        with pytest.raises(DyRepError, match=f'{path} cannot grow'):
            grow(model, path, names)
        return
    block = grow(model, path, names)
    assert get_module(model, path) is block
    assert block.origin.weight is weight
    assert block.origin.bias is bias
    assert all(module.training == training for module in model.modules())
    assert_same(run(model, x), before)

    randomise(block)  # as if it had trained
    before = run(model, x)
    first, *rest = block.names[1:]
    prune(model, path, [first])
    assert_same(run(model, x), before)
    if rest:
        assert structure_of(model) == {path: [ORIGIN, *rest]}
        prune(model, path, rest)
        assert_same(run(model, x), before)
    assert get_module(model, path) is conv
    assert conv.weight is weight
    assert (conv.bias is bias) == (bias is not None)
    assert structure_of(model) == ({path: []} if bias is None else {})


def test_default_is_all_branches_that_fit():
    model = make_net()
    assert grow(model, 'conv1').names == [ORIGIN, *BRANCHES]
    assert grow(model, 'dw').names == [ORIGIN, '1x1', '1x1-kxk', '1xk', 'kx1', 'identity']
    assert grow(model, 'conv2', ['kxk', '1x1']).names == [ORIGIN, '1x1']


def test_prune_without_need_of_a_bias_leaves_the_plain_model():
    model = make_net()
    state, types = snapshot(model), types_of(model)
    grow(model, 'conv1')
    prune(model, 'conv1', list(BRANCHES))
    assert_untouched(model, state, types, skip=['conv1.weight'])
    assert_same(model.conv1.weight.detach(), state['conv1.weight'])
    assert structure_of(model) == {}


def nest(model):
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


def test_nested_growing_and_pruning():
    model, x = make_net(), image()
    before = run(model, x)
    paths = ['conv1']
    for step in ('1x1-kxk.conv', '1x1-kxk.conv', 'kx1.conv', 'kxk'):
        grow(model, paths[-1])
        assert_same(run(model, x), before)
        randomise(model.conv1)
        before = run(model, x)
        paths.append(f'{paths[-1]}.branches.{step}')
    paths.pop()
    assert [depth_of(model, path) for path in paths] == [0, 1, 2, 3]
    for path in paths:
        assert outermost(model, path) == 'conv1'
        prune(model, path, ['1x1'])
        assert_same(run(model, x), before)
    for path in reversed(paths):
        prune(model, path, get_module(model, path).names[1:])
        assert_same(run(model, x), before)
    assert blocks_of(model) == {}
    assert structure_of(model) == {'conv1': []}


def test_growing_the_conv_of_a_block_again():
    model, x = make_net(), image()
    weight, before = model.conv1.weight, run(model, x)
    grow(model, 'conv1', ['1x1'])
    grow(model, 'conv1.branches.kxk', ['1xk', 'identity'])
    assert_same(run(model, x), before)
    assert model.conv1.origin.weight is weight
    randomise(model.conv1)
    before = run(model, x)
    prune(model, 'conv1', ['1x1'])
    assert_same(run(model, x), before)
    assert structure_of(model) == {'conv1': ['kxk', '1xk', 'identity']}
    prune(model, 'conv1', ['1xk', 'identity'])
    assert_same(run(model, x), before)
    assert model.conv1.weight is weight


@pytest.mark.parametrize(
    ('path', 'names', 'sentence'),
    [
        ('nope', None, "no module named 'nope'"),
        ('conv1.nope', None, "no module named 'conv1.nope'"),
        ('bn1', None, 'bn1 is a BatchNorm2d, only a conv'),
        ('', None, 'only a conv'),
        ('conv1', ['2x2'], "conv1 cannot grow: unknown branch '2x2'"),
        ('conv1', '1x1', 'conv1 cannot grow: branches must be a list'),
        ('conv1', [], 'conv1 cannot grow'),
        ('conv2', ['identity'], "conv2 cannot grow: branch 'identity' does not fit"),
    ],
)
def test_grow_refuses(path, names, sentence):
    model = make_net()
    state, types = snapshot(model), types_of(model)
    with pytest.raises(DyRepError, match=sentence) as error:
        grow(model, path, names)
    assert '\n' not in str(error.value)
    assert_untouched(model, state, types)


@pytest.mark.parametrize(
    ('path', 'names', 'sentence'),
    [
        ('nope', ['1x1'], "no module named 'nope'"),
        ('conv1', ['1x1'], 'conv1 is a Conv2d, only a block'),
        ('stem', ['2x2'], "unknown branch '2x2'"),
        ('stem', '1x1', 'must be a list'),
        ('stem', ['kxk'], "stem: no branch 'kxk'"),
        ('stem', ['1xk', '1x1'], "stem: no branch '1xk'"),
    ],
)
def test_prune_refuses(path, names, sentence):
    model = make_net()
    grow(model, 'stem', ['1x1', 'kx1'])
    state, types = snapshot(model), types_of(model)
    with pytest.raises(DyRepError, match=sentence):
        prune(model, path, names)
    assert_untouched(model, state, types)


def test_a_model_that_is_a_conv():
    """Growing needs a parent to hold the block: a clear error, no other exception."""
    with pytest.raises(DyRepError):
        grow(nn.Conv2d(3, 4, 3), '')


def test_frozen_model_gains_no_trainable_bias():
    model = make_pair().requires_grad_(False)
    grow(model, '0', ['1x1'])
    randomise(model)
    prune(model, '0', ['1x1'])
    assert model[0].bias is not None
    assert not model[0].bias.requires_grad


# The norms of new branches


def test_new_norms_are_like_the_norm_beside():
    model = make_net()
    grow(model, 'conv1')
    grow(model, 'conv1.branches.1x1-kxk.conv')
    for bn in norms_of(model.conv1):
        assert type(bn) is nn.BatchNorm2d
        assert (bn.eps, bn.momentum) == (1e-3, 0.2)
    assert neighbour_norm(model, 'dw') is model.dw_bn
    assert neighbour_norm(model, 'conv1.branches.1xk.conv') is model.bn1


def test_the_norm_beside_has_as_many_channels():
    model = nn.ModuleDict(
        {
            'before': nn.BatchNorm2d(8, eps=0.1),
            'conv': nn.Conv2d(4, 8, 3),
            'other': nn.BatchNorm2d(4, eps=0.2),
            'act': nn.ReLU(),
            'norm': nn.BatchNorm2d(8, eps=0.3),
        }
    )
    assert neighbour_norm(model, 'conv') is model['norm']
    del model['norm']
    assert neighbour_norm(model, 'conv') is model['before']
    del model['before']
    assert neighbour_norm(model, 'conv') is model['other']


def test_new_norms_are_frozen_where_the_norm_beside_is():
    model = make_net().train()
    model.bn1.eval()
    assert grow(model, 'conv1').is_linear
    assert not grow(model, 'dw').is_linear


def test_new_norms_are_synchronised_where_the_others_are():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make_net())
    assert {type(bn) for bn in norms_of(grow(model, 'conv1'))} == {nn.SyncBatchNorm}


def test_a_model_without_norm_can_grow():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).double(), image()
    before = run(model, x)
    grow(model, '0')
    assert_same(run(model, x), before)
    model.train()(x).sum().backward()


@pytest.mark.parametrize('deep', [False, True])
def test_norms_of_vectors_are_no_model_for_norms_of_images(deep):
    conv = nn.Conv2d(3, 8, 3)
    model = nn.Sequential(
        nn.Sequential(conv) if deep else conv,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(8),
    ).double()
    grow(model, '0.0' if deep else '0')
    model.train()(image()).sum().backward()


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
    block = insert(model, path, names, torch.Generator().manual_seed(0))
    calibrate(model, [block], batches, model)
    block.settle(0.01)
    sync_optimizer(optimizer, model)
    check_optimizer(optimizer, model)
    return block


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
    output, loss = run(model, x), train_loss(model, x, target)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    known = set(model.parameters())

    block = grow_in_training(model, path, names, optimizer, x, [x])
    assert_same(run(model, x), output)
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
    output, loss = run(model, x), train_loss(model, x, target)
    block = insert(model, path, names, torch.Generator().manual_seed(0))
    calibrate(model, [block], [x], model)
    block.settle(0.01)
    assert_same(run(model, x), output)
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
    output, loss = run(model, x), train_loss(model, x, target)
    blocks = apply_structure(model, {path: ['kxk', *BRANCHES][:-1] for path in SQUARE})
    calibrate(model, blocks, [x], model)
    for block in reversed(blocks):
        block.settle(0.01)
    assert_same(run(model, x), output)
    assert abs(train_loss(model, x, target) - loss) <= LOSS_JUMP * loss


SQUARE = [
    f'layer{stage}.{unit}.conv{conv}'
    for stage in (1, 2, 3, 4)
    for unit in (0, 1)
    for conv in (1, 2)
]


# Structures


@pytest.mark.parametrize('build', [lambda m: m, lambda m: expand(m, 'dbb7'), nest])
def test_structure_round_trip(build):
    """Structure through JSON and state through a file give the model back."""
    model, x = build(make_net()), image()
    structure = json.loads(json.dumps(structure_of(model)))
    assert structure == structure_of(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)

    twin = expand(make_net(seed=7), structure)
    assert structure_of(twin) == structure
    assert list(twin.state_dict()) == list(model.state_dict())
    assert not torch.equal(run(twin, x), run(model, x))
    twin.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(run(twin, x), run(model, x))
    assert torch.equal(twin.train()(x), model.train()(x))


def test_expand_keeps_the_function():
    model, x = make_net(), image()
    structure = structure_of(nest(make_net()))
    weight, before = model.conv1.weight, run(model, x)
    assert expand(model, structure) is model
    assert_same(run(model, x), before)
    assert model.conv1.origin.weight is weight
    deepest = get_module(model, 'conv1.branches.1x1-kxk.conv.branches.kx1.conv')
    assert deepest.importances() == pytest.approx({'1x1': 0.01, 'identity': 0.01})


@pytest.mark.parametrize('scale', [0.01, 0.1])
def test_expand_and_grow_take_the_scale_and_the_generator(scale):
    def seeded():
        return torch.Generator().manual_seed(3)

    grown, expanded = make_net(), make_net()
    state = torch.random.get_rng_state()
    grow(grown, 'conv1', ['1x1', '1xk'], init_scale=scale, generator=seeded())
    expand(expanded, {'conv1': ['kxk', '1x1', '1xk']}, init_scale=scale, generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert grown.conv1.importances() == pytest.approx({'1x1': scale, '1xk': scale})
    for name, tensor in grown.state_dict().items():
        assert torch.equal(tensor, expanded.state_dict()[name]), name


def test_expanding_twice_changes_nothing():
    model = expand(make_net(), {'conv1': ['kxk', '1x1', 'kx1']})
    state, types = snapshot(model), types_of(model)
    expand(model, structure_of(model))
    assert_untouched(model, state, types)
    expand(model, {**structure_of(model), 'dw': ['kxk', '1x1']})
    assert list(structure_of(model)) == ['conv1', 'dw']


def test_the_order_of_operations_does_not_matter():
    structure = {'conv1': ['kxk', 'kx1', '1x1']}
    model = expand(make_net(), structure)
    state, types = snapshot(model), types_of(model)
    expand(model, structure)
    assert_untouched(model, state, types)


INNER = 'conv1.branches.1x1-kxk.conv'

UNFIT = {
    'no such module': ({'nope': ['kxk', '1x1']}, 'nope'),
    'no conv': ({'bn1': ['kxk', '1x1']}, 'bn1'),
    'a branch that does not fit': ({'conv2': ['kxk', 'identity']}, 'conv2'),
    'unknown branch': ({'conv2': ['kxk', '2x2']}, '2x2'),
    'no origin': ({'conv2': ['1x1', '1xk']}, 'conv2'),
    'origin not first': ({'conv2': ['1x1', 'kxk']}, 'conv2'),
    'a branch twice': ({'conv2': ['kxk', '1x1', '1x1']}, 'conv2'),
    'only the origin': ({'conv2': ['kxk']}, 'conv2'),
    'a bias that is there': ({'conv2': []}, 'conv2'),
    'a bias for a norm': ({'bn2': []}, 'bn2'),
    'inside a branch that is not there': ({'conv1': ['kxk', '1x1'], INNER: ['kxk', '1x1']}, INNER),
    'inside a 1x1': (
        {'conv1': ['kxk', '1x1-kxk'], 'conv1.branches.1x1-kxk.pre': ['kxk', 'identity']},
        'pre',
    ),
    'names in a string': ({'conv2': 'kxk'}, 'conv2'),
    'no list': ({'conv2': None}, 'conv2'),
    'no path': ({3: ['kxk', '1x1']}, '3'),
    'no strings': ({'conv2': ['kxk', 3]}, 'conv2'),
    'no mapping': (['conv2'], 'list'),
    'none': (None, 'NoneType'),
    'too many': ({f'c{i}': ['kxk', '1x1'] for i in range(20_000)}, '20000'),
    'unknown preset': ('dbb8', 'dbb8'),
}


@pytest.mark.parametrize('case', UNFIT)
def test_a_structure_that_does_not_fit_changes_nothing(case):
    structure, culprit = UNFIT[case]
    if isinstance(structure, dict) and len(structure) < 10:
        # What fits comes first, so that there is something to take back.
        good = {'stem': ['kxk', '1x1'], 'stem.branches.kxk': ['kxk', '1xk'], 'dw': []}
        structure = {**good, **structure}
    model, x = make_net(), image()
    state, types, before = snapshot(model), types_of(model), run(model, x)
    parameters = dict(model.named_parameters())
    with pytest.raises(DyRepError, match=culprit) as error:
        expand(model, structure)
    assert '\n' not in str(error.value)
    assert_untouched(model, state, types)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert structure_of(model) == {}
    assert torch.equal(run(model, x), before)


def test_a_structure_that_contradicts_the_model():
    model = expand(make_net(), {'conv1': ['kxk', '1x1']})
    state, types = snapshot(model), types_of(model)
    with pytest.raises(DyRepError, match=r"conv1.*\['kxk', '1x1'\].*\['kxk', '1xk'\]"):
        expand(model, {'dw': ['kxk', '1x1'], 'conv1': ['kxk', '1xk']})
    assert_untouched(model, state, types)


@pytest.mark.parametrize(
    ('model', 'name', 'millions'),
    [
        (resnet18, 'dbb', '26.3'),  # Table 3
        (resnet50, 'dbb', '40.7'),  # Table 3
        (resnet50, 'dbb7', '48.3'),  # Table 8
    ],
)
def test_presets_have_the_parameters_of_the_paper(model, name, millions):
    model = expand(model(), name)
    assert f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f}' == millions


@pytest.mark.parametrize(
    ('name', 'operations'),
    [
        ('dbb', ['kxk', '1x1', '1x1-kxk', '1x1-avg']),
        ('dbb7', ['kxk', *BRANCHES]),
        ('repvgg', ['kxk', '1x1', 'identity']),
    ],
)
def test_presets(name, operations):
    model, x = make_net(), image()
    before = run(model, x)
    expand(model, name)
    structure = structure_of(model)
    assert list(structure) == ['conv1', 'dw', 'conv2']  # the stem is 5x5
    assert structure['conv1'] == operations
    assert structure['conv2'] == [n for n in operations if n != 'identity']  # channels, stride
    assert structure['dw'] == [n for n in operations if n != '1x1-avg']  # dilation
    assert_same(run(model, x), before)
    expand(model, name, kernel_sizes=(3, 5))
    assert structure_of(model).keys() == {'stem', 'conv1', 'dw', 'conv2'}


def test_preset_in_scope():
    model = nn.ModuleDict({'backbone': make_net(), 'backbone2': make_net(), 'head': make_net()})
    expand(model, 'repvgg', scope='backbone')
    assert {path.split('.')[0] for path in structure_of(model)} == {'backbone'}
    expand(model, 'repvgg', scope=['head', 'backbone'])
    assert {path.split('.')[0] for path in structure_of(model)} == {'backbone', 'head'}


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_apart(duplicate):
    model, x = nest(make_net()), image()
    before = run(model, x)
    twin = duplicate(model)
    assert structure_of(twin) == structure_of(model)
    assert torch.equal(run(twin, x), before)
    prune(twin, 'conv1', ['1x1'])
    assert structure_of(twin) != structure_of(model)
    assert torch.equal(run(model, x), before)


# What can grow


class Other(nn.Conv2d):
    """Subclass with other math."""

    def forward(self, x):
        return super().forward(x) ** 2


class Wrapped(nn.Conv2d):
    """Stands for mmcv's conv, which is known by name."""


Wrapped.__module__, Wrapped.__qualname__ = 'mmcv.cnn.bricks.wrappers', 'Conv2d'


class Deployable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def switch_to_deploy(self):
        """As RepVGG's."""


class ModulatedDeformConv2dPack(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_offset = nn.Conv2d(4, 18, 3)


class Odd(nn.Module):
    """One conv for every reason not to grow."""

    def __init__(self):
        super().__init__()
        self.good = nn.Conv2d(4, 4, 3)
        self.wrapped = Wrapped(4, 4, 3)
        self.shared1 = nn.Conv2d(4, 4, 3)
        self.shared2 = nn.Conv2d(4, 4, 3)
        self.shared2.weight = self.shared1.weight
        self.twice = nn.ModuleList([nn.Conv2d(4, 4, 3)] * 2)
        self.frozen = nn.Conv2d(4, 4, 3).requires_grad_(False)
        self.other = Other(4, 4, 3)
        with pytest.warns(FutureWarning, match='weight_norm'):
            self.weight_norm = nn.utils.weight_norm(nn.Conv2d(4, 4, 3))
        self.parametrized = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))
        self.even = nn.Conv2d(4, 4, 2)
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect')
        self.deploy = Deployable()
        self.deform = ModulatedDeformConv2dPack()
        self.point = nn.Conv2d(4, 4, 1)
        self.strip = nn.Conv2d(4, 4, (1, 3))  # the paper grows all KxK convs
        self.transposed = nn.ConvTranspose2d(4, 4, 3)
        self.one_dimensional = nn.Conv1d(4, 4, 3)


REASONS = {
    'shared1': 'shared',
    'twice.0': 'shared',
    'shared2': 'shared',
    'frozen': 'frozen',
    'other': 'Other',
    'weight_norm': 'computed from other',
    'parametrized': 'more than a conv',
    'even': r'\(2, 2\) is not odd',
    'reflect': 'reflect',
    'deploy.conv': 'Deployable, which re-parameterizes itself',
    'deform.conv_offset': 'deformable',
}


def test_survey_says_why():
    model = Odd()
    verdicts = survey(model)
    assert [path for path, reason in verdicts.items() if reason is None] == ['good', 'wrapped']
    assert candidates(model) == ['good', 'wrapped']
    assert verdicts.keys() - {'good', 'wrapped'} == REASONS.keys()


@pytest.mark.parametrize('path', REASONS)
def test_every_reason(path):
    model = Odd()
    with pytest.raises(AssertionError, match=REASONS[path]):
        raise AssertionError(survey(model)[path])
    if path != 'frozen':
        with pytest.raises(DyRepError, match=REASONS[path]):
            grow(model, path)


@pytest.mark.parametrize('path', ['point', 'transposed', 'one_dimensional'])
def test_what_is_no_candidate_cannot_grow(path):
    with pytest.raises(DyRepError, match=path):
        grow(Odd(), path)


def test_convs_inside_blocks_are_candidates():
    model = make_net()
    grow(model, 'conv1')
    inside = ['conv1.branches.kxk', 'conv1.branches.1x1-kxk.conv']
    assert candidates(model) == ['stem', *inside, 'dw', 'conv2']
    assert candidates(model, 'conv1') == inside
    assert candidates(model, max_depth=1) == ['stem', 'dw', 'conv2']
    assert candidates(model, max_depth=2) == candidates(model)
    grow(model, inside[1])
    deeper = candidates(model, inside[1])
    assert len(deeper) == 2
    assert not set(deeper) & set(candidates(model, max_depth=2))
    assert set(deeper) <= set(candidates(model, max_depth=3))


@pytest.mark.parametrize('scope', ['nope', 'back', ['backbone', 'nope'], 'backbone.nope'])
def test_scope_that_names_no_module(scope):
    model = nn.ModuleDict({'backbone': make_net(), 'head': make_net()})
    for check in (check_scope, lambda m, s: expand(m, 'dbb', scope=s)):
        with pytest.raises(DyRepError, match=r'scope.*at its top it has backbone, head'):
            check(model, scope)
    assert structure_of(model) == {}


@pytest.mark.parametrize('scope', [None, '', [], 'backbone', ['backbone', 'head'], ('head.fc',)])
def test_scope_that_is_right(scope):
    check_scope(nn.ModuleDict({'backbone': make_net(), 'head': make_net()}), scope)


def test_scope_is_a_prefix_of_whole_names():
    model = nn.ModuleDict({'conv': make_net(), 'conv2': make_net()})
    assert candidates(model, 'conv') == [f'conv.{path}' for path in CONVS]
    assert candidates(model, 'conv.stem') == ['conv.stem']
    assert len(candidates(model, '')) == 2 * len(CONVS)


# Fusing


def whole(model):
    """All of a model that a user can compare."""
    return snapshot(model), types_of(model), [m.training for m in model.modules()]


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('build', [lambda m: m, lambda m: expand(m, 'dbb7'), nest])
def test_fuse_with_inputs_is_the_plain_model(build, training):
    model, plain, x = build(make_net()).train(training), make_net(seed=5), image()
    randomise(model)
    before, (state, types, modes) = run(model, x), whole(model)
    fused = fuse(model, x)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert types_of(fused) == types_of(plain)
    assert_same(run(fused, x), before)
    plain.load_state_dict(fused.state_dict(), strict=True)
    assert_same(run(plain, x), before)
    assert structure_of(fused) == {}
    # The argument is left alone.
    assert_untouched(model, state, types)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(run(model, x), before)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fused.modules())
    ours = {t.data_ptr() for t in model.state_dict().values()}
    assert not ours & {t.data_ptr() for t in fused.state_dict().values()}


def test_fuse_without_inputs_keeps_the_biases_on_the_convs():
    model, x = nest(make_net()), image()
    fused, plain = fuse(model), make_net()
    assert types_of(fused) == types_of(plain)
    extra = fused.state_dict().keys() - plain.state_dict().keys()
    assert extra == {'stem.bias', 'conv1.bias', 'dw.bias'}
    assert_same(run(fused, x), run(model, x))
    for name in ('stem_bn', 'bn1', 'dw_bn', 'bn2'):
        statistics = get_module(model, name).running_mean
        assert torch.equal(get_module(fused, name).running_mean, statistics)


def test_fuse_in_float32_rounds_once():
    model = nest(make_net()).float()
    x = image(dtype=torch.float32)
    fused = fuse(model, x)
    assert {p.dtype for p in fused.parameters()} == {torch.float32}
    assert_same(run(fused, x), run(model, x))
    exact = run(copy.deepcopy(model).double(), x.double())
    assert (run(fused.double(), x.double()) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_fuse_of_a_plain_model_is_a_copy():
    model, x = make_net(), image()
    fused = fuse(model, x)
    assert fused is not model
    assert_untouched(fused, snapshot(model), types_of(model))


def test_fuse_keeps_a_bias_of_the_convs_own():
    model, x = make_pair(bias=True), image(2, 4, 8, 8)
    grow(model, '0')
    randomise(model)
    mean = model[1].running_mean.clone()
    for fused in (fuse(model), fuse(model, x)):
        assert list(fused.state_dict())[:2] == ['0.weight', '0.bias']
        assert torch.equal(fused[1].running_mean, mean)
        assert_same(run(fused, x), run(model, x))


def test_fuse_takes_a_forward():
    model, x = make_pair(), image(2, 4, 8, 8)
    grow(model, '0')
    randomise(model)
    seen = []
    fused = fuse(model, {'image': x}, forward=lambda m, data: seen.append(m) or m(data['image']))
    assert len(seen) == 1
    assert fused[0].bias is None
    assert_same(run(fused, x), run(model, x))


class Wired(nn.Module):
    """Two convs and two norms, wired by a function."""

    def __init__(self, wiring):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.n = nn.BatchNorm2d(4)
        self.m = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.wiring = wiring

    def forward(self, x):
        return self.wiring(self, x)


def both_uses(s, x):
    y = s.a(x)
    return s.n(y) + y


def views(s, x):
    y = s.a(x)
    return s.n(y) + y.flatten(1)[:, :1, None, None]


def other_first(s, x):
    y = s.a(x)
    z = y * 2
    return s.n(y) + z


def in_place_after(s, x):
    y = s.a(x)
    return s.n(y) + s.relu(y)


def two_norms(s, x):
    y = s.a(x)
    return s.n(y) + s.m(y)


def uneven(s, x):
    y = s.a(x)
    return s.n(y) + s.m(y) + s.a(x + 1)


WIRINGS = {
    # wiring, and the convs whose bias goes into a norm
    'a norm each': (lambda s, x: s.n(s.a(x)) + s.m(s.b(x)), 'ab'),
    'in a row': (lambda s, x: s.m(s.b(s.n(s.a(x)))), 'ab'),
    'called twice': (lambda s, x: s.n(s.a(x)) + s.n(s.a(x + 1)) + s.b(x), 'a'),
    'a norm for each call': (lambda s, x: s.n(s.a(x)) + s.m(s.a(x + 1)) + s.b(x), 'a'),
    'dropout between': (lambda s, x: s.n(s.drop(s.a(x))) + s.b(x), None),
    'a shared norm': (lambda s, x: s.n(s.a(x)) + s.n(s.b(x)), ''),
    'a norm that sees more': (lambda s, x: s.n(s.a(x)) + s.n(x) + s.m(s.b(x)), 'b'),
    'a shared norm, and a call without': (
        lambda s, x: s.n(s.a(x)) + s.n(s.b(x)) + s.a(x + 1),
        '',
    ),
    'a norm that sees more, and a call without': (
        lambda s, x: s.n(s.a(x)) + s.n(x) + s.a(x + 1) + s.b(x),
        '',
    ),
    'the sum': (lambda s, x: s.n(s.a(x) + s.b(x)), ''),
    'no norm': (lambda s, x: s.a(x) + s.b(x), ''),
    'one call without norm': (lambda s, x: s.n(s.a(x)) + s.a(x + 1) + s.b(x), ''),
    'two norms for an output': (two_norms, None),
    'two norms for an output, none for the other': (uneven, ''),
    'unused': (lambda s, x: s.n(s.a(x)), 'a'),
    'relu between': (lambda s, x: s.n(torch.relu(s.a(x))) + s.b(x), ''),
    'relu in place between': (lambda s, x: s.n(s.relu(s.a(x))) + s.b(x), ''),
    'used elsewhere too': (both_uses, ''),
    'used elsewhere before': (other_first, ''),
    'used elsewhere through a view': (views, ''),
    'changed in place after the norm': (in_place_after, ''),
    'no conv': (lambda s, x: s.n(x), ''),
}


@pytest.mark.parametrize('case', WIRINGS)
def test_fuse_whatever_the_wiring(case):
    wiring, folded = WIRINGS[case]
    model, x = randomise(Wired(wiring).double()), image(2, 4, 7, 8)
    for path in 'ab':
        grow(model, path)
    randomise(model)
    before = run(model, x)
    fused = fuse(model, x)
    assert_same(run(fused, x), before)
    assert_same(run(fused, x + 3), run(model, x + 3))
    if folded is not None:
        gone = {path for path in 'ab' if get_module(fused, path).bias is None}
        assert gone == set(folded)


def test_fuse_where_the_output_is_returned_too():
    def wiring(s, x):
        y = s.a(x)
        return torch.stack([s.n(y), s.m(s.b(x))]), y

    model, x = randomise(Wired(wiring).double()), image(2, 4, 7, 8)
    grow(model, 'a')
    randomise(model)
    fused = fuse(model, x)
    for output, expected in zip(run(fused, x), run(model, x), strict=True):
        assert_same(output, expected)


def test_fuse_of_a_conv_that_gained_a_bias():
    model, x = make_pair(), image(2, 4, 8, 8)
    block = grow(model, '0')
    randomise(model)
    prune(model, '0', block.names[1:])
    assert model[0].bias is not None
    fused = fuse(model, x)
    assert fused[0].bias is None
    assert not hasattr(fused[0], 'gained_bias')
    assert_same(run(fused, x), run(model, x))
    kept = fuse(model)
    assert kept[0].bias is not None
    assert_same(run(kept, x), run(model, x))


def test_fuse_of_a_model_that_is_a_block():
    """The model is any module, so also the block itself."""
    model, x = make_pair(), image(2, 4, 8, 8)
    block = grow(model, '0')
    randomise(model)
    fused = fuse(block)
    assert type(fused) is nn.Conv2d
    assert_same(run(fused, x), run(block, x))


# Anything goes


@st.composite
def geometries(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel = draw(st.sampled_from([(3, 3), (5, 5), (1, 3), (3, 1), (5, 3)]))
    return {
        'in_channels': 4,
        'out_channels': draw(st.sampled_from([4, 8])),
        'kernel_size': kernel,
        'stride': draw(st.sampled_from([1, 2, (2, 1)])),
        'padding': draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        'dilation': draw(st.sampled_from([1, 2, (1, 2)])),
        'groups': groups,
        'bias': draw(st.booleans()),
    }


@settings(max_examples=25, deadline=None, derandomize=True)
@given(geometries(), st.data())
def test_any_sequence_of_edits_keeps_the_function(geometry, data):
    torch.manual_seed(0)

    def plain():
        conv = nn.Conv2d(**geometry)
        return nn.Sequential(conv, nn.BatchNorm2d(geometry['out_channels'])).double()

    model, x = randomise(plain()), image(2, 4, 12, 13)
    expected = run(model, x)
    for _ in range(data.draw(st.integers(1, 6))):
        edits = ['grow', 'prune', 'train', 'save', 'eval', 'step']
        edit = data.draw(st.sampled_from(edits))
        blocks, convs = blocks_of(model), candidates(model, max_depth=3)
        if edit == 'grow' and convs:
            path = data.draw(st.sampled_from(convs))
            names = fitting(ConvSpec.of(get_module(model, path)))
            grow(model, path, data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True)))
        elif edit == 'prune' and blocks:
            path = data.draw(st.sampled_from(sorted(blocks)))
            names = blocks[path].names[1:]
            chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
            prune(model, path, chosen)
        elif edit == 'train':
            model.train()
        elif edit == 'eval':
            model.eval()
        elif edit == 'step':
            randomise(model)
            expected = run(model, x)
        elif edit == 'save':
            twin = expand(plain().train(model.training), structure_of(model))
            twin.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
            model = twin
        assert_same(run(model, x), expected, edit, scale=10)
    fused = fuse(model, x)
    assert list(fused.state_dict()) == list(plain().state_dict())
    assert_same(run(fused, x), expected, scale=10)
    assert not any(isinstance(module, Block) for module in fused.modules())
