"""The structure of a run over time, replayed from its journal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dyrep_mm.evolution.record import Entry
from dyrep_mm.reparam.branches import OPERATIONS, ORIGIN
from dyrep_mm.surgery.structure import Structure

MARK = '.branches.'


@dataclass(frozen=True)
class Life:
    """One added branch, from its growth to its end.

    Attributes:
        path: Of its block.
        operation: Its name.
        born: When it grew, in the unit of the journal; 0 for the structure that a run started with.
        gone: When it was removed; None if it was not.
        cut: Whether it was pruned itself, and not with a branch that it lay in.
    """

    path: str
    operation: str
    born: int
    gone: int | None = None
    cut: bool = False


def first_structure(structure: Structure, journal: Sequence[Entry]) -> Structure:
    """What a run started with: the branches that no update made.

    Args:
        structure: After the last update.
        journal: All updates.
    """
    start: Structure = {}
    grown = {path for entry in journal for path in entry.grown}
    last = [(path, name) for path, names in structure.items() for name in names if name != ORIGIN]
    while True:
        found, unknown = _replay(start, journal)
        alive = {(life.path, life.operation) for life in found if life.gone is None}
        # A block that moved to another path was made all the same: the pruned ones tell first.
        new = unknown or [at for at in last if at not in alive and at[0] not in grown]
        new = [(path, name) for path, name in new if name not in start.get(path, ())]
        if not new:
            return start
        for path, name in new:
            start.setdefault(path, [ORIGIN]).append(name)


def lives(start: Structure, journal: Sequence[Entry]) -> list[Life]:
    """Every branch that a run ever had, in the order in which they grew."""
    return _replay(start, journal)[0]


def _replay(start: Structure, journal: Sequence[Entry]) -> tuple[list[Life], list[tuple[str, str]]]:
    """The branches, and what was pruned without having been there, by path and name."""
    alive: dict[tuple[str, str], Life] = {}
    ended: list[Life] = []
    unknown: list[tuple[str, str]] = []

    def grow(path: str, names: Iterable[str], at: int) -> None:
        for name in names:
            if name != ORIGIN:
                alive[path, name] = Life(path, name, at)

    def end(path: str, name: str, at: int, cut: bool) -> None:
        if (life := alive.pop((path, name), None)) is not None:
            ended.append(Life(life.path, life.operation, life.born, at, cut))
        else:
            unknown.append((path, name))

    for path, names in start.items():
        grow(path, names, 0)
    for entry in journal:
        for path, names in entry.grown.items():
            grow(path, names, entry.at)
        for path, names in entry.pruned.items():
            for name in names:
                end(path, name, entry.at, True)
                inside = f'{path}{MARK}{name}.'
                for other in [key for key in alive if f'{key[0]}.'.startswith(inside)]:
                    end(*other, entry.at, False)
            _move_up(alive, ended, path, entry.at)
    return sorted([*ended, *alive.values()], key=lambda life: life.born), unknown


def _move_up(alive: dict[tuple[str, str], Life], ended: list[Life], path: str, at: int) -> None:
    """A block without added branches gives its place to its ``kxk``, which may be a block."""
    if any(p == path for p, _ in alive):
        return
    inner = f'{path}{MARK}{ORIGIN}'
    for (p, name), life in list(alive.items()):
        if p == inner or p.startswith(f'{inner}.'):
            del alive[p, name]
            moved = path + p[len(inner) :]
            ended.append(Life(p, name, life.born, at, False))
            alive[moved, name] = Life(moved, name, at)


def outermost(path: str) -> str:
    """The conv of the plain model that ``path`` is or lies in."""
    return path.split(MARK)[0]


def depth(path: str) -> int:
    """How many blocks ``path`` lies in."""
    return path.count(MARK)


def in_order(paths: Iterable[str], layers: Sequence[str]) -> list[str]:
    """Paths from input to output, what lies in a block behind it.

    Args:
        paths: Of blocks and convs.
        layers: Convs of the plain model from input to output; others come last, by name.
    """
    place = {path: i for i, path in enumerate(layers)}
    branch = {name: i for i, name in enumerate(OPERATIONS)}

    def key(path: str) -> tuple:
        first, *rest = path.split(MARK)
        inside = [(branch.get(part.split('.')[0], len(branch)), part) for part in rest]
        return place.get(first, len(place)), first, inside

    return sorted(set(paths), key=key)


def operations_in(names: Iterable[str]) -> list[str]:
    """Added operations in the order of Table 1, those of other projects behind."""
    found = set(names) - {ORIGIN}
    return [*(n for n in OPERATIONS if n in found), *sorted(found - set(OPERATIONS))]


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Paths without the part that all of them begin with, where that leaves something."""
    paths = list(paths)
    heads = {path.partition('.')[0] for path in paths}
    if len(heads) != 1 or any('.' not in path for path in paths):
        return {path: path for path in paths}
    return {path: path.partition('.')[2] for path in paths}


def last_importances(journal: Sequence[Entry]) -> dict[str, tuple[int, Mapping[str, float]]]:
    """For each block the last importances in the journal, and when they were measured."""
    found: dict[str, tuple[int, Mapping[str, float]]] = {}
    for entry in journal:
        found |= {path: (entry.at, values) for path, values in entry.importances.items()}
        for path in entry.grown:
            found.pop(path, None)
    return found
