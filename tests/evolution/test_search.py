"""The search of RepNAS: its gradients against a reference, its budgets, its state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Generator, Tensor, nn

import dyrep_mm
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.search import KeepCost, KeepPart, RepNASRule, Sampler
from dyrep_mm.surgery.gates import Gates
from dyrep_mm.surgery.rewire import set_branch_norm
from dyrep_mm.surgery.tree import blocks_of, get_module, replace
from support.checks import assert_equal_data, assert_same
from support.nets import Net, image, randomise

SEED = 5


def adam(parameters: list[nn.Parameter], decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05, betas=(0.5, 0.999), weight_decay=decay)


def searched_net(branch_norm: str = 'batch') -> nn.Module:
    model = dyrep_mm.expand(Net().double(), 'dbb7', kernel_sizes=(3, 5))
    randomise(model)
    set_branch_norm(model, branch_norm)
    return model


def make_rule(model: nn.Module, keep: float = 0.34, **options) -> RepNASRule:
    rule = RepNASRule(KeepPart(keep), adam, **options)
    rule.seed, rule.progress = SEED, 0.0
    rule.watch(model)
    return rule


def noise(count: int, draws: int = 1) -> tuple[Tensor, Tensor]:
    """The order of equal alphas and the logistic noise (draws, n), written out."""
    generator = Generator().manual_seed(SEED)
    order = torch.randperm(count, generator=generator)
    uniform = [torch.rand(count, dtype=torch.float64, generator=generator) for _ in range(draws)]
    return order, torch.stack([u.log() - (1 - u).log() for u in uniform])


class Summed(nn.Module):
    """A block written out: every branch that is on runs, times its gate."""

    def __init__(self, block: nn.Module, gates: dict[str, Tensor]):
        super().__init__()
        self.block, self.gates = block, gates

    def forward(self, x: Tensor) -> Tensor:
        out = self.block.branches['kxk'](x)
        for name, gate in self.gates.items():
            branch = self.block.branches[name]
            out = out + gate * branch.unit.view(-1, 1, 1) * branch(x)
        return out


@pytest.mark.parametrize('branch_norm', ['batch', 'fixed'])
def test_gradients_of_alphas(branch_norm):
    """Straight through: the gradient of a gate, times the slope of the sigmoid at the rank; only
    what is on has one. In one merged kernel (`fixed`) as branch by branch."""
    model = searched_net(branch_norm)
    rule = make_rule(model)
    x = image(4, 3, 20, 20)

    plain = copy.deepcopy(model)
    count = len(rule.places)
    rank = noise(count)[1][0]
    on = set(rank.topk(math.floor(0.34 * count)).indices.tolist())
    gates = {
        place: torch.ones((), dtype=torch.float64, requires_grad=True)
        for i, place in enumerate(rule.places)
        if i in on
    }
    for path, block in blocks_of(plain).items():
        own = {name: gate for (at, name), gate in gates.items() if at == path}
        replace(plain, path, Summed(block, own))
    loss = plain(x).square().mean()
    slope = rank.sigmoid() * (1 - rank.sigmoid())
    expected = torch.zeros(count, dtype=torch.float64)
    for place, grad in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
        i = rule.places.index(place)
        expected[i] = grad * slope[i]
    assert expected.count_nonzero() == len(on)

    mask, factors = rule.draw()
    assert factors.tolist() == [1.0] * len(on)  # exactly
    Gates(model, rule.places).open(mask, factors)
    searched = model(x).square().mean()
    assert_same(searched.detach(), loss.detach())
    searched.backward()
    assert_same(rule.sampler.alphas.grad, expected)


@pytest.mark.parametrize('branch_norm', ['batch', 'fixed', 'sampled'])
def test_only_what_is_on_is_computed_and_trains(branch_norm):
    model = searched_net(branch_norm)
    rule = make_rule(model)
    gates = Gates(model, rule.places)
    mask, factors = rule.draw()
    gates.open(mask, factors)
    called = set()
    for path, name in rule.places:
        branch = get_module(model, path).branches[name]
        branch.register_forward_pre_hook(lambda *_, place=(path, name): called.add(place))
    model(image(4, 3, 20, 20)).sum().backward()
    on = {place for place, is_on in zip(rule.places, mask, strict=True) if is_on}
    if branch_norm == 'batch':  # else all merge, and none is called
        assert called == on
    for path, name in rule.places:
        parameters = get_module(model, path).branches[name].parameters()
        assert {p.grad is not None for p in parameters} == {(path, name) in on}


def test_one_ranking_for_all_blocks():
    """The number on is the same in every draw, and exactly the top of all is kept."""
    rule = make_rule(model := searched_net())
    count = len(rule.places)
    masks = [rule.draw()[0] for _ in range(200)]
    assert {sum(mask) for mask in masks} == {math.floor(0.34 * count)}
    per_block = {
        tuple(
            sum(on for (at, _), on in zip(rule.places, mask, strict=True) if at == path)
            for path in blocks_of(model)
        )
        for mask in masks
    }
    assert len(per_block) > 20  # blocks compete with one another
    _, ranks = noise(count, 200)
    top = [set(rank.topk(math.floor(0.34 * count)).indices.tolist()) for rank in ranks]
    assert [{i for i, on in enumerate(mask) if on} for mask in masks] == top

    with torch.no_grad():
        rule.sampler.alphas.copy_(torch.randn(count, dtype=torch.float64))
    rule.progress = 1.0
    plan = rule.decide(model, Generator())
    kept = set(rule.sampler.alphas.topk(math.floor(0.34 * count)).indices.tolist())
    expected = {place for i, place in enumerate(rule.places) if i not in kept}
    assert {(path, name) for path, names in plan.prune.items() for name in names} == expected
    assert not plan.grow


def test_alphas_that_are_equal_say_nothing_of_the_place():
    """At the start no block is better than another for standing first."""
    rule = make_rule(searched_net())
    order, _ = noise(len(rule.places))
    best = {i for i, on in enumerate(rule.best()) if on}
    assert best == set(order[: len(best)].tolist())


@pytest.mark.parametrize(
    ('keep', 'of', 'count'),
    [(0.34, 132, 44), (0.29, 100, 29), (1.0, 7, 7), (1, 7, 7), (0.01, 7, 1), (0.34, 22, 7)],
)
def test_the_number_of_branches(keep, of, count):
    assert KeepPart(keep).count(of) == count
    assert sum(KeepPart(keep).choose(torch.arange(float(of)), torch.arange(of))) == count


def test_a_budget_of_cost():
    """The largest gate for its cost first; what does not fit is passed over."""
    budget = KeepCost(1.5)
    ranks = torch.tensor([2.0, 1.0, 0.0, -3.0, 3.0], dtype=torch.float64)
    order = torch.tensor([4, 3, 2, 1, 0])
    assert budget.choose(ranks, order) == [False] * 5  # no cost is known yet
    budget.costs = torch.tensor([0.45, 0.2, 0.2, 0.0, 9.0], dtype=torch.float64)
    # For their cost: 3 is free, then 1, 2, 0 and 4; 0 does not fit behind 1 and 2.
    assert budget.choose(ranks, order) == [False, True, True, True, False]


def test_a_step_is_that_of_the_optimizer():
    """Decay falls by a cosine, and a gradient that is not finite is passed over."""
    sampler = Sampler(3, KeepPart(0.5), lambda p: adam(p, 0.1), SEED)
    alphas = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = adam([alphas], 0.1)
    for progress in (0.0, 0.25, 0.5, 1.0):
        grad = torch.randn(3, dtype=torch.float64)
        sampler.step(grad.clone(), progress)
        sampler.step(torch.full_like(grad, math.nan), progress)
        optimizer.param_groups[0]['weight_decay'] = 0.1 * (1 + math.cos(math.pi * progress)) / 2
        alphas.grad = grad
        optimizer.step()
        assert torch.equal(sampler.alphas, alphas)
    assert sampler.optimizer.state[sampler.alphas]['step'] == 4


def test_alphas_wait_in_the_warm_up():
    rule = make_rule(searched_net())
    rule.progress = -0.5
    mask, factors = rule.draw()
    assert factors is None
    assert any(mask)
    rule.observe(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    assert not rule.sampler.optimizer.state
    assert not rule.sampler.alphas.any()


def test_a_search_goes_on(tmp_path):
    """What a checkpoint holds is plain data, and draws and steps follow as if nothing had been."""
    model = searched_net()
    first, second = make_rule(model), make_rule(model)

    def train(rule: RepNASRule) -> list:
        masks = []
        for i in range(3):
            mask, factors = rule.draw()
            masks.append(mask)
            (factors * torch.arange(len(factors))).sum().backward()
            rule.progress = i / 8
            rule.observe(None)
        return masks

    train(first)
    torch.save(first.state_dict(), tmp_path / 'search.pth')
    saved = torch.load(tmp_path / 'search.pth', weights_only=True)
    second.draw()
    assert second.load_state_dict(saved)
    assert train(first) == train(second)
    assert_equal_data(first.state_dict(), second.state_dict())
    assert first.best() == second.best()


def test_a_search_among_other_branches():
    model = searched_net()
    state = make_rule(model).state_dict()
    dyrep_mm.prune(model, 'conv1', ['1x1'])
    assert not make_rule(model).load_state_dict(state)
    assert not make_rule(model).load_state_dict({'sums': torch.zeros(3)})
    rule = make_rule(model)
    for key in ('alphas', 'optimizer', 'generator', 'order'):
        state = {**rule.state_dict(), key: torch.zeros(1)}
        with pytest.raises(DyRepError, match='the search of the checkpoint is malformed'):
            make_rule(model).load_state_dict(state)


def test_scope_and_nesting():
    """Branches outside the scope and in copies stay on; a nested one goes with what it is in."""
    model = searched_net()
    dyrep_mm.grow(model, 'conv1.branches.1x1-kxk.conv')
    assert {path for path, _ in make_rule(model).places} == {'stem', 'conv1', 'dw', 'conv2'}
    assert {path for path, _ in make_rule(model, scope=['dw', 'stem']).places} == {'dw', 'stem'}
    rule = RepNASRule(KeepPart(0.5), adam)
    rule.copies = ['conv1']
    rule.watch(model)
    assert {path for path, _ in rule.places} == {'stem', 'dw', 'conv2'}
    rule.is_over = True
    rule.watch(model)
    assert (rule.places, rule.state_dict(), rule.decide(model, Generator()).prune) == ([], None, {})
