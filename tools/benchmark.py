"""Measure what DyRep costs on this machine: time and peak memory relative to plain training.

Each row runs both sides in turn in one process and prints the median of the ratios, so that a
machine that is busy with other things slows both. Memory is that of a fresh process for each
side, the median of three, without what it used before the step. `--list` names the rows, `--rows`
measures some of them. On an accelerator add `--device cuda` (times are then those of its events),
`--amp` for mixed precision, `--tf32`, and `--channels-last`.
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
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from prettytable import PrettyTable
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18, resnet50, vgg16_bn

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


@dataclass(frozen=True)
class Case:
    """What runs in a step.

    Attributes:
        model: A key of :data:`MODELS`.
        shape: Of the input (batch, 3, h, w).
        grown: ``plain``, ``dbb``, ``dbb7``, ``average`` (see :func:`average_structure`) or
            ``fused``.
        norms: ``train``, ``frozen`` (in eval mode while the model trains) or ``eval``.
        branch_norm: See docs/norms.md.
        recompute: Whether blocks keep nothing but their input.
    """

    model: str
    shape: tuple[int, int, int, int]
    grown: str = 'dbb7'
    norms: str = 'train'
    branch_norm: str = 'batch'
    recompute: bool = False


def resnet(make: Callable[[], nn.Module]) -> nn.Module:
    """A ResNet of torchvision without pooling and classifier, at any input size."""
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*list(make().children())[:-2])))


def vgg16() -> nn.Module:
    """The VGG-16 of the CIFAR configs: 13 convs with BN, and a linear layer."""
    head = nn.Sequential(nn.Flatten(), nn.Linear(512, 10))
    return nn.Sequential(OrderedDict(layers=vgg16_bn().features, head=head))


class Detector(nn.Module):
    """mmdet's Faster R-CNN R50-FPN; no stage is frozen, and its BNs train."""

    def __init__(self) -> None:
        super().__init__()
        config = Config.fromfile(CONFIG)
        config.model.backbone.update(frozen_stages=-1, norm_eval=False)
        self.detector = build_model(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of the losses of a batch with ten random boxes an image."""
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData

        size = x.shape[2:]
        samples = []
        for _ in x:
            corner = torch.rand(10, 2, device=x.device) * 0.7
            extent = 0.05 + torch.rand(10, 2, device=x.device) * 0.25
            scale = torch.tensor([size[1], size[0]] * 2, device=x.device)
            labels = torch.randint(80, (10,), device=x.device)
            shapes = ('img_shape', 'pad_shape', 'ori_shape', 'batch_input_shape')
            sample = DetDataSample(metainfo=dict.fromkeys(shapes, tuple(size)))
            boxes = torch.cat([corner, corner + extent], 1) * scale
            sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
            samples.append(sample)
        losses = self.detector(x, samples, mode='loss')
        return self.detector.parse_losses(losses)[0]


#: The models, and the part of each that grows.
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    'R50': (partial(resnet, resnet50), 'layers'),
    'R18': (partial(resnet, resnet18), 'layers'),
    'CIFAR VGG-16': (vgg16, 'layers'),
    'Faster R-CNN R50-FPN': (Detector, 'detector.backbone'),
}


def average_structure(model: nn.Module) -> dict[str, list[str]]:
    """Every fourth 3x3 conv with all operations: about the 5.05e9 multiply-adds that the paper's
    structures have on average (Table 3)."""
    everything = list(preset(model, 'dbb7').items())
    return dict(everything[1::4])


def prepare(case: Case, args: argparse.Namespace) -> nn.Module:
    """The model of a case."""
    torch.manual_seed(0)
    make, scope = MODELS[case.model]
    model = make()
    structure: Any = {'average': average_structure, 'fused': lambda _: 'dbb7'}.get(
        case.grown, lambda _: case.grown
    )(model)
    if case.grown != 'plain':
        dyrep_mm.expand(model, structure, scope=scope, branch_norm=case.branch_norm)
    if case.grown == 'fused':
        model = dyrep_mm.fuse(model, torch.randn(1, 3, 64, 64))
    set_recompute(model, case.recompute)
    model.train(case.norms != 'eval')
    if case.norms == 'frozen':
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    model.to(args.device)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def make_step(
    model: nn.Module, shape: tuple[int, ...], args: argparse.Namespace, keep: bool = True
) -> Callable:
    """A function that runs forward and backward once, or forward alone in eval mode, then with
    kernels that are kept between calls or merged at each."""
    x = torch.randn(shape, device=args.device)
    if args.channels_last:
        x = x.to(memory_format=torch.channels_last)
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
    """Time of one call: on the CPU by the clock, on an accelerator between events."""
    if device != 'cpu':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


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


def _peak(case: Case, args: argparse.Namespace, queue: Any) -> None:
    set_up(args)
    step = make_step(prepare(case, args), case.shape, args)
    if args.device == 'cpu':
        Path('/proc/self/clear_refs').write_text('5')  # the high-water mark starts here
        before = high_water()
        step()
        queue.put(high_water() - before)
    else:
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        queue.put(torch.cuda.max_memory_allocated() / 2**20)


def peak(case: Case, args: argparse.Namespace) -> float:
    """Peak memory of one step in a fresh process, MiB; the median of three."""
    context = multiprocessing.get_context('spawn')
    results = []
    for _ in range(1 if args.quick else 3):
        queue = context.Queue()
        process = context.Process(target=_peak, args=(case, args, queue))
        process.start()
        results.append(queue.get())
        process.join()
    return statistics.median(results)


def compare(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Time of a case over the plain model; in training its memory too."""
    plain = replace(case, grown='plain')
    result = ratio(*(make_step(prepare(c, args), c.shape, args) for c in (case, plain)), args)
    if case.norms != 'eval' and not args.no_memory:
        memory, least = (peak(c, args) for c in (case, plain))
        result |= {'memory': memory / least, 'mib': memory, 'mib_plain': least}
    return result


def merging_each_time(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Inference of blocks that merge at every call, over the plain model."""
    grown, plain = (prepare(c, args) for c in (case, replace(case, grown='plain')))
    steps = (make_step(model, case.shape, args, keep=False) for model in (grown, plain))
    return ratio(*steps, args)


class Launches(TorchDispatchMode):
    """Counts operations that compute something: no views, no allocations."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        idle = ('_unsafe_view', 'detach', 'promote_types')
        if not (func.is_view or name in idle or name.startswith('empty')):
            self.count += 1
        return func(*args, **(kwargs or {}))


def operations(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Operations of one conv of 64 channels and its BN in a step, grown and plain."""
    counts = []
    for grown in (case.grown, 'plain'):
        layers = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64))
        if grown != 'plain':
            dyrep_mm.expand(layers, grown, branch_norm=case.branch_norm)
        layers.to(args.device)
        x = torch.randn(8, 64, 32, 32, device=args.device, requires_grad=True)
        with Launches() as launches:
            layers(x).sum().backward()
        counts.append(launches.count)
    return {'operations': counts[0], 'operations_plain': counts[1]}


def surgery(what: str, args: argparse.Namespace) -> dict[str, float]:
    """Time of what is done once to a whole ResNet-50 with its classifier."""
    times = []
    for _ in range(3):
        model = resnet50()
        if what != 'expand':
            dyrep_mm.expand(model, 'dbb7')
        call = {
            'expand': lambda model=model: dyrep_mm.expand(model, 'dbb7'),
            'structure_of': lambda model=model: structure_of(model),
            'fuse': lambda model=model: dyrep_mm.fuse(model, torch.randn(1, 3, 64, 64)),
        }[what]
        times.append(seconds(call, 'cpu'))
    return {'seconds': statistics.median(times)}


def scoring(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """A step of SGD with scores gathered in it, over one without; nothing is grown."""
    model = prepare(case, args)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    score = make_score('synflow', operations_of(model, candidates(model)))
    x = torch.randn(case.shape, device=args.device)

    def step() -> None:
        model(x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def scored() -> None:
        handle = optimizer.register_step_pre_hook(lambda *_: score.gather())
        step()
        handle.remove()

    return ratio(scored, step, args)


def update(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """One update of a real run with EMA, 20 calibration batches, over a training step."""
    from mmengine.hooks import Hook
    from mmengine.runner import Runner
    from mmpretrain.structures import DataSample

    from dyrep_mm import DyRepHook

    batch, _, *size = case.shape
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


def fuse_tool(_: Any, args: argparse.Namespace) -> dict[str, float]:
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


LARGE, MIDDLE, SMALL = (2, 3, 800, 1333), (2, 3, 480, 800), (8, 3, 160, 160)
TINY, IMAGES, CIFAR = (32, 3, 112, 112), (32, 3, 224, 224), (128, 3, 32, 32)

# What `--quick` takes instead.
QUICK = {
    LARGE: (1, 3, 224, 320),
    MIDDLE: (1, 3, 224, 320),
    SMALL: (4, 3, 96, 96),
    TINY: (4, 3, 64, 64),
    IMAGES: (2, 3, 96, 96),
    CIFAR: (16, 3, 32, 32),
}


class Row(NamedTuple):
    """A line of the table: ``what`` is handed to ``measure``."""

    name: str
    what: Any
    target: str = '-'
    measure: Callable[[Any, argparse.Namespace], dict[str, float]] = compare


R50 = partial(Case, 'R50')
ROWS = [
    # A model that trains with BN: what it costs by the choice of branch_norm.
    Row('fixed-r50', R50(MIDDLE, branch_norm='fixed'), 'time 1.10, memory 1.10'),
    Row('fixed-r50-small', R50(SMALL, branch_norm='fixed'), 'time 1.25'),
    Row('fixed-r18', Case('R18', TINY, branch_norm='fixed'), 'time 1.30'),
    Row('fixed-vgg', Case('CIFAR VGG-16', CIFAR, branch_norm='fixed'), 'time 1.25'),
    Row('fixed-detector', Case('Faster R-CNN R50-FPN', LARGE, branch_norm='fixed'), 'time 1.05'),
    Row('sampled-r50', R50(MIDDLE, branch_norm='sampled'), 'time 1.30, memory 1.25'),
    Row('sampled-r50-small', R50(SMALL, branch_norm='sampled')),
    Row('sampled-r18', Case('R18', TINY, branch_norm='sampled')),
    Row('batch-r50', R50(MIDDLE), 'time 1.60, memory 1.60'),
    Row('batch-r50-small', R50(SMALL)),
    Row('batch-r18', Case('R18', TINY)),
    Row('batch-vgg', Case('CIFAR VGG-16', CIFAR)),
    Row('batch-r50-recompute', R50(MIDDLE, recompute=True), 'memory 1.30'),
    Row('batch-r50-dbb', R50(MIDDLE, grown='dbb')),
    Row('batch-r50-average', R50(MIDDLE, grown='average'), 'time 1.25, memory 1.20'),
    # How many operations a block launches in a step.
    *(
        Row(f'operations-{kind}', Case('', (), branch_norm=kind), target, operations)
        for kind, target in (('fixed', '91'), ('sampled', '-'), ('batch', '-'))
    ),
    # A model whose norms are frozen, and inference.
    Row('frozen-r50', R50(LARGE, norms='frozen'), 'time 1.10, memory 1.15'),
    Row('inference-r50', R50(LARGE, norms='eval'), 'time 1.02'),
    Row('inference-r50-merging', R50(LARGE, norms='eval'), '-', merging_each_time),
    Row('inference-r50-fused', R50(MIDDLE, grown='fused', norms='eval'), 'time 1.00'),
    # What is done now and then.
    Row('scoring', R50(MIDDLE, grown='plain'), 'time 1.01', scoring),
    Row('update', R50(SMALL), 'time 12', update),
    *(Row(what, what, '2 s', surgery) for what in ('expand', 'structure_of', 'fuse')),
    Row('fuse-tool', None, '30 s', fuse_tool),
    # For accelerators.
    *(
        Row(f'gpu-{kind}-r50', R50(IMAGES, branch_norm=kind))
        for kind in ('fixed', 'sampled', 'batch')
    ),
]


def chosen(args: argparse.Namespace) -> list[Row]:
    """The rows that the command line names; without names all, those for accelerators on these
    alone."""
    names = [row.name for row in ROWS]
    if args.rows is None:
        return [row for row in ROWS if args.device != 'cpu' or not row.name.startswith('gpu-')]
    wanted = args.rows.split(',')
    if missing := [name for name in wanted if not any(fnmatch(n, name) for n in names)]:
        raise SystemExit(f'no row is named {missing[0]}: choose from {", ".join(names)}')
    return [row for row in ROWS if any(fnmatch(row.name, name) for name in wanted)]


def title(what: Any) -> str:
    """What a row measures, in words."""
    if not isinstance(what, Case) or not what.model:
        return ''
    norms = {'train': 'BN trains', 'frozen': 'BN frozen', 'eval': 'inference'}[what.norms]
    shape = 'x'.join(map(str, what.shape))
    extra = ', recompute' if what.recompute else ''
    return f'{what.model} {shape}, {what.grown}, {norms}{extra}'


def set_up(args: argparse.Namespace) -> None:
    """In every process that measures."""
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    logging.disable(logging.WARNING)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--tf32', action='store_true', help='products in TF32 on an accelerator')
    parser.add_argument('--channels-last', action='store_true', help='memory format of the maps')
    parser.add_argument('--runs', type=int, default=5, help='pairs of runs per row')
    parser.add_argument('--rows', help='names or patterns of rows, with commas: fixed-*,batch-r18')
    parser.add_argument('--list', action='store_true', help='name the rows and stop')
    parser.add_argument('--no-memory', action='store_true', help='times alone')
    parser.add_argument(
        '--quick',
        action='store_true',
        help='one small image, for which the targets are not meant',
    )
    parser.add_argument('--out', type=Path, help='JSON file for the figures')
    args = parser.parse_args()
    args.threads = torch.get_num_threads()
    if args.list:
        for row in chosen(args):
            print(f'{row.name:24} {row.target:24} {title(row.what)}')
        return
    set_up(args)
    if args.quick:
        args.runs = min(args.runs, 3)
    columns = ['row', 'what', 'target', 'time', 'low - high', 'memory', 'seconds', 'operations']
    table = PrettyTable(columns)
    table.align = 'l'
    figures = {}
    for row in chosen(args):
        what = row.what
        if args.quick and isinstance(what, Case) and what.shape in QUICK:
            what = replace(what, shape=QUICK[what.shape])
        print(f'measuring: {row.name}', file=sys.stderr)
        figures[row.name] = found = row.measure(what, args)
        cells = {key: format(value, '.4g') for key, value in found.items()}
        get = partial(lambda cells, key: cells.get(key, '-'), cells)
        table.add_row(
            [
                row.name,
                title(what),
                row.target,
                get('ratio'),
                f'{get("low")} - {get("high")}',
                get('memory'),
                get('seconds'),
                f'{get("operations")} / {get("operations_plain")}',
            ]
        )
    print(table)
    machine = {
        'device': torch.cuda.get_device_name() if args.device != 'cpu' else 'cpu',
        'threads': args.threads,
        'torch': torch.__version__,
        'amp': args.amp,
        'tf32': args.tf32,
        'channels_last': args.channels_last,
    }
    if args.out:
        content = {'machine': machine, 'rows': figures}
        args.out.write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
    main()
