"""The page about the sweep: ``python -m support.compatibility RESULTS PAGE``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from support.convs import LEFT_ALONE, SEEN
from support.sweep import BOUND, Result, result_of
from support.zoo import BACKBONES, CASES, DETECTORS, LIBRARIES, SEGMENTORS, Case

#: The text above the tables.
HEAD = (Path(__file__).parent / 'compatibility.md').read_text()


def row(case: Case, result: Result) -> str:
    """The line of the page about a case; nothing in it depends on the processor."""
    if result.refused:
        outcome = 'refused'
    elif not result.grown:
        outcome = 'trained'
    else:
        biases = f', {result.biased} bias{"es" * (result.biased > 1)}' if result.biased else ''
        outcome = f'fused{biases}'
    reasons = sorted(result.skips.items(), key=lambda pair: (-pair[1], pair[0]))
    why = '; '.join(f'{n}: {reason}' for reason, n in reasons)
    if not result.convs:
        why = 'it has no conv above 1x1'
    scope = f' {result.scope} |' if case.heads else ''
    numbers = f'{result.grown} of {result.convs} | {result.nested} | {result.pruned}'
    return f'| `{case.name}` |{scope} {numbers} | {outcome} | {why} |'


def page(results: Mapping[Case, Result]) -> str:
    """The page of what came out of all cases."""
    made = [result for result in results.values() if result.error64 is not None]
    grown, convs = (sum(getattr(r, name) for r in results.values()) for name in ('grown', 'convs'))
    refused = sum(result.refused is not None for result in results.values())
    parts = [
        HEAD.format(
            whole=len(DETECTORS) + len(SEGMENTORS),
            tolerance=BOUND,
            error=max((result.error64 for result in made), default=0.0),
            sums=f'{len(results)} rows: {len(made)} fused, {refused} refused. '
            f'{grown} of {convs} convs grew.',
        )
    ]
    titles = [
        *((f'Backbones of {name}', 'backbone', name, False) for name in LIBRARIES),
        ('Detectors of mmdet, scope `backbone`', 'detector', 'mmdet', False),
        ('Segmentors of mmseg, scope `backbone`', 'segmentor', 'mmseg', False),
        ('Necks and heads of mmdet', 'detector', 'mmdet', True),
        ('Necks and heads of mmseg', 'segmentor', 'mmseg', True),
    ]
    for title, *kind in titles:
        rows = [row(c, r) for c, r in results.items() if [c.kind, c.library, c.heads] == kind]
        names = ['model', *(['scope'] if kind[2] else []), 'grew', 'nested', 'pruned', 'outcome']
        names.append('why the others stay plain')
        table = [f'| {" | ".join(names)} |', '|---' * len(names) + '|', *rows]
        if kind[0] == 'backbone':
            others = {n: why for n, why in BACKBONES[kind[1]].items() if isinstance(why, str)}
            table += ['', *(f'Not built: `{n}`, {why}.' for n, why in others.items())]
        parts.append('\n'.join([f'## {title}', '', *table]).rstrip() + '\n')
    parts.append(convs_left_alone())
    return '\n'.join(parts)


def convs_left_alone() -> str:
    """The part of the page about convs that stay plain."""
    lines = [
        '## Convs that stay plain',
        '',
        '`dyrep_mm.surgery.candidates.survey` gives the reasons for any model, and a run in which',
        'no conv can grow is refused with them. `tests/surgery/test_left_alone.py` has a conv of',
        'each kind.',
        '',
        '| conv | reason |',
        '|---|---|',
        *(f'| {name} | {reason} |' for name, (_, _, reason) in LEFT_ALONE.items()),
        '',
        'A training forward shows the rest before a conv grows:',
        '',
        '| conv | reason |',
        '|---|---|',
        *(f'| {name} | {reason or "it grows"} |' for name, (_, _, reason) in SEEN.items()),
    ]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    there = Path(sys.argv[1])
    found = {c: result_of(c, there) for c in CASES if (there / f'{c}.json').exists()}
    Path(sys.argv[2]).write_text(page(found))
    if missing := [str(case) for case in CASES if case not in found]:
        sys.exit(f'no result of {", ".join(missing)}')
