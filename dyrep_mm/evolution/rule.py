"""The rule of the paper: scores and importances in, what to grow and to prune out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from dyrep_mm.surgery.structure import Plan


def weak_branches(importances: Mapping[str, float], threshold: float) -> list[str]:
    """Branches to cut (section 4.2): less important than the mean, where the standard
    deviation is above ``threshold``. With fewer than two branches there is no spread."""
    values = list(importances.values())
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return []
    if statistics.pstdev(values) <= threshold:
        return []
    mean = statistics.fmean(values)
    return [name for name, value in importances.items() if value < mean]


def make_plan(
    scores: Mapping[str, float],
    importances: Mapping[str, Mapping[str, float]],
    *,
    grow: int,
    threshold: float | None,
) -> Plan:
    """One update of Algorithm 1 (lines 8 to 10).

    Args:
        scores: Average score of every operation that may grow, by path.
        importances: Eq. 9 for the added branches of every block, by path of the block.
        grow: How many of the best operations grow.
        threshold: lambda; None prunes nothing.
    """
    prune: dict[str, list[str]] = {}
    if threshold is not None:
        for path, values in importances.items():
            if weak := weak_branches(values, threshold):
                prune[path] = weak
    cut = [f'{path}.branches.{name}' for path, names in prune.items() for name in names]

    def survives(path: str) -> bool:
        # What lies in a branch that goes is neither grown nor pruned.
        return not any(path == c or path.startswith(f'{c}.') for c in cut)

    usable = {path: s for path, s in scores.items() if math.isfinite(s) and survives(path)}
    best = sorted(usable, key=usable.__getitem__, reverse=True)
    return Plan(best[:grow], {path: names for path, names in prune.items() if survives(path)})
