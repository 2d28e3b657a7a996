"""Checkpoints of earlier versions: each resumes, and fuses, as it did then.

``data/<version>/make.py`` made them; its docstring describes ``expected.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import DATASETS
from mmengine.runner import Runner

from dyrep_mm import expand, structure_of
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.engine.converter import fuse_checkpoint
from dyrep_mm.evolution.record import Entry
from support.checks import assert_equal_states
from support.runs import Images, TinyClassifier, call_at, journal

# The name that their configs have for it.
DATASETS.register_module(name='TinyImages', module=Images, force=True)

DATA = Path(__file__).parents[1] / 'data'
EXPECTED = {
    f'{file.parent.name}/{kind}': expected
    for file in sorted(DATA.glob('*/expected.json'))
    for kind, expected in json.loads(file.read_text()).items()
}
RESUMABLE = [name for name, expected in EXPECTED.items() if 'next' in expected]
GROWN = [name for name, expected in EXPECTED.items() if expected['structure']]


def stored(name: str) -> Path:
    return DATA / f'{name}.pth'


def changes(entries: list[Entry]) -> list[tuple]:
    """What each update did, without numbers that rounding may change."""
    return [(e.update, e.unit, e.at, e.grown, e.pruned) for e in entries]


def build(name: str, work_dir: Path, **more: Any) -> Runner:
    """A runner of the config that the checkpoint was written with, and the depth that was the
    default then."""
    config = Config.fromstring(load_checkpoint(stored(name))['meta']['cfg'], '.py')
    for hook in config.custom_hooks:
        if hook.type == 'dyrep_mm.DyRepHook':
            hook.setdefault('max_depth', 2)
    config.merge_from_dict(
        {
            'work_dir': str(work_dir),
            'load_from': str(stored(name)),
            'experiment_name': str(work_dir),  # mmengine keeps one logger for each name
            **more,
        }
    )
    return Runner.from_cfg(config)


def inputs() -> torch.Tensor:
    """The images of ``make.py``."""
    return (torch.arange(3 * 3 * 8 * 8).double() * 37 % 101 / 50 - 1).reshape(3, 3, 8, 8)


@torch.no_grad()
def assert_expected(model: torch.nn.Module, logits: list[list[float]]) -> None:
    """The model computes the logits of then, relative to the largest."""
    actual, then = model.double().eval()(inputs()), torch.tensor(logits, dtype=torch.float64)
    assert ((actual - then).abs().max() / then.abs().max()).item() < 1e-5


def assert_holds(model: torch.nn.Module, weights: dict) -> None:
    """The model has the weights of a file; what version 0.1.0 did not have is 1."""
    state = model.state_dict()
    new = {name: state.pop(name) for name in state.keys() - weights.keys()}
    assert_equal_states(state, weights)
    assert all(name.endswith('.unit') and (unit == 1).all() for name, unit in new.items())


def test_every_file_is_tested():
    files = {f'{file.parent.name}/{file.stem}' for file in DATA.glob('*/*.pth')}
    assert files == EXPECTED.keys()


@pytest.mark.parametrize('name', RESUMABLE)
def test_resumes(tmp_path, name):
    """It goes on with the weights, momentum, structure and scores of the file, to the end."""
    expected, saved = EXPECTED[name], load_checkpoint(stored(name))
    run = build(name, tmp_path, resume=True)
    said, begun = [], []
    run.logger.warning = lambda *message: said.append(str(message))

    def check(run: Runner) -> None:
        begun.append((run.epoch, run.iter))
        assert structure_of(run.model) == expected['structure']
        # An average is saved as the model, and the model beside it.
        own = saved.get('ema_state_dict', saved['state_dict'])
        own = {key.removeprefix('module.'): own[key] for key in own if key != 'steps'}
        assert_holds(run.model, own)
        for average in (h.ema_model for h in run.hooks if isinstance(h, EMAHook)):
            assert_holds(average.module, saved['state_dict'])
        state = run.optim_wrapper.optimizer.state
        momentum = {
            key: state[p]['momentum_buffer'].double().abs().sum().item()
            for key, p in run.model.named_parameters()
            if 'momentum_buffer' in state.get(p, {})
        }
        assert momentum == pytest.approx(expected['momentum'])

    call_at(run, check, 'before_train')
    run.train()
    assert begun == [(saved['meta']['epoch'], saved['meta']['iter'])]
    assert run.iter == run.max_iters
    assert not [line for line in said if 'starts without its scores' in line]

    now = journal(Path((tmp_path / 'last_checkpoint').read_text()))
    before = [Entry.from_data(entry) for entry in expected['journal']]
    assert changes(now[: len(before)]) == changes(before)
    # The scores of half an interval are in the first update after it.
    first, then = now[len(before)], expected['next']
    assert first.update == then['update']
    if then['scores']:
        assert changes([first]) == changes([Entry.from_data(then)])
        for path, score in then['scores'].items():
            assert first.scores[path] == pytest.approx(score, rel=1e-3)


@pytest.mark.parametrize(
    ('name', 'config_of'), [('0.1.0/best', '0.1.0/best'), ('0.1.0/fused', '0.1.0/nested')]
)
def test_starts_a_new_run(tmp_path, name, config_of):
    """A file without an optimizer gives weights and structure; the count begins anew."""
    saved = load_checkpoint(stored(name))
    run = build(config_of, tmp_path, load_from=str(stored(name)))
    begun = []

    def check(run: Runner) -> None:
        begun.append(run.iter)
        assert structure_of(run.model) == EXPECTED[name]['structure']
        assert_holds(run.model, saved['state_dict'])

    call_at(run, check, 'before_train')
    run.train()
    assert begun == [0]
    assert run.iter == run.max_iters
    assert journal(Path((tmp_path / 'last_checkpoint').read_text()))[0].update == 1


@pytest.mark.parametrize('name', EXPECTED)
def test_computes_what_it_did(name):
    """Also the fused one, in the plain model."""
    expected = EXPECTED[name]
    model = expand(TinyClassifier(), expected['structure'])
    model.load_state_dict(load_checkpoint(stored(name))['state_dict'], strict=True)
    assert structure_of(model) == expected['structure']
    assert_expected(model, expected['logits'])


@pytest.mark.parametrize('name', GROWN)
def test_fuses(tmp_path, name):
    expected = EXPECTED[name]
    plain, out = tmp_path / 'plain.py', tmp_path / 'fused.pth'
    plain.write_text("model = dict(type='TinyClassifier')\n")
    report = fuse_checkpoint(plain, stored(name), out, size=8)
    assert report.blocks == sum(bool(names) for names in expected['structure'].values())
    assert not report.biased
    model = TinyClassifier()
    model.load_state_dict(load_checkpoint(out)['state_dict'], strict=True)
    assert_expected(model, expected['logits'])
