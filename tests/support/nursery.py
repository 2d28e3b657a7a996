"""Starts Python scripts as processes of their own that need not import the libraries first.

A process that has imported them forks for each script. It never imports dyrep_mm: whether a config
or a tool does is the script's own affair.

    python -m support.nursery

A line of standard input is a request in JSON: ``script``, ``arguments``, ``cwd``, ``env`` and
``out``, a file for all that the script prints. The answer is a line with its exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import runpy
import sys
import traceback
from contextlib import suppress

#: What the tools of all three libraries need, the slowest first.
LIBRARIES = (
    'torch',
    'torchvision',
    'mmengine.runner',
    'mmengine.visualization',
    'mmcv.ops',
    'mmdet.apis',
    'mmseg.apis',
    'mmpretrain.apis',
)

#: Where modules are found, less what this process itself was started with.
OWN = {'', os.getcwd(), *os.environ.get('PYTHONPATH', '').split(os.pathsep)}
INSTALLED = [path for path in sys.path if path not in OWN]


def run(request: dict) -> int:
    """In the child: become the process that runs a script; its exit status."""
    descriptor = os.open(request['out'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request['cwd'])
    os.environ.clear()
    os.environ.update(request['env'])
    script = request['script']
    own = os.environ.get('PYTHONPATH', '').split(os.pathsep)
    sys.path[:] = [os.path.dirname(os.path.abspath(script)), *filter(None, own), *INSTALLED]
    sys.argv = [script, *request['arguments']]
    random.seed()
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    answers = os.fdopen(os.dup(1), 'w')
    with open(os.devnull, 'w') as nowhere:  # libraries print and warn
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    for name in LIBRARIES:
        with suppress(ImportError):  # a script that needs it says so
            importlib.import_module(name)
    sys.stdout.flush()  # what waits in the buffer would be the output of every script
    assert 'dyrep_mm' not in sys.modules
    print('ready', file=answers, flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = run(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, file=answers, flush=True)


if __name__ == '__main__':
    main()
