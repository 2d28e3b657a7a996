"""``tools/slurm_train.sh`` and ``slurm_test.sh``, with an srun that notes how it is called."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from support.processes import ROOT, call, environment

#: Notes its arguments, and runs the command in them for its help alone.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$NOTED"
while [ "$1" != python ]; do shift; done
exec "$PYTHON" "${@:2:2}" --help
"""


def submitted(folder: Path, name: str, *arguments: str, **variables: str) -> tuple[list[str], str]:
    """What srun was given, and what the command that it runs prints."""
    srun = folder / 'srun'
    srun.write_text(SRUN)
    srun.chmod(0o755)
    env = environment(NOTED=str(folder / 'noted'), PYTHON=sys.executable, **variables)
    env['PATH'] = f'{folder}:{env["PATH"]}'
    printed = call('bash', ROOT / 'tools' / f'{name}.sh', *arguments, env=env, cwd=folder)
    return (folder / 'noted').read_text().splitlines(), printed


@pytest.mark.parametrize(
    ('name', 'last', 'flag'),
    [('slurm_train', ['--work-dir', 'out'], '--resume'), ('slurm_test', ['out'], '--out')],
)
def test_srun_gets_what_openmmlab_gives_it(name, last, flag, tmp_path):
    arguments = ['part', 'a job', 'a config.py', 'out', flag, 'a b.pkl']
    said, printed = submitted(
        tmp_path, name, *arguments, GPUS='16', CPUS_PER_TASK='3', SRUN_ARGS='--time 10 --quiet'
    )
    tool = ROOT / 'tools' / f'{name.removeprefix("slurm_")}.py'
    assert said == [
        *('-p', 'part', '--job-name=a job', '--gres=gpu:8', '--ntasks=16', '--ntasks-per-node=8'),
        *('--cpus-per-task=3', '--kill-on-bad-exit=1', '--time', '10', '--quiet', 'python', '-u'),
        *(str(tool), 'a config.py', *last, '--launcher', 'slurm', flag, 'a b.pkl'),
    ]
    assert f'usage: {tool.name}' in printed
    assert flag in printed
