"""Makes the checkpoints in this folder: one of each kind, as version 0.1.0 writes them.

It was run with the code of 0.1.0, commit 2cd4889, torch 2.8.0 and mmengine 0.10.12, and is not
meant for later code::

    mkdir ../dyrep-0.1.0 && git archive 2cd4889 dyrep_mm | tar -x -C ../dyrep-0.1.0
    PYTHONPATH=../dyrep-0.1.0 OMP_NUM_THREADS=1 python tests/data/0.1.0/make.py

Each kind is a training run of a tiny classifier. The stored file is the checkpoint of
iteration 7, or of epoch 3. The run goes on to its end, so that the next update is known.

``best`` comes from the run of ``epochs``, ``fused`` from the file ``nested``.

``expected.json`` holds what later code must make of each file:

- ``structure``: of the model.
- ``journal``: the updates before the checkpoint.
- ``next``: the first update after the checkpoint. Its scores are left out for the metrics
  ``synflow`` and ``vote``: every conv has a BN behind it, so that the sums of ``synflow``
  cancel to rounding, and rounding differs between processors. A vote counts ``synflow`` too.
- ``momentum``: by name of parameter, the sum of the absolute values of its momentum buffer.
- ``logits``: of :func:`inputs`, in eval mode and float64, by the weights that a test uses.

Model and data are copies from the tests of 0.1.0.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

import dyrep_mm
from dyrep_mm.converter import fuse_checkpoint

FOLDER = Path(__file__).resolve().parent


@DATASETS.register_module()
class TinyImages(Dataset):
    """Random images of two classes that differ in brightness; the same at every call."""

    metainfo = {'classes': ('dark', 'bright')}

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 8, 8, generator=generator) + index % 2
        return {'inputs': image, 'labels': torch.tensor(index % 2)}


@MODELS.register_module()
class TinyBackbone(BaseModule):
    """Four convs of different geometry, each with its norm."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)  # has a bias
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.dw = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.dw_bn = nn.BatchNorm2d(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        x = F.relu(self.bn3(self.conv3(x)))
        return F.relu(self.dw_bn(self.dw(x)))


@MODELS.register_module()
class TinyClassifier(BaseModel):
    """Backbone and linear head, with the three modes of mmengine's models."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.backbone = TinyBackbone(width)
        self.head = nn.Linear(2 * width, 2)

    def forward(self, inputs: Tensor, labels: Tensor | None = None, mode: str = 'tensor') -> Any:
        logits = self.head(self.backbone(inputs).mean((2, 3)))
        if mode == 'loss':
            return {'loss': F.cross_entropy(logits, labels)}
        if mode == 'predict':
            return [{'logits': row, 'label': label} for row, label in zip(logits, labels)]  # noqa: B905
        return logits


@METRICS.register_module()
class TinyLoss(BaseMetric):
    """Cross entropy of the predictions."""

    def process(self, data_batch: Any, data_samples: list[dict]) -> None:
        self.results += [F.cross_entropy(s['logits'], s['label']).item() for s in data_samples]

    def compute_metrics(self, results: list) -> dict[str, float]:
        return {'loss': sum(results) / len(results)}


def inputs() -> Tensor:
    """Images (3, 3, 8, 8), float64, by a formula: no generator has to stay as it is."""
    return (torch.arange(3 * 3 * 8 * 8).double() * 37 % 101 / 50 - 1).reshape(3, 3, 8, 8)


HOOK = {
    'type': 'dyrep_mm.DyRepHook',
    'interval': 2,
    'metric': 'snip',
    'calibration_batches': 2,
    'prune_threshold': 0.0,
}
SMALL = {'branches': ['1x1', '1x1-kxk', 'identity'], 'prune': False}

#: The hooks of each run, and what else it has.
KINDS: dict[str, dict[str, Any]] = {
    # Nothing has grown yet.
    'ungrown': {'hooks': [{**HOOK, 'interval': 8, 'metric': 'synflow'}]},
    # Blocks of one level, pruned; the unit is the iteration.
    'iterations': {'hooks': [{**HOOK, 'max_depth': 1}]},
    # Blocks in branches of blocks.
    'nested': {'hooks': [{**HOOK, **SMALL, 'interval': 3, 'scope': 'backbone.conv2'}]},
    'ema': {
        'hooks': [
            {**HOOK, **SMALL, 'interval': 3, 'max_depth': 1},
            {'type': 'EMAHook', 'momentum': 0.2},
        ]
    },
    # conv1 has a gained bias; conv2 gained one before it grew.
    'bias': {
        'hooks': [{**HOOK, **SMALL, 'interval': 3, 'scope': 'backbone.conv2'}],
        'load_from': 'before/grown.pth',
    },
    # The unit is the epoch; it also writes a best checkpoint, which has no optimizer.
    'epochs': {
        'hooks': [{**HOOK, **SMALL, 'grow_per_update': 2, 'max_depth': 1}],
        'epochs': True,
    },
    'vote': {'hooks': [{**HOOK, **SMALL, 'interval': 4, 'metric': 'vote'}]},
    'random': {'hooks': [{**HOOK, **SMALL, 'interval': 4, 'metric': 'random'}]},
}


def settings(name: str, hooks: list[dict], epochs: bool = False, **more: Any) -> dict[str, Any]:
    """The config of a run; ``name`` is its folder, relative, so that no path is stored."""
    loader = {
        'batch_size': 4,
        'num_workers': 0,
        'collate_fn': {'type': 'default_collate'},
        'dataset': {'type': 'TinyImages'},
    }
    sampler = 'DefaultSampler' if epochs else 'InfiniteSampler'
    schedule = {'max_epochs': 5, 'val_begin': 3} if epochs else {'max_iters': 11}
    checkpoint = {'type': 'CheckpointHook', 'by_epoch': epochs, 'interval': 3 if epochs else 7}
    result = {
        'model': {'type': 'TinyClassifier'},
        'work_dir': name,
        'train_dataloader': {**loader, 'sampler': {'type': sampler, 'shuffle': True}},
        'train_cfg': {'by_epoch': epochs, **schedule},
        'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9}},
        'default_hooks': {
            'logger': {'type': 'LoggerHook', 'interval': 10},
            'checkpoint': checkpoint,
        },
        'custom_hooks': hooks,
        'randomness': {'seed': 0},
        'experiment_name': name,
        'log_level': 'WARNING',
    }
    if epochs:
        checkpoint |= {'save_best': 'loss', 'rule': 'less'}
        result |= {
            'val_dataloader': {**loader, 'sampler': {'type': 'DefaultSampler', 'shuffle': False}},
            'val_evaluator': {'type': 'TinyLoss'},
            'val_cfg': {},
        }
    return {**result, **more}


class Note(Hook):
    """Keeps the momentum of every checkpoint, by iteration."""

    def __init__(self) -> None:
        self.momentum: dict[int, dict[str, float]] = {}

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        state = runner.optim_wrapper.optimizer.state
        self.momentum[checkpoint['meta']['iter']] = {
            name: state[p]['momentum_buffer'].double().abs().sum().item()
            for name, p in runner.model.named_parameters()
            if 'momentum_buffer' in state.get(p, {})
        }


def make_grown() -> None:
    """Write ``before/grown.pth``: after a short training two convs without a bias absorb all
    their branches and gain a bias. No rule prunes the last branch: this takes a call by hand."""
    blocks = {'backbone.conv1': ['kxk', '1x1'], 'backbone.conv2': ['kxk', '1x1']}
    run = Runner.from_cfg(
        Config(settings('before', [{**HOOK, 'interval': None, 'structure': blocks}]))
    )
    run.train()
    for path in blocks:
        dyrep_mm.prune(run.model, path, ['1x1'])
    assert dyrep_mm.structure_of(run.model) == {path: [] for path in blocks}
    run.save_checkpoint('before', 'grown.pth', save_optimizer=False)


def store(source: Path, name: str) -> dict[str, Any]:
    """Copy a checkpoint into this folder, without traces of the machine.

    mmengine notes the absolute paths of the last and the best checkpoint in ``message_hub``:
    they become relative. The log of step times depends on the load of the machine: it is
    removed.
    """
    saved = torch.load(source, weights_only=False)
    info = saved['message_hub']['runtime_info']
    for key in ('last_ckpt', 'best_ckpt'):
        if info.get(key):
            info[key] = os.path.relpath(info[key])
    for part in ('log_scalars', 'resumed_keys'):
        for key in [k for k in saved['message_hub'][part] if k.endswith('time')]:
            del saved['message_hub'][part][key]
    torch.save(saved, FOLDER / f'{name}.pth')
    return saved


def logits_of(state: dict[str, Tensor], structure: dict[str, list[str]]) -> list[list[float]]:
    """What a model of this structure and state makes of :func:`inputs`."""
    model = dyrep_mm.expand(TinyClassifier(), structure)
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model.double().eval()(inputs()).tolist()


def make(name: str, epochs: bool = False, **more: Any) -> dict[str, dict[str, Any]]:
    """Run a kind and store its checkpoint; what is expected of it."""
    run = Runner.from_cfg(Config(settings(name, epochs=epochs, **more)))
    note = Note()
    run.register_hook(note)
    run.train()
    at, last = ('epoch_3', 'epoch_5') if epochs else ('iter_7', 'iter_11')
    files = {name: Path(name, f'{at}.pth')}
    if epochs:
        (files['best'],) = Path(name).glob('best_*.pth')
    whole = torch.load(Path(name, f'{last}.pth'), weights_only=False)['meta']['dyrep_mm']['journal']
    results = {}
    for kind, file in files.items():
        saved = store(file, kind)
        said = saved['meta']['dyrep_mm']
        results[kind] = {
            'structure': said['structure'],
            'journal': said['journal'],
            'logits': logits_of(saved['state_dict'], said['structure']),
        }
        if 'optimizer' in saved:
            following = dict(whole[len(said['journal'])])
            if saved['dyrep_mm']['scores']['metric'] in ('synflow', 'vote'):
                following['scores'] = {}
            results[kind] |= {'next': following, 'momentum': note.momentum[saved['meta']['iter']]}
    return results


def make_fused() -> dict[str, Any]:
    """``fused.pth``, of the nested one, by ``fuse_checkpoint``."""
    Path('plain.py').write_text("model = dict(type='TinyClassifier')\n")
    fuse_checkpoint('plain.py', FOLDER / 'nested.pth', FOLDER / 'fused.pth', size=8)
    state = torch.load(FOLDER / 'fused.pth', weights_only=True)['state_dict']
    return {'structure': {}, 'journal': [], 'logits': logits_of(state, {})}


def main() -> None:
    assert dyrep_mm.__version__ == '0.1.0'
    torch.set_num_threads(1)
    expected: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_grown()
        for name, options in KINDS.items():
            expected |= make(name, **options)
        expected['fused'] = make_fused()
        os.chdir(FOLDER)
    Path('expected.json').write_text(json.dumps(expected, indent=1) + '\n')


if __name__ == '__main__':
    main()
