"""A budget: which operations grow, and which branches go for them, so that a model does not cost
more than a limit."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence

from dyrep_mm.reparam.branches import ORIGIN
from dyrep_mm.surgery.structure import Structure
from dyrep_mm.surgery.tree import in_scope

#: Branches to remove, by path of their block.
Cuts = Mapping[str, Sequence[str]]

#: Multiply-adds in training after a change, blocks to make and branches to remove, over plain.
CostAfter = Callable[[Structure, Cuts], float]


def outside(paths: Iterable[str], cuts: Cuts) -> list[str]:
    """Those of ``paths`` that do not go with a branch that is cut."""
    gone = [f'{path}.branches.{name}' for path, names in cuts.items() for name in names]
    return [path for path in paths if not gone or not in_scope(path, gone)]


def forms_of(names: Sequence[str], gains: Mapping[str, float] | None) -> list[list[str]]:
    """What a conv may grow to: all of ``names``, then always one less, the least gain first."""
    forms = [list(names)]
    if gains is not None:
        by_gain = sorted(gains.keys() & set(names), key=lambda n: (gains[n], n))
        for name in by_gain[:-1]:
            forms.append([other for other in forms[-1] if other != name])
    return [form for form in forms if set(form) - {ORIGIN}]


class Budget:
    """Chooses what grows and what goes within a budget.

    Args:
        cost: What the model costs after a change.
        limit: What it may cost.
        importances: Of the branches that may go for others, by path of their block.
    """

    def __init__(
        self, cost: CostAfter, limit: float, importances: Mapping[str, Mapping[str, float]]
    ):
        self.cost = cost
        self.limit = limit
        self.importances = {
            path: values
            for path, values in importances.items()
            if all(map(math.isfinite, values.values()))
        }

    def keep(self, cuts: Cuts) -> dict[str, list[str]]:
        """``cuts`` and what must go besides for the model to cost no more than the limit; the best
        branches of blocks go last."""
        for also_best in (False, True):
            if self.cost({}, cuts) <= self.limit:
                break
            for cut in self._weakest(cuts, also_best):
                if self.cost({}, cuts) <= self.limit:
                    break
                cuts = _and(cuts, [cut])
        return _and(cuts, [])

    def spend(
        self,
        scores: Mapping[str, float],
        forms: Mapping[str, list[list[str]]],
        cuts: Cuts,
        count: int,
    ) -> tuple[Structure, dict[str, list[str]]]:
        """What grows, and ``cuts`` with what goes for it.

        Args:
            scores: Of what may grow, by path.
            forms: The operations that each may have, the best choice first.
            cuts: What goes anyway.
            count: How many may grow.
        """
        base = self.cost({}, cuts)
        added = {p: self.cost({p: forms[p][0]}, cuts) - base for p in outside(scores, cuts)}
        added = {path: more for path, more in added.items() if more < math.inf}
        best = sorted(added, key=lambda path: _worth(scores[path], added[path]), reverse=True)
        grow: Structure = {}
        for path in best:
            if len(grow) == count:
                break
            for form in forms[path]:
                if self.cost({**grow, path: form}, cuts) <= self.limit:
                    grow[path] = form
                    break
        if grow or not count:
            return grow, _and(cuts, [])
        weakest = list(self._weakest(cuts))
        for path in best:
            for form in forms[path]:
                room = self._room({path: form}, cuts, weakest)
                if room is not None:
                    return {path: form}, _and(cuts, room)
        return {}, _and(cuts, [])

    def _room(
        self, grow: Structure, cuts: Cuts, weakest: list[tuple[str, str]]
    ) -> list[tuple[str, str]] | None:
        """Which of ``weakest`` must go for ``grow``; None if it does not fit then either."""

        def fits(room: list[tuple[str, str]]) -> bool:
            return self.cost(grow, _and(cuts, room)) <= self.limit

        weakest = [(p, name) for p, name in weakest if outside(grow, {p: [name]})]
        if not fits(weakest):
            return None
        sizes = range(1, len(weakest) + 1)
        room = weakest[: sizes[bisect_left(sizes, True, key=lambda n: fits(weakest[:n]))]]
        for cut in reversed(room):  # large ones may have made small ones needless
            if fits(rest := [other for other in room if other != cut]):
                room = rest
        return room

    def _weakest(self, cuts: Cuts, also_best: bool = False) -> list[tuple[str, str]]:
        """Branches as (path of block, name), the least importance for the cost that it saves first.

        Without ``also_best`` only those below the mean of their block: the best stays, and so do
        the branches of a new block, which nothing tells apart yet.
        """
        base, found = self.cost({}, cuts), []
        for path in outside(self.importances, cuts):
            gone = cuts.get(path, ())
            left = {n: value for n, value in self.importances[path].items() if n not in gone}
            mean = math.inf if also_best or not left else statistics.fmean(left.values())
            for name, value in left.items():
                saved = base - self.cost({}, _and(cuts, [(path, name)]))
                if value < mean and saved > 0:
                    found.append((value / saved, path, name))
        return [(path, name) for _, path, name in sorted(found)]


def _and(cuts: Cuts, more: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """``cuts`` and ``more`` branches, as (path of block, name)."""
    both = {path: list(names) for path, names in cuts.items()}
    for path, name in more:
        both.setdefault(path, []).append(name)
    return both


def _worth(score: float, added: float) -> tuple[float, float]:
    """Score for the cost that it adds, to compare; what costs nothing comes first, and of scores
    below zero the one of least cost."""
    if score > 0:
        return (score / added if added > 0 else math.inf), score
    return score * max(added, 0.0), score
