"""Train every config with every seed and compare them with the first one.

tools/study.py CONFIG [CONFIG ...] --seeds 4 --out FOLDER

A cell is an ordinary run of tools/train.py in FOLDER/CONFIG/seed-N. A cell that is done is not done
again, and one that was killed goes on from its last checkpoint; so does the study when the same
command is given again.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _cli import check_out, sentence
from mmengine.config import Config
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dyrep_mm.engine.converter import read_config
from dyrep_mm.errors import DyRepError

TRAIN = Path(__file__).with_name('train.py')


@dataclass(frozen=True)
class Cell:
    """One config with one seed."""

    config: Path
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f'{self.config.stem}, seed {self.seed}'

    @property
    def is_done(self) -> bool:
        return (self.folder / 'done').exists()

    def progress(self) -> float:
        """The part of its training that is over, by what its logger has written so far."""
        if self.is_done:
            return 1.0
        scalars = sorted(self.folder.glob('*/vis_data/scalars.json'))
        config = next(self.folder.glob('*/vis_data/config.py'), None)
        if not scalars or config is None:
            return 0.0
        train = Config.fromfile(config).train_cfg
        # The last line may be in the middle of being written.
        lines = [line for line in scalars[-1].read_text().splitlines() if line.endswith('}')]
        last = json.loads(lines[-1]) if lines else {}
        if 'max_epochs' in train:
            return min(last.get('epoch', last.get('step', 0)) / train.max_epochs, 1.0)
        return min(last.get('iter', last.get('step', 0)) / train.max_iters, 1.0)


class Study:
    """Runs cells in processes of their own, one torch thread each.

    Args:
        cells: What to run, in order.
        options: ``--cfg-options`` for all of them.
    """

    def __init__(self, cells: list[Cell], options: list[str]):
        self.cells = cells
        self.options = options
        self._running: set[subprocess.Popen] = set()
        self._stopped = threading.Event()

    def run(self, jobs: int) -> list[str]:
        """Run what is not done, ``jobs`` at once; returns why cells failed."""
        with ThreadPoolExecutor(jobs) as pool, _watched(self.cells):
            futures = [pool.submit(self._run, cell) for cell in self.cells if not cell.is_done]
            try:
                return [reason for future in futures if (reason := future.result())]
            except BaseException:
                self._stopped.set()
                for process in list(self._running):
                    process.terminate()
                raise

    def _run(self, cell: Cell) -> str | None:
        if self._stopped.is_set():
            return None
        cell.folder.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, TRAIN, cell.config, '--work-dir', cell.folder, '--resume'),
            *('--cfg-options', f'randomness.seed={cell.seed}', *self.options),
        ]
        log = cell.folder / 'output.txt'
        with log.open('a') as output:
            process = subprocess.Popen(
                list(map(str, command)),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, 'OMP_NUM_THREADS': '1'},
            )
            self._running.add(process)
            status = process.wait()
            self._running.discard(process)
        if status == 0:
            (cell.folder / 'done').touch()
            return None
        if self._stopped.is_set():
            return None
        said = [line for line in log.read_text().splitlines() if line.strip()]
        return f'{cell.name} failed: {said[-1] if said else f"exit status {status}"} ({log})'


@contextmanager
def _watched(cells: list[Cell]) -> Iterator[None]:
    """Show how far the cells are, and the time that is left, on a terminal; else a line now and
    then."""
    over = threading.Event()
    console = Console(stderr=True)
    start, begun = time.monotonic(), sum(cell.progress() for cell in cells)

    def status() -> tuple[float, str]:
        parts = [cell.progress() for cell in cells]
        done, passed = sum(parts), time.monotonic() - start
        said = f'{sum(cell.is_done for cell in cells)} of {len(cells)} cells'
        if done > begun:
            left = passed * (len(cells) - done) / (done - begun)
            said += f', {left / 3600:.1f} h left'
        return done, said

    def follow() -> None:
        columns = TextColumn('{task.description}'), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task('', total=len(cells))
            while not over.wait(5 if console.is_terminal else 300):
                done, said = status()
                progress.update(task, completed=done, description=said)
                if not console.is_terminal:
                    console.print(said)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
