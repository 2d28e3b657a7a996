"""The page: one HTML file with everything in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from dyrep_mm.evolution.record import Entry
from dyrep_mm.report.blocks import blocks, replaced
from dyrep_mm.report.compare import against_cost, common_metric, curves, table
from dyrep_mm.report.data import Run, best_of
from dyrep_mm.report.drawing import DARK, VARIABLES, Picture
from dyrep_mm.report.evolution import evolution, scores, when
from dyrep_mm.report.study import Row, methods_of
from dyrep_mm.report.study import picture as study_picture
from dyrep_mm.report.study import table as study_table
from dyrep_mm.report.words import count, number, scale_of, scaled
from dyrep_mm.version import __version__


@dataclass
class Section:
    """What the page says of one run."""

    run: Run
    anchor: str
    when: str
    state: str
    costs: list[tuple[str, str, str, str]]
    updates: list[tuple[str, str, str, str]]
    evolution: Picture | None
    blocks: list[Picture]
    scores: Picture | None

    @property
    def pictures(self) -> list[Picture]:
        """All of it, in the order of the page."""
        return [p for p in (self.evolution, *self.blocks, self.scores) if p is not None]


@dataclass
class StudySection:
    """What the page says of a study."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    picture: Picture


@dataclass
class Report:
    """A page before it is written.

    Attributes:
        title: Of the page.
        sections: One for each run that has a structure.
        pictures: Of all runs side by side.
        columns: Of the table of all runs.
        rows: Of that table.
        studies: One for each study.
    """

    title: str
    sections: list[Section]
    pictures: list[Picture]
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    studies: Sequence[StudySection] = ()

    def html(self) -> str:
        """The page, with everything in it."""
        sheet = {
            'light': ''.join(f'{name}:{colour};' for colour, name in VARIABLES.items()),
            'dark': ''.join(f'{name}:{DARK[colour]};' for colour, name in VARIABLES.items()),
        }
        return _template().render(
            report=self,
            sheet=sheet,
            version=__version__,
            now=f'{datetime.now():%Y-%m-%d %H:%M}',
            svg=lambda picture: Markup(picture.svg()),
        )

    def all_pictures(self) -> list[Picture]:
        """Those of the studies, of all runs and of each."""
        return [
            *(study.picture for study in self.studies),
            *self.pictures,
            *(p for section in self.sections for p in section.pictures),
        ]

    def write_figures(self, folder: Path) -> list[Path]:
        """Write an SVG and a PNG file of each figure; their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for picture in self.all_pictures():
            for suffix, content in (('svg', picture.svg_file().encode()), ('png', picture.png())):
                files.append(folder / f'{picture.name}.{suffix}')
                files[-1].write_bytes(content)
        return files


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader('dyrep_mm.report', ''),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template('page.html.j2')


def make_report(
    runs: Sequence[Run],
    *,
    studies: Mapping[str, Sequence[Row]] | None = None,
    metric: str | None = None,
    title: str | None = None,
) -> Report:
    """Draw all that runs and studies tell.

    Args:
        runs: From :func:`dyrep_mm.report.data.read_runs`.
        studies: Rows of studies, by what the page calls them.
        metric: To show; by default the first of the usual main metrics that a run has.
        title: Of the page; made of the runs by default.
    """
    with_structure = [run for run in runs if run.has_structure]
    sections = [_section(run, f'run-{i}', metric) for i, run in enumerate(with_structure, 1)]
    labels = [*(studies or {}), *(run.label for run in runs)]
    title = title or f'DyRep: {", ".join(labels)}'
    report = Report(title, sections, [])
    report.studies = [
        _study(label, rows, f'study-{i}') for i, (label, rows) in enumerate((studies or {}).items())
    ]
    if len(runs) > 1:
        common = common_metric(runs, metric)
        report.columns, report.rows = table(runs, common)
        if common is not None:
            pictures = [curves(runs, common), against_cost(runs, common)]
            report.pictures = [picture for picture in pictures if picture is not None]
        for section in sections:
            for picture in section.pictures:  # no two files and no two ids are the same
                picture.name = f'{section.anchor}-{picture.name}'
    return report


def _study(label: str, rows: Sequence[Row], name: str) -> StudySection:
    methods, metric = methods_of(rows), rows[0]['metric']
    return StudySection(label, *study_table(methods, metric), study_picture(methods, metric, name))


def _section(run: Run, anchor: str, metric: str | None) -> Section:
    main = run.main_metric(metric)
    return Section(
        run,
        anchor,
        when(run, run.recorded),
        _state(run, main),
        _costs(run),
        [_update(run, entry) for entry in run.journal],
        evolution(run, main) if run.lives else None,
        blocks(run),
        scores(run),
    )


def _state(run: Run, metric: str | None) -> str:
    """What the run did, in sentences."""
    planned = '' if run.planned is None else f' of {number(run.planned, 6)}'
    sentences = [
        f'The training is at {when(run, run.reached)}{planned}'
        + ('.' if run.is_over else '; it is going on, or was stopped.')
    ]
    if run.recorded < run.reached:
        sentences.append(
            f'The structure is known up to {when(run, run.recorded)}, where the newest checkpoint '
            'was written.'
        )
    changed = [entry for entry in run.journal if entry.grown or entry.pruned]
    blocks = sum(bool(names) for names in run.structure.values())
    branches = sum(len(names) - 1 for names in run.structure.values() if names)
    sentences.append(
        f'{count(len(changed), "update") if changed else "No update"} changed the structure. '
        'The model has now '
        f'{count(blocks, "block")} with {count(branches, "branch")} '
        f'in the place of {count(len(replaced(run)), "conv")}.'
    )
    if metric is not None:
        at, value = best_of(run.metrics[metric], metric)
        sentences.append(f'{metric} was best at {when(run, at)}: {number(value, 4)}.')
    return ' '.join(sentences)


def _costs(run: Run) -> list[tuple[str, str, str, str]]:
    """Rows of plain, average and last cost, as far as they are known."""
    rows = []
    for key, name in (
        ('multiply_adds', 'multiply-adds of one image'),
        ('parameters', 'parameters'),
    ):
        last = next(
            (value for e in reversed(run.journal) if (value := getattr(e, key)) is not None), None
        )
        values = [run.plain.get(key), run.averages.get(key), last]
        if any(value is not None for value in values):
            size, unit = scale_of(key, values)
            plain, average, now = (number(scaled(value, size)) for value in values)
            rows.append((f'{name}, {unit}', plain, average, now))
    if 'time' in run.averages:
        rows.append(('time of training, relative', '1', number(run.averages['time']), '–'))
    if run.seconds is not None:
        size, unit = scale_of('seconds', [run.seconds])
        rows.append((f'training steps and updates, {unit}', '–', number(run.seconds / size), '–'))
    return rows


def _update(run: Run, entry: Entry) -> tuple[str, str, str, str]:
    """A row of the journal: number, time, what grew, what was pruned."""
    grown = []
    for path, names in entry.grown.items():
        score = entry.scores.get(path)
        about = '' if score is None else f' (score {number(score)})'
        grown.append(f'{path}{about}: {", ".join(names[1:])}')
    if entry.grown and entry.runner_up is not None:
        path, score = entry.runner_up
        grown.append(f'next was {path} ({number(score)})')
    pruned = []
    for path, names in entry.pruned.items():
        known = entry.importances.get(path, {})
        words = [f'{n} ({number(known[n])})' if n in known else n for n in names]
        reasons = entry.reasons.get(path, {})
        why = ', '.join(f'{name} {number(value)}' for name, value in reasons.items())
        pruned.append(f'{path}: {", ".join(words)}' + (f'; {why}' if why else ''))
    return (
        str(entry.update),
        number(entry.at, 6),
        '\n'.join(grown) or '–',
        '\n'.join(pruned) or '–',
    )
