"""The archive and the wheel: what they hold, and what an installed package does."""

from __future__ import annotations

import configparser
import os
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dyrep_mm.version import __version__
from support.processes import ROOT, call
from support.wheels import copy_sources


def build(source: Path, kind: str, out: Path) -> Path:
    """Build as ``python -m build --no-isolation`` does, which is not needed for it."""
    out.mkdir(exist_ok=True)
    code = f'from setuptools import build_meta as b; b.build_{kind}({str(out)!r})'
    call(sys.executable, '-c', code, cwd=source, env=dict(os.environ))
    (file,) = out.glob('*.tar.gz' if kind == 'sdist' else '*.whl')
    return file


@pytest.fixture(scope='module')
def dist(tmp_path_factory) -> tuple[Path, Path]:
    """The archive of this checkout, and the wheel that is built from the archive."""
    folder = tmp_path_factory.mktemp('dist')
    checkout = copy_sources(folder / 'checkout')
    archive = build(checkout, 'sdist', folder / 'sdist')
    shutil.unpack_archive(archive, folder / 'unpacked')
    (unpacked,) = (folder / 'unpacked').iterdir()
    return archive, build(unpacked, 'wheel', folder / 'wheel')


def files_below(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }


def test_the_wheel_holds_what_the_checkout_has(dist):
    with zipfile.ZipFile(dist[1]) as wheel:
        names = set(wheel.namelist())
        info = f'dyrep_mm-{__version__}.dist-info'
        commands = configparser.ConfigParser()
        commands.read_string(wheel.read(f'{info}/entry_points.txt').decode())
        assert wheel.read(f'{info}/top_level.txt').decode().split() == ['dyrep_mm']
    expected = {f'dyrep_mm/{name}' for name in files_below(ROOT / 'dyrep_mm')}
    for folder in ('configs', 'tools'):
        expected |= {f'dyrep_mm/.mim/{folder}/{name}' for name in files_below(ROOT / folder)}
    expected.add('dyrep_mm/.mim/model-index.yml')
    assert {name for name in names if not name.startswith(info)} == expected
    assert 'dyrep_mm/py.typed' in names
    assert set(commands['console_scripts']) == {'dyrep-flops', 'dyrep-fuse', 'dyrep-report'}


#: A small classifier, as a user has one; the last line is the one of DyRep.
CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet_CIFAR', depth=18, stem_channels=8, base_channels=8),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=64, topk=(1,)),
)
data_preprocessor = dict(mean=[128.0] * 3, std=[64.0] * 3)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset',
        data_root='images',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    ),
)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
train_cfg = dict(by_epoch=True, max_epochs=2)
custom_hooks = [dict(type='dyrep_mm.DyRepHook', interval=1, metric='snip', calibration_batches=1)]
"""

BASES = """
import sys
from pathlib import Path

from mmengine.config import Config

Path('by_path.py').write_text(
    "_base_ = __import__('dyrep_mm').config_path('fpn_r50_dyrep_coco.py')\\n"
)
Path('by_import.py').write_text(
    'from mmengine.config import read_base\\n'
    'with read_base():\\n'
    '    from dyrep_mm.configs.faster_rcnn_r50_fpn_dyrep_1x_coco import *\\n'
)
configs = [Config.fromfile(name).to_dict() for name in ('by_path.py', 'by_import.py')]
assert configs[0] == configs[1]
assert configs[0]['default_hooks']['dyrep']['type'] == 'dyrep_mm.DyRepHook'
import dyrep_mm
assert Path(dyrep_mm.__file__).is_relative_to(sys.prefix), dyrep_mm.__file__
assert '.mim' in Path(dyrep_mm.config_path('fpn_r50_dyrep_coco.py')).parts
"""


def of_a_user() -> dict[str, str]:
    """Variables that do not lead to this checkout."""
    return {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}


@pytest.fixture(scope='module')
def installed(dist, tmp_path_factory) -> Path:
    """The programs of a new environment with the wheel; of everything else it sees what is
    installed here, but for this checkout."""
    folder = tmp_path_factory.mktemp('environment') / 'env'
    call(sys.executable, '-m', 'venv', '--without-pip', folder)
    programs = folder / 'bin'
    pip = (sys.executable, '-m', 'pip', '--python', programs / 'python')
    call(*pip, 'install', '--no-deps', '--no-index', dist[1], cwd=folder, env=of_a_user())
    (packages,) = folder.glob('lib/python*/site-packages')
    (packages / 'stack.pth').write_text(sysconfig.get_paths()['purelib'] + '\n')
    return programs


@pytest.mark.slow
def test_a_user_installs_trains_and_fuses(installed, tmp_path):
    env = {**of_a_user(), 'OMP_NUM_THREADS': '1'}

    def run(program: str, *arguments: object) -> str:
        return call(installed / program, *arguments, cwd=tmp_path, env=env)

    run('python', '-c', BASES)
    noise = np.random.default_rng(0)
    for number in range(8):
        file = tmp_path / 'images' / 'ab'[number % 2] / f'{number}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    (tmp_path / 'user.py').write_text(CONFIG)
    # With the tool of the library, as a user of it does.
    where = 'from pathlib import Path; import mmpretrain; print(Path(mmpretrain.__file__).parent)'
    package = run('python', '-c', where).splitlines()[-1]
    log = run('python', f'{package}/.mim/tools/train.py', 'user.py', '--work-dir', 'run')
    assert 'DyRep update 1' in log
    assert 'wrote fused.pth' in run('dyrep-fuse', 'user.py', 'run/epoch_2.pth', 'fused.pth')
    table = run('dyrep-flops', 'user.py', 'run/epoch_2.pth', '--shape', 32)
    assert 'as trained' in table
    run('dyrep-report', 'run', '--out', 'report.html')
    assert (tmp_path / 'report.html').stat().st_size
    tools = '__import__("pathlib").Path(__import__("dyrep_mm").__file__).parent / ".mim/tools"'
    tools = run('python', '-c', f'print({tools})').splitlines()[-1]
    assert '--auto-scale-lr' in run('python', f'{tools}/train.py', '--help')


@pytest.mark.slow
def test_twine_takes_both(dist):
    pytest.importorskip('twine')
    call(sys.executable, '-m', 'twine', 'check', '--strict', *dist)
