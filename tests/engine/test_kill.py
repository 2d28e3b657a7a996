"""A run that is killed and resumed, again and again, is the run that was never killed.

``DYREP_KILLS`` sets how many kills the slow test makes; ``make soak`` runs it with more.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dyrep_mm.engine.checkpoint import is_whole, latest_checkpoint, load_checkpoint
from dyrep_mm.engine.stock import BRANCHES
from support.checks import assert_equal_data, without_times
from support.processes import start_worker

KILLS = int(os.environ.get('DYREP_KILLS', '20'))
LAST = {
    'iterations': 'iter_24.pth',
    'search': 'iter_24.pth',
    'epochs': 'epoch_6.pth',
    'accumulating': 'epoch_6.pth',
}


def start(work_dir: Path, kind: str, *mode: str) -> subprocess.Popen:
    return start_worker('killed', work_dir, kind, *mode, stdout=subprocess.PIPE, text=True)


def finish(work_dir: Path, kind: str) -> str:
    """Let a run come to its end; what it printed."""
    process = start(work_dir, kind)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-3000:]
    return printed


def kill(process: subprocess.Popen) -> bool:
    """SIGKILL; whether the process had not ended before."""
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), 'a resumed run failed'
    return process.returncode != 0


def content(path: Path) -> dict:
    """Weights, averages, optimizer, structure, journal and scores of a checkpoint."""
    saved = load_checkpoint(path)
    kept = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'dyrep_mm', BRANCHES)
    meta = {key: saved['meta'][key] for key in ('epoch', 'iter', 'dyrep_mm', BRANCHES)}
    meta = without_times(meta)
    return {'meta': meta, **{key: saved[key] for key in kept if key in saved}}


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Callable[[str], Path]:
    """Runs that are never killed, each made when it is asked for."""
    folder = tmp_path_factory.mktemp('whole')

    @functools.cache
    def make(kind: str) -> Path:
        finish(folder / kind, kind)
        return folder / kind

    return make


def assert_never_killed(work_dir: Path, whole: Path, kind: str) -> int:
    """The run in ``work_dir`` ended as the one in ``whole``; counts the tensors compared."""
    expected, actual = content(whole / LAST[kind]), content(work_dir / LAST[kind])
    assert expected['meta']['dyrep_mm']['structure']
    assert expected['dyrep_mm']['updates'] >= 5
    return assert_equal_data(expected, actual)


SLOW = pytest.param('search', marks=pytest.mark.slow)  # its resumes are tested elsewhere too


@pytest.mark.parametrize('kind', [*(kind for kind in LAST if kind != 'search'), SLOW])
def test_killed_while_it_writes_and_while_it_edits(tmp_path, whole, kind):
    """Kills at the two worst moments, at which the process waits for them."""
    work_dir = tmp_path / 'run'
    for moment in ('edits', 'writes'):
        process = start(work_dir, kind, moment)
        printed = []
        while printed[-1:] not in (['waits\n'], ['']):
            printed.append(process.stdout.readline())
        assert kill(process), ''.join(printed[-30:])
        assert all(map(is_whole, work_dir.glob('*.pth'))) is (moment == 'edits')
    finish(work_dir, kind)
    assert assert_never_killed(work_dir, whole(kind), kind) > 50


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize('kind', LAST)
def test_killed_at_random(tmp_path, whole, kind, capsys):
    """As many runs as it takes, each killed several times, where chance has it."""
    chance = random.Random(os.environ.get('DYREP_SEED', kind))
    kills = runs = tensors = torn = 0
    while kills < KILLS:
        work_dir = tmp_path / str(runs)
        for _ in range(chance.randint(1, 5)):
            process = start(work_dir, kind, 'slow')
            process.stdout.readline()  # the runner is built
            time.sleep(chance.uniform(0, 2.5))
            if not kill(process):
                break
            kills += 1
            torn += not all(map(is_whole, work_dir.glob('*.pth')))
        finish(work_dir, kind)
        tensors += assert_never_killed(work_dir, whole(kind), kind)
        runs += 1
    with capsys.disabled():
        print(
            f'\n{kind}: survived {kills} kills in {runs} runs, {torn} left a torn checkpoint; '
            f'compared {tensors} tensors with the run never killed, all equal'
        )


# What the newest file may look like.


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two checkpoints and the pointer to the second."""
    for i, name in enumerate(('iter_5.pth', 'iter_10.pth', 'best_loss_iter_10.pth')):
        torch.save({'meta': {'iter': i}, 'state_dict': {}}, tmp_path / name)
        os.utime(tmp_path / name, (i, i))
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_10.pth'))
    return tmp_path


@pytest.mark.parametrize('cut', [0, 1, 100, -1])
def test_torn_file(folder, cut):
    file = folder / 'iter_10.pth'
    assert latest_checkpoint(folder) == str(file)
    file.write_bytes(file.read_bytes()[:cut])
    assert not is_whole(file)
    assert latest_checkpoint(folder) == str(folder / 'iter_5.pth')


def test_file_that_is_gone(folder):
    (folder / 'iter_10.pth').unlink()
    assert latest_checkpoint(folder) == str(folder / 'iter_5.pth')


def test_torn_pointer(folder):
    for text in ('', str(folder / 'iter_1')):
        (folder / 'last_checkpoint').write_text(text)
        assert latest_checkpoint(folder) == str(folder / 'iter_10.pth')


def test_no_pointer(folder):
    """Someone took it away: mmengine starts anew then, and so do we."""
    (folder / 'last_checkpoint').unlink()
    assert latest_checkpoint(folder) is None


def test_nothing_is_whole(folder):
    for file in folder.glob('iter_*.pth'):
        file.write_bytes(b'half')
    assert latest_checkpoint(folder) is None  # a best checkpoint cannot resume a run


def test_checkpoints_elsewhere(folder, tmp_path_factory):
    """``CheckpointHook(out_dir=...)`` leaves only the pointer in the work folder."""
    work_dir = tmp_path_factory.mktemp('work')
    (folder / 'last_checkpoint').rename(work_dir / 'last_checkpoint')
    assert latest_checkpoint(work_dir) == str(folder / 'iter_10.pth')
    (folder / 'iter_10.pth').write_bytes(b'half')
    assert latest_checkpoint(work_dir) == str(folder / 'iter_5.pth')
    (work_dir / 'last_checkpoint').write_text('s3://bucket/iter_10.pth')
    assert latest_checkpoint(work_dir) == 's3://bucket/iter_10.pth'  # not ours to judge
