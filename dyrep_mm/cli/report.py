"""Show runs as one page: ``dyrep-report WORK_DIR [WORK_DIR ...] --out report.html``."""

from __future__ import annotations

import argparse
from pathlib import Path

from dyrep_mm.cli.common import check_out, sentence
from dyrep_mm.engine.progress import track
from dyrep_mm.errors import DyRepError
from dyrep_mm.report.data import read_runs
from dyrep_mm.report.page import make_report
from dyrep_mm.report.story import story
from dyrep_mm.report.study import is_study, read_study
from dyrep_mm.report.words import count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'runs',
        nargs='+',
        metavar='[LABEL=]WORK_DIR',
        help='work directory of a run, also of one that is going on, or a checkpoint; several are '
        'laid side by side, plain runs too. Or the folder of a study, or its study.jsonl',
    )
    parser.add_argument('--out', default='report.html', help='HTML file to write')
    parser.add_argument('--figures', help='folder for an SVG and a PNG file of each figure')
    parser.add_argument(
        '--story',
        help='SVG file of one block from conv to conv: the one that changed most in the first run '
        'that has any',
    )
    parser.add_argument('--metric', help='validation metric to show, as in the log')
    parser.add_argument('--title', help='title of the page')
    parser.add_argument(
        '--trust',
        action='store_true',
        help='load checkpoints that hold more than plain data; such a file can run code',
    )
    args = parser.parse_args()
    with sentence('report'):
        check_out(args.out, '.html', '.htm')
        check_out(args.story, '.svg')
        studies = {source: read_study(source) for source in args.runs if is_study(source)}
        sources = [source for source in args.runs if source not in studies]
        runs = read_runs(sources, trust=args.trust) if sources else []
        report = make_report(runs, studies=studies, metric=args.metric, title=args.title)
        for drawn in track(report.all_pictures(), 'drawing figures'):
            drawn.svg()  # is kept
        Path(args.out).write_text(report.html())
        read = [count(len(runs), 'run')] if runs else []
        read += [count(len(studies), 'study')] if studies else []
        print(f'{args.out}: {count(len(report.all_pictures()), "figure")} of {" and ".join(read)}')
        if args.story is not None:
            picture = next(filter(None, map(story, runs)), None)
            if picture is None:
                raise DyRepError('--story has no block to draw: none has grown')
            Path(args.story).write_text(picture.svg_file())
            print(args.story)
        if args.figures is not None:
            files = report.write_figures(Path(args.figures))
            print(f'{args.figures}: {len(files)} files')
