"""Numbers that are not numbers, and numbers that are zero."""

from __future__ import annotations

import math
import re

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner

from dyrep_mm.engine.losses import LossWatch
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.operations import Operation
from dyrep_mm.evolution.rule import make_plan, weak_branches
from dyrep_mm.evolution.saliency import SCORES, make_score
from dyrep_mm.surgery.candidates import left_alone
from dyrep_mm.surgery.fuse import fuse
from dyrep_mm.surgery.rewire import grow, prune
from dyrep_mm.surgery.tree import blocks_of
from support.checks import assert_same
from support.nets import image, make_net, output_of
from support.runs import FAST, PRUNING, call_at, dyrep, runner

NAN, INF = float('nan'), float('inf')
BAD = pytest.mark.parametrize('bad', [NAN, INF, -INF])


class BadGradient(Hook):
    """Puts a value into the gradient of one parameter, where the optimizer will not see it."""

    priority = 'VERY_LOW'

    def __init__(self, name: str, value: float, at: set[int] | None = None):
        self.name, self.value, self.at = name, value, at

    def before_train(self, runner):
        optimizer = runner.optim_wrapper.optimizer
        parameter = dict(runner.model.named_parameters())[self.name]
        kept = []

        def spoil(*_):
            if self.at is None or runner.iter in self.at:
                kept.append(parameter.grad.clone())
                parameter.grad[0] = self.value

        def mend(*_):
            if kept:
                parameter.grad.copy_(kept.pop())

        # Around the hook that scores, which before_train has registered by now.
        self.handles = [optimizer.register_step_pre_hook(hook) for hook in (spoil, mend)]
        first, last = self.handles[0].id, self.handles[1].id
        hooks = optimizer._optimizer_step_pre_hooks
        hooks.move_to_end(first, last=False)
        hooks.move_to_end(last)


@BAD
@pytest.mark.parametrize(
    'metric', [name for name in SCORES if name not in ('random', 'grasp', 'gain')]
)
def test_iterations_with_a_bad_gradient_count_nothing(tmp_path, metric, bad):
    run = runner(tmp_path, [{**PRUNING, 'metric': metric}], iters=5)
    run.register_hook(BadGradient('backbone.conv1.weight', bad, at={1}), 'VERY_LOW')
    counts = []

    def count(run):
        counts.append(dyrep(run).rule.score.counts.max().item())

    call_at(run, count, 'after_train_iter', 'VERY_HIGH')
    run.train()
    assert counts == [1, 1, 1, 2, 1]  # of the second iteration there is none
    for entry in dyrep(run).journal:
        assert all(map(math.isfinite, entry.scores.values()))
    assert all(p.isfinite().all() for p in run.model.parameters())


@BAD
def test_nothing_grows_from_bad_scores(tmp_path, bad):
    """Every iteration is bad: there are updates, and nothing to choose from."""
    run = runner(tmp_path, [FAST], iters=5)
    run.register_hook(BadGradient('backbone.conv1.weight', bad), 'VERY_LOW')
    run.train()
    journal = dyrep(run).journal
    assert [entry.grown for entry in journal] == [{}, {}]
    assert not blocks_of(run.model)


@BAD
def test_bad_gradients_that_the_optimizer_sees(tmp_path, bad):
    """As in a plain run the weights are lost; the run goes on as that does, and grows nothing."""

    class Poison(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 1:
                self.handle = runner.model.head.weight.register_hook(lambda grad: grad * bad)

    run = runner(tmp_path, [FAST], iters=7, every=100)
    run.register_hook(Poison())
    run.train()
    assert run.iter == 7
    assert not run.model.head.weight.isfinite().all()
    # The loss of iteration 2 was finite still.
    assert [entry.at for entry in dyrep(run).journal] == [2]


# The loss


@OPTIM_WRAPPERS.register_module(force=True)
class Skipping(OptimWrapper):
    """Makes no step from a loss that is not finite."""

    def update_params(self, loss, *args, **kwargs):
        if loss.isfinite():
            super().update_params(loss, *args, **kwargs)


def spoil_loss(run: Runner, bad: float, *iterations: int) -> list[str]:
    """Multiply the loss of some iterations; what the log says of it."""
    forward, said = run.model.forward, []

    def spoilt(*args, mode='tensor', **kwargs):
        result = forward(*args, mode=mode, **kwargs)
        if mode == 'loss' and run.iter + 1 in iterations:
            result = {'loss': result['loss'] * bad}
        return result

    run.model.forward = spoilt
    run.logger.warning = lambda line, *_: said.append(line) if 'the loss is' in line else None
    return said


@BAD
def test_a_bad_loss_once_in_a_while(tmp_path, bad):
    """With a wrapper that skips such steps the run goes on: the log tells once, nothing is scored,
    and an update that is due waits for the next step."""
    wrapper = {'type': 'Skipping', 'optimizer': {'type': 'SGD', 'lr': 0.05}}
    run = runner(tmp_path, [{**PRUNING, 'interval': 4}], iters=11, optim_wrapper=wrapper)
    said = spoil_loss(run, bad, 2, 5, 8)
    counts = []
    call_at(
        run,
        lambda run: counts.append(dyrep(run).rule.score.counts.max().item()),
        'after_train_iter',
        'VERY_HIGH',
    )
    run.train()
    assert counts == [1, 1, 2, 3, 0, 1, 2, 2, 3, 1, 2]
    journal = dyrep(run).journal
    assert [entry.at for entry in journal] == [4, 9]
    assert all(entry.grown for entry in journal)
    assert all(t.isfinite().all() for t in run.model.state_dict().values())
    assert len(said) == 1
    assert re.search(r'the loss is -?(nan|inf) at iteration 2;', said[0])


@BAD
@pytest.mark.parametrize('unit', ['epochs', 'iterations'])
def test_weights_that_are_lost_end_no_run(tmp_path, unit, bad):
    """A plain run would end too, with no more to show for it."""
    more = {'epochs': 4} if unit == 'epochs' else {'iters': 16}
    hook = {**PRUNING, 'interval': 1 if unit == 'epochs' else 4}
    run = runner(tmp_path, [hook], **more)
    said = spoil_loss(run, bad, 7)
    run.train()
    assert run.iter == 16
    assert [entry.at for entry in dyrep(run).journal] == [1 if unit == 'epochs' else 4]
    assert len(blocks_of(run.model)) == 1
    assert len(said) == 1


@BAD
@pytest.mark.parametrize('interval', [None, 2])
def test_a_bad_loss_ends_the_run_if_told_to(tmp_path, interval, bad):
    hook = {**FAST, 'interval': interval, 'stop_on_invalid_loss': True}
    run = runner(tmp_path, [hook], iters=5)
    spoil_loss(run, bad, 4)
    sentence = r'the loss is -?(nan|inf) at iteration 4: training cannot go on from a loss that is'
    with pytest.raises(DyRepError, match=sentence):
        run.train()
    assert (tmp_path / 'iter_3.pth').is_file()
    assert not (tmp_path / 'iter_4.pth').is_file()


@BAD
def test_a_bad_loss_is_nothing_to_a_fixed_structure(tmp_path, bad):
    hook = {**FAST, 'interval': None, 'structure': 'dbb'}
    run = runner(tmp_path, [hook], iters=5)
    said = spoil_loss(run, bad, 2, 3)
    run.train()
    assert run.iter == 5
    assert not said


@BAD
@pytest.mark.parametrize('kind', [float, torch.float32, torch.float64, torch.float16])
def test_the_first_bad_loss_is_told(kind, bad):
    losses = LossWatch()
    for i, value in enumerate((1.0, bad, 2.0, NAN), start=1):
        losses.see(value if kind is float else torch.tensor(value, dtype=kind), i)
        first, loss, latest = losses.read()
        assert latest is (i in (2, 4))
        assert first == (0 if i == 1 else 2)
        assert i == 1 or str(loss) == str(bad)


@pytest.mark.parametrize('loss', [None, 'nan', [NAN], torch.tensor([])])
def test_what_is_no_loss_is_passed_over(loss):
    losses = LossWatch()
    losses.see(loss, 1)
    assert losses.read() == (0, 0.0, False)


def test_looking_at_a_loss_does_not_wait_for_it():
    """A tensor of the device `meta` has no value to wait for: reading one raises."""
    losses = LossWatch()
    for i in range(1, 4):
        losses.see(torch.empty((), device='meta', requires_grad=True), i)
    assert not losses.is_free
    with pytest.raises((RuntimeError, NotImplementedError)):
        losses.read()


@pytest.mark.parametrize('metric', ['synflow', 'snip', 'grad_norm', 'vote'])
def test_scores_that_are_not_finite_are_left_out(metric):
    """A score can overflow where its gradients are finite."""
    weights = {name: torch.full((2, 2), 1e30, requires_grad=True) for name in ('a', 'b')}
    operations = {name: Operation(weight, None, ()) for name, weight in weights.items()}
    score = make_score(metric, operations)
    for name, weight in weights.items():
        weight.grad = torch.full_like(weight, 1e30 if name == 'a' else 1e-30)
    score.gather()
    assert all(map(math.isfinite, score.means().values()))
    assert score.sums.isfinite().all()


@BAD
def test_plan_from_bad_numbers(bad):
    operations = {path: ['kxk', '1x1'] for path in 'abc'}
    scores = {'a': bad, 'b': 1.0, 'c': bad}
    plan = make_plan(scores, {}, operations, count=2, threshold=0.0)
    assert list(plan.grow) == ['b']
    assert weak_branches({'1x1': bad, 'kx1': 1.0, '1xk': 2.0}, 0.0) == []


@pytest.mark.parametrize('importance', [0.0, 0.01, 5.0])
def test_one_branch_has_no_spread(importance):
    assert weak_branches({'1x1': importance}, 0.0) == []
    assert weak_branches({}, 0.0) == []


def test_one_branch_is_kept(tmp_path):
    """Through real updates, whatever its importance."""
    hook = {**PRUNING, 'interval': 1, 'branches': ['1x1'], 'max_depth': 1}
    run = runner(tmp_path, [hook], iters=6)
    run.train()
    assert not any(entry.pruned for entry in dyrep(run).journal)
    assert len(blocks_of(run.model)) == 4


@pytest.mark.parametrize('dead', ['gamma', 'variance', 'both'])
@pytest.mark.parametrize('which', ['last', 'inner'])
def test_dead_branch(dead, which):
    """A scale of 0 (all zeros or one channel), a variance of 0: importances, kernels, pruning and
    fusing stay finite and exact."""
    for channels in (slice(None), slice(0, 1)):
        model, x = make_net(), image()
        block = grow(model, 'conv1')
        for branch in block.added:
            norm = branch.bn if which == 'last' else getattr(branch, 'pre_bn', None)
            if norm is None:
                continue
            if dead in ('gamma', 'both'):
                norm.weight.data[channels] = 0
            if dead in ('variance', 'both'):
                norm.running_var[channels] = 0
        expected = output_of(model, x)
        assert expected.isfinite().all()
        importances = block.importances()
        assert all(map(math.isfinite, importances.values()))
        if which == 'last' and dead != 'variance' and channels == slice(None):
            assert set(importances.values()) == {0.0}
        assert_same(output_of(fuse(model, x), x), expected, scale=1e3)
        prune(model, 'conv1', ['1x1', '1x1-kxk', 'kx1'])
        assert_same(output_of(model, x), expected, scale=1e3)
        prune(model, 'conv1', model.conv1.names[1:])
        assert_same(output_of(model, x), expected, scale=1e3)
        assert all(p.isfinite().all() for p in model.parameters())


def test_dead_conv():
    """The conv itself puts out zeros: its branches start at zero, and importances, which are
    relative to it, are no division by zero."""
    model, x = make_net(), image()
    model.conv1.weight.data.zero_()
    expected = output_of(model, x)
    block = grow(model, 'conv1')
    assert_same(output_of(model, x), expected)
    assert all(value == 0 for value in block.importances().values())
    for branch in block.added:
        branch.bn.weight.data.fill_(0.1)
    importances = block.importances()
    assert not any(map(math.isnan, importances.values()))
    weak_branches(importances, 0.02)  # no crash
    assert all(t.isfinite().all() for t in block.kernel())


def test_constant_input(tmp_path):
    """Every image is the same grey: statistics of zero variance, from calibration on."""
    run = runner(tmp_path, [{**PRUNING, 'interval': 1}], iters=6)
    dataset = run.train_dataloader.dataset
    shape = dataset[0]['inputs'].shape
    type(dataset).__getitem__, getitem = (
        lambda self, index: {'inputs': torch.ones(shape), 'labels': torch.tensor(index % 2)},
        type(dataset).__getitem__,
    )
    try:
        run.train()
    finally:
        type(dataset).__getitem__ = getitem
    assert blocks_of(run.model)
    assert all(t.isfinite().all() for t in run.model.state_dict().values())


@pytest.mark.parametrize('bad', [NAN, INF])
def test_bad_activations_leave_the_conv_plain(tmp_path, bad):
    """What would be written into kernels for good is not."""
    run = runner(tmp_path, [FAST], iters=5)

    def spoil(run):
        if run.iter == 1:
            run.model.backbone.bn1.bias.data[0] = bad

    call_at(run, spoil, 'after_train_iter', 'VERY_HIGH')
    run.train()
    assert blocks_of(run.model) == {}
    assert all('not finite' in reason for reason in left_alone(run.model).values())
    assert len(left_alone(run.model)) == 1


@BAD
def test_a_branch_that_is_not_finite_is_not_absorbed(tmp_path, bad):
    """Importances that are no numbers prune nothing in their block."""
    run = runner(tmp_path, [PRUNING], iters=5)
    spoilt = []

    def spoil(run):
        if run.iter == 3:
            dyrep(run).rule.grow_per_update = 0
            spoilt.extend(blocks_of(run.model).items())
            for _, block in spoilt:
                block.branches['1x1'].bn.weight.data[0] = bad

    call_at(run, spoil, 'after_train_iter', 'VERY_HIGH')
    seen = []

    def look(run):
        if run.iter == 3:
            seen.extend(block.origin.weight.isfinite().all().item() for _, block in spoilt)
            seen.append(dict(blocks_of(run.model)) == dict(spoilt))

    call_at(run, look)
    run.train()
    assert seen == [True, True]
    assert not dyrep(run).journal[-1].pruned
