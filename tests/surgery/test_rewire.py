"""Growing and pruning, and the copies that follow."""

import copy

import pytest
import torch
from torch import nn

from dyrep_mm import expand, grow, prune, structure_of, sync_optimizer
from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.branches import BRANCHES, ORIGIN, fitting
from dyrep_mm.reparam.geometry import ConvSpec
from dyrep_mm.surgery.rewire import mirror, restore, rewire
from dyrep_mm.surgery.structure import Plan, structure_from_names
from dyrep_mm.surgery.tree import blocks_of, depth_of, get_module, neighbour_norm, outermost
from support.checks import assert_same, assert_untouched
from support.nets import (
    CONVS,
    SETS,
    image,
    make_net,
    make_pair,
    nest,
    norms_of,
    output_of,
    randomise,
    snapshot,
    types_of,
)


def fits(model, path, names):
    return not names or names[0] in fitting(ConvSpec.of(get_module(model, path)))


# Growing and pruning


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('names', SETS, ids=str)
@pytest.mark.parametrize('path', CONVS)
def test_grow_then_prune_keeps_the_function(path, names, training):
    model, x = make_net().train(training), image()
    conv = get_module(model, path)
    weight, bias, before = conv.weight, conv.bias, output_of(model, x)
    if not fits(model, path, names):
        with pytest.raises(DyRepError, match=f'{path} cannot grow'):
            grow(model, path, names)
        return
    block = grow(model, path, names)
    assert get_module(model, path) is block
    assert block.origin.weight is weight
    assert block.origin.bias is bias
    assert all(module.training == training for module in model.modules())
    assert_same(output_of(model, x), before)

    randomise(block)  # as if it had trained
    before = output_of(model, x)
    first, *rest = block.names[1:]
    prune(model, path, [first])
    assert_same(output_of(model, x), before)
    if rest:
        assert structure_of(model) == {path: [ORIGIN, *rest]}
        prune(model, path, rest)
        assert_same(output_of(model, x), before)
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


def test_nested_growing_and_pruning():
    model, x = make_net(), image()
    before = output_of(model, x)
    paths = ['conv1']
    for step in ('1x1-kxk.conv', '1x1-kxk.conv', 'kx1.conv', 'kxk'):
        grow(model, paths[-1])
        assert_same(output_of(model, x), before)
        randomise(model.conv1)
        before = output_of(model, x)
        paths.append(f'{paths[-1]}.branches.{step}')
    paths.pop()
    assert [depth_of(model, path) for path in paths] == [0, 1, 2, 3]
    for path in paths:
        assert outermost(model, path) == 'conv1'
        prune(model, path, ['1x1'])
        assert_same(output_of(model, x), before)
    for path in reversed(paths):
        prune(model, path, get_module(model, path).names[1:])
        assert_same(output_of(model, x), before)
    assert blocks_of(model) == {}
    assert structure_of(model) == {'conv1': []}


def test_growing_the_conv_of_a_block_again():
    model, x = make_net(), image()
    weight, before = model.conv1.weight, output_of(model, x)
    grow(model, 'conv1', ['1x1'])
    grow(model, 'conv1.branches.kxk', ['1xk', 'identity'])
    assert_same(output_of(model, x), before)
    assert model.conv1.origin.weight is weight
    randomise(model.conv1)
    before = output_of(model, x)
    prune(model, 'conv1', ['1x1'])
    assert_same(output_of(model, x), before)
    assert structure_of(model) == {'conv1': ['kxk', '1xk', 'identity']}
    prune(model, 'conv1', ['1xk', 'identity'])
    assert_same(output_of(model, x), before)
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
    before = output_of(model, x)
    grow(model, '0')
    assert_same(output_of(model, x), before)
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


# Averaged copies


def averaged_copy(model):
    """As mmengine's averaged models hold it, some updates behind."""
    twin = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return twin


def plan_of(model):
    """What has grown a plain model to this one."""
    return Plan(grow=structure_of(model))


def test_mirror_keeps_the_function_of_the_copy():
    model, x = make_net(), image()
    copied = averaged_copy(model)
    expected = output_of(copied, x)
    weights = [get_module(copied, path).weight for path in ('conv1', 'dw')]
    for path in ('conv1', 'dw'):
        grow(model, path)
    mirror(copied, model, plan_of(model))
    assert_same(output_of(copied, x), expected)
    assert not torch.allclose(output_of(model, x), expected)
    assert structure_of(copied) == structure_of(model)
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert not any(p.requires_grad for p in copied.parameters())
    assert [copied.conv1.origin.weight, copied.dw.origin.weight] == weights
    for name, branch in model.conv1.branches.items():
        if name != ORIGIN:
            twin = copied.conv1.branches[name]
            assert all(torch.equal(t, twin.state_dict()[n]) for n, t in branch.state_dict().items())
            assert twin.bn.weight is not branch.bn.weight
    assert copied.conv1.importances() == model.conv1.importances()

    randomise(model)
    randomise(copied)
    expected = output_of(copied, x)
    inner, pruned = 'conv1.branches.1x1-kxk.conv', {'dw': model.dw.names[1:], 'conv1': ['1x1']}
    plan = Plan({inner: grow(model, inner).names}, pruned)
    for path, names in plan.prune.items():
        prune(model, path, names)
    mirror(copied, model, plan)
    assert_same(output_of(copied, x), expected)
    assert structure_of(copied) == structure_of(model)
    assert list(copied.state_dict()) == list(model.state_dict())


def test_mirror_leaves_the_copy_frozen():
    model = make_net()
    copied = averaged_copy(model)
    grow(model, 'conv1', ['1x1'])
    mirror(copied, model, plan_of(model))
    assert not any(p.requires_grad for p in copied.parameters())
    randomise(model)
    randomise(copied)
    mirror(copied, model, Plan(prune={'conv1': ['1x1']}))
    assert copied.conv1.bias is not None
    assert not any(p.requires_grad for p in copied.parameters())


def test_mirror_of_nested_growth_in_one_update():
    model, x = make_net(), image()
    copied = averaged_copy(model)
    expected = output_of(copied, x)
    inner = 'conv1.branches.1x1-kxk.conv'
    names = ['kxk', '1x1', '1x1-kxk']
    rewire(model, dict.fromkeys(('conv1', inner, 'conv1.branches.kxk'), names))
    mirror(copied, model, plan_of(model))
    assert structure_of(copied) == structure_of(model)
    assert depth_of(copied, inner) == 1
    assert_same(output_of(copied, x), expected)


def test_mirror_leaves_the_model_and_the_random_numbers_alone():
    model = make_net()
    copied = averaged_copy(model)
    grow(model, 'conv1')
    state = {n: t.clone() for n, t in model.state_dict().items()}
    mirror(copied, model, plan_of(model))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert set(model.conv1.branches) == {ORIGIN, *BRANCHES}


# Exactly a structure


STRUCTURES = {
    'plain': lambda model: model,
    'a bias': lambda model: _with_bias(model, 'stem'),
    'smaller': lambda model: expand(model, {'conv1': ['kxk', '1x1'], 'dw': ['kxk', '1x1']}),
    'other operations': lambda model: expand(
        model, {'conv1': ['kxk', 'kx1'], 'stem': ['kxk', '1xk']}
    ),
    'block in the place of a bias': lambda model: _with_bias(
        expand(model, {'stem': ['kxk', '1x1']}), 'stem.branches.kxk'
    ),
    'nested': nest,
    'nested otherwise': lambda model: expand(
        model,
        {
            'conv1': ['kxk', *BRANCHES],
            'conv1.branches.kxk': ['kxk', '1x1', '1xk'],
            'conv1.branches.1x1-kxk.conv': ['kxk', 'identity'],
            'conv2': ['kxk', '1x1'],
        },
    ),
}


def _with_bias(model, path):
    grow(model, path, ['1x1'])
    randomise(model)
    prune(model, path, ['1x1'])
    assert structure_of(model)[path] == []
    return model


@pytest.mark.parametrize('with_state', [False, True])
@pytest.mark.parametrize('to', STRUCTURES)
@pytest.mark.parametrize('of', STRUCTURES)
def test_restore_gives_exactly_that_structure(of, to, with_state):
    """From any structure to any other; convs stay, and so do blocks that are in both."""
    model, wanted = STRUCTURES[of](make_net()), STRUCTURES[to](make_net(seed=5))
    weights = {path: get_module(model, path) for path in CONVS}
    weights = {path: getattr(m, 'origin', m).weight for path, m in weights.items()}
    blocks, structure = blocks_of(model), structure_of(wanted)
    state = wanted.state_dict() if with_state else None
    # Biases are the business of the state, where there is one.
    said = structure_from_names(state) if with_state else structure
    assert restore(model, said, state) == (structure_of(STRUCTURES[of](make_net())) != structure)
    assert structure_of(model) == structure
    assert list(model.state_dict()) == list(wanted.state_dict())
    model.load_state_dict(wanted.state_dict(), strict=True)
    x = image()
    assert_same(output_of(model, x), output_of(wanted, x))
    for path, weight in weights.items():
        assert getattr(get_module(model, path), 'origin', get_module(model, path)).weight is weight
    for path, block in blocks_of(model).items():
        if of == to:
            assert block is blocks[path]
    assert not restore(model, said, state)


@pytest.mark.parametrize('of', STRUCTURES)
def test_restore_of_what_does_not_fit_changes_nothing(of):
    model = STRUCTURES[of](make_net())
    state, types, structure = snapshot(model), types_of(model), structure_of(model)
    parameters = dict(model.named_parameters())
    for wrong in ({'conv1': ['kxk', '1x1'], 'nope': ['kxk', '1x1']}, {'dw': [], 'conv2': []}):
        with pytest.raises(DyRepError, match=r'nope|conv2'):
            restore(model, wrong)
    other = nest(make_net()).state_dict()
    other['conv1.branches.kx1.bn.weight'] = other['conv1.branches.kx1.bn.weight'][:3]
    with pytest.raises(DyRepError, match=r'kx1.bn.weight has shape \(3,\) instead of \(8,\)'):
        restore(expand(make_net(), {'conv1': ['kxk', '1x1']}), structure_from_names(other), other)
    assert_untouched(model, state, types)
    assert structure_of(model) == structure
    assert all(p is parameters[name] for name, p in model.named_parameters())


@pytest.mark.parametrize('path', ['0.origin', '0.branches.kxk.origin', '0.forward', '0..', '.0'])
def test_a_second_name_of_a_module_is_no_path(path):
    model = make_pair()
    grow(model, '0', ['1x1'])
    with pytest.raises(DyRepError, match='no module named'):
        grow(model, path)
    assert list(structure_of(model)) == ['0']


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.Identity])
def test_applying_a_structure_takes_linear_time(norm, monkeypatch):
    """Counted in modules that are walked over: eight times the blocks, eight times the walk."""
    walks = []
    walk = nn.Module.named_modules

    def counted(module, *args, **kwargs):
        walks.append(module)
        return walk(module, *args, **kwargs)

    def work(call, *args):
        walks.clear()
        call(*args)
        return len(walks)

    def model_of(blocks):
        parts = [(nn.Conv2d(2, 2, 3), norm(2)) for _ in range(blocks)]
        return nn.ModuleList([nn.Sequential(*part) for part in parts])

    monkeypatch.setattr(nn.Module, 'named_modules', counted)
    costs = []
    for blocks in (64, 512):
        structure = {f'{i}.0': ['kxk', '1x1'] for i in range(blocks)}
        first, second, third = (model_of(blocks) for _ in range(3))
        optimizer = torch.optim.SGD(second.parameters(), lr=0.1)
        costs.append(
            [
                work(expand, first, structure),
                work(restore, second, structure, first.state_dict()),
                work(sync_optimizer, optimizer, second),
                work(restore, second, {}),
                work(restore, third, structure),
            ]
        )
    assert all(0 < many < 9 * few for few, many in zip(*costs, strict=True)), costs
