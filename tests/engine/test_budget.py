"""A budget in real runs: what a training step costs, counted while it runs, stays under it."""

from __future__ import annotations

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.evolution.record import Record
from support.checks import assert_equal_states, without_times
from support.nets import norms_of
from support.runs import FAST, TinyClassifier, call_at, dyrep, journal, runner

# The CPU runs an average pooling as a conv, which is no part of the count.
BRANCHES = ['1x1', '1x1-kxk', '1xk', 'kx1', 'identity']
HOOK = {
    **FAST,
    'metric': 'snip',
    'branches': BRANCHES,
    'max_depth': 1,
    'prune_threshold': 9.0,
}


class Counter(Hook):
    """Multiply-adds of the forward of each iteration, by torch's own count."""

    def __init__(self) -> None:
        self.counts: list[float] = []
        self.waits = False

    def before_train(self, runner):
        forward = runner.model.forward

        def counted(*args, **kwargs):
            if not self.waits:  # a look at the use of convs, calibration
                return forward(*args, **kwargs)
            self.waits = False
            with FlopCounterMode(display=False) as counter:
                result = forward(*args, **kwargs)
            self.counts.append(counter.get_total_flops() / 2)
            return result

        runner.model.forward = counted

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.waits = True


@MODELS.register_module(force=True)
class FrozenNorms(TinyClassifier):
    """Its BNs are in eval mode, so that blocks are linear."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for norm in norms_of(self):
            norm.eval()
        return self


def trained(work_dir, *, frozen=False, iters=12, **options):
    """The hook, and what each iteration cost beside the first, which is plain."""
    model = {'type': 'FrozenNorms' if frozen else 'TinyClassifier'}
    run = runner(work_dir, [{**HOOK, **options}], iters=iters, model=model, every=iters)
    counter = Counter()
    run.register_hook(counter)
    run.train()
    return dyrep(run), [count / counter.counts[0] for count in counter.counts]


@pytest.mark.parametrize(
    ('frozen', 'most', 'depth'),
    [(False, 1.1, 1), (False, 1.6, 1), (False, 1.3, 2), (True, 1.01, 1), (True, 1.3, 2)],
)
def test_no_step_costs_more(tmp_path, frozen, most, depth):
    hook, ratios = trained(tmp_path, frozen=frozen, max_cost=most, max_depth=depth)
    entries = hook.journal
    assert any(entry.grown for entry in entries)
    assert max(ratios) <= most
    # The journal says what runs.
    said = [1.0, *(entry.cost_ratio for entry in entries)]
    assert said == pytest.approx(ratios[::2], rel=1e-12)


def test_without_a_budget_it_costs_more(tmp_path):
    hook, ratios = trained(tmp_path)
    assert max(ratios) > 2
    assert hook.journal[-1].cost_ratio == pytest.approx(ratios[-1], rel=1e-12)


def test_linear_blocks_leave_room_for_more(tmp_path):
    """At the same budget."""
    mixed, _ = trained(tmp_path / 'mixed', max_cost=1.3)
    linear, _ = trained(tmp_path / 'linear', frozen=True, max_cost=1.3)
    assert linear.journal[-1].branches > mixed.journal[-1].branches


def test_pruning_makes_room(tmp_path):
    """Branches grow on, where room comes from the weaker ones of blocks."""
    hook, ratios = trained(tmp_path, max_cost=1.8)
    assert any(entry.pruned and entry.grown for entry in hook.journal)
    assert max(ratios) <= 1.8
    assert hook.journal[-1].blocks


def test_a_start_above_the_budget_is_brought_back(tmp_path):
    start = {f'backbone.{name}': ['kxk', '1x1', '1xk', 'kx1'] for name in ('conv1', 'conv2')}
    hook, ratios = trained(tmp_path, structure=start, max_cost=1.1, iters=5)
    entry = hook.journal[0]
    assert entry.pruned
    assert ratios[0] / ratios[2] > 1.2
    assert entry.cost_ratio <= 1.1


@pytest.mark.parametrize('frozen', [False, True])
def test_resume_is_bit_equal(tmp_path, frozen):
    hook = {**HOOK, 'max_cost': 1.4}

    def run(folder, **more):
        model = {'type': 'FrozenNorms' if frozen else 'TinyClassifier'}
        return runner(tmp_path / folder, [hook], iters=16, model=model, **more)

    run('whole').train()
    stopped = run('killed')

    def stop(at):
        if at.iter + 1 == 7:
            raise KeyboardInterrupt

    call_at(stopped, stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    run('killed', resume=True).train()
    whole, again = (
        load_checkpoint(tmp_path / name / 'iter_16.pth') for name in ('whole', 'killed')
    )
    assert_equal_states(whole['state_dict'], again['state_dict'])
    records = (without_times(saved['meta']['dyrep_mm']) for saved in (whole, again))
    assert next(records) == next(records)
    entries = journal(tmp_path / 'killed' / 'iter_16.pth')
    assert len(entries) == 7
    assert all(1 <= entry.cost_ratio <= 1.4 for entry in entries)


def test_a_checkpoint_that_does_not_know_the_batch(tmp_path):
    """Of a version before budgets: the sizes are looked at again."""
    runner(tmp_path, [HOOK], iters=4, every=1).train()
    file = tmp_path / 'iter_3.pth'
    checkpoint = load_checkpoint(file)
    assert checkpoint['dyrep_mm'].pop('images') == 4
    assert checkpoint['dyrep_mm'].pop('autocast') is False
    torch.save(checkpoint, file)
    again = runner(tmp_path, [{**HOOK, 'max_cost': 9.0}], iters=8, load_from=str(file), resume=True)
    again.train()
    assert Record.from_checkpoint(load_checkpoint(tmp_path / 'iter_8.pth')).images == 4
    assert dyrep(again).journal[-1].cost_ratio > 1
