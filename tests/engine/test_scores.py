"""Every score in a real run: resumed, and with batches of its own."""

import pytest
import torch
from mmengine.registry import DATASETS, MODELS
from torch import nn
from torch.utils.data import IterableDataset

from dyrep_mm import DyRepHook
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.saliency import SCORES
from dyrep_mm.surgery.structure import structure_of
from support.checks import assert_equal_states, assert_same_run
from support.runs import PRUNING, Images, TinyClassifier, call_at, dyrep, runner, settings


@pytest.mark.parametrize(
    ('metric', 'branches'), [*((m, None) for m in SCORES), ('snip', 'best'), ('gain', 2)]
)
def test_resumed_in_the_middle_of_an_interval(tmp_path, metric, branches):
    """Bit for bit as if never interrupted, with scores of blocks among them."""
    hook = {**PRUNING, 'interval': 3, 'metric': metric, 'branches': branches}
    whole = runner(tmp_path, [dict(hook)], iters=11)
    whole.train()
    assert len(dyrep(whole).journal) == 3
    assert any('kxk' in path for entry in dyrep(whole).journal for path in entry.scores)
    file = tmp_path / 'iter_8.pth'
    run = runner(tmp_path / 'resumed', [dict(hook)], iters=11, load_from=str(file), resume=True)
    run.train()
    assert_same_run(whole, run)


def test_resumed_with_a_pick(tmp_path):
    """The score goes on, and the gains start to be gathered."""
    hook = {**PRUNING, 'interval': 4, 'metric': 'snip'}
    runner(tmp_path, [dict(hook)], iters=6).train()
    file = str(tmp_path / 'iter_2.pth')
    hook['branches'] = 1
    run = runner(tmp_path / 'resumed', [hook], iters=6, load_from=file, resume=True)
    counts = []
    call_at(run, lambda run: counts.append(dyrep(run).rule.score.counts.max().item()))
    run.train()
    assert counts[0] == 3
    assert [len(names) for names in dyrep(run).journal[0].grown.values()] == [2]


@pytest.mark.parametrize(('branches', 'most'), [('best', 6), (1, 1), (2, 2)])
def test_only_branches_that_pay(tmp_path, branches, most):
    hook = {**PRUNING, 'metric': 'gain', 'branches': branches, 'prune': False, 'max_depth': 1}
    run = runner(tmp_path, [hook], iters=7)
    run.train()
    blocks = structure_of(run.model)
    assert len(blocks) == 3
    sizes = [len(names) - 1 for names in blocks.values()]
    assert all(1 <= size <= most for size in sizes)
    assert branches == 'best' or set(sizes) == {most}


@pytest.mark.parametrize(
    ('branches', 'sentence'), [(0, 'at least 1'), ('worst', "or 'best'"), (1.5, "or 'best'")]
)
def test_picks_without_a_meaning(branches, sentence):
    with pytest.raises(DyRepError, match=sentence):
        DyRepHook(branches=branches)


@pytest.mark.parametrize('metric', ['grasp', 'vote'])
def test_training_does_not_notice_batches_of_a_score(tmp_path, metric):
    """The run is that of a metric that looks at nothing, random streams included."""
    states = {}
    for name in (metric, 'random'):
        hook = {**PRUNING, 'metric': name, 'grow_per_update': 0}
        runner(tmp_path / name, [hook], iters=5).train()
        states[name] = load_checkpoint(tmp_path / name / 'iter_5.pth')
    assert_equal_states(states[metric]['state_dict'], states['random']['state_dict'])
    scores = states[metric]['meta']['dyrep_mm']['journal'][0]['scores']
    assert len(set(scores.values())) > 1


def test_a_vote_counts_grasp_where_batches_can_be_drawn(tmp_path):
    run = runner(tmp_path, [{**PRUNING, 'metric': 'vote', 'interval': 1}], iters=2)
    run.train()
    ranks = dyrep(run).journal[0].scores
    assert sorted(4 * rank for rank in ranks.values()) == pytest.approx(
        sorted(round(4 * rank) for rank in ranks.values())
    )
    assert sum(ranks.values()) == pytest.approx(0 + 1 + 2 + 3)


class Once(torch.autograd.Function):
    """A map whose backward has no backward."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


@MODELS.register_module(force=True)
class OnceClassifier(TinyClassifier):
    def __init__(self):
        super().__init__()
        self.backbone.bn3 = nn.Sequential(self.backbone.bn3, OnceLayer())


class OnceLayer(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_a_model_without_second_derivatives(tmp_path):
    hook = {**PRUNING, 'metric': 'grasp'}
    run = runner(tmp_path, [hook], iters=3, model={'type': 'OnceClassifier'})
    with pytest.raises(DyRepError, match='metric=grasp needs second derivatives of the loss'):
        run.train()


@DATASETS.register_module()
class ScoreStream(IterableDataset):
    def __len__(self):  # for the log
        return 1000

    def __iter__(self):
        return (Images()[i % 16] for i in range(1000))


@pytest.mark.parametrize('metric', ['grasp', 'vote', 'gain'])
def test_where_no_batches_can_be_drawn(tmp_path, metric):
    loader = settings(tmp_path)['train_dataloader']
    loader |= {'dataset': {'type': 'ScoreStream'}, 'sampler': None}
    hook = {**PRUNING, 'metric': metric, 'calibration_batches': 0, 'by_epoch': False}
    run = runner(tmp_path, [hook], iters=3, train_dataloader=loader)
    if metric == 'grasp':
        with pytest.raises(DyRepError, match='metric=grasp needs batches of its own'):
            run.train()
        return
    run.train()
    assert dyrep(run).journal[0].scores
