"""The libraries' inference APIs on checkpoints of a run, with the plain config, where dyrep_mm
cannot be imported: they predict what the run's own validation predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from test_projects import BASES

from dyrep_mm.engine.checkpoint import load_checkpoint
from support.processes import ROOT, run_script, run_tool

#: Small and fast. Weights of the detector's head are wide: scores are apart by more than rounding,
#: which must not decide what boxes are kept.
SMALL = {
    'mmpretrain': {
        'model.backbone': {'stem_channels': 8, 'base_channels': 8},
        'model.head': {'in_channels': 64},
    },
    'mmdet': {
        'model.backbone': {'stem_channels': 8, 'base_channels': 8},
        'model.neck': {'in_channels': [8, 16, 32, 64], 'out_channels': 8},
        'model.bbox_head': {
            'in_channels': 8,
            'feat_channels': 8,
            'init_cfg': {'type': 'Normal', 'layer': 'Conv2d', 'std': 0.05},
        },
        'model.test_cfg': {
            'score_thr': 0.0,
            'nms': {'type': 'nms', 'iou_threshold': 1.0},
            'max_per_img': 40,
        },
    },
    'mmseg': {
        'model.backbone': {'stem_channels': 8, 'base_channels': 8},
        'model.decode_head': {'in_channels': 64, 'channels': 8},
        'model.auxiliary_head': {'in_channels': 32, 'channels': 8},
    },
}
SCHEDULE = """
train_cfg = dict(_delete_=True, by_epoch=False, max_iters=6, val_interval=3)
param_scheduler = [dict(type='ConstantLR', by_epoch=False, factor=1.0)]
default_hooks = dict(checkpoint=dict(
    by_epoch=False, interval=3, save_best='auto', published_keys=['meta', 'state_dict']))
loader = dict(batch_size=2, num_workers=0, persistent_workers=False)
"""
HOOK = {
    'type': 'dyrep_mm.DyRepHook',
    'interval': 2,
    'by_epoch': False,
    'init_scale': 0.3,
    'prune_threshold': 0.0,
    'grow_per_update': 3,
    'calibration_batches': 1,
}


class Collect(Hook):
    """Keeps the predictions of every validation."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, dict[str, torch.Tensor]]] = {}

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        for sample in outputs:
            self.found.setdefault(runner.iter, {})[sample.img_path] = tensors(sample)


def tensors(sample: Any) -> dict[str, torch.Tensor]:
    """The predictions in a data sample, as :mod:`support.inference` gives them."""
    if 'pred_instances' in sample:
        found = sample.pred_instances
        return {name: found[name].clone() for name in ('bboxes', 'scores', 'labels')}
    if 'seg_logits' in sample:
        return {'logits': sample.seg_logits.data.clone()}
    return {'scores': sample.pred_score.clone()}


def assert_same_predictions(actual: dict, expected: dict) -> None:
    """To float rounding; instances of nearly equal scores may come in any order."""
    if 'bboxes' not in expected:
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4)
        return
    scores = expected['scores'][:20]
    torch.testing.assert_close(actual['scores'][:20], scores, rtol=1e-4, atol=1e-5)
    for box, score, label in zip(*(expected[n][:20] for n in expected), strict=True):
        near = (actual['bboxes'] - box).abs().amax(1) < 0.05
        same = near & (actual['labels'] == label) & ((actual['scores'] - score).abs() < 1e-4)
        assert same.any(), (box, score, label)


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('digits') / 'data'
    options = '--forms detection segmentation classification --size 64 --train 4 --val 2'
    run_tool('digits', '--out', folder, *options.split())
    return folder


@pytest.mark.parametrize('average', [False, True], ids=['raw', 'averaged'])
@pytest.mark.parametrize('library', ['mmpretrain', 'mmdet', 'mmseg'])
def test_they_predict_what_the_validation_predicted(tmp_path, digits, library, average):
    text = f"data_root = '{digits}/'\n{SCHEDULE}{BASES[library]}"
    (tmp_path / 'base.py').write_text(text)
    config = Config.fromfile(tmp_path / 'base.py')
    config.merge_from_dict(
        {f'{part}.{k}': v for part, values in SMALL[library].items() for k, v in values.items()}
    )
    if library == 'mmpretrain':
        config.model.backbone.type = 'ResNet'
    config.dump(tmp_path / 'plain.py')  # knows nothing of what follows
    config.work_dir = str(tmp_path / 'run')
    config.experiment_name = f'{library}_{average}_inference'
    config.log_level = 'WARNING'
    config.custom_hooks = [HOOK, *([{'type': 'EMAHook', 'momentum': 0.2}] if average else [])]
    run, collect = Runner.from_cfg(config), Collect()
    run.register_hook(collect)
    run.train()

    files = sorted(Path(config.work_dir).glob('*.pth'))
    kinds = {file.name.partition('_')[0] + '-' * ('-' in file.stem) for file in files}
    assert kinds == {'iter', 'iter-', 'best', 'best-'}
    images = sorted(collect.found[3])[:2]
    script = ROOT / 'tests' / 'support' / 'inference.py'
    options = [library, tmp_path / 'plain.py', tmp_path / 'found.pth', *images, '--', *files]
    said = run_script(script, *options)
    assert 'unexpected key' not in said
    assert 'missing keys' not in said
    found = torch.load(tmp_path / 'found.pth')
    assert found.keys() == {file.name for file in files}
    for file in files:
        meta = load_checkpoint(file)['meta']
        assert len(meta['dyrep_mm']['structure']) >= 3
        assert meta['dyrep_mm']['weights'] == ('averaged' if average else 'raw')
        for image, actual in zip(images, found[file.name], strict=True):
            assert_same_predictions(actual, collect.found[meta['iter']][image])
