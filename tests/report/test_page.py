"""The page: complete, for everybody, and with nothing outside of it."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from dyrep_mm.evolution.record import Entry
from dyrep_mm.report.data import Run, read_runs
from dyrep_mm.report.drawing import DARK, VARIABLES
from dyrep_mm.report.history import lives
from dyrep_mm.report.page import Report, make_report
from support.pages import Html


@pytest.fixture(scope='module')
def long(r50) -> str:
    """The page of the long run."""
    return make_report(read_runs([str(r50[0])])).html()


@pytest.fixture(scope='module')
def many(plain, static, trained) -> Report:
    """The report of several runs."""
    return make_report(read_runs([str(plain), str(static), trained.work_dir]), metric='loss')


def check(page: str) -> Html:
    """What holds for every page."""
    html = Html(page)
    assert html.asked == []
    assert html.scripts == 0
    assert 'url(' not in html.styles
    assert '@import' not in html.styles
    assert not re.search(r'(?<!:)//\w', page)  # no address of a server anywhere
    assert html.ids.total() == len(html.ids)
    for picture in html.pictures:
        assert picture['role'] == 'img'
        title, text = picture['aria-labelledby'].split()
        assert len(html.texts[title]) > 10
        assert len(html.texts[text]) > 20
    return html


def test_a_long_run(r50, long):
    """40 updates of a ResNet-50: everything is there, and it is small enough to send."""
    record, html = r50[1], check(long)
    assert len(long.encode()) < 3_000_000
    paths = {path for e in record.journal for path in [*e.grown, *e.pruned]} | {*record.structure}
    assert len(paths) > 30
    assert not {path for path in paths if path not in html.text}
    outer = {path.split('.branches.')[0] for path, names in record.structure.items() if names}
    assert len(html.pictures) == 2 + len(outer)


def test_tables_say_what_figures_show(r50, long):
    record, html = r50[1], Html(long)
    report = make_report(read_runs([str(r50[0])]))
    (section,) = report.sections
    assert len(section.evolution.rows) == len(lives({}, record.journal))
    winners = [row for row in section.scores.rows if row[-1] == 'grew']
    assert {row[3] for row in winners} == {path for e in record.journal for path in e.grown}
    for picture in report.all_pictures():
        assert all(len(row) == len(picture.columns) for row in picture.rows)
        assert picture.title in html.text
    values = {(row[0], row[1]): row[2] for p in section.blocks for row in p.rows}
    for path, names in record.structure.items():
        assert {name for p, name in values if p == path} == set(names)
        assert values[path, 'kxk'] == '1'


def test_axes_have_units(long):
    for words in ('epochs of training', 'epoch of the update', 'multiply-adds of one image'):
        assert words in Html(long).text


def test_colours_follow_the_page(long):
    """No ink is written down in a figure: it is that of the page, which has a light and a dark."""
    html = Html(long)
    for colour, name in VARIABLES.items():
        assert f'{name}:{colour}' in html.styles
        assert f'{name}:{DARK[colour]}' in html.styles
        assert f'var({name})' in long
        assert long.count(colour) == html.styles.count(colour)
    assert 'prefers-color-scheme: dark' in html.styles
    assert '@media print' in html.styles


def test_several_runs(many):
    html = check(many.html())
    assert many.columns[0] == 'method'
    assert [row[0] for row in many.rows] == ['plain', 'DBB', 'DyRep']
    assert [picture.name for picture in many.pictures] == ['curves', 'cost']
    assert [section.run.label for section in many.sections] == ['dbb', 'dyrep']
    for section in many.sections:
        assert f'{section.anchor}' in html.ids


def test_runs_of_a_method_are_told_as_mean_and_spread():
    runs = [
        Run('a', 'DyRep', metrics={'acc': [(1, 0.5), (2, 0.7)]}, averages={'parameters': 2e6}),
        Run('b', 'DyRep', metrics={'acc': [(1, 0.9), (2, 0.8)]}, averages={'parameters': 4e6}),
        Run('c', 'plain', metrics={'acc': [(1, 0.25)]}),
    ]
    report = make_report(runs)
    rows = {row[0]: dict(zip(report.columns, row, strict=True)) for row in report.rows}
    assert rows['DyRep']['acc, best'] == '0.8 ± 0.14'
    assert rows['DyRep']['acc, last'] == '0.75 ± 0.071'
    assert rows['DyRep']['average parameters, M'] == '3 ± 1.4'
    assert rows['plain']['acc, best'] == '0.25'
    assert rows['plain']['average parameters, M'] == '–'


def test_files_of_figures(many, tmp_path):
    """SVG files stand alone, in both schemes; PNG files are pictures."""
    files = many.write_figures(tmp_path / 'new' / 'figures')
    assert len(files) == 2 * len(many.all_pictures())
    for file in files:
        if file.suffix == '.svg':
            root = ElementTree.fromstring(file.read_text())
            assert root.tag == '{http://www.w3.org/2000/svg}svg'
            assert 'prefers-color-scheme:dark' in file.read_text()
        else:
            assert file.read_bytes().startswith(b'\x89PNG')


def test_names_are_text_and_never_markup(r50):
    runs = read_runs([f'<b>&"x"</b>={r50[0]}'])
    page = make_report(runs, title='<script>1</script>').html()
    html = check(page)
    assert '<b>&"x"</b>' in html.text


def own_journal() -> list[Entry]:
    """A journal with an operation of another project, and values that no figure can show."""
    return [
        Entry(1, 'iteration', 100, {'a': ['kxk', 'mine']}, scores={'a': float('nan'), 'b': 2.0}),
        Entry(2, 'iteration', 200, scores={'b': -1.0}, importances={'a': {'mine': float('nan')}}),
        Entry(3, 'iteration', 300),
    ]


def test_little_is_enough():
    """No log, no costs, no weights, no layers: what is not known is left out."""
    journal = own_journal()
    structure = {'a': ['kxk', 'mine']}
    run = Run(
        'r',
        'DyRep',
        unit='iteration',
        reached=300,
        recorded=300,
        journal=journal,
        structure=structure,
        lives=lives({}, journal),
    )
    html = check(make_report([run]).html())
    assert 'mine' in html.text
    assert 'iterations of training' in html.text


def test_a_run_without_growth_yet():
    run = Run('r', 'DyRep', journal=[Entry(1, 'epoch', 5, scores={'a': 1.0})], recorded=5)
    html = check(make_report([run]).html())
    assert 'No update changed the structure' in html.text
