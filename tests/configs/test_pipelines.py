"""The demo configs end to end on a handful of digits: stage C, then D and C+D in every pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.engine.converter import fuse_checkpoint, relative_difference
from dyrep_mm.surgery.structure import structure_of
from support.checks import RELATIVE
from support.processes import ROOT, run_tool

DEMO = ROOT / 'configs' / 'demo'
HOOK = {
    'interval': 2,
    'by_epoch': False,
    'metric': 'snip',
    'calibration_batches': 1,
    'prune_threshold': 0.0,  # weak branches show after the first update already
    'max_depth': 1,
}


SEARCH = {'warmup': 2, 'fixed': 3, 'calibration_batches': 1}


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('digits') / 'data'
    options = '--forms detection segmentation classification --size 96 --train 4 --val 2'
    run_tool('digits', '--out', folder, *options.split(), fresh=True)
    return folder


def load(name: str, digits: Path, work_dir: Path) -> Config:
    """A demo config, on a handful of digits and for a handful of iterations."""
    cfg = Config.fromfile(DEMO / name)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        root = str(loader.dataset.data_root)
        assert root.startswith('data/digits')
        loader.dataset.data_root = root.replace('data/digits', str(digits))
        for transform in loader.dataset.pipeline:
            if transform.type == 'Resize':
                transform.scale = (64, 64)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        if 'ann_file' in evaluator:
            evaluator.ann_file = evaluator.ann_file.replace('data/digits', str(digits))
    cfg.train_dataloader.batch_size = 2
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (64, 64)
    cfg.train_cfg = {'by_epoch': False, 'max_iters': 7, 'val_interval': 100}
    cfg.param_scheduler = None
    cfg.train_dataloader.sampler = {'type': 'InfiniteSampler', 'shuffle': True}
    hooks = {'checkpoint': {'type': 'CheckpointHook', 'interval': 7, 'by_epoch': False}}
    if 'dyrep' in cfg.default_hooks:
        hook = cfg.default_hooks.dyrep
        hooks['dyrep'] = {**hook, **(SEARCH if hook.type.endswith('RepNASHook') else HOOK)}
    cfg.default_hooks = hooks
    cfg.work_dir, cfg.experiment_name, cfg.log_level = str(work_dir), work_dir.name, 'WARNING'
    cfg.visualizer = {'type': 'Visualizer'}
    return cfg


#: What a test reports, and the features of the backbone for each of its batches.
Evaluation = tuple[dict, list]


def train(cfg: Config, out: Path) -> tuple[Path, Path, Evaluation]:
    """Train and fuse; returns both checkpoints and what a test of the trained one gives."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    checkpoint = Path(cfg.work_dir) / 'iter_7.pth'
    said = load_checkpoint(checkpoint)['meta']['dyrep_mm']
    assert said['structure'] == structure_of(runner.model)
    assert said['method'] == 'RepNAS' or any(entry['grown'] for entry in said['journal'])
    assert any(entry['pruned'] for entry in said['journal'])
    cfg.dump(out / 'config.py')
    report = fuse_checkpoint(out / 'config.py', checkpoint, out / 'fused.pth', size=64)
    assert report.error64 <= 1e-6
    assert not report.biased
    cfg.load_from, cfg.experiment_name = str(checkpoint), cfg.experiment_name + 't'
    return checkpoint, out / 'fused.pth', evaluate(Runner.from_cfg(cfg))


def evaluate(runner: Runner) -> Evaluation:
    features = []
    runner.model.backbone.register_forward_hook(lambda *args: features.append(args[-1]))
    return runner.test(), features


def check_fused(plain: Config, fused: Path, before: Evaluation) -> None:
    """The plain config takes the fused checkpoint whole, and computes the same on the images.

    Metrics may differ: rounding decides between scores that are equal but for it.
    """
    assert 'dyrep' not in plain.default_hooks
    runner = Runner.from_cfg({**plain, 'load_from': str(fused)})
    assert not runner.model.load_state_dict(torch.load(fused)['state_dict'], strict=True)[0]
    metrics, features = evaluate(runner)
    assert metrics.keys() == before[0].keys() != set()
    assert len(features) == len(before[1]) > 0
    assert relative_difference(before[1], features) <= RELATIVE[torch.float32]


@pytest.fixture(scope='module')
def stage_c(digits, tmp_path_factory) -> tuple[Path, Path, Evaluation]:
    folder = tmp_path_factory.mktemp('stage_c')
    return train(load('resnet50_dyrep_digits.py', digits, folder / 'run'), folder)


def test_classification(digits, stage_c, tmp_path):
    _, fused, before = stage_c
    check_fused(load('resnet50_digits.py', digits, tmp_path), fused, before)


@pytest.mark.slow
def test_a_search(digits, tmp_path):
    _, fused, before = train(load('resnet50_odbb_digits.py', digits, tmp_path / 'run'), tmp_path)
    check_fused(load('resnet50_digits.py', digits, tmp_path / 'plain'), fused, before)


@pytest.mark.parametrize('model', ['faster-rcnn_r50_fpn', 'pspnet_r50-d8'])
@pytest.mark.parametrize('stage', ['dyrep', 'dyrep-cd'])
def test_c_to_d(digits, stage_c, tmp_path, model, stage):
    checkpoint, fused, _ = stage_c
    cfg = load(f'{model}_{stage}_digits.py', digits, tmp_path / 'run')
    structured = stage == 'dyrep-cd'
    assert cfg.model.backbone.init_cfg.type == (
        'dyrep_mm.DyRepPretrained' if structured else 'Pretrained'
    )
    cfg.model.backbone.init_cfg.checkpoint = str(checkpoint if structured else fused)
    trained, fused, before = train(cfg, tmp_path)
    grown = set(load_checkpoint(trained)['meta']['dyrep_mm']['structure'])
    inherited = set(load_checkpoint(checkpoint)['meta']['dyrep_mm']['structure'])
    assert not structured or grown & inherited
    plain = load(f'{model}_digits.py', digits, tmp_path / 'plain')
    check_fused(plain, fused, before)
