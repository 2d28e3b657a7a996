"""The run that is killed: ``python -m support.killed WORK_DIR KIND [slow]``; resumes by itself.

``slow`` stretches what a kill should hit: updates, and the writing of checkpoints.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mmengine.fileio import LocalBackend

from dyrep_mm.engine.transaction import Transaction
from support.runs import PRUNING, runner, watch

PIECES = 8
#: What a run of each kind is made of.
KINDS = {
    'iterations': {'iters': 24, 'every': 5},  # not a multiple of the interval of 2
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
}


def write_slowly(self, obj: bytes, filepath: str | Path) -> None:
    """Like ``LocalBackend.put``, in pieces."""
    with open(filepath, 'wb') as file:
        for i in range(PIECES):
            file.write(obj[i * len(obj) // PIECES : (i + 1) * len(obj) // PIECES])
            file.flush()
            time.sleep(0.02)


def main() -> None:
    work_dir, kind, slow = sys.argv[1], sys.argv[2], sys.argv[3:] == ['slow']
    hook = {**PRUNING, 'interval': 2 if kind == 'iterations' else 1}
    hooks = [hook, {'type': 'EMAHook', 'momentum': 0.1}]
    run = runner(work_dir, hooks, **KINDS[kind], resume=True)
    print('ready', flush=True)
    watch(run, lambda run: print('iteration', run.iter, flush=True))
    if slow:
        LocalBackend.put = write_slowly
        change = Transaction.change

        def change_slowly(*args):
            time.sleep(0.05)
            print('edits', flush=True)
            change(*args)
            time.sleep(0.05)

        Transaction.change = change_slowly
    run.train()


if __name__ == '__main__':
    main()
