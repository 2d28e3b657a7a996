"""All that DyRep does with a model of the zoos: grow, prune, train on, save, load, fuse, verify."""

from __future__ import annotations

import copy
import gc
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, MODELS
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from dyrep_mm import DyRepHook, fuse, structure_of
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.engine.converter import (
    TOLERANCE,
    build_model,
    difference,
    find_passes,
    fuse_checkpoint,
    read_config,
)
from dyrep_mm.engine.passes import tensors_in
from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.branches import ORIGIN
from dyrep_mm.surgery.candidates import candidates, left_alone, survey
from dyrep_mm.surgery.outputs import following_norms
from dyrep_mm.surgery.structure import Plan, altered
from dyrep_mm.surgery.tree import Scope, blocks_of, get_module
from support.nets import branchwise, norms_of, randomise
from support.zoo import Case, model_config

_NUMBERS = count()

#: Largest relative difference in float64; what one percent of a branch changes is larger.
BOUND = 1e-9


@dataclass
class Result:
    """What came out of a case.

    Attributes:
        case: As a text.
        convs: How many convs above 1x1 there are in the scope.
        able: How many of them may grow, before any forward.
        grown: How many stood as blocks at some time.
        nested: How many blocks inside blocks there were.
        pruned: How many branches were pruned.
        skips: Why the others did not grow, and how many.
        biased: How many convs gained a bias in the fused model.
        refused: The sentence with which the run ended at its start.
        error64: The relative difference of the outputs of the fused model in float64.
        scope: Where convs grew.
    """

    case: str
    convs: int = 0
    able: int = 0
    grown: int = 0
    nested: int = 0
    pruned: int = 0
    skips: dict[str, int] = field(default_factory=dict)
    biased: int = 0
    refused: str | None = None
    error64: float | None = None
    scope: str = 'backbone'


@MODELS.register_module(force=True)
class Probe(BaseModel):
    """A backbone, and the mean square of all that it puts out as a loss."""

    def __init__(self, backbone: dict, data_preprocessor: dict | None = None):
        super().__init__(data_preprocessor)
        self.backbone = MODELS.build(backbone)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        tensors = tensors_in(self.backbone(inputs))
        if mode == 'loss':
            return {'loss': sum(t.square().mean() for t in tensors) / len(tensors)}
        return tensors


@DATASETS.register_module(force=True)
class Pictures(Dataset):
    """Random images with all that a detector or segmentor may be taught; the same at every call.

    Args:
        library: Whose data samples.
        size: Height and width.
        channels: Of an image.
        masks: Objects have some, as in trainings that need them.
    """

    def __init__(self, library: str, size: int, channels: int = 3, masks: bool = True):
        self.library, self.size, self.channels, self.masks = library, size, channels, masks
        self.metainfo: dict[str, Any] = {'classes': ()}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        size, shape = self.size, (self.size, self.size)
        image = torch.randint(256, (self.channels, *shape), generator=generator)
        if self.library == 'mmpretrain':
            return {'inputs': image.byte()}
        # In rectangles: noise has no regions.
        labels = torch.randint(2, (1, 4, 4), generator=generator).repeat_interleave(size // 4, 1)
        labels = labels.repeat_interleave(size // 4, 2)
        if self.library == 'mmseg':
            from mmseg.structures import SegDataSample

            sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
            sample.gt_edge_map = PixelData(data=labels)
            sample.set_metainfo({'img_shape': shape, 'ori_shape': shape})
            return {'inputs': image.byte(), 'data_samples': sample}
        from mmdet.structures import DetDataSample
        from mmdet.structures.mask import BitmapMasks

        boxes = torch.tensor([[4.0, 4, size / 2, size / 2], [8, 8, size - 8, size - 8]])
        sample = DetDataSample(gt_sem_seg=PixelData(sem_seg=labels))
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]))
        if self.masks:
            masks = np.zeros((2, *shape), np.uint8)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
                mask[y1:y2, x1:x2] = 1
            sample.gt_instances.masks = BitmapMasks(masks, *shape)
        sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=boxes[:0, 0].long())
        sample.set_metainfo(
            {
                'img_shape': shape,
                'ori_shape': shape,
                'pad_shape': shape,
                'scale_factor': (1.0, 1.0),
                'batch_input_shape': shape,
            }
        )
        return {'inputs': image.byte(), 'data_samples': sample}


class Everywhere:
    """A rule with which every conv of a scope grows: a half at the first update, some convs inside
    at the second, the rest at the third, which prunes too.

    Args:
        scope: Where.
    """

    def __init__(self, scope: Scope):
        self.scope = scope
        self.updates = 0
        self.planned: set[str] = set()
        self.nested = 0
        self.pruned = 0

    def watch(self, model: nn.Module) -> None:
        pass

    def observe(self, optimizer: Optimizer) -> None:
        pass

    def decide(self, model: nn.Module, generator: Generator) -> Plan:
        self.updates += 1
        able, blocks = candidates(model, self.scope), blocks_of(model)
        plain = candidates(model, self.scope, max_depth=1)
        if self.updates == 2 and blocks:
            chosen = list(blocks)[:: max(1, len(blocks) // 2)]
            inside = [f'{p}.branches.{name}' for p in chosen for name in (ORIGIN, '1x1-kxk.conv')]
            grow = {path: able[path] for path in inside if path in able}
            self.nested += len(grow)
            return Plan(grow)
        # One operation each, in turn, so that all meet all kinds of convs.
        paths = list(plain) if self.updates > 1 else list(plain)[::2]
        grow = {}
        for i, path in enumerate(paths):
            branches = plain[path][1:]
            grow[path] = [ORIGIN, *dict.fromkeys([branches[i % len(branches)], branches[0]])]
        self.planned |= grow.keys()
        prune = {}
        if self.updates > 1:
            outer = [path for path in blocks if not any(f'{o}.' in path for o in blocks)]
            prune = {path: blocks[path].names[1:2] for path in outer[1::2] or outer}
            prune = {p: names for p, names in prune.items() if names}
            self.pruned += sum(map(len, prune.values()))
        return Plan(grow, prune)

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state: dict) -> bool:
        return True


@HOOKS.register_module(force=True)
class EverywhereDyRepHook(DyRepHook):
    """The hook with the rule :class:`Everywhere`."""

    def make_rule(self) -> Everywhere:
        return Everywhere(self.scope)


class Grown(Hook):
    """Notes after each iteration which convs are blocks. Before, all that is zero at the start of a
    training, or nothing has filled, becomes random, and BNs follow the data fast: else no output
    depends on a block."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.paths: set[str] = set()

    @torch.no_grad()
    def before_train(self, runner: Runner) -> None:
        randomise(runner.model)
        for norm in norms_of(runner.model):
            norm.momentum = 0.5
        for parameter in runner.model.parameters():
            if parameter.ndim and parameter.numel() > 1 and not 1e-3 <= parameter.abs().max() < 1e3:
                # Last norms of residuals, scales of layers; kernels that make offsets.
                fan = parameter[0].numel()
                parameter.uniform_(0.2, 0.8) if fan == 1 else parameter.normal_(0, 0.1 / fan**0.5)

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        blocks = blocks_of(runner.model)
        self.paths |= {path for path in blocks if not any(f'{o}.' in path for o in blocks)}


def sweep(case: Case, folder: str | Path) -> Result:
    """Grow three times, once nested, prune, train on, save, load, fuse, verify in float64, and load
    the stock model strictly: in a real run with the hook, and with what ``tools/fuse.py`` does.

    Args:
        case: The model.
        folder: Empty; for what the run writes.

    Raises:
        AssertionError: something is wrong.
    """
    model, size, channels = model_config(case)
    folder = Path(folder)
    scope: str | list[str] = 'backbone'
    if case.heads:
        parts = [name for name, part in model.items() if isinstance(part, (dict, list))]
        parts = [name for name in parts if 'neck' in name or 'head' in name]
        scope = [name for name in parts if model[name]]
    arguments = {
        'default_scope': case.library,
        'custom_imports': {'imports': ['support.sweep']},
        'model': model,
    }
    Config(arguments).dump(folder / 'plain.py')
    run, notes = _runner(arguments, scope, folder, case, size, channels), Grown()
    run.register_hook(notes)
    hook = next(hook for hook in run.hooks if isinstance(hook, DyRepHook))
    verdicts = survey(run.model, scope)
    result = Result(str(case), len(verdicts), sum(r is None for r in verdicts.values()))
    result.scope = scope if isinstance(scope, str) else ', '.join(scope)
    result.skips = dict(Counter(reason for reason in verdicts.values() if reason))
    try:
        run.train()
    except DyRepError as error:
        if result.able:
            raise
        result.refused = str(error).split(' (')[0]
        return result
    rule = hook.rule
    found = left_alone(run.model)
    reasons = {path: found[path] for path, was in verdicts.items() if was is None and path in found}
    result.skips = dict(Counter(result.skips) + Counter(reasons.values()))
    result.grown, result.nested, result.pruned = len(notes.paths), rule.nested, rule.pruned
    assert result.grown + sum(result.skips.values()) == result.convs, (notes.paths, verdicts)
    if not result.grown:
        return result
    checkpoint = folder / 'run' / 'iter_4.pth'
    stored = load_checkpoint(checkpoint)
    assert set(stored['meta']['dyrep_mm']['structure']) == set(structure_of(run.model))
    plain = read_config(folder / 'plain.py')
    result.error64, result.biased = compare(run.model, build_model(plain), size)
    assert result.error64 <= BOUND
    # And the file: by the tool, and as the stock model loads it.
    report = fuse_checkpoint(folder / 'plain.py', checkpoint, folder / 'fused.pth', size=size)
    assert report.error64 <= TOLERANCE
    assert len(report.biased) == result.biased
    fused, stock = load_checkpoint(folder / 'fused.pth')['state_dict'], build_model(plain)
    assert {f'{p}.bias' for p in report.biased} == fused.keys() - stock.state_dict().keys()
    if not report.biased:
        stock.load_state_dict(fused, strict=True)
    if not stored['meta']['dyrep_mm']['biased']:
        stock.load_state_dict(stored['state_dict'], strict=True)
    return result


def compare(trained: nn.Module, stock: nn.Module, size: int) -> tuple[float, int]:
    """The largest relative difference, in float64, of what a model puts out whose branches run one
    by one, and the stock model with its fused weights; and how many biases that had to gain.

    Args:
        trained: With branches.
        stock: Built from its config.
        size: Height and width of the images.
    """
    exact = copy.deepcopy(trained).double().eval()
    inputs, passes = find_passes(exact, stock, [size])
    norms = following_norms(exact, altered(exact), inputs, passes)
    fused = fuse(exact, inputs, forward=passes, norms=norms)
    biased = fused.state_dict().keys() - stock.state_dict().keys()
    stock.double()
    for name in biased:
        conv = get_module(stock, name.removesuffix('.bias'))
        conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
    stock.load_state_dict(fused.state_dict(), strict=True)
    for block in blocks_of(exact).values():
        block.forward = partial(branchwise, block)
    error = difference(exact, stock, inputs, passes, norms)
    with torch.no_grad():
        next(iter(blocks_of(exact).values())).added[0].unit.mul_(1 + 1e-2)
    seen = difference(exact, stock, inputs, passes, norms)
    assert seen > 100 * error, f'the outputs hardly depend on the first block: {seen}, {error}'
    return error, len(biased)


def _runner(
    arguments: Mapping[str, Any],
    scope: Scope,
    folder: Path,
    case: Case,
    size: int,
    channels: int,
) -> Runner:
    """Four iterations, and an update after each of the first three."""
    hook = {
        'type': 'EverywhereDyRepHook',
        'interval': 1,
        'by_epoch': False,
        'end': 3,
        'scope': scope,
        'max_depth': 3,
        'calibration_batches': 1,
        'init_scale': 0.1,
    }
    return Runner.from_cfg(
        Config(
            {
                **arguments,
                'work_dir': str(folder / 'run'),
                'train_dataloader': {
                    'batch_size': 2,
                    'num_workers': 0,
                    'collate_fn': {'type': 'pseudo_collate'},
                    'sampler': {'type': 'InfiniteSampler', 'shuffle': True},
                    'dataset': {
                        'type': 'Pictures',
                        'library': case.library,
                        'size': size,
                        'channels': channels,
                        'masks': 'loss_mask' in str(arguments['model']),
                    },
                },
                'train_cfg': {'by_epoch': False, 'max_iters': 4, 'val_interval': 1000},
                'optim_wrapper': {
                    'optimizer': {'type': 'SGD', 'lr': 1e-4, 'momentum': 0.9},
                    'clip_grad': {'max_norm': 1.0},
                },
                'default_hooks': {
                    'logger': {'type': 'LoggerHook', 'interval': 100},
                    'checkpoint': {'type': 'CheckpointHook', 'interval': 4, 'by_epoch': False},
                },
                'custom_hooks': [hook],
                'randomness': {'seed': 0},
                'experiment_name': f'zoo_{next(_NUMBERS)}',
                'log_level': 'ERROR',
            }
        )
    )


def result_of(case: Case, store: Path | None = None) -> Result:
    """:func:`sweep` in a folder that goes afterwards.

    Args:
        case: The model.
        store: Folder of results: one that is there is read, another is written.
    """
    file = None if store is None else store / f'{case}.json'
    if file is not None and file.exists():
        return Result(**json.loads(file.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        result = sweep(case, folder)
    gc.collect()
    if file is not None:
        store.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(result), indent=1) + '\n')
    return result
