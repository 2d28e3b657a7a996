"""Our configs as bases, by path and in Python style, from a folder that knows nothing of us."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS, init_default_scope

import dyrep_mm
from dyrep_mm.errors import DyRepError
from support.processes import ROOT

PACKAGE = Path(dyrep_mm.__file__).parent / 'configs'
MODULES = sorted(
    '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
    for path in PACKAGE.rglob('*.py')
    if path.stem != '__init__'
)
TEXT = [str(path.relative_to(ROOT / 'configs')) for path in (ROOT / 'configs').rglob('*.py')]


def twin(module: str) -> str:
    """The config in text style of the same name, as far as modules can have it."""
    (name,) = (n for n in TEXT if Path(n).stem.replace('-', '_') == module.rpartition('.')[2])
    return name


def written(folder: Path, *lines: str) -> Config:
    """A config of a user."""
    (folder / 'user.py').write_text('\n'.join(lines) + '\n')
    return Config.fromfile(folder / 'user.py')


def python_style(module: str, *lines: str) -> list[str]:
    base = f'    from dyrep_mm.configs.{module} import *'
    return ['from mmengine.config import read_base', '', 'with read_base():', base, *lines]


@pytest.mark.parametrize('module', MODULES)
def test_both_styles_say_the_same(module, tmp_path):
    expected = Config.fromfile(ROOT / 'configs' / twin(module)).to_dict()
    assert written(tmp_path, *python_style(module)).to_dict() == expected
    path = f"_base_ = __import__('dyrep_mm').config_path({twin(module)!r})"
    assert written(tmp_path, path).to_dict() == expected


def test_every_method_is_there():
    methods = {name for name in TEXT if name.startswith('_base_/methods/')}
    assert {twin(module) for module in MODULES if module.startswith('methods.')} == methods


def test_options_merge_in_python_style(tmp_path):
    config = written(
        tmp_path,
        *python_style('faster_rcnn_r50_fpn_dyrep_1x_coco'),
        "default_hooks.update(dyrep=dict(metric='snip'))",
        'model.update(backbone=dict(depth=101))',
    )
    assert config.model.backbone.depth == 101
    assert config.model.backbone.type == 'ResNet'
    init_default_scope('mmdet')
    assert config.default_hooks.dyrep.interval == 1
    assert HOOKS.build(config.default_hooks.dyrep).metric == 'snip'


def test_a_method_joins_a_config_of_the_zoo(tmp_path):
    config = written(
        tmp_path,
        "_base_ = ['mmpretrain::resnet/resnet18_8xb32_in1k.py',",
        "          __import__('dyrep_mm').config_path('_base_/methods/dbb.py')]",
        "default_hooks = dict(dyrep=_base_.pop('dyrep'))",
    )
    assert config.default_hooks.dyrep.structure == 'dbb'
    assert 'dyrep' not in config


def test_a_method_joins_a_config_in_python_style(tmp_path):
    logger = "dict(type='LoggerHook', interval=7)"
    (tmp_path / 'plain.py').write_text(f'default_hooks = dict(logger={logger})\n')
    config = written(
        tmp_path,
        *python_style('methods.dbb', '    from .plain import *'),
        'default_hooks.update(dyrep=dyrep)',
    )
    assert config.default_hooks.logger.interval == 7
    assert config.default_hooks.dyrep.structure == 'dbb'


@pytest.mark.parametrize('name', ['nothing.py', 'detection', '../setup.cfg'])
def test_a_config_that_is_not_there_is_named(name):
    with pytest.raises(DyRepError, match='there is no config'):
        dyrep_mm.config_path(name)
