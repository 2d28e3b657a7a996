"""Numbers, times and amounts as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable

#: For each quantity its units, the largest first: the least value that is told in it, what one is,
#: and its name.
UNITS = {
    'multiply_adds': ((1e8, 1e9, 'G'), (1e5, 1e6, 'M'), (0, 1e3, 'k')),
    'parameters': ((1e5, 1e6, 'M'), (0, 1e3, 'k')),
    'seconds': ((7200, 3600, 'hours'), (120, 60, 'minutes'), (0, 1, 'seconds')),
}


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits that count; a dash for one that is not known."""
    if value is None:
        return '–'
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 10 ** max(digits, 6):
        return f'{value:,.0f}'
    if abs(value) >= 10 ** (digits - 1):
        return f'{value:,.0f}'
    return f'{value:.{digits}g}'


def count(n: int, noun: str) -> str:
    """``1 branch``, ``2 branches``."""
    plural = f'{noun}es' if noun.endswith(('ch', 's')) else f'{noun}s'
    plural = f'{noun[:-1]}ies' if noun.endswith('dy') else plural
    return f'{number(n)} {noun if n == 1 else plural}'


def scale_of(quantity: str, values: Iterable[float | None]) -> tuple[float, str]:
    """What to divide the values by, and the unit that they are in then.

    Args:
        quantity: One of :data:`UNITS`.
        values: Those to be told side by side.
    """
    most = max((value for value in values if value is not None), default=0)
    return next((size, unit) for least, size, unit in UNITS[quantity] if most >= least)


def scaled(value: float | None, size: float) -> float | None:
    """A value in a unit, see :func:`scale_of`."""
    return None if value is None else value / size
