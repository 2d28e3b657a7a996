"""Scores against autograd by hand, and what they must not do."""

import io
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.saliency import METRICS, NAMES, Saliency, check_metric
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.tree import get_module
from support.nets import image, make_net

BY_HAND = {
    'synflow': lambda w, g: (w * g).sum(),
    'snip': lambda w, g: (w * g).abs().sum(),
    'grad_norm': lambda w, g: (g**2).sum().sqrt(),
}


def weights_of(model):
    return {path: get_module(model, path).weight for path in candidates(model)}


def backward(model, seed, scale=1.0):
    torch.manual_seed(seed)
    model.zero_grad()
    (model(image()).square().mean() * scale).backward()


def gathered(metric, iterations=3, model=None, scale=None):
    """A saliency over some iterations, and the means computed by hand."""
    model = model or make_net()
    weights = weights_of(model)
    saliency = Saliency(metric, list(weights))
    rows = []
    for i in range(iterations):
        backward(model, i, scale or 1.0)
        saliency.gather(weights, None if scale is None else torch.tensor(scale))
        if metric in BY_HAND:
            loss_grads = {p: w.grad / (scale or 1.0) for p, w in weights.items()}
            rows.append({p: BY_HAND[metric](weights[p], g).item() for p, g in loss_grads.items()})
    means = {p: sum(row[p] for row in rows) / iterations for p in weights} if rows else None
    return saliency, means


@pytest.mark.parametrize('metric', METRICS)
def test_metric_is_the_mean_of_the_formula(metric):
    saliency, expected = gathered(metric)
    assert expected.keys() == {'stem', 'conv1', 'dw', 'conv2'}
    assert saliency.means() == pytest.approx(expected)
    assert len(set(expected.values())) == 4


def test_metrics_are_known():
    assert set(METRICS) == set(BY_HAND)
    assert set(NAMES) == {*BY_HAND, 'random', 'vote'}
    for name in NAMES:
        check_metric(name)
    for make in (check_metric, lambda name: Saliency(name, ['a'])):
        with pytest.raises(DyRepError, match="unknown metric 'nope': choose from synflow"):
            make('nope')


@pytest.mark.parametrize('metric', METRICS)
def test_loss_scale(metric):
    """Under AMP the gradients may still carry the scale of the loss."""
    scaled, expected = gathered(metric, scale=1024.0)
    assert scaled.means() == pytest.approx(expected)
    assert scaled.means() == pytest.approx(gathered(metric)[0].means())


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_nothing(metric, bad):
    model = make_net()
    weights = weights_of(model)
    saliency, _ = gathered(metric, model=model)
    before = saliency.means()
    weights['conv1'].grad[0, 0, 0, 0] = bad
    saliency.gather(weights)
    assert saliency.means() == before
    backward(model, 9)
    saliency.gather(weights)
    after = saliency.means()
    assert all(math.isfinite(value) for value in after.values())
    assert after != before


@pytest.mark.parametrize('found', [0.0, 1.0, 2.0])
def test_a_skipped_step_counts_nothing(found):
    model = make_net()
    weights = weights_of(model)
    saliency, _ = gathered('snip', model=model)
    before = saliency.means()
    backward(model, 9)
    saliency.gather(weights, found_inf=torch.tensor(found))
    assert (saliency.means() == before) == (found > 0)


def test_operations_without_gradient_are_not_counted():
    model = make_net()
    weights = weights_of(model)
    saliency = Saliency('snip', list(weights))
    backward(model, 0)
    weights['dw'].grad = None
    saliency.gather(weights)
    backward(model, 1)
    weights['conv1'].grad = None
    saliency.gather(weights)
    weights['stem'].grad = weights['conv2'].grad = weights['dw'].grad = None
    saliency.gather(weights)  # none at all
    score = BY_HAND['snip']
    backward(model, 0)
    first = {p: score(w, w.grad).item() for p, w in weights.items()}
    backward(model, 1)
    second = {p: score(w, w.grad).item() for p, w in weights.items()}
    expected = {p: (first[p] + second[p]) / 2 for p in weights}
    expected.update(dw=second['dw'], conv1=first['conv1'])
    assert saliency.means() == pytest.approx(expected)


def test_operations_that_were_never_counted_have_no_mean():
    model = make_net()
    weights = weights_of(model)
    for metric in METRICS:
        saliency = Saliency(metric, list(weights))
        assert saliency.means() == {}
        backward(model, 0)
        weights['dw'].grad = None
        saliency.gather(weights)
        assert saliency.means().keys() == weights.keys() - {'dw'}
    saliency = Saliency('vote', list(weights))
    assert saliency.means() == {}


def test_random_needs_no_gradient_and_follows_its_generator():
    saliency = Saliency('random', ['a', 'b', 'c'])
    saliency.gather({path: torch.zeros(2, requires_grad=True) for path in 'abc'})
    draws = [saliency.means(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0].keys() == {'a', 'b', 'c'}
    assert len(set(draws[0].values())) == 3


def test_vote_is_the_mean_rank():
    saliency, _ = gathered('vote')
    singles = [gathered(metric)[0].means() for metric in METRICS]
    paths = list(singles[0])
    expected = {
        p: sum(sum(s[p] > s[other] for other in paths) for s in singles) / len(singles)
        for p in paths
    }
    assert saliency.means() == pytest.approx(expected)


@pytest.mark.parametrize('metric', NAMES)
def test_state_round_trip_through_a_safe_file(metric):
    """Half of the iterations, a file, the other half: as if never interrupted."""
    model = make_net()
    weights = weights_of(model)
    whole, half = Saliency(metric, list(weights)), Saliency(metric, list(weights))
    for seed in range(2):
        backward(model, seed)
        whole.gather(weights)
        half.gather(weights)
    file, state = io.BytesIO(), half.state_dict()
    backward(model, 5)
    half.gather(weights)  # the state is a copy
    torch.save(state, file)
    file.seek(0)
    resumed = Saliency(metric, list(weights))
    assert resumed.load_state_dict(torch.load(file, weights_only=True))
    backward(model, 7)
    whole.gather(weights)
    resumed.gather(weights)

    def means(saliency):
        return saliency.means(torch.Generator().manual_seed(0))

    assert means(resumed) == means(whole)
    assert metric == 'random' or means(half) != means(whole)


@pytest.mark.parametrize('other', [Saliency('snip', ['a']), Saliency('synflow', ['a', 'b'])])
def test_state_of_something_else_is_refused(other):
    saliency = Saliency('synflow', ['a'])
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
    weights = weights_of(model)
    saliency = Saliency('synflow', list(weights))
    for _ in range(3):
        model.zero_grad()
        out = model(image(8, 3, 12, 12, dtype=torch.float32))
        (out[:, :4] ** 3).mean().backward()
        saliency.gather(weights)
    return saliency


def test_cancellation_in_front_of_a_norm_in_train_mode():
    assert conv_bn(training=True).cancelled()
    assert not conv_bn(training=False).cancelled()


def test_only_the_signed_sum_cancels():
    assert not Saliency('synflow', ['a']).cancelled()
    assert not Saliency('synflow', []).cancelled()
    for metric in ('snip', 'grad_norm', 'random', 'vote'):
        assert not gathered(metric)[0].cancelled()


class NoSync(TorchDispatchMode):
    """Raises where a value of a tensor is needed on the host."""

    HOST = ('_local_scalar_dense', 'is_nonzero', 'item', 'equal', 'nonzero', 'masked_select')

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.HOST, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('metric', NAMES)
def test_gathering_never_waits_for_the_device(metric):
    model = make_net()
    weights = weights_of(model)
    saliency = Saliency(metric, list(weights))
    backward(model, 0)
    weights['dw'].grad = None
    with NoSync():
        saliency.gather(weights)
        saliency.gather(weights, torch.tensor(2.0), torch.tensor([0.0]))
    with pytest.raises(AssertionError), NoSync():
        torch.ones(1).item()


@pytest.mark.parametrize('metric', METRICS)
def test_gathering_works_without_values(metric):
    """On the meta device there is nothing to wait for, nor to copy from the host."""
    model = make_net().to('meta')
    weights = weights_of(model)
    for weight in weights.values():
        weight.grad = torch.empty_like(weight)
    Saliency(metric, list(weights), device='meta').gather(weights)


def test_gathering_leaves_weights_and_gradients_alone():
    model = make_net()
    weights = weights_of(model)
    backward(model, 0)
    copies = {p: (w.detach().clone(), w.grad.clone()) for p, w in weights.items()}
    for metric in NAMES:
        Saliency(metric, list(weights)).gather(weights, torch.tensor(3.0))
    for path, weight in weights.items():
        assert torch.equal(weight, copies[path][0])
        assert torch.equal(weight.grad, copies[path][1])


def test_the_absolute_sum_is_of_the_first_iteration_alone():
    """It costs as much as the scores, and one iteration tells whether they cancel."""
    weight = torch.tensor([1.0, -2.0]).view(1, 1, 1, 2).requires_grad_()
    weight.grad = torch.full_like(weight, 3.0)
    saliency = Saliency('synflow', ['a'])
    for _ in range(3):
        saliency.gather({'a': weight})
    assert saliency.state_dict()['sums'].tolist() == [[-9.0], [9.0]]
    assert saliency.means() == {'a': -3.0}
