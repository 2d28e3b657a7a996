"""Two processes on the CPU: what DDP must still guarantee when the model changes shape."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.runner import FlexibleRunner

from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.errors import DyRepError
from support.checks import without_times
from support.processes import call, environment, run_ranks
from support.runs import FAST, PRUNING, runner, settings


@pytest.fixture(scope='module')
def reports(tmp_path_factory) -> list[dict]:
    """All cases of ``support.ranks`` in two processes; what each of them reports."""
    return run_ranks(tmp_path_factory.mktemp('ranks'))


def assert_in_step(first: dict, second: dict, iters: int = 9, updates: int = 4) -> None:
    """Weights and structure were the same on both ranks after every iteration."""
    assert first['inputs'] != second['inputs']  # each has its own data
    assert len(first['weights']) == iters
    assert len(set(first['weights'])) > updates
    assert first['weights'] == second['weights']
    assert first['structure'] == second['structure']
    assert first['journal'] == second['journal']
    assert len(first['journal']) == updates


@pytest.mark.parametrize('case', ['average', 'scores', 'accumulate', 'fixed'])
def test_ranks_stay_in_step(reports, case):
    """With an average beside the model; with ranks that disagree on what to grow; with
    gradients that are accumulated before they are averaged; with fixed norms of branches."""
    first, second = (report[case] for report in reports)
    assert_in_step(first, second, *((10, 4) if case == 'accumulate' else ()))
    assert any(entry['pruned'] for entry in first['journal'])


def test_fixed_statistics_are_the_same_everywhere(reports):
    first, second = (report['fixed'] for report in reports)
    assert first['statistics'] == second['statistics']


def test_ranks_search_together(reports):
    """The same branches are on and the same alphas learn, though not every parameter has a gradient
    in every iteration and DDP looks for no unused ones."""
    first, second = (report['search'] for report in reports)
    assert_in_step(first, second, updates=2)
    assert first['masks'] == second['masks']
    assert {sum(mask) for mask in first['masks'][:6]} == {8}
    assert len(first['alphas']) == 5
    assert first['alphas'] == second['alphas']
    assert any(first['alphas'][-1])
    assert first['journal'][-1]['pruned']


def test_a_sample_of_all_processes(reports):
    assert all(report['sampled']['apart'] < 1e-10 for report in reports)


def test_ranks_with_seeds_of_their_own(reports):
    first, second = (report['seeds'] for report in reports)
    assert first['own'] != second['own']
    assert_in_step(first, second)
    assert len(first['unwrapped']) == 4
    assert first['unwrapped'] == second['unwrapped']


def test_ranks_share_the_losses_of_a_score(reports):
    """Each rank has the mean over the batches of both."""
    first, second = (report['losses'] for report in reports)
    assert_in_step(first, second)
    assert first['scores'] == second['scores']
    assert all(len(set(scores.values())) > 1 for scores in first['scores'])


def test_ranks_agree_on_what_stays_plain(reports):
    """One rank meets activations that are not finite: neither grows that conv. One rank does not
    call another conv: the other one has measured it, and both grow it."""
    first, second = (report['uneven'] for report in reports)
    assert_in_step(first, second)
    assert first['left_alone'] == second['left_alone']
    assert list(first['left_alone']) == ['backbone.conv2']
    grown = {f'backbone.{name}' for name in ('conv1', 'conv3', 'dw')}
    assert set(first['structure'][-1]) == set(first['journal'][0]['grown']) == grown


def test_wrapper_survives(reports):
    """Every wrapper has the settings and communication hook of the first."""
    first, second = (report['wrapper'] for report in reports)
    assert_in_step(first, second)
    assert len(first['wrapper']) == 9
    for wrapper in first['wrapper']:
        assert wrapper == {
            'type': 'MMDistributedDataParallel',
            'find_unused_parameters': False,
            'broadcast_buffers': False,
            'gradient_as_bucket_view': True,
            'bucket_bytes_cap': 1024**2,
            'detect_anomalous_params': True,
            'communication_hooks': 1,
        }
    # The hook was given the gradient of every parameter there was, once per iteration.
    at_step = [first['parameters'][0], *first['parameters'][:-1]]
    assert first['communicated'] == second['communicated'] == at_step
    assert at_step[-1] > at_step[0]  # how many follows from what grew and what was pruned


def test_resumed_together(reports):
    """Every rank resumes from the same file, and goes on as if nothing had happened."""
    first, second = (report['resume'] for report in reports)
    assert len(first['again']) == 3
    assert first['again'] == second['again'] == first['whole'][6:]


def test_a_loss_that_one_rank_sees(reports):
    """All ranks wait together, and all say it."""
    first, second = (report['loss'] for report in reports)
    assert_in_step(first, second)
    assert [entry['at'] for entry in first['journal']] == [2, 5, 6, 8]
    assert first['said'] == second['said']
    assert len(first['said']) == 1
    assert 'the loss is nan at iteration 4;' in first['said'][0]


def test_ranks_stop_together(reports):
    first, second = (report['stop'] for report in reports)
    assert first == second
    assert first['iter'] == 3  # within iteration 4
    assert first['said'].startswith('the loss is nan at iteration 4: training cannot go on')


def test_wrappers_that_are_refused(reports):
    first, second = (report['refuse'] for report in reports)
    assert first == second
    for name, said in first.items():
        assert said == f'DyRepHook does not work with {name}; use MMDistributedDataParallel'
    assert len(first) == 2


def test_from_the_command_line(tmp_path):
    """``tools/dist_train.sh`` without an accelerator, then again with ``--resume auto``."""
    config = tmp_path / 'config.py'
    arguments = settings(tmp_path / 'run', [dict(PRUNING)], iters=8, every=2)
    arguments['custom_imports'] = {'imports': ['support.runs', 'support.at_exit']}
    del arguments['work_dir'], arguments['log_level']
    Config(arguments).dump(config)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    variables = environment(PORT=str(port), PATH=path)

    def launch(*flags: str) -> str:
        command = ['bash', 'tools/dist_train.sh', config, '2', '--work-dir', tmp_path, *flags]
        return call(*command, env=variables)

    log = launch()
    assert log.count('DyRep update') == 3  # rank 0 alone tells
    assert log.count('process group at exit: none') == 2
    whole = load_checkpoint(tmp_path / 'iter_8.pth')
    (tmp_path / 'iter_8.pth').write_bytes(b'half')
    log = launch('--resume', 'auto')
    assert 'resuming from' in log
    again = load_checkpoint(tmp_path / 'iter_8.pth')
    assert without_times(again['meta']['dyrep_mm']) == without_times(whole['meta']['dyrep_mm'])
    assert all((again['state_dict'][n] == t).all() for n, t in whole['state_dict'].items())


@pytest.mark.parametrize('moment', ['before_run', 'after_load_checkpoint'])
def test_flexible_runner_is_refused(tmp_path, moment):
    """All strategies (FSDP, DeepSpeed, ColossalAI) come with it, and it loads checkpoints
    before it calls ``before_run``."""
    run = runner(tmp_path, [FAST], iters=4, every=2)
    run.train()
    arguments = settings(tmp_path / 'flexible', [dict(FAST)], iters=4)
    if moment == 'after_load_checkpoint':
        arguments['load_from'] = str(tmp_path / 'iter_4.pth')
    flexible = FlexibleRunner(**{**arguments, 'strategy': {'type': 'SingleDeviceStrategy'}})
    with pytest.raises(DyRepError, match="does not work with FlexibleRunner; use mmengine's Run"):
        flexible.train()


@pytest.mark.parametrize(
    ('setting', 'word'),
    [
        ({'compile': True}, 'compile'),
        ({'compile': {}}, 'compile'),
        ({'compile': {'backend': 'eager'}}, 'compile'),
        ({'efficient_conv_bn_eval': ['backbone']}, 'efficient_conv_bn_eval'),
    ],
)
def test_what_captures_the_model_is_refused(tmp_path, setting, word):
    run = runner(tmp_path, [FAST], iters=4)
    run.cfg.merge_from_dict(setting)
    with pytest.raises(DyRepError, match=f'does not work with {word}; use'):
        run.train()
    assert not list(tmp_path.glob('*.pth'))


def test_several_optimizers_are_refused(tmp_path):
    part = {'optimizer': {'type': 'SGD', 'lr': 0.1}}
    run = runner(tmp_path, [FAST], iters=4)
    both = {
        name: build_optim_wrapper(getattr(run.model, name), part) for name in ('backbone', 'head')
    }
    run.optim_wrapper = OptimWrapperDict(**both)
    run.param_schedulers = None
    with pytest.raises(DyRepError, match='OptimWrapperDict'):
        run.train()


@pytest.mark.parametrize('name', ['ZeroRedundancyOptimizer', 'ApexOptimWrapper'])
def test_foreign_optimizers_are_refused(tmp_path, name):
    """By name: what they come from is not installed, or wants several processes."""
    run = runner(tmp_path, [FAST], iters=4)
    run.optim_wrapper = run.build_optim_wrapper(run.optim_wrapper)
    foreign = run.optim_wrapper.optimizer if name.startswith('Zero') else run.optim_wrapper
    foreign.__class__ = type(name, (type(foreign),), {})
    with pytest.raises(DyRepError, match=f'does not work with {name}; use'):
        run.train()
