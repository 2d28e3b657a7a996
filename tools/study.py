"""Train every config with every seed and compare them with the first one.

tools/study.py CONFIG [CONFIG ...] --seeds 4 --out FOLDER

A cell is an ordinary run of tools/train.py in FOLDER/CONFIG/seed-N. A cell that is done is not done
again, and one that was killed goes on from its last checkpoint; so does the study when the same
command is given again.
"""

import argparse
import json
import os
import statistics
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

from _cli import sentence
from prettytable import PrettyTable, TableStyle
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dyrep_mm.engine.converter import read_config
from dyrep_mm.errors import DyRepError
from dyrep_mm.report.data import Run, best_of, read_run, share_plain_costs
from dyrep_mm.report.logs import read_log
from dyrep_mm.report.study import ROWS, methods_of
from dyrep_mm.report.study import table as table_of

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
        log = read_log(self.folder)
        loop = log.config.get('train_cfg') or {}
        iterations, epochs, _ = log.steps[-1] if log.steps else (0, None, {})
        if loop.get('max_epochs'):
            return min(((epochs or 1) - 1) / loop['max_epochs'], 1.0)
        return min(iterations / loop.get('max_iters', float('inf')), 1.0)


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


def row_of(cell: Cell, run: Run, metric: str) -> dict[str, Any]:
    """A finished cell as a line of JSON.

    Its metric is the one of the last validation: the best one of many would be chosen on the data
    that it is reported on.
    """
    points = run.metrics[metric]
    last = max((time for time, _ in run.loss), default=0)
    losses = [loss for time, loss in run.loss if time > 0.95 * last]
    return {
        'config': cell.config.stem,
        'seed': cell.seed,
        'metric': metric,
        'value': points[-1][1],
        'best': best_of(points, metric)[1],
        'loss': statistics.fmean(losses) if losses else None,
        'parameters': run.averages.get('parameters'),
        'multiply_adds': run.averages.get('multiply_adds'),
        'final_parameters': final_of(run, 'parameters'),
        'final_multiply_adds': final_of(run, 'multiply_adds'),
        'seconds': run.seconds,
        'structure': run.structure,
    }


def final_of(run: Run, name: str) -> float | None:
    """``parameters`` or ``multiply_adds`` at the end of a run."""
    if run.journal:
        return getattr(run.journal[-1], name)
    return run.first.get(name, run.plain.get(name))


def read_rows(cells: list[Cell], metric: str | None) -> list[dict[str, Any]]:
    """The rows of all cells that are done.

    Raises:
        DyRepError: a run has no such metric.
    """
    done = [cell for cell in cells if cell.is_done]
    runs = [read_run(str(cell.folder)) for cell in done]
    share_plain_costs(runs)
    rows = []
    for cell, run in zip(done, runs, strict=True):
        name = run.main_metric(metric)
        if name is None or (metric is not None and name != metric):
            raise DyRepError(
                f'{cell.name} has no metric {metric or ""}: {", ".join(run.metrics) or "none"}'
            )
        rows.append(row_of(cell, run, name))
    return rows


def write_results(out: Path, cells: list[Cell], metric: str | None) -> None:
    """Write ``study.jsonl`` and ``summary.md``, and print the table."""
    rows = read_rows(cells, metric)
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    (out / ROWS).write_text(lines)
    methods = methods_of(rows, list(dict.fromkeys(cell.config.stem for cell in cells)))
    columns, cells_of_table = table_of(methods, rows[0]['metric'] if rows else 'metric')
    table = PrettyTable(columns)
    table.align, table.align['config'] = 'r', 'l'
    table.add_rows(cells_of_table)
    text = table.get_formatted_string('text')
    table.set_style(TableStyle.MARKDOWN)
    (out / 'summary.md').write_text(f'{table}\n')
    print(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', help='what to compare; the first is the measure')
    parser.add_argument('--out', required=True, help='folder of the study')
    parser.add_argument('--seeds', type=int, default=4, help='how many, from 0')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='cells at once')
    parser.add_argument('--metric', help='what to compare; by default the main one of the task')
    parser.add_argument(
        '--only-results', action='store_true', help='read what is done and run nothing'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], help='for every cell, as tools/train.py has them'
    )
    return parser.parse_args()


def make_cells(args: argparse.Namespace) -> list[Cell]:
    """The grid, seed by seed, so that an unfinished study has all configs side by side."""
    if args.seeds < 1 or args.jobs < 1:
        raise DyRepError('--seeds and --jobs are at least 1')
    configs = [Path(config) for config in args.configs]
    stems = [config.stem for config in configs]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise DyRepError(f'two configs have the name {twice[0]}')
    for config in configs:
        read_config(str(config))
    return [
        Cell(config, seed, Path(args.out) / config.stem / f'seed-{seed}')
        for seed in range(args.seeds)
        for config in configs
    ]


def main() -> None:
    args = parse_args()
    with sentence('study'):
        cells, out = make_cells(args), Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        failed = [] if args.only_results else Study(cells, args.cfg_options).run(args.jobs)
        write_results(out, cells, args.metric)
        if failed:
            raise DyRepError('; '.join(failed))


if __name__ == '__main__':
    main()
