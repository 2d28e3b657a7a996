"""Runs that go on: resumed, loaded, with other settings, from the command line."""

from __future__ import annotations

import pytest
import torch

from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.surgery.structure import structure_of
from support.checks import assert_equal_states, assert_same_run
from support.processes import run_tool
from support.runs import (
    FAST,
    PRUNING,
    call_at,
    dyrep,
    journal,
    runner,
    updates,
    with_branches,
    write_config,
)


@pytest.mark.parametrize('at', range(1, 9))
def test_resumed_at_any_iteration(tmp_path, made, at):
    """In the middle of an interval the scores that were gathered so far count."""
    whole = runner(tmp_path / 'whole', [dict(PRUNING)], iters=9)
    whole.train()
    file = made / f'iter_{at}.pth'
    scores = load_checkpoint(file)['dyrep_mm']['scores']
    assert set(scores['counts'].tolist()) == {at % 2}
    run = runner(tmp_path, [dict(PRUNING)], iters=9, load_from=str(file), resume=True)
    run.train()
    assert_same_run(whole, run)


def test_resumed_with_other_settings(tmp_path, made):
    """What was grown stays; from then on the new settings count."""
    file = made / 'iter_5.pth'
    grown = load_checkpoint(file)['meta']['dyrep_mm']['structure']
    hook = {**FAST, 'interval': 3, 'metric': 'snip', 'branches': ['1x1'], 'prune': False}
    run = runner(tmp_path, [hook], iters=9, load_from=str(file), resume=True)
    run.train()
    assert updates(tmp_path / 'iter_9.pth') == [2, 4, 6]
    entry = journal(tmp_path / 'iter_9.pth')[-1]
    assert list(entry.grown.values()) == [['kxk', '1x1']]
    assert not entry.pruned
    assert structure_of(run.model) == {**grown, **entry.grown}


def test_resumed_with_an_interval_of_none(tmp_path, made):
    """The structure stays as it is and goes on training."""
    file = made / 'iter_5.pth'
    hook = {'type': 'dyrep_mm.DyRepHook', 'interval': None, 'structure': 'dbb'}
    run = runner(tmp_path, [hook], iters=9, load_from=str(file), resume=True)
    run.train()
    assert journal(tmp_path / 'iter_9.pth') == journal(file)
    assert structure_of(run.model) == load_checkpoint(file)['meta']['dyrep_mm']['structure']


def test_resumed_with_another_unit(tmp_path, made):
    """Iterations become epochs: the next update is at the next multiple of the interval."""
    hook = {**PRUNING, 'interval': 1, 'by_epoch': True}
    runner(tmp_path / 'first', [{**PRUNING, 'by_epoch': False}], epochs=5).train()
    file = tmp_path / 'first/epoch_2.pth'
    assert updates(file) == [2, 4, 6, 8]
    runner(tmp_path, [hook], epochs=5, load_from=str(file), resume=True).train()
    entries = journal(tmp_path / 'epoch_5.pth')
    assert [entry.at if entry.unit == 'iteration' else -entry.at for entry in entries] == [
        2, 4, 6, 8, -3, -4,
    ]  # fmt: skip


@pytest.mark.parametrize('interval', [2, 4])
def test_resumed_from_a_plain_checkpoint(tmp_path, made, interval):
    """It starts to grow at the next multiple of the interval, not at once."""
    hook = {**PRUNING, 'interval': interval}
    file = made / 'plain/iter_5.pth'
    run = runner(tmp_path, [hook], iters=9, load_from=str(file), resume=True)
    seen = []
    call_at(run, lambda run: seen.append(bool(structure_of(run.model))))
    run.train()
    due = {2: [6, 8], 4: [8]}[interval]
    assert updates(tmp_path / 'iter_9.pth') == due
    assert seen.index(True) == due[0] - 6  # it began with iteration 6


@pytest.mark.parametrize('file', ['iter_5.pth', 'plain/iter_5.pth'])
@pytest.mark.parametrize('start', [None, {'backbone.conv2': ['kxk', '1x1']}])
def test_loaded_not_resumed(tmp_path, made, file, start):
    """`load_from` takes weights and structure, and starts counting anew; a structure of the
    config is for what has none of its own."""
    hook = {**FAST, 'structure': start}
    run = runner(tmp_path, [hook], iters=5, load_from=str(made / file))
    seen = []
    call_at(run, lambda run: seen.append(structure_of(run.model)), 'before_train')
    weights = with_branches(made / file)
    structure = weights['meta'].get('dyrep_mm', {}).get('structure')
    if structure is not None:
        call_at(
            run,
            lambda run: assert_equal_states(run.model.state_dict(), weights['state_dict']),
            'before_train',
        )
    run.train()
    assert seen == [structure or start or {}]
    assert updates(tmp_path / 'iter_5.pth') == [2, 4]
    assert journal(tmp_path / 'iter_5.pth')[0].update == 1


def test_other_metric_or_scope_drops_the_scores(tmp_path, made):
    for other in ({'metric': 'snip'}, {'scope': 'backbone.conv1'}):
        run = runner(
            tmp_path, [{**PRUNING, **other}], iters=9, load_from=str(made / 'iter_5.pth'),
            resume=True, log_level='WARNING',
        )  # fmt: skip
        said = []
        run.logger.warning = said.append
        run.train()
        assert any('starts without its scores' in line for line in said)


# The end of the changes


@pytest.mark.parametrize(('end', 'expected'), [(6, [2, 4, 6]), (7, [2, 4, 6]), (1, [])])
def test_no_update_after_the_end(tmp_path, end, expected):
    run = runner(tmp_path, [{**PRUNING, 'end': end}], iters=9)
    gathered = []
    call_at(run, lambda run: gathered.append(dyrep(run).rule.score.counts.max().item()))
    run.train()
    assert updates(tmp_path / 'iter_9.pth') == expected
    assert not any(gathered[end + 1 :])  # nothing is scored for no use


def test_end_with_updates_that_wait(tmp_path):
    """With accumulation over 2 the update due at 5 waits until 6; the last one is still at 10."""
    wrapper = {'optimizer': {'type': 'SGD', 'lr': 0.05}, 'accumulative_counts': 2}
    hook = {**PRUNING, 'interval': 5, 'end': 10}
    runner(tmp_path, [hook], iters=18, every=18, optim_wrapper=wrapper).train()
    assert updates(tmp_path / 'iter_18.pth') == [6, 10]


# The command line


def test_a_config_without_the_hook(tmp_path, made):
    """It cannot go on with the branches, and our tools say so; it can start from the weights. What
    has its branches among its weights, as a bare `state_dict`, it cannot take at all."""
    plain = write_config(tmp_path / 'plain.py', None)
    file, bare = made / 'iter_5.pth', tmp_path / 'bare.pth'
    torch.save({'state_dict': with_branches(file)['state_dict']}, bare)
    for flags in (('--resume', file), ('--cfg-options', f'load_from={bare}')):
        said = run_tool('train', plain, '--work-dir', tmp_path / 'out', *flags, code=1)
        assert 'no DyRepHook to rebuild it' in said.splitlines()[-1]
        assert 'Traceback' not in said
    assert not (tmp_path / 'out').exists()
    flags = '--work-dir', tmp_path / 'out', '--cfg-options', f'load_from={file}', 'log_level=INFO'
    said = run_tool('train', plain, *flags)
    assert 'unexpected key' not in said
    assert 'missing keys' not in said
    assert (tmp_path / 'out/iter_9.pth').exists()


def test_resume_auto_after_a_kill(tmp_path, made):
    """With a plain config too: the fallback is in the tool as well as in the hook."""
    work_dir = tmp_path / 'plain'
    config = write_config(tmp_path / 'plain.py', None)
    runner(work_dir, iters=9).train()
    whole = load_checkpoint(work_dir / 'iter_9.pth')
    (work_dir / 'iter_9.pth').write_bytes(b'half')
    said = run_tool('train', config, '--resume', 'auto')
    assert f'resuming from {work_dir / "iter_8.pth"}' in said
    assert_equal_states(load_checkpoint(work_dir / 'iter_9.pth')['state_dict'], whole['state_dict'])


def test_a_named_file_that_is_torn_is_an_error(tmp_path, made):
    """Only `--resume auto` may choose another."""
    config = write_config(tmp_path / 'config.py', [dict(PRUNING)])
    torn = tmp_path / 'torn.pth'
    torn.write_bytes((made / 'iter_9.pth').read_bytes()[:9999])
    said = run_tool('train', config, '--resume', torn, code=1)
    assert 'torn.pth is truncated' in said.splitlines()[-1]
