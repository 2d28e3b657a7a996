"""The report as a user makes it."""

from __future__ import annotations

from support.journals import write_run
from support.pages import read_page
from support.processes import run_tool


def test_the_page_of_a_run(tmp_path):
    work_dir, out = tmp_path / 'run', tmp_path / 'report.html'
    write_run(work_dir, updates=2)
    figures = ['--figures', tmp_path / 'figures']
    said = run_tool('report', work_dir, '--out', out, *figures, fresh=True)
    assert str(out) in said
    html = read_page(out)
    assert html.asked == []
    assert len(html.pictures) >= 3
    assert len(list((tmp_path / 'figures').glob('*.png'))) == len(html.pictures)


def test_what_has_no_journal_is_one_sentence(tmp_path):
    out = tmp_path / 'report.html'
    said = run_tool('report', tmp_path, '--out', out, code=1)
    assert said.startswith(f'report: there is no journal in {tmp_path}')
    assert '\n' not in said
    assert not out.exists()
    said = run_tool('report', tmp_path, '--out', tmp_path / 'report.pdf', code=1)
    assert said.startswith('report: --out must end in .html')
