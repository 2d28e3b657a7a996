"""When updates come: units, gradient accumulation, and what is said of too many."""

from __future__ import annotations

import re
import time

import pytest

from dyrep_mm.engine.transaction import Transaction
from dyrep_mm.errors import DyRepError
from support.checks import assert_same_run
from support.runs import FAST, PRUNING, call_at, dyrep, runner, settings, updates

IDLE = {**FAST, 'interval': 1, 'grow_per_update': 0, 'prune': False}


def wrapper(count: int) -> dict:
    return {'optimizer': {'type': 'SGD', 'lr': 0.05}, 'accumulative_counts': count}


def loader(iterations: int) -> dict:
    """Epochs of so many iterations."""
    given = settings('')['train_dataloader']
    return {**given, 'dataset': {'type': 'Images', 'length': 4 * iterations}}


def when(run) -> list[int]:
    """The iterations of a run in which there were updates."""
    hook, seen = dyrep(run), []
    update = hook.update

    def spy(run):
        seen.append(run.optim_wrapper.inner_count)
        return update(run)

    hook.update = spy
    return seen


# Gradient accumulation


@pytest.mark.parametrize(
    ('length', 'count', 'epochs', 'interval', 'iterations', 'at'),
    [
        (3, 1, 8, 1, [3, 6, 9, 12, 15, 18, 21], [1, 2, 3, 4, 5, 6, 7]),
        (3, 2, 8, 1, [4, 6, 10, 12, 16, 18, 22], [2, 2, 4, 4, 6, 6, 8]),
        (3, 4, 8, 1, [4, 8, 12, 16, 20], [2, 3, 4, 6, 7]),
        (3, 2, 8, 3, [10, 18], [4, 6]),
        (5, 2, 12, 1, [6, 10, 16, 20, 26, 30, 36, 40, 46, 50, 56], None),
        (5, 3, 12, 1, [6, 12, 15, 21, 27, 30, 36, 42, 45, 51, 57], None),
        (5, 4, 12, 1, [8, 12, 16, 20, 28, 32, 36, 40, 48, 52, 56], None),
        (5, 8, 12, 1, [8, 16, 24, 32, 40, 48, 56], None),
        (1, 3, 8, 1, [3, 6], [3, 6]),
        (3, 100, 8, 1, [], []),
    ],
)
def test_an_update_that_is_due_waits_for_the_next_step(
    tmp_path, length, count, epochs, interval, iterations, at
):
    """At an epoch's end if that ends with a step, else within the next epoch; two updates have
    steps in between, and none comes at the end of training."""
    run = runner(
        tmp_path,
        [{**IDLE, 'interval': interval}],
        epochs=epochs,
        every=100,
        train_dataloader=loader(length),
        optim_wrapper=wrapper(count),
    )
    seen = when(run)
    run.train()
    assert seen == iterations
    expected = [(i - 1) // length + 1 for i in iterations]
    assert at in (None, expected)
    assert updates(tmp_path / f'epoch_{epochs}.pth', 'epoch') == expected


@pytest.mark.parametrize('count', [1, 2, 3, 4, 7])
@pytest.mark.parametrize('interval', [2, 3, 5])
def test_updates_by_iteration_wait_too(tmp_path, interval, count):
    run = runner(
        tmp_path,
        [{**IDLE, 'interval': interval}],
        iters=20,
        every=100,
        optim_wrapper=wrapper(count),
    )
    seen = when(run)
    run.train()
    # The first step at or behind each multiple; several may wait for one.
    steps = {-(-due // count) * count for due in range(interval, 20, interval)}
    assert seen == updates(tmp_path / 'iter_20.pth') == sorted(s for s in steps if s < 20)


@pytest.mark.parametrize('epoch', [1, 2, 3, 4])
def test_resumed_with_an_update_that_waits(tmp_path, epoch):
    """The run goes on as the one that was never stopped. mmengine saves no gradients that wait for
    a step, so that run forgets them too."""
    more = {
        'epochs': 6,
        'train_dataloader': loader(3),
        'optim_wrapper': {**wrapper(2), 'optimizer': {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9}},
    }
    hook = {**PRUNING, 'interval': 1}
    whole = runner(tmp_path / 'whole', [hook], **more)

    def forget(run):
        if run.epoch + 1 == epoch:
            run.optim_wrapper.zero_grad()

    call_at(whole, forget, 'after_train_epoch')
    iterations = when(whole)
    whole.train()
    file = str(tmp_path / f'whole/epoch_{epoch}.pth')
    run = runner(tmp_path / 'again', [hook], **more, load_from=file, resume=True)
    again = when(run)
    run.train()
    assert iterations == [4, 6, 10, 12, 16]
    assert again == [i for i in iterations if i > 3 * epoch]
    assert_same_run(whole, run)


@pytest.mark.parametrize(
    ('end', 'expected'), [(1, []), (2, [2, 2]), (3, [2, 2]), (4, [2, 2, 4, 4])]
)
def test_nothing_changes_or_is_scored_after_the_end(tmp_path, end, expected):
    """An update that would have to wait until then falls out."""
    run = runner(
        tmp_path,
        [{**PRUNING, 'interval': 1, 'end': end}],
        epochs=6,
        train_dataloader=loader(3),
        optim_wrapper=wrapper(2),
    )
    counts = []
    call_at(run, lambda run: counts.append(dyrep(run).rule.score.counts.max().item()))
    run.train()
    assert updates(tmp_path / 'epoch_6.pth', 'epoch') == expected
    assert len(set(counts[3 * end :])) == 1


# Units


@pytest.mark.parametrize('by_epoch', [None, True])
def test_the_default_is_five_epochs(tmp_path, by_epoch):
    hook = {'type': 'dyrep_mm.DyRepHook', 'by_epoch': by_epoch, 'calibration_batches': 1}
    runner(tmp_path, [hook], epochs=11, every=11).train()
    assert updates(tmp_path / 'epoch_11.pth', 'epoch') == [5, 10]


@pytest.mark.parametrize(
    ('unit', 'batches', 'advised'),
    [
        # A twelfth of the training, 5 epochs of 4 iterations, ten times the calibration.
        ({'iters': 120}, 0, 10),
        ({'iters': 1200}, 1, 20),
        ({'iters': 1200}, 3, 30),
        ({'iters': 9}, 20, 4),
        ({'epochs': 30}, 0, 10),
    ],
)
def test_iterations_have_no_default(tmp_path, unit, batches, advised):
    hook = {'type': 'dyrep_mm.DyRepHook', 'calibration_batches': batches, 'by_epoch': False}
    if 'iters' in unit:
        del hook['by_epoch']
    run = runner(tmp_path, [hook], **unit)
    with pytest.raises(DyRepError, match=f'interval={advised} ') as error:
        run.train()
    assert '\n' not in str(error.value)
    assert not list(tmp_path.glob('*.pth'))
    assert said_at_the_start(tmp_path, {**hook, 'interval': advised}, **unit) is not None


def test_a_fixed_structure_needs_no_interval(tmp_path):
    hook = {'type': 'dyrep_mm.DyRepHook', 'interval': None, 'structure': 'dbb'}
    runner(tmp_path, [hook], iters=3).train()


# Too many


class Stop(Exception):
    """Ends a run."""


def listen(run) -> list[str]:
    said: list[str] = []
    run.logger.warning = lambda line, *_: said.append(line) if 'write' in line else None
    return said


def said_at_the_start(tmp_path, hook: dict, **more) -> list[str]:
    """Warnings before the first iteration of a run."""

    def stop(run):
        raise Stop

    run = runner(tmp_path, [hook], **more)
    said = listen(run)
    call_at(run, stop, 'before_train_iter')
    with pytest.raises(Stop):
        run.train()
    return said


@pytest.mark.parametrize(
    ('interval', 'batches', 'unit', 'advice'),
    [
        (1, 20, {'iters': 400}, 'write interval=40 or fewer'),  # an epoch has 4 batches
        (1, 2, {'iters': 400}, 'write interval=20 or fewer'),
        (2, 2, {'iters': 400}, 'write interval=20 or fewer'),
        (3, 2, {'iters': 400}, None),
        (1, 0, {'iters': 400}, None),
        (1, 2, {'iters': 9}, 'write fewer calibration_batches'),
        (1, 3, {'epochs': 40}, None),
        (1, 4, {'epochs': 40}, 'write interval=10 or fewer'),
        (2, 20, {'epochs': 40}, None),
    ],
)
def test_updates_no_further_apart_than_their_calibration(tmp_path, interval, batches, unit, advice):
    hook = {**FAST, 'interval': interval, 'calibration_batches': batches}
    said = said_at_the_start(tmp_path, hook, **unit)
    assert len(said) == (advice is not None)
    if advice:
        assert advice in said[0]
        assert f'interval={interval}, ' in said[0]
        number = re.search(r'write interval=(\d+)', advice)
        if number:  # the advice is good
            hook['interval'] = int(number[1])
            assert not said_at_the_start(tmp_path, hook, **unit)


@pytest.mark.parametrize(
    ('update', 'interval', 'unit', 'advice'),
    [
        # An iteration takes a second: 0.1 s of 3.1 s, 1 s of 4 s, ...
        (0.1, 3, {'iters': 20}, None),
        (1.0, 3, {'iters': 20}, r'25% of the time: write interval=9 or fewer'),
        (5.0, 3, {'iters': 20}, r'62% of the time: write fewer calibration_batches'),
        (0.4, 1, {'epochs': 5}, None),
        (1.0, 1, {'epochs': 5}, r'20% of the time: write interval=3 or fewer'),
    ],
)
def test_updates_that_take_more_than_a_tenth_of_the_time(
    tmp_path, monkeypatch, update, interval, unit, advice
):
    clock = 0.0

    def pass_time(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    change = Transaction.change

    def change_slowly(*args):
        pass_time(update)
        return change(*args)

    monkeypatch.setattr(time, 'monotonic', lambda: clock)
    monkeypatch.setattr(Transaction, 'change', change_slowly)
    hook = {**FAST, 'interval': interval, 'metric': 'snip'}
    for growing in (True, False):
        said = None
        hook['grow_per_update'] = int(growing)
        run = runner(tmp_path / str(growing), [hook], every=100, **unit)
        said = listen(run)
        call_at(run, lambda run: pass_time(1.0), 'before_train_iter')
        run.train()
        assert len(dyrep(run).journal) > 2
        assert len(said) == (growing and advice is not None)  # once
        assert not said or re.search(advice, said[0])
