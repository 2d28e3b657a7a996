"""The run that is killed: ``python -m support.killed WORK_DIR KIND [MODE]``; resumes by itself.

``slow`` stretches what a kill should hit: updates, and the writing of checkpoints. ``edits`` and
``writes`` say that they are in the middle of one and wait there: no kill comes too late.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mmengine.fileio import LocalBackend

from dyrep_mm.engine.transaction import Transaction
from support.runs import PRUNING, SEARCH, call_at, runner

PIECES = 8
#: What a run of each kind is made of.
KINDS = {
    'iterations': {'iters': 24, 'every': 5},  # not a multiple of the interval of 2
    'search': {'iters': 24, 'every': 5},
    # It also writes best checkpoints, and then the last one anew.
    'epochs': {
        'epochs': 6,
        'val': 1,
        'default_hooks': {
            'checkpoint': {
                'type': 'CheckpointHook',
                'interval': 1,
                'save_best': 'loss',
                'rule': 'less',
                'max_keep_ckpts': 3,
            }
        },
    },
    # Updates wait for steps within the next epoch. A checkpoint is at every third, which ends
    # with a step: mmengine saves no gradients that wait for one.
    'accumulating': {
        'epochs': 6,
        'every': 3,
        'optim_wrapper': {
            'optimizer': {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9},
            'accumulative_counts': 3,
        },
    },
}


def write_slowly(self, obj: bytes, filepath: str | Path) -> None:
    """Like ``LocalBackend.put``, in pieces."""
    with open(filepath, 'wb') as file:
        for i in range(PIECES):
            file.write(obj[i * len(obj) // PIECES : (i + 1) * len(obj) // PIECES])
            file.flush()
            time.sleep(0.02)


def wait_for_the_kill() -> None:
    print('waits', flush=True)
    signal.pause()


def write_half(kind: str) -> Callable:
    """Like ``LocalBackend.put``, but waits in the middle of a checkpoint when there is an older
    one. Where best checkpoints are kept, it is the one that a resume would take: the last is
    then written anew."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        path = Path(filepath)
        pointer = path.with_name('last_checkpoint')
        newest = Path(pointer.read_text()) if pointer.is_file() else None
        others = [p for p in path.parent.glob(f'{path.name.split("_")[0]}_*.pth') if p != path]
        with path.open('wb') as file:
            file.write(obj[: len(obj) // 2])
            file.flush()
            is_best = path.name.startswith('best')
            if others and not is_best and (kind != 'epochs' or path == newest):
                wait_for_the_kill()
            file.write(obj[len(obj) // 2 :])

    return put


def main() -> None:
    work_dir, kind, mode = sys.argv[1], sys.argv[2], ''.join(sys.argv[3:])
    hook = {**PRUNING, 'interval': 2 if kind == 'iterations' else 1}
    if kind == 'search':
        hook = {**SEARCH, 'warmup': 4, 'fixed': 4, 'interval': 4}
    hooks = [hook, {'type': 'EMAHook', 'momentum': 0.1}]
    run = runner(work_dir, hooks, **KINDS[kind], resume=True)
    print('ready', flush=True)
    call_at(run, lambda run: print('iteration', run.iter, flush=True))
    change, changes = Transaction.change, []

    def change_slowly(*args):
        time.sleep(0.05)
        plan = change(*args)
        time.sleep(0.05)
        return plan

    def change_and_wait(*args):
        plan = change(*args)
        changes.append(args)
        if len(changes) == 4:  # after the first checkpoint
            wait_for_the_kill()
        return plan

    if mode == 'slow':
        LocalBackend.put, Transaction.change = write_slowly, change_slowly
    elif mode == 'edits':
        Transaction.change = change_and_wait
    elif mode == 'writes':
        LocalBackend.put = write_half(kind)
    run.train()


if __name__ == '__main__':
    main()
