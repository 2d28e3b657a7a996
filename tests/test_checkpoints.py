"""What checkpoints hold, who reads them, and what a wrong one leads to."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from tiny import (
    FAST,
    PRUNING,
    TinyClassifier,
    assert_equal_states,
    assert_same_run,
    dyrep,
    runner,
    settings,
    watch,
)

from dyrep_mm.checkpoint import Record, load_checkpoint, load_structure
from dyrep_mm.converter import fuse_checkpoint
from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery import MAX_DEPTH, blocks_of, structure_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> Path:
    """The checkpoints of a run of 9 iterations, at every one, and of a plain run."""
    folder = tmp_path_factory.mktemp('made')
    runner(folder, [dict(PRUNING)], iters=9).train()
    runner(folder / 'plain', iters=9).train()
    return folder


def journal(file: Path) -> list[dict]:
    return load_checkpoint(file)['meta']['dyrep_mm']['journal']


def updates(file: Path, unit: str = 'iteration') -> list[int]:
    return [entry[unit] for entry in journal(file)]


# Resuming


@pytest.mark.parametrize('at', range(1, 9))
def test_resumed_at_any_iteration(tmp_path, made, at):
    """In the middle of an interval the scores that were gathered so far count."""
    whole = runner(tmp_path / 'whole', [dict(PRUNING)], iters=9)
    whole.train()
    file = made / f'iter_{at}.pth'
    scores = load_checkpoint(file)['dyrep_mm']['scores']
    assert set(scores['counts'].tolist()) == {at % 2}
    run = runner(tmp_path, [dict(PRUNING)], iters=9, load_from=str(file), resume=True)
    run.train()
    assert_same_run(whole, run)


def test_resumed_with_other_settings(tmp_path, made):
    """What was grown stays; from then on the new settings count."""
    file = made / 'iter_5.pth'
    grown = load_checkpoint(file)['meta']['dyrep_mm']['structure']
    hook = {**FAST, 'interval': 3, 'metric': 'snip', 'branches': ['1x1'], 'prune': False}
    run = runner(tmp_path, [hook], iters=9, load_from=str(file), resume=True)
    run.train()
    assert updates(tmp_path / 'iter_9.pth') == [2, 4, 6]
    entry = journal(tmp_path / 'iter_9.pth')[-1]
    assert list(entry['grown'].values()) == [['kxk', '1x1']]
    assert not entry['pruned']
    assert structure_of(run.model) == {**grown, **entry['grown']}


def test_resumed_with_an_interval_of_none(tmp_path, made):
    """The structure stays as it is and goes on training."""
    file = made / 'iter_5.pth'
    hook = {'type': 'dyrep_mm.DyRepHook', 'interval': None, 'structure': 'dbb'}
    run = runner(tmp_path, [hook], iters=9, load_from=str(file), resume=True)
    run.train()
    assert journal(tmp_path / 'iter_9.pth') == journal(file)
    assert structure_of(run.model) == load_checkpoint(file)['meta']['dyrep_mm']['structure']


def test_resumed_with_another_unit(tmp_path, made):
    """Iterations become epochs: the next update is at the next multiple of the interval."""
    hook = {**PRUNING, 'interval': 1, 'by_epoch': True}
    runner(tmp_path / 'first', [{**PRUNING, 'by_epoch': False}], epochs=5).train()
    file = tmp_path / 'first/epoch_2.pth'
    assert updates(file) == [2, 4, 6, 8]
    runner(tmp_path, [hook], epochs=5, load_from=str(file), resume=True).train()
    entries = journal(tmp_path / 'epoch_5.pth')
    assert [entry.get('iteration', -entry.get('epoch', 0)) for entry in entries] == [
        2, 4, 6, 8, -3, -4,
    ]  # fmt: skip


@pytest.mark.parametrize('interval', [2, 4])
def test_resumed_from_a_plain_checkpoint(tmp_path, made, interval):
    """It starts to grow at the next multiple of the interval, not at once."""
    hook = {**PRUNING, 'interval': interval}
    file = made / 'plain/iter_5.pth'
    run = runner(tmp_path, [hook], iters=9, load_from=str(file), resume=True)
    seen = []
    watch(run, lambda run: seen.append(bool(structure_of(run.model))))
    run.train()
    due = {2: [6, 8], 4: [8]}[interval]
    assert updates(tmp_path / 'iter_9.pth') == due
    assert seen.index(True) == due[0] - 6  # it began with iteration 6


@pytest.mark.parametrize('file', ['iter_5.pth', 'plain/iter_5.pth'])
@pytest.mark.parametrize('start', [None, {'backbone.conv2': ['kxk', '1x1']}])
def test_loaded_not_resumed(tmp_path, made, file, start):
    """`load_from` takes weights and structure, and starts counting anew; a structure of the
    config is for what has none of its own."""
    hook = {**FAST, 'structure': start}
    run = runner(tmp_path, [hook], iters=5, load_from=str(made / file))
    seen = []
    watch(run, lambda run: seen.append(structure_of(run.model)), 'before_train')
    weights = load_checkpoint(made / file)
    structure = weights['meta'].get('dyrep_mm', {}).get('structure')
    if structure is not None:
        watch(
            run,
            lambda run: assert_equal_states(run.model.state_dict(), weights['state_dict']),
            'before_train',
        )
    run.train()
    assert seen == [structure or start or {}]
    assert updates(tmp_path / 'iter_5.pth') == [2, 4]
    assert journal(tmp_path / 'iter_5.pth')[0]['update'] == 1


def test_other_metric_or_scope_drops_the_scores(tmp_path, made):
    for other in ({'metric': 'snip'}, {'scope': 'backbone.conv1'}):
        run = runner(
            tmp_path, [{**PRUNING, **other}], iters=9, load_from=str(made / 'iter_5.pth'),
            resume=True, log_level='WARNING',
        )  # fmt: skip
        said = []
        run.logger.warning = said.append
        run.train()
        assert any('starts without its scores' in line for line in said)


# The end of the changes


@pytest.mark.parametrize(('end', 'expected'), [(6, [2, 4, 6]), (7, [2, 4, 6]), (1, [])])
def test_no_update_after_the_end(tmp_path, end, expected):
    run = runner(tmp_path, [{**PRUNING, 'end': end}], iters=9)
    gathered = []
    watch(run, lambda run: gathered.append(dyrep(run)._saliency._counts.max().item()))
    run.train()
    assert updates(tmp_path / 'iter_9.pth') == expected
    assert not any(gathered[end + 1 :])  # nothing is scored for no use


def test_end_with_updates_that_wait(tmp_path):
    """With accumulation over 2 the update due at 5 waits until 6; the last one is still at 10."""
    wrapper = {'optimizer': {'type': 'SGD', 'lr': 0.05}, 'accumulative_counts': 2}
    hook = {**PRUNING, 'interval': 5, 'end': 10}
    runner(tmp_path, [hook], iters=18, every=18, optim_wrapper=wrapper).train()
    assert updates(tmp_path / 'iter_18.pth') == [6, 10]


# What other parts of mmengine do with checkpoints


def test_best_checkpoint_and_validation(tmp_path):
    """Validation in the middle sees the structure; so does a test of the best checkpoint."""
    checkpoint = {'type': 'CheckpointHook', 'interval': 1, 'save_best': 'loss', 'rule': 'less'}
    run = runner(
        tmp_path, [{**PRUNING, 'interval': 1}], epochs=5, val=1,
        default_hooks={'checkpoint': checkpoint},
    )  # fmt: skip
    scores = {}
    watch(
        run,
        lambda run: scores.update(
            {run.epoch: run.message_hub.get_scalar('val/fingerprint').current()}
        ),
        'after_val_epoch',
    )
    run.train()
    (best,) = tmp_path.glob('best_*.pth')
    for file in (best, tmp_path / 'epoch_3.pth'):
        saved = load_checkpoint(file)
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
    assert dyrep(run)._handle is None
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
        "custom_imports = dict(imports=['tiny'])\nmodel = dict(type='TinyClassifier')\n"
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


# The command line


def tool(name: str, *arguments: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, f'tools/{name}.py', *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # As many threads as here: results are compared bit for bit.
        env={
            **os.environ,
            'OMP_NUM_THREADS': str(torch.get_num_threads()),
            'PYTHONPATH': str(ROOT / 'tests'),
        },
        check=False,
    )
    return done.returncode, (done.stdout + done.stderr).strip()


def write_config(path: Path, hooks: list[dict] | None, **more) -> Path:
    arguments = settings(path.parent / path.stem, hooks, **{'iters': 9, **more})
    arguments = {k: v for k, v in arguments.items() if v is not None}
    Config({**arguments, 'custom_imports': {'imports': ['tiny']}}).dump(path)
    return path


def test_a_config_without_the_hook_is_told(tmp_path, made):
    """By our tools; mmengine's own runner only warns of unknown names."""
    plain = write_config(tmp_path / 'plain.py', None)
    file = made / 'iter_5.pth'
    for flags in (('--resume', file), ('--cfg-options', f'load_from={file}')):
        code, said = tool('train', plain, '--work-dir', tmp_path / 'out', *flags)
        assert code == 1
        assert 'no DyRepHook to rebuild it' in said.splitlines()[-1]
        assert 'Traceback' not in said
    assert not (tmp_path / 'out').exists()


def test_resume_auto_after_a_kill(tmp_path, made):
    """With a plain config too: the fallback is in the tool as well as in the hook."""
    work_dir = tmp_path / 'plain'
    config = write_config(tmp_path / 'plain.py', None)
    runner(work_dir, iters=9).train()
    whole = load_checkpoint(work_dir / 'iter_9.pth')
    (work_dir / 'iter_9.pth').write_bytes(b'half')
    code, said = tool('train', config, '--resume', 'auto')
    assert code == 0, said
    assert f'resuming from {work_dir / "iter_8.pth"}' in said
    assert_equal_states(load_checkpoint(work_dir / 'iter_9.pth')['state_dict'], whole['state_dict'])


def test_a_named_file_that_is_torn_is_an_error(tmp_path, made):
    """Only `--resume auto` may choose another."""
    config = write_config(tmp_path / 'config.py', [dict(PRUNING)])
    torn = tmp_path / 'torn.pth'
    torn.write_bytes((made / 'iter_9.pth').read_bytes()[:9999])
    code, said = tool('train', config, '--resume', torn)
    assert code == 1
    assert 'torn.pth is truncated' in said.splitlines()[-1]


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
    code, said = tool('fuse', made / 'config.py', tmp_path / 'bad.pth', tmp_path / 'out.pth')
    assert code == 1
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
    ({'backbone.conv2': ['kxk']}, 'no branch'),
    ({'': ['kxk', '1x1']}, 'only a conv'),
    ({'__class__': ['kxk', '1x1']}, 'no module'),
    ({'backbone.conv2.weight': ['kxk', '1x1']}, 'no module'),
    ({'backbone.forward': ['kxk', '1x1']}, 'no module'),
    ({'head': ['kxk', '1x1']}, 'only a conv'),
    ({'backbone.bn1': []}, 'not a conv'),
    ({'backbone.conv3': []}, 'not a conv without bias'),
    ({'backbone.conv3': ['kxk', 'identity']}, 'identity'),
    ({'backbone.conv2.branches.kxk': ['kxk', '1x1']}, 'no module'),
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
        "custom_imports = dict(imports=['tiny'])\nmodel = dict(type='TinyClassifier')\n"
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
        ('scores', [1.0], 'scores'),
        ('sums', torch.zeros(1, 1), 'sums'),
        ('sums', [1.0], 'sums'),
        ('counts', None, 'counts'),
        ('journal', {}, 'journal'),
        ('journal', [1], 'journal'),
    ],
)
def test_record_of_a_stranger(tmp_path, made, place, value, word):
    bad = load_checkpoint(made / 'iter_5.pth')
    if place == 'record':
        bad['meta']['dyrep_mm'] = value
    elif place == 'journal':
        bad['meta']['dyrep_mm']['journal'] = value
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
    bad = load_checkpoint(made / 'iter_5.pth')
    name = next(n for n in bad['state_dict'] if '.branches.' in n and n.endswith('bn.weight'))
    del bad['state_dict'][name]
    torch.save(bad, tmp_path / 'bad.pth')
    run = runner(tmp_path, [dict(PRUNING)], iters=9, load_from=str(tmp_path / 'bad.pth'))
    with pytest.raises(DyRepError, match=name):
        run.train()


def test_record_round_trip(made):
    saved = load_checkpoint(made / 'iter_5.pth')
    record = Record.from_checkpoint(saved)
    again: dict = {'meta': {}}
    record.to_checkpoint(again)
    assert again['meta']['dyrep_mm'] == saved['meta']['dyrep_mm']
    assert again['dyrep_mm'].keys() == saved['dyrep_mm'].keys()
    assert Record.from_checkpoint({'meta': {}}) == Record()
    assert Record.from_checkpoint({}) == Record()
