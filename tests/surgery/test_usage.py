"""Which uses of a conv a block can stand for, seen in a forward of training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dyrep_mm.surgery.candidates import candidates, leave_alone, left_alone, survey
from dyrep_mm.surgery.rewire import grow
from dyrep_mm.surgery.usage import watch_use
from support.checks import assert_untouched
from support.nets import snapshot, types_of


class User(nn.Module):
    """Two convs; ``use`` says how the second one, ``conv``, is used."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.average = nn.Conv2d(4, 4, 3, padding=1, bias=False).requires_grad_(False)
        self.fc = nn.Linear(4, 2)
        self.convs, self.calls = [self.conv], [self.conv.forward]
        self.count, self.seen, self.queues = 0, [], {'a': [1]}

    def forward(self, x):
        self.count += 1
        self.seen.append(x)
        self.queues['a'].append(2)
        x = self.use(self, F.relu(self.bn(self.stem(x))))
        self.kept = x
        return self.fc(x.float().relu().mean((2, 3)))


def functional(net, x, weight):
    return F.conv2d(x, weight, padding=1)


def averaging(net, x):
    with torch.no_grad():
        net.average.weight.lerp_(net.conv.weight, 0.5)
    return net.conv(x) + net.average(x)


def averaging_by_data(net, x):
    net.average.weight.data = net.average.weight.data * 0.5 + net.conv.weight.data * 0.5
    return net.conv(x) + net.average(x)


def penalty(net, x):
    w = net.conv.weight.flatten(1)
    net.penalty = (w @ w.t()).square().sum()
    return net.conv(x)


def autocast(net, x):
    with torch.autocast('cpu', torch.bfloat16):
        return net.conv(x) + net.average(x)


def twice_in_autocast(net, x):
    with torch.autocast('cpu', torch.bfloat16):
        return net.conv(x) + functional(net, x, net.conv.weight)


def standardised(net, x):
    w = net.conv.weight
    return functional(net, x, (w - w.mean()) / w.std())


def unfolded(net, x):
    columns = F.unfold(x, 3, padding=1)
    return torch.einsum('oc,bcl->bol', net.conv.weight.flatten(1), columns).reshape(x.shape)


def by_hand(net, x):
    """Products of single numbers, no matrix product."""
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    return (windows[:, None] * net.conv.weight[None, :, :, None, None]).sum((2, -2, -1))


def constrained(net, x):
    net.conv.weight.data.renorm_(2, 0, 1.0)
    return net.conv(x)


def constrained_by_data(net, x):
    net.conv.weight.data = net.conv.weight.data * 0.5
    return net.conv(x)


def with_another_weight(net, x):
    return torch.func.functional_call(net.conv, {'weight': net.conv.weight * 2}, (x,))


RIGHT = {
    'once': lambda net, x: net.conv(x),
    'twice': lambda net, x: net.conv(net.conv(x)),
    'recomputed': lambda net, x: checkpoint(net.conv, x, use_reentrant=False),
    'type and device are read': lambda net, x: net.conv(x.to(net.conv.weight)),
    'averaging': averaging,
    'averaging by data': averaging_by_data,
    'penalty': penalty,
    'autocast': autocast,
}
WRONG = {
    'list': lambda net, x: net.convs[0](x),
    'bound method': lambda net, x: net.calls[0](x),
    '_conv_forward': lambda net, x: net.conv._conv_forward(x, net.conv.weight, None),
    'functional': lambda net, x: functional(net, x, net.conv.weight),
    'functional too': lambda net, x: net.conv(x) + functional(net, x, net.conv.weight),
    'detached too': lambda net, x: net.conv(x) + functional(net, x, net.conv.weight.detach()),
    'data': lambda net, x: functional(net, x, net.conv.weight.data),
    'with others': lambda net, x: functional(
        net, x, torch.cat([net.conv.weight, net.average.weight])
    )[:, :4],
    'twice in autocast': twice_in_autocast,
    'standardised': standardised,
    'unfolded': unfolded,
    'by hand': by_hand,
    'constrained': constrained,
    'constrained by data': constrained_by_data,
    'with another weight': with_another_weight,
}
ALL = {**RIGHT, **WRONG, 'never': lambda net, x: x}


@pytest.mark.parametrize('name', ALL)
def test_what_a_block_can_stand_for(name):
    torch.manual_seed(0)
    net = User(ALL[name]).train()
    state, types = snapshot(net), types_of(net)
    storage, modules = net.average.weight.data_ptr(), list(net.modules())
    batches = iter(torch.randn(3, 2, 3, 8, 8))
    reasons, calls = watch_use(net, ['stem', 'conv'], batches, net)
    if name in RIGHT:
        assert reasons == {}
        assert calls == {'stem': 1, 'conv': 2 if name == 'twice' else 1}
        assert len(list(batches)) == 2  # one batch has told it
    else:
        reason = 'not called' if name == 'never' else 'outside of its own forward'
        assert list(reasons) == ['conv']
        assert reason in reasons['conv']
    assert_untouched(net, state, types)
    assert list(net.modules()) == modules
    assert net.average.weight.data_ptr() == storage
    assert (net.count, net.seen, net.queues) == (0, [], {'a': [1]})
    assert not hasattr(net, 'kept')
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_branch_that_some_batches_take():
    """One batch that takes it is enough."""
    net = User(lambda net, x: net.conv(x) if x.shape[0] > 2 else x)
    data = [torch.randn(n, 3, 8, 8) for n in (2, 2, 3, 2)]
    assert watch_use(net, ['stem', 'conv'], data, net) == ({}, {'stem': 1, 'conv': 1})
    assert list(watch_use(net, ['stem', 'conv'], data[:2], net)[0]) == ['conv']


def test_convs_in_blocks():
    """The block around them is what is called."""
    net = User(lambda net, x: net.conv(net.conv(x)))
    grow(net, 'conv')
    inside = ['conv.branches.kxk', 'conv.branches.1x1-kxk.conv']
    data = [torch.randn(2, 3, 8, 8)]
    assert watch_use(net, inside, data, net) == ({}, {'conv': 2})
    net.use = lambda net, x: x
    assert list(watch_use(net, inside, data, net)[0]) == inside
    net.use = lambda net, x: net.convs[0](net.conv(x))
    assert list(watch_use(net, inside, data, net)[0]) == inside[:1]


@pytest.mark.parametrize('shape', [(0, 3, 8, 8), (1, 3, 1, 1)])
def test_few_values(shape):
    net = User(lambda net, x: net.conv(x)).eval()
    reasons, _ = watch_use(net, ['conv'], [torch.randn(shape)], net)
    assert 'less than two values' in reasons['conv']


def test_no_batch():
    net = User(lambda net, x: net.conv(x))
    assert 'no training batch' in watch_use(net, ['conv'], [], net)[0]['conv']


def test_what_is_left_alone_is_no_candidate():
    net = User(lambda net, x: net.conv(x))
    assert set(candidates(net)) == {'stem', 'conv'}
    leave_alone(net.conv, 'it is tired')
    assert set(candidates(net)) == {'stem'}
    assert survey(net)['conv'] == 'it is tired'
    assert left_alone(net) == {'conv': 'it is tired'}
