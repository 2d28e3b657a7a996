"""Evaluate two checkpoints on the same data and show metrics and predictions side by side.

tools/compare.py CONFIG CHECKPOINT OTHER_CONFIG OTHER_CHECKPOINT

Made for a checkpoint with a structure and the fused one: metrics are equal, and predictions
differ by float rounding.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from _cli import add_common, build_runner, check_local, check_out, load_config, sentence
from mmengine.hooks import Hook
from mmengine.structures import BaseDataElement, InstanceData
from prettytable import PrettyTable

from dyrep_mm.errors import DyRepError


class Collect(Hook):
    """Keeps all predictions of a test."""

    def __init__(self) -> None:
        self.predictions: list[BaseDataElement] = []

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self.predictions += [sample.cpu() for sample in outputs]


def evaluate(args: argparse.Namespace, config: str, checkpoint: str) -> tuple[dict, list]:
    """Metrics and predictions of a checkpoint."""
    cfg = load_config(argparse.Namespace(**{**vars(args), 'config': config}))
    check_local(checkpoint, cfg)
    cfg.load_from = checkpoint
    cfg.experiment_name = f'compare_{Path(checkpoint).stem}_{Path(config).stem}'
    runner = build_runner(cfg)
    collect = Collect()
    runner.register_hook(collect)
    return runner.test(), collect.predictions


def tensors(data: Any, name: str = '') -> Iterator[tuple[str, torch.Tensor]]:
    """The predicted tensors of a data sample by dotted name; what it was given is left out."""
    if isinstance(data, BaseDataElement):
        data = dict(data.items())
    if isinstance(data, Mapping):
        for key, value in data.items():
            if not key.startswith('gt_') and key != 'ignored_instances':
                yield from tensors(value, f'{name}.{key}' if name else key)
    else:
        data = getattr(data, 'tensor', data)  # boxes
        if isinstance(data, torch.Tensor):
            yield name, data


def in_order_of(first: InstanceData, second: InstanceData) -> InstanceData:
    """``second`` with each instance where ``first`` has the nearest one: instances of equal scores
    come in any order."""
    if len(first) != len(second) or not len(first):
        return second
    from scipy.optimize import linear_sum_assignment  # mmdet brings it, as it does instances

    cost = torch.zeros(len(first), len(second), dtype=torch.float64)
    others = dict(tensors(second))
    for name, a in tensors(first):
        if a.numel() <= 16 * len(first):  # masks are not needed for it
            rows = [t.double().reshape(len(first), -1) for t in (a, others[name])]
            cost += torch.cdist(*rows, p=torch.inf)
    if not cost.isfinite().all():
        return second
    _, order = linear_sum_assignment(cost.numpy())
    return second[torch.as_tensor(order)]


def align(one: BaseDataElement, other: BaseDataElement) -> None:
    """Put the predicted instances of ``other`` into the order of those of ``one``."""
    for name, instances in one.items():
        theirs = other.get(name)
        if name.startswith('pred') and isinstance(theirs, InstanceData):
            setattr(other, name, in_order_of(instances, theirs))


def labels(args: argparse.Namespace) -> list[str]:
    """What to call the two sides: their files' names, or more of them where those are the same."""
    pairs = (args.config, args.checkpoint), (args.other_config, args.other_checkpoint)
    for name in (
        lambda config, checkpoint: Path(checkpoint).name,
        lambda config, checkpoint: checkpoint,
        lambda config, checkpoint: f'{Path(config).stem}: {checkpoint}',
        lambda config, checkpoint: f'{config}: {checkpoint}',
    ):
        first, second = (name(*pair) for pair in pairs)
        if first != second:
            return [first, second]
    return [f'{first} (1)', f'{first} (2)']


def differences(first: list, second: list) -> tuple[dict[str, float], int]:
    """Largest difference of each predicted tensor, and on how many samples shapes differ."""
    largest: dict[str, float] = {}
    unlike = 0
    if len(first) != len(second):
        raise DyRepError(f'one config tests {len(first)} samples, the other {len(second)}')
    for one, other in zip(first, second, strict=True):
        align(one, other)
        one, other = dict(tensors(one)), dict(tensors(other))
        if {n: t.shape for n, t in one.items()} != {n: t.shape for n, t in other.items()}:
            unlike += 1
            continue
        for name, a in one.items():
            gap = (a.double() - other[name].double()).abs().max().item() if a.numel() else 0.0
            before = largest.get(name, 0.0)
            # NaN is above all numbers.
            largest[name] = before if before != before or gap <= before else gap
    return largest, unlike


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ('config', 'checkpoint', 'other_config', 'other_checkpoint'):
        parser.add_argument(name)
    add_common(parser)
    parser.add_argument('--out', help='text file for what is printed')
    parser.add_argument('--tolerance', type=float, help='exit with 1 above this difference')
    args = parser.parse_args()
    with sentence('compare'):
        if args.tolerance is not None and not args.tolerance >= 0:
            raise DyRepError(f'--tolerance is a number of at least 0, got {args.tolerance}')
        check_out(args.out)
        metrics, predictions = evaluate(args, args.config, args.checkpoint)
        others, other_predictions = evaluate(args, args.other_config, args.other_checkpoint)
        table = PrettyTable(['metric', *labels(args)])
        table.align = 'r'
        table.add_rows([[name, metrics[name], others.get(name)] for name in metrics])
        largest, unlike = differences(predictions, other_predictions)
        lines = [str(table), f'largest differences over {len(predictions)} samples:']
        lines += [f'  {name}: {value:.2e}' for name, value in largest.items()]
        if unlike:
            lines.append(f'  another number of predictions on {unlike} samples')
        print('\n'.join(lines))
        if args.tolerance is not None:
            if unlike or not all(gap <= args.tolerance for gap in largest.values()):
                raise DyRepError(f'the predictions differ by more than {args.tolerance}')
        if args.out is not None:
            Path(args.out).write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
