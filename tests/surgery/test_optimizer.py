"""The optimizer follows the model."""

import io

import pytest
import torch
from torch import nn

from dyrep_mm import expand, grow, prune, structure_of
from dyrep_mm.surgery.optimizer import check_optimizer, donors, sync_optimizer
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


def test_frozen_parameters_do_not_join():
    model = make_net()
    model.conv1.requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, 0.01)
    grow(model, 'conv1')
    sync_optimizer(optimizer, model)
    check_optimizer(optimizer, model)
    assert optimizer.param_groups[0]['params'] == trainable


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
    elif case == 'missing':
        second['params'].pop()
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
        ('missing', r"not in the optimizer: \['fc.bias'\]"),
        ('state', 'state of no parameter'),
        ('grown', 'not in the optimizer'),
        ('pruned', 'of no module'),
    ],
)
def test_check_catches(case, sentence):
    with pytest.raises(AssertionError, match=sentence):
        check_optimizer(*broken(case))


def test_check_accepts():
    check_optimizer(*broken('nothing'))
    optimizer, model = broken('nothing')
    model.stem.requires_grad_(False)  # frozen later: the optimizer may still hold it
    check_optimizer(optimizer, model)
