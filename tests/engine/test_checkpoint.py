"""What checkpoints hold, who reads them, and what a wrong one leads to."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from dyrep_mm.engine.checkpoint import load_checkpoint, load_structure
from dyrep_mm.engine.converter import fuse_checkpoint
from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.structure import MAX_DEPTH, structure_of
from dyrep_mm.surgery.tree import blocks_of
from support.checks import assert_equal_states
from support.processes import run_tool
from support.runs import FAST, PRUNING, TinyClassifier, call_at, runner, updates, with_branches

# What other parts of mmengine do with checkpoints


def test_best_checkpoint_and_validation(tmp_path):
    """Validation in the middle sees the structure; so does a test of the best checkpoint."""
    checkpoint = {'type': 'CheckpointHook', 'interval': 1, 'save_best': 'loss', 'rule': 'less'}
    run = runner(
        tmp_path, [{**PRUNING, 'interval': 1}], epochs=5, val=1,
        default_hooks={'checkpoint': checkpoint},
    )  # fmt: skip
    scores = {}
    call_at(
        run,
        lambda run: scores.update(
            {run.epoch: run.message_hub.get_scalar('val/fingerprint').current()}
        ),
        'after_val_epoch',
    )
    run.train()
    (best,) = tmp_path.glob('best_*.pth')
    for file in (best, tmp_path / 'epoch_3.pth'):
        saved = with_branches(file)
        assert blocks_of(run.model)
        tested = runner(tmp_path / file.stem, [dict(PRUNING)], epochs=5, val=1, load_from=str(file))
        metrics = tested.test()
        assert structure_of(tested.model) == saved['meta']['dyrep_mm']['structure'] != {}
        assert_equal_states(tested.model.state_dict(), saved['state_dict'])
        assert metrics['fingerprint'] == scores[saved['meta']['epoch']]
    assert len(scores) == 5
    assert 'optimizer' not in load_checkpoint(best)


def test_early_stopping(tmp_path):
    """It ends the run between two updates; hook and checkpoints are as after a whole run."""
    stop = {'type': 'EarlyStoppingHook', 'monitor': 'loss', 'rule': 'greater', 'patience': 1}
    stop |= {'min_delta': 1e9}
    run = runner(tmp_path, [{**PRUNING, 'interval': 1}, stop], epochs=9, val=1)
    run.train()
    assert run.epoch < 9
    last = load_checkpoint(tmp_path / f'epoch_{run.epoch}.pth')
    assert last['meta']['dyrep_mm']['structure'] == structure_of(run.model)
    assert not run.optim_wrapper.optimizer._optimizer_step_pre_hooks
    optimizer = run.optim_wrapper.optimizer
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize('setting', ['save_optimizer', 'published'])
def test_checkpoints_without_an_optimizer(tmp_path, setting):
    checkpoint = {'type': 'CheckpointHook', 'interval': 1, 'by_epoch': False}
    if setting == 'published':
        checkpoint |= {'published_keys': ['meta', 'state_dict']}
    else:
        checkpoint |= {'save_optimizer': False}
    run = runner(tmp_path, [dict(PRUNING)], iters=5, default_hooks={'checkpoint': checkpoint})
    run.train()
    (file,) = tmp_path.glob('iter_5-*.pth' if setting == 'published' else 'iter_5.pth')
    saved = load_checkpoint(file)
    assert 'optimizer' not in saved
    tested = runner(tmp_path / 'test', [dict(PRUNING)], iters=5, val=1, load_from=str(file))
    tested.test()
    assert_equal_states(tested.model.state_dict(), run.model.state_dict())
    tuned = runner(tmp_path / 'tuned', [dict(PRUNING)], iters=5, load_from=str(file))
    tuned.train()
    assert updates(tmp_path / 'tuned/iter_5.pth') == [2, 4]
    if setting == 'save_optimizer':
        resumed = runner(
            tmp_path / 'on', [dict(PRUNING)], iters=9, load_from=str(file), resume=True
        )
        resumed.train()
        assert updates(tmp_path / 'on/iter_9.pth') == [2, 4, 6, 8]
    config = tmp_path / 'plain.py'
    config.write_text(
        "custom_imports = dict(imports=['support.runs'])\nmodel = dict(type='TinyClassifier')\n"
    )
    fuse_checkpoint(config, file, tmp_path / 'fused.pth', size=8)
    fused = TinyClassifier()
    fused.load_state_dict(load_checkpoint(tmp_path / 'fused.pth')['state_dict'], strict=False)


def test_publishing_as_the_libraries_do(tmp_path, made):
    """Their tools keep meta and weights of what they load."""
    saved = load_checkpoint(made / 'iter_9.pth')
    torch.save({key: saved[key] for key in ('meta', 'state_dict')}, tmp_path / 'published.pth')
    run = runner(
        tmp_path, [dict(PRUNING)], iters=5, val=1, load_from=str(tmp_path / 'published.pth')
    )
    run.test()
    assert structure_of(run.model) == saved['meta']['dyrep_mm']['structure']


# Files from strangers


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_no_more_trust_than_mmengine(tmp_path, made):
    """What the hook saves loads as plain data, and fusing a file runs nothing in it."""
    saved = torch.load(made / 'iter_5.pth', weights_only=False)
    plain = {'meta': saved['meta']['dyrep_mm'], 'dyrep_mm': saved['dyrep_mm']}
    torch.save(plain, tmp_path / 'plain.pth')
    torch.load(tmp_path / 'plain.pth', weights_only=True)
    json.dumps(plain['meta'])
    for place in ('optimizer', 'dyrep_mm', 'meta'):
        bad = copy.deepcopy(saved)
        bad[place] = {'x': Evil(tmp_path / 'owned')} | (bad[place] if place == 'meta' else {})
        torch.save(bad, tmp_path / 'bad.pth')
        for read in (load_checkpoint, load_structure):
            with pytest.raises(DyRepError, match='plain data'):
                read(tmp_path / 'bad.pth')
        assert not (tmp_path / 'owned').exists()
    said = run_tool('fuse', made / 'config.py', tmp_path / 'bad.pth', tmp_path / 'out.pth', code=1)
    assert 'plain data' in said.splitlines()[-1]
    assert not (tmp_path / 'owned').exists()
    assert not (tmp_path / 'out.pth').exists()


def deep(levels: int) -> dict:
    path, structure = 'backbone.conv2', {}
    for _ in range(levels):
        structure[path] = ['kxk', '1x1']
        path += '.branches.kxk'
    return structure


#: Structures that are none, and a word of what is said.
STRUCTURES = [
    (None, 'NoneType'),
    ([], 'list'),
    ('backbone.conv2', 'str'),
    ({1: ['kxk', '1x1']}, 'maps paths to lists'),
    ({'backbone.conv2': {'kxk': 1}}, 'maps paths to lists'),
    ({'backbone.conv2': 'kxk'}, 'maps paths to lists'),
    ({'backbone.conv2': [1, 2]}, 'list of names'),
    ({'backbone.conv2': [['kxk']]}, 'list of names'),
    ({'backbone.conv2': ['kxk', '__class__']}, '__class__'),
    ({'backbone.conv2': ['1x1', 'kxk']}, 'start with kxk'),
    ({'backbone.conv2': ['kxk', '1x1', '1x1']}, 'differ'),
    ({'backbone.conv2': ['kxk']}, 'not that of its weights'),
    ({'': ['kxk', '1x1']}, 'not that of its weights'),
    ({'__class__': ['kxk', '1x1']}, 'not that of its weights'),
    ({'backbone.conv2.weight': ['kxk', '1x1']}, 'not that of its weights'),
    ({'backbone.forward': ['kxk', '1x1']}, 'not that of its weights'),
    ({'head': ['kxk', '1x1']}, 'not that of its weights'),
    ({'backbone.bn1': []}, 'not a conv'),
    ({'backbone.conv3': []}, 'not a conv without bias'),
    ({'backbone.conv3': ['kxk', 'identity']}, 'not that of its weights'),
    ({'backbone.conv2.branches.kxk': ['kxk', '1x1']}, 'not that of its weights'),
    (deep(MAX_DEPTH + 1), 'deep'),
    ({f'a{i}': ['kxk', '1x1'] for i in range(10_001)}, 'at most'),
]


@pytest.mark.parametrize(
    ('structure', 'word'), STRUCTURES, ids=[str(s)[:40] for s, _ in STRUCTURES]
)
def test_structure_of_a_stranger(tmp_path, made, structure, word):
    bad = load_checkpoint(made / 'iter_1.pth')
    bad['meta']['dyrep_mm']['structure'] = structure
    torch.save(bad, tmp_path / 'bad.pth')
    run = runner(tmp_path / 'run', [dict(PRUNING)], iters=9, load_from=str(tmp_path / 'bad.pth'))
    names = [name for name, _ in run.model.named_modules()]
    with pytest.raises(DyRepError, match=word):
        run.train()
    assert [name for name, _ in run.model.named_modules()] == names  # nothing was built
    config = tmp_path / 'plain.py'
    config.write_text(
        "custom_imports = dict(imports=['support.runs'])\nmodel = dict(type='TinyClassifier')\n"
    )
    with pytest.raises(DyRepError, match=word):
        fuse_checkpoint(config, tmp_path / 'bad.pth', tmp_path / 'out.pth', size=8)
    assert not list(tmp_path.glob('out*'))


def test_the_deepest_structure_works(tmp_path):
    # In a file: mmengine formats the whole config for every checkpoint, at length.
    (tmp_path / 'deep.json').write_text(json.dumps(deep(MAX_DEPTH)))
    structure = str(tmp_path / 'deep.json')
    hook = {'type': 'dyrep_mm.DyRepHook', 'interval': None, 'structure': structure}
    run = runner(tmp_path, [hook], iters=2)
    run.train()
    again = runner(tmp_path, [hook], iters=2, val=1, load_from=str(tmp_path / 'iter_2.pth'))
    again.test()
    assert_equal_states(again.model.state_dict(), run.model.state_dict())
    with pytest.raises(DyRepError, match='max_depth must be at most'):
        runner(tmp_path, [{**FAST, 'max_depth': MAX_DEPTH + 1}], iters=2)


@pytest.mark.parametrize(
    ('place', 'value', 'word'),
    [
        ('record', 3, 'not a mapping'),
        ('progress', [1], 'not a mapping'),
        ('updates', -1, 'counts'),
        ('updates', 'many', 'counts'),
        ('last', 1.5, 'counts'),
        ('last', True, 'counts'),
        ('by_epoch', 'yes', 'by_epoch'),
        ('warned', 'no', 'warned'),
        ('left_alone', ['backbone'], 'left_alone'),
        ('left_alone', {'backbone': 1}, 'left_alone'),
        ('scores', [1.0], 'scores'),
        ('sums', torch.zeros(1, 1), 'sums'),
        ('sums', [1.0], 'sums'),
        ('counts', None, 'counts'),
        ('journal', {}, 'journal'),
        ('journal', [1], 'journal'),
        ('plain', 3, 'plain'),
        ('start', {'parameters': 'many'}, 'start'),
        ('iteration', -1, 'counts'),
        ('timing', {'steps': 'few'}, 'timing'),
        ('method', 3, 'method'),
        ('units', [1], 'units'),
        ('units', {'backbone.conv1.branches.1x1.unit': 1.0}, 'units'),
    ],
)
def test_record_of_a_stranger(tmp_path, made, place, value, word):
    bad = load_checkpoint(made / 'iter_5.pth')
    if place == 'record':
        bad['meta']['dyrep_mm'] = value
    elif place in ('journal', 'plain', 'start', 'iteration', 'timing', 'method'):
        bad['meta']['dyrep_mm'][place] = value
    elif place == 'progress':
        bad['dyrep_mm'] = value
    elif place in ('sums', 'counts'):
        bad['dyrep_mm']['scores'][place] = value
    else:
        bad['dyrep_mm'][place] = value
    torch.save(bad, tmp_path / 'bad.pth')
    run = runner(
        tmp_path, [dict(PRUNING)], iters=9, load_from=str(tmp_path / 'bad.pth'), resume=True
    )
    with pytest.raises(DyRepError, match=word):
        run.train()


def test_weights_that_are_not_of_the_structure(tmp_path, made):
    bad = with_branches(made / 'iter_5.pth')
    name = next(n for n in bad['state_dict'] if '.branches.' in n and n.endswith('bn.weight'))
    del bad['state_dict'][name]
    torch.save(bad, tmp_path / 'bad.pth')
    run = runner(tmp_path, [dict(PRUNING)], iters=9, load_from=str(tmp_path / 'bad.pth'))
    with pytest.raises(DyRepError, match=name):
        run.train()


def test_the_original_line_of_mmengine_has_no_list_of_safe_classes(tmp_path, monkeypatch):
    runner(tmp_path, [dict(PRUNING)], iters=3).train()
    monkeypatch.delattr('mmengine.runner.checkpoint.get_torch_safe_globals', raising=False)
    checkpoint = load_checkpoint(tmp_path / 'iter_3.pth')
    assert checkpoint['message_hub']['log_scalars']['train/loss'].current() > 0
