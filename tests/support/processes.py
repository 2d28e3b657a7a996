"""Processes: the tools as a user runs them, workers of tests, and several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    """Variables of a process that imports this copy of the package and ``support``, and computes
    with as many threads as this one: results are compared bit for bit."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / 'tests')))
    threads = str(torch.get_num_threads())
    return {**os.environ, 'OMP_NUM_THREADS': threads, 'PYTHONPATH': path, **more}


def call(*command: object, code: int = 0, **options: Any) -> str:
    """Run a command, by default from the root of the project; returns all that it printed.

    Args:
        command: Program and arguments.
        code: The exit status that it must have.
        options: Of ``subprocess.run``.
    """
    options = {'cwd': ROOT, 'env': environment(), **options}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return (done.stdout + done.stderr).strip()


class Nursery:
    """The process of :mod:`support.nursery`, started when it is needed first."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def run(self, **request: Any) -> tuple[int, str]:
        """Exit status of a script and what it printed."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, '-m', 'support.nursery'],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment(),
                cwd=ROOT,
            )
            assert self.process.stdout.readline() == 'ready\n'
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / 'out'
            print(json.dumps({**request, 'out': str(out)}), file=self.process.stdin, flush=True)
            code = int(self.process.stdout.readline())
            return code, out.read_text()


NURSERY = Nursery()


def run_script(
    script: str | Path,
    *arguments: object,
    code: int = 0,
    cwd: str | Path = ROOT,
    env: dict[str, str] | None = None,
) -> str:
    """Run a script that uses the libraries, in a process that has imported them already; returns
    all that it printed.

    Args:
        script: Path, from ``cwd``.
        arguments: Of its command line.
        code: The exit status that it must have.
        cwd: Where it runs.
        env: Its variables; those of :func:`environment` by default.
    """
    done, said = NURSERY.run(
        script=str(script),
        arguments=[*map(str, arguments)],
        cwd=str(cwd),
        env=environment() if env is None else env,
    )
    assert done == code, said[-6000:]
    return said.strip()


def run_tool(name: str, *arguments: object, code: int = 0, fresh: bool = False) -> str:
    """Run a tool of the project; returns all that it printed.

    Args:
        name: Of the file in ``tools/``.
        arguments: Of its command line.
        code: The exit status that it must have.
        fresh: As from a shell, with all imports; else as :func:`run_script`.
    """
    if fresh:
        return call(sys.executable, f'tools/{name}.py', *arguments, code=code)
    return run_script(f'tools/{name}.py', *arguments, code=code)


def start_worker(module: str, *arguments: object, **options: Any) -> subprocess.Popen:
    """Start a module of ``support`` as a process of its own; what it prints is one stream."""
    command = [sys.executable, '-m', f'support.{module}', *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.STDOUT, env=environment(), **options)


def run_ranks(folder: Path, world: int = 2) -> list[dict]:
    """All cases of ``support.ranks`` in several processes; what each of them reports."""
    processes = []
    for rank in range(world):
        with (folder / f'log_{rank}').open('w') as log:
            processes.append(start_worker('ranks', folder, rank, world, stdout=log))
    try:
        # One that fails leaves the others waiting for it.
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    said = '\n'.join((folder / f'log_{rank}').read_text()[-2000:] for rank in range(world))
    assert codes == [0] * world, said
    return [json.loads((folder / f'report_{rank}.json').read_text()) for rank in range(world)]
