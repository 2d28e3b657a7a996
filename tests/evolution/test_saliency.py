"""Scores against autograd by hand, and what they must not do."""

import io
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.operations import Operation, operations_of
from dyrep_mm.evolution.saliency import SCORES, check_metric, make_score, register_score
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.tree import get_module
from support.checks import assert_equal_data
from support.nets import image, make_net

#: Of weight, bias (or None) and their gradients.
BY_HAND = {
    'synflow': lambda w, g, b, h: (w * g).sum() + (0 if b is None else (b * h).sum()),
    'snip': lambda w, g, *_: (w * g).abs().sum(),
    'grad_norm': lambda w, g, *_: (g**2).sum().sqrt() * (w**2).sum().sqrt(),
}


def by_hand(metric, conv, scale=1.0):
    bias = conv.bias
    grads = [None if p is None else p.grad / scale for p in (conv.weight, bias)]
    return BY_HAND[metric](conv.weight, grads[0], bias, grads[1]).item()


def operations(model):
    return operations_of(model, candidates(model))


def weights_of(model):
    return {path: get_module(model, path).weight for path in candidates(model)}


def bare(weights):
    return {path: Operation(weight, None, ()) for path, weight in weights.items()}


def backward(model, seed, scale=1.0):
    torch.manual_seed(seed)
    model.zero_grad()
    (model(image()).square().mean() * scale).backward()


def gathered(metric, iterations=3, model=None, scale=None):
    """A saliency over some iterations, and the means computed by hand."""
    model = model or make_net()
    weights = weights_of(model)
    saliency = make_score(metric, operations(model))
    rows = []
    for i in range(iterations):
        backward(model, i, scale or 1.0)
        saliency.gather(None if scale is None else torch.tensor(scale))
        if metric in BY_HAND:
            rows.append({p: by_hand(metric, get_module(model, p), scale or 1.0) for p in weights})
    means = {p: sum(row[p] for row in rows) / iterations for p in weights} if rows else None
    return saliency, means


@pytest.mark.parametrize('metric', BY_HAND)
def test_metric_is_the_mean_of_the_formula(metric):
    saliency, expected = gathered(metric)
    assert expected.keys() == {'stem', 'conv1', 'dw', 'conv2'}
    assert saliency.means() == pytest.approx(expected)
    assert len(set(expected.values())) == 4


def test_metrics_are_known():
    assert set(SCORES) == {*BY_HAND, 'random', 'vote', 'grasp', 'gain'}
    for name in SCORES:
        check_metric(name)
    for make in (check_metric, lambda name: make_score(name, {})):
        with pytest.raises(DyRepError, match="unknown metric 'nope': choose from gain, synflow"):
            make('nope')


@pytest.mark.parametrize('metric', BY_HAND)
def test_loss_scale(metric):
    """Under AMP the gradients may still carry the scale of the loss."""
    scaled, expected = gathered(metric, scale=1024.0)
    assert scaled.means() == pytest.approx(expected)
    assert scaled.means() == pytest.approx(gathered(metric)[0].means())


@pytest.mark.parametrize('metric', BY_HAND)
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_nothing(metric, bad):
    model = make_net()
    weights = weights_of(model)
    saliency, _ = gathered(metric, model=model)
    before = saliency.means()
    weights['conv1'].grad[0, 0, 0, 0] = bad
    saliency.gather()
    assert saliency.means() == before
    backward(model, 9)
    saliency.gather()
    after = saliency.means()
    assert all(math.isfinite(value) for value in after.values())
    assert after != before


@pytest.mark.parametrize('found', [0.0, 1.0, 2.0])
def test_a_skipped_step_counts_nothing(found):
    model = make_net()
    saliency, _ = gathered('snip', model=model)
    before = saliency.means()
    backward(model, 9)
    saliency.gather(found_inf=torch.tensor(found))
    assert (saliency.means() == before) == (found > 0)


def test_operations_without_gradient_are_not_counted():
    model = make_net()
    weights = weights_of(model)
    saliency = make_score('snip', operations(model))
    backward(model, 0)
    weights['dw'].grad = None
    saliency.gather()
    backward(model, 1)
    weights['conv1'].grad = None
    saliency.gather()
    weights['stem'].grad = weights['conv2'].grad = weights['dw'].grad = None
    saliency.gather()  # none at all
    backward(model, 0)
    first = {p: by_hand('snip', get_module(model, p)) for p in weights}
    backward(model, 1)
    second = {p: by_hand('snip', get_module(model, p)) for p in weights}
    expected = {p: (first[p] + second[p]) / 2 for p in weights}
    expected.update(dw=second['dw'], conv1=first['conv1'])
    assert saliency.means() == pytest.approx(expected)


def test_operations_that_were_never_counted_have_no_mean():
    model = make_net()
    weights = weights_of(model)
    for metric in (*BY_HAND, 'gain'):
        saliency = make_score(metric, operations(model))
        assert saliency.means() == {}
        backward(model, 0)
        weights['dw'].grad = None
        saliency.gather()
        assert saliency.means().keys() == weights.keys() - {'dw'}
    saliency = make_score('vote', operations(model))
    assert saliency.means() == {}


def test_random_needs_no_gradient_and_follows_its_generator():
    saliency = make_score('random', bare({path: torch.zeros(2) for path in 'abc'}))
    saliency.gather()
    draws = [saliency.means(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0].keys() == {'a', 'b', 'c'}
    assert len(set(draws[0].values())) == 3


def test_vote_is_the_mean_rank():
    saliency, _ = gathered('vote')
    singles = [gathered(metric)[0].means() for metric in BY_HAND]
    paths = list(singles[0])
    expected = {
        p: sum(sum(s[p] > s[other] for other in paths) for s in singles) / len(singles)
        for p in paths
    }
    assert saliency.means() == pytest.approx(expected)


@pytest.mark.parametrize('metric', SCORES)
def test_state_round_trip_through_a_safe_file(metric):
    """Half of the iterations, a file, the other half: as if never interrupted."""
    model = make_net()
    whole, half = (make_score(metric, operations(model)) for _ in range(2))
    for seed in range(4):  # so that every score looks at the next one
        backward(model, seed)
        whole.gather()
        half.gather()
    file, state = io.BytesIO(), half.state_dict()
    backward(model, 5)
    half.gather()  # the state is a copy
    torch.save(state, file)
    file.seek(0)
    resumed = make_score(metric, operations(model))
    assert resumed.load_state_dict(torch.load(file, weights_only=True))
    backward(model, 7)
    whole.gather()
    resumed.gather()

    def means(saliency):
        return saliency.means(torch.Generator().manual_seed(0))

    assert means(resumed) == means(whole)
    assert_equal_data(whole.state_dict(), resumed.state_dict())
    gathers = metric not in ('random', 'grasp')
    assert (means(half) != means(whole)) == gathers


@pytest.mark.parametrize(('metric', 'paths'), [('snip', 'a'), ('synflow', 'ab')])
def test_state_of_something_else_is_refused(metric, paths):
    saliency = make_score('synflow', bare({'a': torch.zeros(2)}))
    other = make_score(metric, bare({path: torch.zeros(2) for path in paths}))
    assert not saliency.load_state_dict(other.state_dict())
    assert not saliency.load_state_dict({})


def conv_bn(training):
    """A conv in front of a BN, in single precision, after a few iterations."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8, eps=1e-12),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8, eps=1e-12),
    ).train(training)
    saliency = make_score('synflow', operations(model))
    for _ in range(3):
        model.zero_grad()
        out = model(image(8, 3, 12, 12, dtype=torch.float32))
        (out[:, :4] ** 3).mean().backward()
        saliency.gather()
    return saliency


def test_cancellation_in_front_of_a_norm_in_train_mode():
    assert 'cancel to rounding' in conv_bn(training=True).remark()
    assert conv_bn(training=False).remark() is None


def test_only_the_signed_sum_cancels():
    for paths in ('a', ''):
        bares = bare({path: torch.zeros(2) for path in paths})
        assert make_score('synflow', bares).remark() is None
    for metric in SCORES:
        assert gathered(metric)[0].remark() is None


class Whole:
    """A score with all that is asked of one."""

    def __init__(self, operations):
        self.operations = operations

    def gather(self, loss_scale=None, found_inf=None): ...

    def means(self, generator=None): ...

    def remark(self): ...

    def state_dict(self): ...

    def load_state_dict(self, state): ...


def test_registering_a_score(monkeypatch):
    monkeypatch.setattr('dyrep_mm.evolution.saliency.SCORES', dict(SCORES))
    assert register_score('whole')(Whole) is Whole
    register_score('whole')(Whole)  # a notebook cell runs twice
    bares = bare({'a': torch.zeros(2)})
    assert make_score('whole', bares).operations is bares
    for name, cls, sentence in (
        ('whole', type('Other', (Whole,), {}), "'whole' is registered already"),
        ('snip', Whole, "'snip' is registered already"),
        ('', Whole, 'registered under a name'),
        ('half', type('Half', (), {'gather': None}), "'half' lacks the method means"),
    ):
        with pytest.raises(DyRepError, match=sentence):
            register_score(name)(cls)


class NoSync(TorchDispatchMode):
    """Raises where a value of a tensor is needed on the host."""

    HOST = ('_local_scalar_dense', 'is_nonzero', 'item', 'equal', 'nonzero', 'masked_select')

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.HOST, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('metric', SCORES)
def test_gathering_never_waits_for_the_device(metric):
    model = make_net()
    weights = weights_of(model)
    saliency = make_score(metric, operations(model))
    backward(model, 0)
    weights['dw'].grad = None
    with NoSync():
        saliency.gather()
        saliency.gather(torch.tensor(2.0), torch.tensor([0.0]))
    with pytest.raises(AssertionError), NoSync():
        torch.ones(1).item()


@pytest.mark.parametrize('metric', SCORES)
def test_gathering_works_without_values(metric):
    """On the meta device there is nothing to wait for, nor to copy from the host."""
    model = make_net().to('meta')
    weights = weights_of(model)
    for weight in weights.values():
        weight.grad = torch.empty_like(weight)
    make_score(metric, operations(model)).gather()


def test_gathering_leaves_weights_and_gradients_alone():
    model = make_net()
    weights = weights_of(model)
    backward(model, 0)
    copies = {p: (w.detach().clone(), w.grad.clone()) for p, w in weights.items()}
    for metric in SCORES:
        make_score(metric, operations(model)).gather(torch.tensor(3.0))
    for path, weight in weights.items():
        assert torch.equal(weight, copies[path][0])
        assert torch.equal(weight.grad, copies[path][1])


def test_the_absolute_sum_is_of_the_first_iteration_alone():
    """It costs as much as the scores, and one iteration tells whether they cancel."""
    weight = torch.tensor([1.0, -2.0]).view(1, 1, 1, 2).requires_grad_()
    weight.grad = torch.full_like(weight, 3.0)
    saliency = make_score('synflow', {'a': Operation(weight, None, ())})
    for _ in range(3):
        saliency.gather()
    assert saliency.state_dict()['sums'].tolist() == [[-9.0], [9.0]]
    assert saliency.means() == {'a': -3.0}
