"""Bars: for people at a terminal, of the first rank, and for nobody else."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import sys
from collections.abc import Callable

import pytest

from dyrep_mm.engine import progress
from dyrep_mm.engine.progress import stage, stages, track


@pytest.fixture
def make_terminal(monkeypatch):
    """Makes stderr a terminal, inside of a test: between its phases pytest sets stderr itself."""
    master, slave = pty.openpty()
    stream = os.fdopen(slave, 'w')
    monkeypatch.setenv('TERM', 'xterm')

    def drawn() -> str:
        """What was drawn since the last call."""
        stream.flush()
        os.set_blocking(master, False)
        said = b''
        with contextlib.suppress(BlockingIOError):
            while True:
                said += os.read(master, 4096)
        return said.decode()

    def make() -> Callable[[], str]:
        monkeypatch.setattr(sys, 'stderr', stream)
        return drawn

    yield make
    stream.close()
    os.close(master)


def work() -> list[int]:
    """Bars in a bar."""
    done = []
    with stages('reading', 2):
        stage('reading')
        done += track(iter([1, 2]), 'drawing', total=2)
        stage('writing')
        done += track([3], 'colouring')
    return done


def test_a_bar_on_a_terminal(make_terminal):
    terminal = make_terminal()
    assert work() == [1, 2, 3]
    said = terminal()
    assert all(word in said for word in ('reading', 'drawing', '0/2', 'writing', '1/2'))


def test_a_bar_ends_with_its_work(make_terminal):
    """By an error too, and where nobody takes the last item: the next bar is a new one."""
    terminal = make_terminal()
    with pytest.raises(StopIteration), stages('dividing', 1):
        next(iter([]))
    left = track([1, 2, 3], 'counting')
    assert next(left) == 1
    left.close()
    terminal()
    stage('nothing')
    assert terminal() == ''
    assert work() == [1, 2, 3]
    assert 'dividing' not in terminal()


def test_other_ranks_are_quiet(make_terminal, monkeypatch):
    terminal = make_terminal()
    monkeypatch.setattr(progress, 'is_main_process', lambda: False)
    assert work() == [1, 2, 3]
    assert terminal() == ''


def test_a_file_is_no_terminal(monkeypatch):
    """Whatever the environment says of colours."""
    monkeypatch.setenv('FORCE_COLOR', '1')
    file = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', file)
    assert work() == [1, 2, 3]
    assert file.getvalue() == ''
