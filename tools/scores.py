"""Hold scores against the decrease of the loss that is measured, and measure what they cost.

With a folder of images, one folder for each class: a small net trains on it and gathers scores in
an interval, as in a run. Then every conv grows all its branches for real, calibrated, and each
branch by itself takes a step of SGD in units of its importance. Each number is a rank correlation
(Spearman) with the decrease of the loss. With ``--cost``: a training step of ResNet-50 with
scores gathered, over one without.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from mmpretrain.models import ResNet_CIFAR
from prettytable import PrettyTable, TableStyle
from torch import Tensor, nn
from torchvision.io import ImageReadMode, read_image
from torchvision.models import resnet50

from dyrep_mm.evolution.gain import EVERY, gains_of
from dyrep_mm.evolution.operations import operations_of
from dyrep_mm.evolution.saliency import SCORES, make_score
from dyrep_mm.surgery.calibration import calibrate
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.rewire import INIT_SCALE, rewire

Batch = tuple[Tensor, Tensor]
Key = tuple[str, str]

METRICS = ('synflow', 'grad_norm', 'snip', 'gain')


def make_backbone(kind: str) -> tuple[nn.Module, int]:
    """A residual net or a plain stack for images of 32x32, and how many channels it gives."""
    if kind == 'resnet':
        return ResNet_CIFAR(18, stem_channels=16, base_channels=16), 128
    layers, inner = [], 3
    for width, depth in ((24, 2), (48, 2), (96, 3), (192, 2)):
        layers += [nn.MaxPool2d(2)] if layers else []
        for _ in range(depth):
            conv = nn.Conv2d(inner, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            inner = width
    return nn.Sequential(*layers), inner


class Classifier(nn.Module):
    """A backbone with a linear head."""

    def __init__(self, kind: str, classes: int):
        super().__init__()
        self.backbone, width = make_backbone(kind)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.backbone(x)
        maps = maps[-1] if isinstance(maps, tuple) else maps
        return self.head(maps.mean((2, 3)))


def read_images(folder: Path, count: int) -> Batch:
    """The first ``count`` images of each class, (n, 3, h, w), and their classes, shuffled."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [(p, i) for i, c in enumerate(classes) for p in sorted(c.iterdir())[:count]]
    if not found:
        sys.exit(f'scores.py: {folder} has no folder of images')
    random.shuffle(found)
    images = torch.stack([read_image(str(path), ImageReadMode.RGB) for path, _ in found])
    return (images / 255 - 0.47) / 0.25, torch.tensor([label for _, label in found])


def draw(data: Batch, size: int) -> Iterator[Batch]:
    """Random batches, mirrored by half, without end."""
    images, labels = data
    while True:
        chosen = torch.randint(len(images), (size,))
        x = images[chosen]
        yield (x.flip(-1) if random.random() < 0.5 else x), labels[chosen]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def decreases(model: nn.Module, batches: list[Batch], rate: float) -> dict[Key, float]:
    """Of the loss on the first batch, per unit of the learning rate, by a step of each branch of a
    grown copy; calibrated on all batches."""
    grown = copy.deepcopy(model)
    blocks = rewire(
        grown,
        candidates(grown),
        measure=lambda made: calibrate(grown, made, batches, lambda batch: grown(batch[0])),
    )
    grown.zero_grad()
    loss = loss_of(grown, batches[0])
    loss.backward()
    found = {}
    with torch.no_grad():
        for path, block in blocks.items():
            for name in block.names[1:]:
                scale = block.branches[name].bn.weight
                before, unit = scale.clone(), scale / INIT_SCALE
                scale -= rate * unit.square() * scale.grad
                found[path, name] = (loss - loss_of(grown, batches[0])).item() / rate
                scale.copy_(before)
    return found


def correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, of lists without ties."""
    ranks = [
        torch.tensor(values).argsort().argsort().double().tolist() for values in (first, second)
    ]
    return statistics.correlation(*ranks)


def compare(scores: dict[str, dict], gains: dict[str, dict], found: dict[Key, float]) -> list[list]:
    """Rows of the table; ``gains`` are by conv and branch."""
    paths = list(dict.fromkeys(path for path, _ in found))
    by_conv = {p: {name: v for (path, name), v in found.items() if path == p} for p in paths}
    whole = [sum(by_conv[path].values()) for path in paths]
    rows = []
    for title, values in gains.items():
        pairs = [(values[path][name], v) for (path, name), v in found.items()]
        inside = [
            correlation([values[p][name] for name in own], list(own.values()))
            for p, own in by_conv.items()
            if len(own) > 3
        ]
        got = [own[max(own, key=values[p].get)] / max(own.values()) for p, own in by_conv.items()]
        sums = [sum(values[path].values()) for path in paths]
        row = [correlation(*map(list, zip(*pairs, strict=True))), statistics.fmean(inside)]
        rows.append([title, correlation(sums, whole), *row, statistics.fmean(got)])
    for title, values in scores.items():
        rows.append([title, correlation([values[path] for path in paths], whole), None, None, None])
    return rows


def measure_cost(shape: list[int], rounds: int) -> None:
    """Print a training step with the scores of all convs over one without, by score."""
    model = resnet50(num_classes=1000)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    operations = operations_of(model, candidates(model))
    scores = {name: make_score(name, operations) for name in SCORES}
    x = torch.randn(shape)
    table = PrettyTable(['score', 'step with it', 'lowest', 'highest'])
    table.set_style(TableStyle.MARKDOWN)
    steps, gathers = [], {name: [] for name in SCORES}
    for _ in range(rounds + 1):
        optimizer.zero_grad()
        start = time.perf_counter()
        model(x).square().mean().backward()
        optimizer.step()
        steps.append(time.perf_counter() - start)
        for name, score in scores.items():
            start = time.perf_counter()
            for _ in range(EVERY):  # one looks at so many iterations in turn
                score.gather()
            gathers[name].append((time.perf_counter() - start) / EVERY)
    for name, times in gathers.items():  # the first round warms up
        ratios = [1 + t / statistics.median(steps[1:]) for t in times[1:]]
        row = statistics.median(ratios), min(ratios), max(ratios)
        table.add_row([name, *(f'{ratio:.4f}' for ratio in row)])
    print(f'ResNet-50, {"x".join(map(str, shape))}, {statistics.median(steps[1:]):.2f} s a step')
    print(table)


def ratios_of(gains: dict[str, dict[str, float]], found: dict[Key, float]) -> str:
    """Median of what was foretold over what was found, by branch."""
    ratios: dict[str, list[float]] = {}
    for (path, name), decrease in found.items():
        ratios.setdefault(name, []).append(gains[path][name] / decrease)
    return ', '.join(f'{name} {statistics.median(r):.2f}' for name, r in ratios.items())


def measure_correlations(args: argparse.Namespace) -> None:
    """Train, gather, grow, step, and print a table for each of ``args.before``."""
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    data = read_images(args.folder, args.images)
    batches = draw(data, 64)
    model = Classifier(args.model, int(data[1].max()) + 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)

    def train(count: int) -> Iterator[None]:
        for batch in islice(batches, count):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            yield
            optimizer.step()

    for before in args.before:
        for _ in train(before):
            pass
        operations = operations_of(model, candidates(model))
        scores = {name: make_score(name, operations) for name in METRICS}
        slopes = {path: torch.zeros_like(o.weight) for path, o in operations.items()}
        for _ in train(args.interval):
            for score in scores.values():
                score.gather()
            for path, operation in operations.items():
                slopes[path] += operation.weight.grad / args.interval
        measuring = list(islice(draw(data, args.batch), 3))
        measured = [decreases(model, measuring, args.step) for _ in range(args.draws)]
        optimizer.zero_grad()
        loss_of(model, measuring[0]).backward()
        same = {path: operation.weight.grad for path, operation in operations.items()}
        found = {key: statistics.fmean(m[key] for m in measured) for key in measured[0]}
        gains = {'gain': scores['gain'].gains()}
        for title, given in (
            ('gain of the mean gradient', slopes),
            ('gain of the same batch', same),
        ):
            for path, operation in operations.items():
                operation.weight.grad = given[path]
            gains[title] = {
                path: {name: gain.item() for name, gain in gains_of(operation).items()}
                for path, operation in operations.items()
            }
        others = {name: scores[name].means() for name in METRICS if name != 'gain'}
        table = PrettyTable(['score', 'convs', 'branches', 'within a conv', 'best branch gets'])
        table.set_style(TableStyle.MARKDOWN)
        for row in compare(others, gains, found):
            table.add_row(
                ['-' if v is None else v if isinstance(v, str) else f'{v:.2f}' for v in row]
            )
        print(f'{args.model}, after {before} more iterations, {len(found)} branches')
        print(table)
        ratios = ratios_of(gains['gain of the same batch'], found)
        print('gain of the same batch over the decrease, median:', ratios, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
    parser.add_argument('folder', type=Path, nargs='?', help='images, a folder for each class')
    parser.add_argument('--cost', action='store_true', help='measure the cost instead')
    parser.add_argument('--shape', type=int, nargs=4, default=[2, 3, 480, 800], help='for --cost')
    parser.add_argument('--model', choices=['resnet', 'vgg'], default='resnet')
    parser.add_argument('--images', type=int, default=200, help='of each class')
    parser.add_argument('--before', type=int, nargs='+', default=[150], help='iterations')
    parser.add_argument('--interval', type=int, default=50, help='iterations')
    parser.add_argument('--draws', type=int, default=1, help='how often convs grow')
    parser.add_argument('--batch', type=int, default=128, help='images to measure the loss on')
    parser.add_argument('--step', type=float, default=0.1, help='learning rate of the branches')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    if args.cost:
        measure_cost(args.shape, rounds=7)
    elif args.folder is None:
        parser.error('name a folder of images, or --cost')
    else:
        measure_correlations(args)


if __name__ == '__main__':
    main()
