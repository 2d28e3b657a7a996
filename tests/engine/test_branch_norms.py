"""The three choices of ``branch_norm`` in real runs."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from torch import nn

from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Record
from dyrep_mm.surgery.tree import blocks_of
from support.checks import assert_equal_states, assert_same_run
from support.nets import image
from support.runs import PRUNING, call_at, dyrep, resnet_runner, runner

MODES = ['batch', 'fixed', 'sampled']


def hook(branch_norm: str, **more) -> dict:
    return {**PRUNING, 'metric': 'snip', 'branch_norm': branch_norm, **more}


def modes_of(model: nn.Module) -> set[str]:
    return {block.branch_norm for block in blocks_of(model).values()}


@pytest.mark.parametrize('branch_norm', MODES)
def test_resumed_in_each_mode(tmp_path, branch_norm):
    """Weights, averages, momentum, journal and scores are the same bit for bit."""
    hooks = [hook(branch_norm), {'type': 'EMAHook', 'momentum': 0.2}]
    whole = runner(tmp_path / 'whole', hooks, iters=9)
    whole.train()
    assert any(entry.pruned for entry in dyrep(whole).journal)
    assert modes_of(whole.model) == {branch_norm}
    for at in (3, 6):
        file = tmp_path / f'whole/iter_{at}.pth'
        assert Record.from_checkpoint(load_checkpoint(file)).branch_norm == branch_norm
        run = runner(tmp_path / str(at), hooks, iters=9, load_from=str(file), resume=True)
        run.train()
        assert_same_run(whole, run)
        averages = [h.ema_model for r in (whole, run) for h in r.hooks if isinstance(h, EMAHook)]
        assert_equal_states(*(average.state_dict() for average in averages))


@pytest.mark.parametrize('then', MODES)
@pytest.mark.parametrize('first', MODES)
def test_resumed_in_another_mode(tmp_path, first, then):
    runner(tmp_path / 'first', [hook(first)], iters=4).train()
    file = tmp_path / 'first/iter_4.pth'
    run, said = runner(tmp_path, [hook(then)], iters=7, load_from=str(file), resume=True), []
    run.logger.info = lambda line, *_: said.append(line)
    frozen = []
    call_at(run, lambda run: frozen.append([b.is_linear for b in blocks_of(run.model).values()]))
    run.train()
    told = f"go on with branch_norm='{then}', the checkpoint has '{first}'"
    assert any(told in line for line in said) == (first != then)
    assert modes_of(run.model) == {then}
    assert all(set(linear) == {then == 'fixed'} for linear in frozen)


def test_a_checkpoint_of_before_has_batch_statistics():
    record = Record.from_checkpoint({'meta': {'dyrep_mm': {'structure': {}}}, 'dyrep_mm': {}})
    assert record.branch_norm == 'batch'
    wrong = {'meta': {'dyrep_mm': {'structure': {}}}, 'dyrep_mm': {'branch_norm': 'scale'}}
    with pytest.raises(DyRepError, match='malformed: branch_norm'):
        Record.from_checkpoint(wrong)


@pytest.mark.parametrize(
    'option', [{'branch_norm': 'scale'}, {'branch_norm': None}, {'remeasure': -1}], ids=str
)
def test_options_without_meaning(tmp_path, option):
    with pytest.raises(DyRepError, match=next(iter(option))):
        runner(tmp_path, [{**PRUNING, **option}], iters=2).train()


@torch.no_grad()
def loss_of(model: nn.Module, batch: dict) -> float:
    """In train mode and double precision; nothing is changed."""
    twin = copy.deepcopy(model).double().train()
    data = twin.data_preprocessor(copy.deepcopy(batch), True)
    data['inputs'] = data['inputs'].double()
    return sum(v.item() for v in twin(**data, mode='loss').values())


def test_an_update_does_not_change_the_training_loss(tmp_path):
    """Of a ResNet-18 whose BNs train, in double precision: measuring again, pruning, and growing,
    also inside of blocks; nor does it change what the average computes."""
    options = hook('fixed', interval=2, grow_per_update=4, calibration_batches=2)
    del options['type']
    run = resnet_runner(tmp_path, hook=options, iters=9)
    run.register_hook(EMAHook(momentum=0.2))
    batch = next(iter(run.build_dataloader(run._train_dataloader)))
    made = dyrep(run)
    update, changes = made.update, []

    def watched(runner: Runner):
        (average,) = (h.ema_model for h in runner.hooks if isinstance(h, EMAHook))
        x = image(2, 3, 32, 32)

        def look() -> tuple:
            twin = copy.deepcopy(average.module).double().eval()
            return loss_of(runner.model, batch), twin(x, mode='tensor')[0].detach()

        before = look()
        plan = update(runner)
        after = look()
        scale = before[1].abs().max()
        changes.append((abs(after[0] - before[0]) / before[0],))
        changes[-1] += ((after[1] - before[1]).abs().max() / scale,)
        return plan

    made.update = watched
    run.train()
    assert len(changes) == 4
    for changed in changes:
        assert max(changed) < 1e-5, changes  # the run is in single precision
    assert sum(len(entry.pruned) for entry in made.journal) > 1
    assert any('branches' in path for entry in made.journal for path in entry.grown)


@pytest.mark.parametrize(('every', 'measured'), [(0, []), (1, [1, 2, 3, 4]), (2, [2, 4])])
def test_how_often_blocks_are_measured_again(tmp_path, every, measured):
    run = runner(tmp_path, [hook('fixed', remeasure=every, prune=False)], iters=9)
    made = dyrep(run)
    decide = made.rule.decide
    before = {}

    def remember(run):
        for path, block in blocks_of(run.model).items():
            before[path] = [n.running_mean.clone() for n in block.added_norms]

    call_at(run, remember, 'after_train_iter', 'VERY_HIGH')
    moved = []

    def decide_and_compare(model, generator):
        now = {p: [n.running_mean for n in b.added_norms] for p, b in blocks_of(model).items()}
        changed = any(
            not torch.equal(a, b) for p in now for a, b in zip(now[p], before[p], strict=True)
        )
        if changed:
            moved.append(len(made.journal) + 1)
        return decide(model, generator)

    made.rule.decide = decide_and_compare
    run.train()
    assert moved == [number for number in measured if number > 1]


def test_branches_can_be_exempt_from_decay(tmp_path):
    """As docs/norms.md has it."""
    keys = {'branches': {'decay_mult': 0}, 'branches.kxk.weight': {'decay_mult': 1}}
    wrapper = {
        'optimizer': {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9, 'weight_decay': 1e-4},
        'paramwise_cfg': {'norm_decay_mult': 0, 'custom_keys': keys},
    }
    run = runner(tmp_path, [hook('fixed', prune=False)], iters=5, optim_wrapper=wrapper)
    run.train()
    decays = {
        id(p): group['weight_decay']
        for group in run.optim_wrapper.optimizer.param_groups
        for p in group['params']
    }
    blocks = blocks_of(run.model)
    assert len(blocks) == 2
    origins = {id(block.origin.weight) for block in blocks.values()}
    for block in blocks.values():
        assert decays[id(block.origin.weight)] == 1e-4
        for branch in block.added:
            inside = [p for p in branch.parameters() if id(p) not in origins]
            assert {decays[id(p)] for p in inside} == {0.0}
