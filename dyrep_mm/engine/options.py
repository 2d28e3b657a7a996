"""The form of the hook's options: one sentence for each that has no meaning, when it is built."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.saliency import check_metric
from dyrep_mm.reparam.branches import OPERATIONS, ORIGIN, check_operations
from dyrep_mm.surgery.structure import PRESETS, check_structure
from dyrep_mm.surgery.tree import Scope

#: What the word of the option ``preset`` stands for. ``interval`` is not in it: 5 epochs in the
#: paper, no number where iterations are counted. Nor is ``end``: the authors' files stop at 5/6 of
#: most trainings, the paper never.
OPTIONS_OF: dict[str, dict[str, Any]] = {
    'paper': {
        'metric': 'synflow',  # Eq. 4 (section 4.1)
        'grow_per_update': 1,  # the argmax (Algorithm 1)
        'branches': list(OPERATIONS),  # Table 1
        'init_scale': 0.01,  # gamma of a new branch (section 4.1)
        'calibration_batches': 20,  # for the statistics of new norms (section 4.1)
        'prune': True,  # de-parameterization (section 4.2)
        'prune_threshold': 0.02,  # lambda (section 4.2)
        'prune_relative': False,
        'prune_below': None,
        'max_cost': None,
        'branch_norm': 'batch',  # every branch ends in a BN
        'max_depth': 2,  # the authors' code; the paper says "recursively"
    }
}


def with_presets(init: Callable) -> Callable:
    """Let the option ``preset`` of a constructor fill in options that are not given."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def filled(self: Any, *args: Any, **options: Any) -> None:
        given = signature.bind_partial(self, *args, **options).arguments
        preset = given.get('preset')
        if preset is not None and (not isinstance(preset, str) or preset not in OPTIONS_OF):
            raise DyRepError(
                f'preset must be {" or ".join(map(repr, OPTIONS_OF))} or None, got {preset!r}'
            )
        fills = {} if preset is None else OPTIONS_OF[preset]
        more = {k: v for k, v in fills.items() if k not in given}
        init(self, *args, **more, **options)

    return filled


def check_flag(name: str, value: Any) -> bool:
    """``value`` if it is True or False.

    Raises:
        DyRepError: it is anything else; ``'no'`` would count as true.
    """
    if type(value) is not bool:
        raise DyRepError(f'{name} must be True or False, got {value!r}')
    return value


def check_count(name: str, value: Any, least: int, most: int | None = None) -> int:
    """``value`` if it is an integer from ``least`` to ``most``, else ``DyRepError``."""
    if type(value) is not int or value < least:
        raise DyRepError(f'{name} must be an integer of at least {least}, got {value!r}')
    if most is not None and value > most:
        raise DyRepError(f'{name} must be at most {most}, got {value}')
    return value


def check_number(name: str, value: Any) -> float:
    """``value`` if it is a finite number of at least 0, else ``DyRepError``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise DyRepError(f'{name} must be a finite number of at least 0, got {value!r}')
    return value


def check_budget(max_cost: Any) -> float | None:
    """``max_cost`` if it is a finite number above 1 or None, else ``DyRepError``."""
    if max_cost is not None and check_number('max_cost', max_cost) <= 1:
        raise DyRepError(
            f'max_cost must be above 1, the cost of the plain model, got {max_cost}; '
            'interval=None is what never grows'
        )
    return max_cost


def check_part(name: str, value: Any) -> float:
    """``value`` if it is a number above 0 and at most 1, else ``DyRepError``."""
    if not 0 < check_number(name, value) <= 1:
        raise DyRepError(f'{name} must be above 0 and at most 1, got {value}')
    return value


def check_ratio(name: str, value: Any) -> float:
    """``value`` if it is a finite number above 1, the cost of the plain model, else
    ``DyRepError``."""
    if check_number(name, value) <= 1:
        raise DyRepError(f'{name} must be above 1, the cost of the plain model, got {value}')
    return value


def check_seed(seed: Any) -> int | None:
    """``seed`` if it is an integer or None, else ``DyRepError``."""
    if seed is not None and type(seed) is not int:
        raise DyRepError(f"seed must be an integer, or None for the runner's, got {seed!r}")
    return seed


def check_prefixes(scope: Any) -> Scope:
    """A scope as the surgery takes it; None is everywhere.

    Raises:
        DyRepError: it is no prefix and no list of them, or an empty list.
    """
    if scope is None or isinstance(scope, str):
        return scope
    if (
        not isinstance(scope, (list, tuple))
        or not scope
        or not all(isinstance(prefix, str) for prefix in scope)
    ):
        raise DyRepError(
            f'scope must be a dotted prefix, a list of them, or None for everywhere, got {scope!r}'
        )
    return list(scope)


def check_score(metric: Any) -> str:
    """``metric`` if a score is registered under it, else ``DyRepError``."""
    if not isinstance(metric, str):
        raise DyRepError(f'metric must be the name of a score, got {metric!r}')
    check_metric(metric)
    return metric


#: ``branches``: the operations that pay.
BEST = 'best'


def check_pick(branches: Any) -> int | str | None:
    """How many operations a grown conv gets, by what they gain: a number, or ``'best'``; None if
    ``branches`` names them.

    Raises:
        DyRepError: it is a number below 1.
    """
    if type(branches) is int and branches < 1:
        raise DyRepError(f'branches must be at least 1 where it is a number, got {branches}')
    return branches if branches == BEST or type(branches) is int else None


def check_branches(branches: Any) -> list[str] | None:
    """The operations that a grown conv gets, or gets a pick of, as a list; None is the default.

    Raises:
        DyRepError: a name is unknown, or no branch is among them: nothing would ever grow.
    """
    if branches is None or check_pick(branches) is not None:
        return None
    if not isinstance(branches, (list, tuple)):
        raise DyRepError(f"branches must be a list of names, a number, or 'best', got {branches!r}")
    check_operations(branches)
    if not set(branches) - {ORIGIN}:
        raise DyRepError(
            f'branches must name an operation besides {ORIGIN}, got {list(branches)}; '
            'interval=None is what never grows'
        )
    return list(branches)


def check_start(structure: Any) -> str | os.PathLike | Mapping[str, Sequence[str]] | None:
    """``structure`` if it can say what to start from; files are read when training starts.

    Raises:
        DyRepError: it is no name, no path and no mapping, or the mapping is no Structure.
    """
    if isinstance(structure, Mapping):
        check_structure(structure)
    elif structure is not None and (
        not isinstance(structure, (str, os.PathLike)) or not os.fspath(structure)
    ):
        raise DyRepError(
            f'structure must be a name ({", ".join(PRESETS)}), a file, or a mapping from paths to '
            f'operations, got {structure!r}'
        )
    return structure
