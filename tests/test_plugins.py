"""A branch, a score and a rule that others bring: registered from outside, trained, killed,
resumed, pruned and fused."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import ModuleType

import pytest
from torch import nn

from dyrep_mm import expand, fuse, grow, prune, register_branch, structure_of
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.engine.converter import fuse_checkpoint
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.saliency import SCORES
from dyrep_mm.reparam.branches import BRANCHES, Branch, known_operations
from support.checks import assert_equal_states, assert_same, without_times
from support.nets import image, make_net, output_of, randomise
from support.processes import start_worker
from support.runs import TinyClassifier, journal


@pytest.fixture(scope='module')
def plugins() -> Iterator[ModuleType]:
    """The module that registers them; other tests do not see them."""
    from support import plugins

    yield plugins
    del BRANCHES['0-twin'], SCORES['largest']


def train(work_dir, kind, *kill_at) -> int:
    process = start_worker('plugins', work_dir, kind, *kill_at)
    process.communicate(timeout=300)
    return process.returncode


@pytest.mark.parametrize('kind', ['score and branch', 'rule'])
def test_train_kill_resume_and_fuse(tmp_path, plugins, kind):
    end = f'iter_{plugins.ITERS}.pth'
    assert train(tmp_path / 'whole', kind) == 0
    assert train(tmp_path / 'killed', kind, 5) == -signal.SIGKILL
    assert not (tmp_path / 'killed' / end).exists()
    assert train(tmp_path / 'killed', kind) == 0

    last = tmp_path / 'whole' / end
    whole, again = (load_checkpoint(tmp_path / name / end) for name in ('whole', 'killed'))
    for key in ('state_dict', 'ema_state_dict'):
        assert_equal_states(whole[key], again[key])
    assert without_times(whole['meta']['dyrep_mm']) == without_times(again['meta']['dyrep_mm'])
    entries = journal(last)
    assert any('0-twin' in names for entry in entries for names in entry.grown.values())
    assert any(entry.pruned for entry in entries)

    plain = tmp_path / 'plain.py'
    plain.write_text("model = dict(type='TinyClassifier')\n")
    fuse_checkpoint(plain, last, tmp_path / 'fused.pth', size=8)
    fused = load_checkpoint(tmp_path / 'fused.pth')['state_dict']
    TinyClassifier().load_state_dict(fused, strict=True)


def test_a_branch_from_outside_is_exact(plugins):
    model, x = make_net(), image()
    before = output_of(model, x)
    grow(model, 'conv1', ['0-twin', 'identity', '1x1'])
    grow(model, 'conv1.branches.0-twin.conv', ['0-twin'])
    assert_same(output_of(model, x), before)
    randomise(model)
    before = output_of(model, x)
    assert_same(output_of(fuse(model, x), x), before)
    prune(model, 'conv1', ['0-twin'])
    assert_same(output_of(model, x), before)


def test_the_order_inside_a_block_is_that_of_names(plugins):
    """Table 1 first, then the others by name: imports do not matter."""
    model = make_net()
    grow(model, 'conv1', ['0-twin', 'identity', '1x1'])
    assert structure_of(model) == {'conv1': ['kxk', '1x1', 'identity', '0-twin']}
    assert known_operations()[-1] == '0-twin'


def test_defaults_are_table_1(plugins):
    model = make_net()
    expand(model, 'dbb7')
    grow(model, 'stem')
    assert not any('0-twin' in names for names in structure_of(model).values())


class Other(Branch):
    """Never registered."""


@pytest.mark.parametrize(
    ('name', 'cls', 'sentence'),
    [
        ('a.b', Other, "letters, digits, - and _, got 'a.b'"),
        ('', Other, 'letters, digits'),
        (3, Other, 'got 3'),
        ('keys', Other, 'nn.ModuleDict has an attribute'),
        ('kxk', Other, "'kxk' is registered already"),
        ('1x1', Other, "'1x1' is registered already"),
        ('0-twin', Other, "'0-twin' is registered already"),
        ('other', nn.Conv2d, 'must be a subclass of Branch'),
    ],
)
def test_bad_registrations(plugins, name, cls, sentence):
    known = dict(BRANCHES)
    with pytest.raises(DyRepError, match=sentence):
        register_branch(name)(cls)
    assert known == BRANCHES


def test_a_notebook_cell_runs_twice(plugins):
    assert register_branch('0-twin')(plugins.Twin) is plugins.Twin


def test_a_structure_with_an_unknown_branch():
    structure = {'conv1': ['kxk', 'unheard-of']}
    with pytest.raises(DyRepError, match="unknown branch 'unheard-of'"):
        expand(make_net(), structure)
