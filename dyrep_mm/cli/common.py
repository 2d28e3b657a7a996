"""What the commands and the tools share: files to write, and errors as one sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dyrep_mm.errors import DyRepError


def check_out(path: str | None, *suffixes: str, option: str = '--out') -> None:
    """Refuse a file to write, before the work, where it could not be written after it.

    Args:
        path: The file; None is no file.
        suffixes: Endings of its name, of which it must have one; none allow any.
        option: What the command line calls it.

    Raises:
        DyRepError: its name ends otherwise, it is a folder, or its folder does not exist.
    """
    if path is None:
        return
    if suffixes and not path.endswith(suffixes):
        raise DyRepError(f'{option} must end in {" or ".join(suffixes)}, got {path}')
    if Path(path).is_dir():
        raise DyRepError(f'{option} {path} is a folder: name the file to write')
    if not (folder := Path(path).resolve().parent).is_dir():
        raise DyRepError(f'{folder} is no folder to write {Path(path).name} into')


@contextmanager
def sentence(program: str) -> Iterator[None]:
    """End with one sentence on what the user can mend; bugs keep their traceback.

    The sentence is the last line of a log file too, where output waits in a buffer."""
    try:
        yield
    except DyRepError as error:
        sys.stdout.flush()
        sys.exit(f'{program}: {error}')
