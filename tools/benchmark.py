"""Measure what DyRep costs on this machine: time and peak memory relative to plain training.

Each row runs both sides in turn in one process and prints the median of the ratios, so that a
machine that is busy with other things slows both. Memory is that of a fresh process for each
side, the median of three, without what it used before the step. On an accelerator add
``--device cuda``, and ``--amp`` for mixed precision.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from prettytable import PrettyTable
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import resnet50

import dyrep_mm
from dyrep_mm.engine.converter import build_model
from dyrep_mm.evolution.operations import operations_of
from dyrep_mm.evolution.record import Record
from dyrep_mm.evolution.saliency import make_score
from dyrep_mm.surgery.candidates import candidates, preset
from dyrep_mm.surgery.rewire import set_recompute
from dyrep_mm.surgery.structure import structure_of

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/fpn_r50_dyrep_coco.py'


class Backbone(nn.Module):
    """ResNet-50 without pooling and classifier, at any input size."""

    def __init__(self) -> None:
        super().__init__()
        net = resnet50()
        self.layers = nn.Sequential(*list(net.children())[:-2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def average_structure(model: nn.Module) -> dict[str, list[str]]:
    """Every fourth 3x3 conv with all operations: about the 5.05e9 multiply-adds that the paper's
    structures have on average (Table 3)."""
    everything = list(preset(model, 'dbb7').items())
    return dict(everything[1::4])


def prepare(variant: str, norms: str, device: str) -> nn.Module:
    """ResNet-50, ``plain`` or expanded, its norms in ``train``, ``frozen`` or ``eval`` mode."""
    torch.manual_seed(0)
    model = Backbone()
    if variant in ('dbb', 'dbb7', 'recompute'):
        dyrep_mm.expand(model, 'dbb' if variant == 'dbb' else 'dbb7')
    elif variant == 'average':
        dyrep_mm.expand(model, average_structure(model))
    elif variant == 'fused':
        dyrep_mm.expand(model, 'dbb7')
        model = dyrep_mm.fuse(model, torch.randn(1, 3, 64, 64))
    set_recompute(model, variant == 'recompute')
    model.train(norms != 'eval')
    if norms == 'frozen':
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    return model.to(device)


def make_step(
    model: nn.Module, shape: tuple[int, ...], args: argparse.Namespace, keep: bool = True
) -> Callable:
    """A function that runs forward and backward once, or forward alone in eval mode, then with
    kernels that are kept between calls or merged at each."""
    x = torch.randn(shape, device=args.device)
    autocast = torch.autocast(args.device) if args.amp else nullcontext()

    kept = ExitStack()
    if keep and not model.training:
        kept.enter_context(dyrep_mm.kernels_kept(model))

    def step() -> None:
        if not model.training:
            with torch.no_grad(), autocast:
                model(x)
            return
        with autocast:
            loss = model(x).float().mean()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    step.kept = kept  # as long as the function is in use
    return step


def seconds(function: Callable[[], Any], device: str) -> float:
    """Wall time of one call, the accelerator's work included."""
    if device != 'cpu':
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device != 'cpu':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(first: Callable, second: Callable, args: argparse.Namespace) -> dict[str, float]:
    """Median of the ratios of ``first`` over ``second``, run in turn."""
    first(), second()
    pairs = [(seconds(first, args.device), seconds(second, args.device)) for _ in range(args.runs)]
    ratios = [a / b for a, b in pairs]
    return {
        'ratio': statistics.median(ratios),
        'low': min(ratios),
        'high': max(ratios),
        'seconds': statistics.median(a for a, _ in pairs),
        'seconds_plain': statistics.median(b for _, b in pairs),
    }


def high_water() -> float:
    """Largest resident memory of this process so far, MiB (Linux)."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 2**10


def _peak(variant: str, norms: str, shape: tuple, args: argparse.Namespace, queue: Any) -> None:
    model = prepare(variant, norms, args.device)
    step = make_step(model, shape, args)
    if args.device == 'cpu':
        torch.set_num_threads(args.threads)
        Path('/proc/self/clear_refs').write_text('5')  # the high-water mark starts here
        before = high_water()
        step()
        queue.put(high_water() - before)
    else:
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        queue.put(torch.cuda.max_memory_allocated() / 2**20)


def peak(variant: str, norms: str, shape: tuple, args: argparse.Namespace) -> float:
    """Peak memory of one step in a fresh process, MiB; the median of three."""
    context = multiprocessing.get_context('spawn')
    results = []
    for _ in range(1 if args.quick else 3):
        queue = context.Queue()
        process = context.Process(target=_peak, args=(variant, norms, shape, args, queue))
        process.start()
        results.append(queue.get())
        process.join()
    return statistics.median(results)


def compare(variant: str, norms: str, shape: tuple, args: argparse.Namespace) -> dict[str, float]:
    """Time and memory of a variant over the plain model."""
    steps = [make_step(prepare(v, norms, args.device), shape, args) for v in (variant, 'plain')]
    result = ratio(*steps, args)
    del steps
    if norms != 'eval':
        memory, plain = (peak(v, norms, shape, args) for v in (variant, 'plain'))
        result |= {'memory': memory / plain, 'mib': memory, 'mib_plain': plain}
    return result


def merging_each_time(shape: tuple, args: argparse.Namespace) -> dict[str, float]:
    """Inference of blocks that merge at every call, over the plain model."""
    grown, plain = (prepare(variant, 'eval', args.device) for variant in ('dbb7', 'plain'))
    return ratio(make_step(grown, shape, args, keep=False), make_step(plain, shape, args), args)


def scoring(shape: tuple, args: argparse.Namespace) -> dict[str, float]:
    """A step of SGD with scores gathered in it, over one without; nothing is grown."""
    model = prepare('plain', 'train', args.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    score = make_score('synflow', operations_of(model, candidates(model)))
    x = torch.randn(shape, device=args.device)

    def step() -> None:
        model(x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def scored() -> None:
        handle = optimizer.register_step_pre_hook(lambda *_: score.gather())
        step()
        handle.remove()

    return ratio(scored, step, args)


def update(shape: tuple, args: argparse.Namespace) -> dict[str, float]:
    """One update of a real run with EMA, 20 calibration batches, over a training step."""
    from mmengine.hooks import Hook
    from mmengine.runner import Runner
    from mmpretrain.structures import DataSample

    from dyrep_mm import DyRepHook

    batch, _, *size = shape
    images = [
        {'inputs': torch.rand(3, *size) * 255, 'data_samples': DataSample().set_gt_label(i % 10)}
        for i in range(batch * 20)
    ]
    times: dict[str, list[float]] = {'step': [], 'update': []}

    class Clock(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.start = time.perf_counter()

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            times['step'].append(time.perf_counter() - self.start)

    class Timed(DyRepHook):
        def update(self, runner):
            times['update'].append(seconds(lambda: DyRepHook.update(self, runner), 'cpu'))

    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            model={
                'type': 'mmpretrain.ImageClassifier',
                'backbone': {'type': 'mmpretrain.ResNet', 'depth': 50},
                'neck': {'type': 'mmpretrain.GlobalAveragePooling'},
                'head': {
                    'type': 'mmpretrain.LinearClsHead',
                    'num_classes': 10,
                    'in_channels': 2048,
                },
            },
            work_dir=folder,
            train_dataloader={
                'batch_size': batch,
                'sampler': {'type': 'DefaultSampler', 'shuffle': True},
                'dataset': images,
                'collate_fn': {'type': 'pseudo_collate'},
            },
            train_cfg={'by_epoch': True, 'max_epochs': 1},
            optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.01, 'momentum': 0.9}},
            custom_hooks=[{'type': 'EMAHook'}],
            default_hooks={'checkpoint': None, 'logger': None},
            default_scope='mmpretrain',
            log_level='ERROR',
        )
        clock, hook = Clock(), Timed(interval=6, by_epoch=False, end=12)
        runner.register_hook(hook, 'HIGH')
        runner.register_hook(clock, 'VERY_HIGH')
        runner.train()
    step = statistics.median(times['step'][1:6])
    return {'ratio': statistics.median(times['update']) / step, 'seconds': step}


def fuse_tool() -> dict[str, float]:
    """Wall time of tools/fuse.py on Faster R-CNN R50-FPN with every 3x3 conv expanded."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / 'grown.pth', Path(folder) / 'fused.pth'
        model = build_model(Config.fromfile(CONFIG))
        dyrep_mm.expand(model, 'dbb7', scope='backbone')
        checkpoint: dict[str, Any] = {'meta': {}, 'state_dict': model.state_dict()}
        Record(structure_of(model)).to_checkpoint(checkpoint)
        torch.save(checkpoint, source)
        command = [sys.executable, ROOT / 'tools/fuse.py', CONFIG, source, out]
        return {
            'seconds': seconds(
                lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), 'cpu'
            )
        }


def multiply_adds(variant: str) -> float:
    """Multiply-adds of the backbone on one image of 224x224 pixels, in units of 1e9."""
    model = prepare(variant, 'train', 'cpu')  # in eval mode a block is one conv
    inputs = (torch.zeros(2, 3, 224, 224),)
    info = get_model_complexity_info(model, inputs=inputs, show_table=False, show_arch=False)
    return info['flops'] / 2 / 1e9


def rows(args: argparse.Namespace) -> list[tuple[str, str, Callable[[], dict[str, float]]]]:
    """What is measured: a name, the target, a function."""
    large = (2, 3, 800, 1333) if not args.quick else (1, 3, 224, 320)
    middle = (2, 3, 480, 800) if not args.quick else (1, 3, 224, 320)
    small = (8, 3, 160, 160) if not args.quick else (4, 3, 96, 96)
    shape = 'x'.join(map(str, large)), 'x'.join(map(str, middle))
    return [
        ('scoring, nothing grown', 'time 1.01', lambda: scoring(middle, args)),
        (
            f'frozen BN, 16 convs x 7, {shape[0]}',
            'time 1.10, memory 1.15',
            lambda: compare('dbb7', 'frozen', large, args),
        ),
        (
            f'inference, 16 convs x 7, unfused, {shape[0]}',
            'time 1.02',
            lambda: compare('dbb7', 'eval', large, args),
        ),
        (
            f'the same, merged at every call, {shape[0]}',
            '-',
            lambda: merging_each_time(large, args),
        ),
        (
            f'train BN, 16 convs x 4 (static DBB), {shape[1]}',
            '-',
            lambda: compare('dbb', 'train', middle, args),
        ),
        (
            f'train BN, 16 convs x 7, {shape[1]}',
            'time 1.60, memory 1.60',
            lambda: compare('dbb7', 'train', middle, args),
        ),
        (
            f'the same, recompute, {shape[1]}',
            'memory 1.30',
            lambda: compare('recompute', 'train', middle, args),
        ),
        (
            f'train BN, average structure, {multiply_adds("average"):.2f} G, {shape[1]}',
            'time 1.25, memory 1.20',
            lambda: compare('average', 'train', middle, args),
        ),
        ('one update, in steps', 'time 12', lambda: update(small, args)),
        ('fused, inference', 'time 1.00', lambda: compare('fused', 'eval', middle, args)),
        ('tools/fuse.py, Faster R-CNN', '30 s', fuse_tool),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--runs', type=int, default=5, help='pairs of runs per row')
    parser.add_argument('--only', help='rows whose name contains this')
    parser.add_argument(
        '--quick',
        action='store_true',
        help='2 minutes: one small image, for which the targets are not meant',
    )
    parser.add_argument('--out', type=Path, help='JSON file for the figures')
    args = parser.parse_args()
    args.threads = torch.get_num_threads()
    logging.disable(logging.WARNING)  # of the counter, about operators that cost nothing
    if args.quick:
        args.runs = min(args.runs, 3)
    table = PrettyTable(['row', 'target', 'time', 'low - high', 'memory', 'seconds'])
    table.align = 'l'
    figures = {}
    for name, target, measure in rows(args):
        if args.only and args.only not in name:
            continue
        print(f'measuring: {name}', file=sys.stderr)
        figures[name] = f = SimpleNamespace(**measure())
        get = lambda key, spec='.2f': format(getattr(f, key), spec) if hasattr(f, key) else '-'  # noqa: B023, E731
        table.add_row(
            [
                name,
                target,
                get('ratio'),
                f'{get("low")} - {get("high")}',
                get('memory'),
                get('seconds'),
            ]
        )
    print(table)
    machine = {
        'device': torch.cuda.get_device_name() if args.device != 'cpu' else 'cpu',
        'threads': args.threads,
        'torch': torch.__version__,
        'amp': args.amp,
    }
    if args.out:
        content = {'machine': machine, 'rows': {n: vars(f) for n, f in figures.items()}}
        args.out.write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
    main()
