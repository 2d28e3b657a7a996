"""Turn a checkpoint of a DyRep run into a plain one: ``dyrep-fuse CONFIG CHECKPOINT OUT``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dyrep_mm.cli.common import check_out, sentence
from dyrep_mm.engine.checkpoint import load_checkpoint, weights_of
from dyrep_mm.engine.converter import (
    IMAGE_SIZE,
    TOLERANCE,
    FuseReport,
    fuse_checkpoint,
    read_config,
)
from dyrep_mm.engine.export import check_onnx, export_onnx
from dyrep_mm.engine.passes import Passes
from dyrep_mm.engine.progress import stages
from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.quantization import (
    Spread,
    at_risk,
    channel_spreads,
    named_as,
    norms_behind,
)

#: How many convs are named as most at risk.
NAMED = 10


def preprocessing_of(config: Config) -> str:
    """What the config does with images before the model, as JSON."""
    said = config.model.get('data_preprocessor') or config.get('data_preprocessor') or {}
    return json.dumps(said, default=str)


def print_spreads(report: FuseReport, before: Mapping[str, Tensor] | None) -> None:
    """Show how far the channels of every fused conv are apart, and of the same before DyRep."""
    paths, model = report.fused, report.model
    passes = Passes(model, report.images, paths)
    norms = norms_behind(model, paths, report.images, passes)
    spreads = channel_spreads(model.state_dict(), norms)
    earlier = {} if before is None else channel_spreads(named_as(before, paths), norms)
    if before is not None and paths and not earlier:
        raise DyRepError(f'--before holds none of the fused convs, {paths[0]} for one')
    table = Table('conv', title='largest / median channel range')
    columns = ['kernel', 'with its norm']
    columns += [f'{name} before' for name in columns] if before is not None else []
    for name in columns:
        table.add_column(name, justify='right')
    for path in at_risk(spreads):
        values = [spreads[path], *([earlier.get(path)] if before is not None else [])]
        table.add_row(path, *(text for value in values for text in written(value)))
    console = Console(highlight=False)
    if not console.is_terminal:  # a file has room for long names
        console.width = 200
    console.print(table)
    worst = ', '.join(at_risk(spreads)[:NAMED])
    print(f'most at risk in int8 with one scale for a kernel: {worst or "no conv was fused"}')


def written(spread: Spread | None) -> list[str]:
    """The cells of a conv."""
    if spread is None:
        return ['-', '-']
    return [f'{spread.kernel:.1f}', f'{spread.folded:.1f}']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of the run; its plain config does too')
    parser.add_argument('checkpoint', help='checkpoint of the run')
    parser.add_argument('out', help='file to write; only if the fused model is verified')
    parser.add_argument(
        '--size',
        type=int,
        nargs='+',
        help='height and width of the verification images, or one number for both; '
        f'default: {IMAGE_SIZE}, or what the config says of a model that does not take it',
    )
    parser.add_argument(
        '--tolerance',
        type=float,
        default=TOLERANCE,
        help='largest relative difference of outputs in float64',
    )
    parser.add_argument(
        '--trust',
        action='store_true',
        help='load a checkpoint that holds more than plain data; such a file can run code',
    )
    parser.add_argument(
        '--onnx',
        metavar='OUT.onnx',
        help='write an ONNX file too, checked in onnxruntime: of a classifier or a segmentor the '
        'logits, of a detector backbone and neck',
    )
    parser.add_argument(
        '--report',
        action='store_true',
        help='show which fused convs int8 would cost most, by the spread of their channels',
    )
    parser.add_argument(
        '--before',
        metavar='CHECKPOINT',
        help='with --report: the plain checkpoint before DyRep, shown beside it',
    )
    args = parser.parse_args()
    with sentence('fuse'):
        if args.onnx is not None:
            check_out(args.onnx, '.onnx', option='--onnx')
            if Path(args.onnx).resolve() == Path(args.out).resolve():
                raise DyRepError(f'--onnx {args.onnx} is the file of the fused checkpoint too')
            check_onnx()
        if args.before is not None and not args.report:
            raise DyRepError('--before is for --report')
        before = None
        if args.before is not None:
            before = weights_of(load_checkpoint(args.before, trust=args.trust))
        with stages('fusing', total=5):
            report = fuse_checkpoint(
                args.config,
                args.checkpoint,
                args.out,
                size=args.size,
                tolerance=args.tolerance,
                trust=args.trust,
                say=print,
            )
        if args.report:
            print_spreads(report, before)
        if args.onnx is not None:
            about = {
                'source': Path(args.checkpoint).name,
                'preprocessing': preprocessing_of(read_config(args.config)),
            }
            export_onnx(report.model, report.images, args.onnx, about=about, say=print)
