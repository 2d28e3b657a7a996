"""What a build of the package reads."""

from __future__ import annotations

import shutil
from pathlib import Path

from support.processes import ROOT

#: A checkout has it, and the archive must hold it too.
SOURCES = ['dyrep_mm', 'configs', 'tools', 'requirements', 'setup.py', 'pyproject.toml']
SOURCES += ['MANIFEST.in', 'README.md', 'LICENSE', 'CHANGELOG.md', 'requirements.txt']
SOURCES += ['model-index.yml']


def copy_sources(folder: Path) -> Path:
    """Copy it to ``folder``, which must not exist."""
    folder.mkdir()
    ignore = shutil.ignore_patterns('__pycache__')
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder
