"""The optimizer follows the model."""

import io

import pytest
import torch
from torch import nn

from dyrep_mm import expand, grow, prune, structure_of
from dyrep_mm.surgery.optimizer import FreezeWatch, check_optimizer, donors, sync_optimizer
from support.nets import image, make_net, norms_of, randomise


def one_group(model, kind=torch.optim.SGD, **options):
    options.setdefault('lr', 0.01)
    return kind(model.parameters(), **options)


def group_per_parameter(model, kind=torch.optim.SGD, **options):
    """As mmengine makes them with ``paramwise_cfg``: each with settings of its own."""
    groups = [
        {'params': [p], 'lr': 0.001 * (i + 1), 'weight_decay': 0.0 if p.ndim == 1 else 0.1}
        for i, p in enumerate(model.parameters())
    ]
    return kind(groups, lr=0.01, **options)


def two_groups(model, kind=torch.optim.SGD, **options):
    """Decay for kernels, none for the rest."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    return kind([{'params': kernels, 'weight_decay': 0.1}, {'params': rest}], lr=0.01, **options)


LAYOUTS = [one_group, two_groups, group_per_parameter]


KINDS = [
    (torch.optim.SGD, {'momentum': 0.9}),
    (torch.optim.AdamW, {}),
    (torch.optim.RMSprop, {'momentum': 0.5}),
]


def step(model, optimizer, n=1):
    model.train()
    for _ in range(n):
        optimizer.zero_grad()
        model(image()).square().mean().backward()
        optimizer.step()


def group_names(optimizer, model):
    """Names of the parameters of every group."""
    names = {p: name for name, p in model.named_parameters()}
    return [[names[p] for p in group['params']] for group in optimizer.param_groups]


def settings_of(optimizer):
    return [{k: v for k, v in g.items() if 'param' not in k} for g in optimizer.param_groups]


def tensors(state):
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize(('kind', 'options'), KINDS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_grow_and_prune_keep_state_and_groups(layout, kind, options):
    model = make_net()
    optimizer = layout(model, kind, **options)
    step(model, optimizer, 2)
    survivors = dict(model.named_parameters())
    states = {p: optimizer.state[p] for p in survivors.values()}
    copies = {p: {k: v.clone() for k, v in tensors(s).items()} for p, s in states.items()}
    held = {p: tensors(s) for p, s in states.items()}
    before = settings_of(optimizer)

    def check():
        sync_optimizer(optimizer, model)
        check_optimizer(optimizer, model)
        assert settings_of(optimizer) == before
        for parameter, state in states.items():
            assert optimizer.state[parameter] is state
            for key, tensor in tensors(state).items():
                assert tensor is held[parameter][key]
                assert torch.equal(tensor, copies[parameter][key])
        order = [name for name, _ in model.named_parameters()]
        for group in group_names(optimizer, model):
            assert group == sorted(group, key=order.index)

    grow(model, 'conv1')
    grow(model, 'conv1.branches.1x1-kxk.conv')
    check()
    prune(model, 'conv1.branches.1x1-kxk.conv', ['1x1'])
    prune(model, 'conv1', ['1x1', 'identity'])
    check()
    randomise(model)
    prune(model, 'conv1', model.conv1.names[1:])
    check()
    assert model.conv1.bias is not None
    step(model, optimizer)
    known = set(model.parameters())
    assert set(optimizer.state) <= known


def test_state_of_what_left_is_dropped():
    model = make_net()
    optimizer = one_group(model, torch.optim.Adam)
    grow(model, 'conv1')
    sync_optimizer(optimizer, model)
    step(model, optimizer)
    branch = list(model.conv1.branches['1x1'].parameters())
    assert all(p in optimizer.state for p in branch)
    prune(model, 'conv1', ['1x1'])
    sync_optimizer(optimizer, model)
    assert not any(p in optimizer.state for p in branch)
    check_optimizer(optimizer, model)


def test_new_parameters_join_the_group_beside():
    model = make_net()
    optimizer = group_per_parameter(model)
    plain = [name for (name,) in group_names(optimizer, model)]
    block = grow(model, 'conv1')
    grow(model, 'conv1.branches.1x1-kxk.conv')
    sync_optimizer(optimizer, model)
    groups = dict(zip(plain, group_names(optimizer, model), strict=True))
    inside = dict(block.named_parameters())
    kernels = {f'conv1.{n}' for n, p in inside.items() if p.ndim > 1}
    scales = {f'conv1.{n}' for n, p in inside.items() if p.ndim == 1 and n.endswith('weight')}
    shifts = {f'conv1.{n}' for n, p in inside.items() if p.ndim == 1 and n.endswith('bias')}
    assert len(kernels) > 5
    assert len(scales) == len(shifts) == len(norms_of(block))
    assert set(groups['conv1.weight']) == kernels
    assert set(groups['bn1.weight']) == {'bn1.weight', *scales}
    assert set(groups['bn1.bias']) == {'bn1.bias', *shifts}
    for name in set(plain) - {'conv1.weight', 'bn1.weight', 'bn1.bias'}:
        assert groups[name] == [name]


def test_a_gained_bias_joins_the_shift_beside():
    model = make_net()
    optimizer = group_per_parameter(model)
    plain = [name for (name,) in group_names(optimizer, model)]
    expand(model, {'conv1': []})
    sync_optimizer(optimizer, model)
    check_optimizer(optimizer, model)
    groups = dict(zip(plain, group_names(optimizer, model), strict=True))
    assert groups['bn1.bias'] == ['conv1.bias', 'bn1.bias']


def test_a_model_without_norms():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).double()
    optimizer = group_per_parameter(model)
    grow(model, '1')
    sync_optimizer(optimizer, model)
    check_optimizer(optimizer, model)
    groups = group_names(optimizer, model)
    assert groups[:2] == [['0.weight'], ['0.bias']]
    assert len(groups[2]) == len(list(model[1].parameters())) - 1
    assert groups[3] == ['1.branches.kxk.bias']


def test_donors_are_outside_the_block():
    model = make_net()
    grow(model, 'conv1')
    grow(model, 'conv1.branches.1x1-kxk.conv')
    origin, norm = model.conv1.origin.weight, model.bn1
    beside = donors(model)
    assert beside.keys() == set(model.conv1.parameters()) - {origin}
    for near in beside.values():
        assert near[-1] is origin
        assert set(near) <= {origin, norm.weight, norm.bias}


@pytest.mark.parametrize('frozen', [False, True], ids=['trainable', 'frozen'])
@pytest.mark.parametrize('left_out', [['conv1'], ['conv1', 'bn1', 'stem', 'fc']])
def test_what_is_left_out_stays_out(left_out, frozen):
    """Whether it is frozen or not: only what blocks added may join."""
    model = make_net()
    model.conv1.requires_grad_(not frozen)
    names = [n for n, _ in model.named_parameters() if n.split('.')[0] not in left_out]
    held = [model.get_parameter(name) for name in names]
    optimizer = torch.optim.SGD(held, 0.01)
    for path in ('conv1', 'conv1.branches.1x1-kxk.conv', 'conv2'):
        grow(model, path)
        sync_optimizer(optimizer, model)
        check_optimizer(optimizer, model, held)
    (names_now,) = group_names(optimizer, model)
    new = {n for n in names_now if n.startswith('conv2.branches') and '.kxk.' not in n}
    origin = {'conv2.weight': 'conv2.branches.kxk.weight', 'conv2.bias': 'conv2.branches.kxk.bias'}
    assert len(new) > 10
    assert set(names_now) == {origin.get(n, n) for n in names} | new
    before = {n: p.clone() for n, p in model.named_parameters()}
    step(model, optimizer, 2)
    for name, parameter in model.named_parameters():
        if name.split('.')[0] in left_out:
            assert torch.equal(parameter, before[name]), name


def test_a_bias_of_the_conv_itself_stays_out():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    optimizer = torch.optim.SGD([model[0].weight], 0.01)
    grow(model, '0')
    sync_optimizer(optimizer, model)
    check_optimizer(optimizer, model, [model[0].origin.weight])
    (names,) = group_names(optimizer, model)
    assert '0.branches.kxk.bias' not in names
    assert '0.branches.1x1.bn.bias' in names


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_frozen_conv_in_the_optimizer_has_its_branches_there(layout):
    """And where they go does not depend on whether it is frozen at that time."""
    layouts = []
    for frozen in (False, True):
        model = make_net()
        optimizer = layout(model)
        model.conv1.requires_grad_(not frozen)
        grow(model, 'conv1')
        sync_optimizer(optimizer, model)
        check_optimizer(optimizer, model)
        layouts.append(group_names(optimizer, model))
    assert layouts[0] == layouts[1]
    assert sum('conv1.branches' in n for group in layouts[0] for n in group) > 10
    assert not any(p.requires_grad for p in model.conv1.parameters())


def test_branches_leave_with_the_weight_of_their_origin():
    model = make_net()
    optimizer = one_group(model, torch.optim.Adam)
    grow(model, 'conv1')
    sync_optimizer(optimizer, model)
    step(model, optimizer)
    (group,) = optimizer.param_groups
    origin = model.conv1.origin.weight
    group['params'] = [p for p in group['params'] if p is not origin]
    del optimizer.state[origin]
    sync_optimizer(optimizer, model)
    check_optimizer(optimizer, model)
    assert not any('conv1' in name for name in group_names(optimizer, model)[0])


def test_an_order_of_the_user_is_kept():
    """A plain model again has the layout of the plain model: torch restores by position."""
    model = make_net()
    held = list(reversed(list(model.parameters())))
    optimizer = torch.optim.Adam(held, 0.01)
    for path in ('conv2', 'conv1'):
        grow(model, path)
        sync_optimizer(optimizer, model)
    grown = optimizer.param_groups[0]['params']
    assert grown[: len(held)] == held
    twin = make_net()
    other = torch.optim.Adam(list(reversed(list(twin.parameters()))), 0.01)
    expand(twin, structure_of(model))
    sync_optimizer(other, twin)
    assert group_names(other, twin) == group_names(optimizer, model)
    for path in ('conv1', 'conv2'):
        prune(model, path, model.get_submodule(path).names[1:])
        sync_optimizer(optimizer, model)
    assert [p for p in optimizer.param_groups[0]['params'] if p in set(held)] == held


def flags(module):
    return {p.requires_grad for p in module.parameters()}


def test_branches_are_freed_and_frozen_with_their_origin():
    model = make_net()
    model.conv1.requires_grad_(False)
    grow(model, 'conv1')
    grow(model, 'conv1.branches.1x1-kxk.conv')
    grow(model, 'conv2')
    watch = FreezeWatch(model)
    watch.follow()
    assert flags(model.conv1) == {False}
    assert flags(model.conv2) == {True}
    model.conv1.origin.weight.requires_grad = True
    watch.follow()
    assert flags(model.conv1) == {True}
    # One that is frozen by itself stays so.
    model.conv1.branches['1x1'].requires_grad_(False)
    watch.follow()
    assert flags(model.conv1.branches['1x1']) == {False}
    model.conv1.origin.weight.requires_grad = False
    watch.follow()
    assert flags(model.conv1) == {False}
    assert flags(model.conv2) == {True}


def test_names_in_groups_follow():
    """Torch keeps names beside parameters if it was given them."""
    model = make_net()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.01)
    grow(model, 'conv1')
    sync_optimizer(optimizer, model)
    (group,) = optimizer.param_groups
    assert group['param_names'] == [name for name, _ in model.named_parameters()]
    prune(model, 'conv1', ['1x1'])
    sync_optimizer(optimizer, model)
    assert group['param_names'] == [name for name, _ in model.named_parameters()]
    assert group['params'] == list(model.parameters())


def test_syncing_twice_changes_nothing():
    model = make_net()
    optimizer = two_groups(model)
    grow(model, 'conv1')
    sync_optimizer(optimizer, model)
    groups = group_names(optimizer, model)
    sync_optimizer(optimizer, model)
    assert group_names(optimizer, model) == groups


def test_schedulers_go_on():
    model = make_net()
    optimizer = two_groups(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    grow(model, 'conv1')
    sync_optimizer(optimizer, model)
    step(model, optimizer)
    scheduler.step()
    assert [group['lr'] for group in optimizer.param_groups] == [0.005, 0.005]


@pytest.mark.parametrize(('kind', 'options'), KINDS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_saved_optimizer_loads_into_one_of_the_same_structure(layout, kind, options):
    """The layout follows from the Structure, whatever the order of the edits was."""
    model = make_net()
    optimizer = layout(model, kind, **options)
    for path in ('dw', 'conv1', 'conv1.branches.1x1-kxk.conv', 'stem'):
        grow(model, path)
        sync_optimizer(optimizer, model)
        step(model, optimizer)
    randomise(model)
    prune(model, 'conv1', ['1x1', 'identity', '1xk'])
    prune(model, 'stem', model.stem.names[1:])
    sync_optimizer(optimizer, model)
    step(model, optimizer)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), model.state_dict(), structure_of(model)), file)
    file.seek(0)
    saved, state, structure = torch.load(file, weights_only=True)

    twin = make_net(seed=3)
    resumed = layout(twin, kind, **options)
    expand(twin, structure)
    sync_optimizer(resumed, twin)
    assert group_names(resumed, twin) == group_names(optimizer, model)
    twin.load_state_dict(state, strict=True)
    resumed.load_state_dict(saved)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert optimizer.state[p].keys() == resumed.state[q].keys(), name
        for key, tensor in tensors(optimizer.state[p]).items():
            assert torch.equal(tensor, resumed.state[q][key]), (name, key)
    for m, o in ((model, optimizer), (twin, resumed)):
        torch.manual_seed(5)
        step(m, o, 2)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


# The check


def broken(case):
    model = make_net()
    optimizer = two_groups(model, torch.optim.Adam)
    first, second = optimizer.param_groups
    if case == 'twice':
        second['params'].append(first['params'][0])
    elif case == 'foreign':
        first['params'].append(nn.Parameter(torch.zeros(2)))
    elif case == 'half':
        grow(model, 'conv1')
        sync_optimizer(optimizer, model)
        first['params'] = [p for p in first['params'] if p is not model.conv1.origin.weight]
    elif case == 'state':
        optimizer.state[nn.Parameter(torch.zeros(2))] = {}
    elif case == 'grown':
        grow(model, 'conv1')
    elif case == 'pruned':
        grow(model, 'conv1')
        sync_optimizer(optimizer, model)
        prune(model, 'conv1', ['1x1'])
    return optimizer, model


@pytest.mark.parametrize(
    ('case', 'sentence'),
    [
        ('twice', 'two param groups'),
        ('foreign', 'of no module'),
        ('half', r"where the weight of the origin is not: \['conv1\.branches\.1x1\."),
        ('state', 'state of no parameter'),
        ('grown', r"where the weight of the origin is: \['conv1\.branches\.1x1\."),
        ('pruned', 'of no module'),
    ],
)
def test_check_catches(case, sentence):
    with pytest.raises(AssertionError, match=sentence):
        check_optimizer(*broken(case))


@pytest.mark.parametrize('case', ['missing', 'joined'])
def test_check_compares_with_the_time_before(case):
    optimizer, model = broken('nothing')
    group = optimizer.param_groups[1]
    before = [p for g in optimizer.param_groups for p in g['params']]
    if case == 'missing':
        group['params'].pop()
        sentence = 'no longer in the optimizer: fc.bias'
    else:
        before.pop()
        sentence = 'was not in the optimizer before: fc.bias'
    check_optimizer(optimizer, model)
    with pytest.raises(AssertionError, match=sentence):
        check_optimizer(optimizer, model, before)


def test_check_accepts():
    check_optimizer(*broken('nothing'))
    optimizer, model = broken('nothing')
    model.stem.requires_grad_(False)  # frozen later: the optimizer may still hold it
    check_optimizer(optimizer, model)
