"""Every checkpoint of a run is one of the stock model, with the branches beside its weights."""

from __future__ import annotations

import copy
import importlib.util
import shutil
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS, MODELS
from torch import nn

from dyrep_mm import structure_of
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.engine.converter import fuse_checkpoint
from dyrep_mm.engine.stock import BRANCHES, from_stock
from dyrep_mm.errors import DyRepError
from support.checks import assert_equal_states, assert_same, assert_same_run
from support.nets import output_of
from support.runs import (
    PRUNING,
    TinyClassifier,
    call_at,
    dyrep,
    runner,
    updates,
    with_branches,
)

EMA = {'type': 'EMAHook', 'momentum': 0.3}
#: Branches that matter: a model without them is another one.
HOOK = {**PRUNING, 'init_scale': 0.5}
DATA = Path(__file__).parents[1] / 'data' / '0.1.0'


def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.5


def stock(file: Path, key: str = 'state_dict') -> nn.Module:
    """The model that knows nothing of dyrep_mm, with the weights of a file."""
    state = load_checkpoint(file)[key]
    state = {k.removeprefix('module.'): v for k, v in state.items() if k != 'steps'}
    model = TinyClassifier()
    model.load_state_dict(state, strict=True)
    assert list(model.state_dict()) == list(state)
    return model


def average_of(run) -> nn.Module:
    (hook,) = (h for h in run.hooks if isinstance(h, EMAHook))
    return hook.ema_model.module


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> Path:
    """Checkpoints of a run with an average, at every iteration, also right after updates."""
    folder = tmp_path_factory.mktemp('saved')
    runner(folder, [dict(HOOK), dict(EMA)], iters=7).train()
    return folder


@pytest.fixture
def config(tmp_path) -> Path:
    """The plain config."""
    file = tmp_path / 'plain.py'
    file.write_text("model = dict(type='TinyClassifier')\n")
    return file


# What is in a file


@pytest.mark.parametrize('hooks', [[], [EMA], [{**EMA, 'update_buffers': True}]])
def test_both_models_of_every_file_are_stock_ones(tmp_path, hooks):
    run = runner(tmp_path, [dict(HOOK), *map(dict, hooks)], iters=7)
    functions = {}

    def look(run):
        models = [average_of(run)] if hooks else []
        models.append(run.model)
        functions[run.iter + 1] = [output_of(model, images()) for model in models]
        functions[run.iter + 1] += [structure_of(run.model)]

    call_at(run, look, 'after_train_iter', 'VERY_LOW')
    run.train()
    grown = 0
    for at, (*expected, structure) in functions.items():
        file = tmp_path / f'iter_{at}.pth'
        for key, function in zip(('state_dict', 'ema_state_dict'), expected, strict=False):
            assert_same(output_of(stock(file, key), images()), function, (at, key), scale=10)
        said = load_checkpoint(file)['meta']['dyrep_mm']
        assert said['fused'] == 'by the run'
        assert said['weights'] == ('averaged' if hooks else 'raw')
        assert said['structure'] == structure
        assert not said['biased']
        grown += bool(structure)
    assert grown == 6


def test_without_the_branches_it_is_another_function(saved):
    """So the other tests notice if they are lost."""
    state = with_branches(saved / 'iter_7.pth')['state_dict']
    plain = TinyClassifier()
    names = {name: name.replace('.branches.kxk', '') for name in state}
    own = {names[n]: t for n, t in state.items() if names[n] in plain.state_dict()}
    assert not plain.load_state_dict(own, strict=False).unexpected_keys
    one, other = output_of(plain, images()), output_of(stock(saved / 'iter_7.pth'), images())
    assert (one - other).abs().max() > 0.01 * other.abs().max()


def test_every_tensor_is_stored_once(saved):
    content = load_checkpoint(saved / 'iter_7.pth')
    parts = [
        content['state_dict'],
        content['meta'][BRANCHES]['tensors'],
        content['ema_state_dict'],
        content[BRANCHES]['tensors'],
    ]
    storages = [t.untyped_storage().data_ptr() for part in parts for t in part.values()]
    assert len(storages) == len(set(storages))
    for state, prefix, beside in ((parts[0], '', parts[1]), (parts[2], 'module.', parts[3])):
        for name, tensor in beside.items():
            assert '.branches.' in name or '.origin_std' in name or 'bn' in name
            if prefix + name in state:
                assert not torch.equal(tensor, state[prefix + name]), name


def test_saving_runs_and_changes_nothing(tmp_path):
    run = runner(tmp_path, [dict(HOOK), dict(EMA)], iters=5, every=100)
    seen = []

    def save(run):
        models = run.model, average_of(run)
        before = [copy.deepcopy(model.state_dict()) for model in models]
        kinds = [[type(m) for m in model.modules()] for model in models]
        handles = [
            m.register_forward_pre_hook(lambda *_: seen.append('forward'))
            for model in models
            for m in model.modules()
        ]
        run.save_checkpoint(str(tmp_path), f'{run.iter}.pth')
        for handle in handles:
            handle.remove()
        for model, state, types in zip(models, before, kinds, strict=True):
            assert_equal_states(model.state_dict(), state)
            assert [type(m) for m in model.modules()] == types
        seen.append(bool(structure_of(run.model)))

    call_at(run, save)
    run.train()
    assert seen == [False, True, True, True, True]


@HOOKS.register_module(force=True)
class Edits(Hook):
    """Writes into every checkpoint."""

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint['state_dict']['head.bias'] = torch.tensor([5.0, 6.0])
        checkpoint['mine'] = 1


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'NORMAL', 'LOWEST'])
def test_other_hooks_may_write_into_a_checkpoint(tmp_path, priority):
    run = runner(tmp_path, [dict(HOOK), {'type': 'Edits', 'priority': priority}], iters=5)
    call_at(run, lambda run: run.iter == 2 and run.register_hook(Edits(), 'LOWEST'))
    run.train()
    for at in (2, 5):
        content = load_checkpoint(tmp_path / f'iter_{at}.pth')
        assert content['mine'] == 1
        model = stock(tmp_path / f'iter_{at}.pth')
        assert model.head.bias.tolist() == [5.0, 6.0]
        from_stock(content)


def test_a_run_from_old_weights_saves_stock_ones(tmp_path):
    """Which norms follow is seen in its first training forward."""
    torch.save({'state_dict': load_checkpoint(DATA / 'nested.pth')['state_dict']}, tmp_path / 'o')
    keep = {'type': 'dyrep_mm.DyRepHook', 'interval': None}
    run = runner(tmp_path, [keep], iters=2, load_from=str(tmp_path / 'o'))
    run.train()
    assert structure_of(run.model)
    assert not load_checkpoint(tmp_path / 'iter_1.pth')['meta']['dyrep_mm']['biased']
    assert_same(output_of(stock(tmp_path / 'iter_2.pth'), images()), output_of(run.model, images()))


def test_a_loaded_file_is_saved_again_before_any_forward(tmp_path, saved):
    run = runner(tmp_path, [dict(HOOK), dict(EMA)], iters=7, load_from=str(saved / 'iter_7.pth'))
    call_at(run, lambda run: run.save_checkpoint(str(tmp_path), 'again.pth'), 'before_train')
    run.train()
    files = saved / 'iter_7.pth', tmp_path / 'again.pth'
    first, again = (load_checkpoint(file)['state_dict'] for file in files)
    assert_equal_states(again, first)


# Convs without a norm


@MODELS.register_module(force=True)
class NormlessClassifier(TinyClassifier):
    """Nothing but a ReLU takes what `conv2` puts out."""

    def __init__(self):
        super().__init__()
        self.backbone.bn2 = nn.Identity()


def test_a_conv_that_gains_a_bias_is_named_once(tmp_path):
    hook = {**HOOK, 'scope': 'backbone.conv2', 'prune': False, 'max_depth': 1}
    model = {'type': 'NormlessClassifier'}
    run = runner(tmp_path, [hook, dict(EMA)], iters=6, model=model)
    said = []
    run.logger.warning = said.append
    run.train()
    (line,) = (line for line in said if 'checkpoints have a bias' in line)
    assert 'a bias for backbone.conv2 that the plain model has not' in line
    content = load_checkpoint(tmp_path / 'iter_6.pth')
    assert content['meta']['dyrep_mm']['biased'] == ['backbone.conv2']
    plain = NormlessClassifier()
    missing = plain.load_state_dict(content['state_dict'], strict=False)
    assert missing.unexpected_keys == ['backbone.conv2.bias']
    plain.backbone.conv2.bias = nn.Parameter(torch.zeros(4))
    plain.load_state_dict(content['state_dict'], strict=True)
    assert_same(output_of(plain, images()), output_of(average_of(run), images()), scale=10)
    again = runner(tmp_path / 'on', [hook, dict(EMA)], iters=8, model=model,
                   load_from=str(tmp_path / 'iter_4.pth'), resume=True)  # fmt: skip
    again.train()
    whole = runner(tmp_path / 'whole', [hook, dict(EMA)], iters=8, model=model)
    whole.train()
    assert_same_run(again, whole)


# Parts that do not belong together


def edited(content: dict, part: str) -> None:
    beside = content['meta'][BRANCHES]['tensors']
    if part == 'fused weight':
        content['state_dict']['backbone.conv2.weight'][0, 0, 0, 0] += 1
    elif part == 'fused mean':
        name = next(n for n in beside if n.endswith('running_mean') and '.branches.' not in n)
        content['state_dict'][name] += 1
    elif part == 'average of others':
        content['state_dict'] = {
            k: v * 0.5 if v.is_floating_point() else v for k, v in content['state_dict'].items()
        }
    elif part == 'half precision':
        content['state_dict'] = {k: v.half() for k, v in content['state_dict'].items()}
    elif part == 'branch':
        next(t for n, t in beside.items() if n.endswith('bn.weight')).mul_(2)
    elif part == 'branch is gone':
        del beside[next(n for n in beside if n.endswith('bn.weight'))]
    elif part == 'the other beside':
        content['meta'][BRANCHES] = content[BRANCHES]
    elif part == 'weight is gone':
        del content['state_dict']['backbone.conv2.weight']
    elif part == 'another weight':
        content['state_dict']['backbone.conv2.weight'] = torch.zeros(1)
    elif part == 'not a tensor':
        content['state_dict']['backbone.conv2.weight'] = 'x'


EDITS = [
    *('fused weight', 'fused mean', 'average of others', 'half precision', 'branch'),
    *('branch is gone', 'the other beside', 'weight is gone', 'another weight', 'not a tensor'),
]


@pytest.fixture(scope='module')
def conv2(tmp_path_factory) -> Path:
    """A checkpoint in which `conv2` has branches."""
    folder = tmp_path_factory.mktemp('conv2')
    hook = {**HOOK, 'scope': 'backbone.conv2', 'prune': False}
    runner(folder, [hook, dict(EMA)], iters=3).train()
    return folder / 'iter_3.pth'


@pytest.mark.parametrize('part', EDITS)
def test_an_edited_file_is_refused(tmp_path, conv2, config, part):
    content = load_checkpoint(conv2)
    edited(content, part)
    torch.save(content, tmp_path / 'edited.pth')
    word = 'fused weights in state_dict are not those of the branches beside them'
    for resume in (True, False):
        run = runner(tmp_path / 'run', [dict(HOOK), dict(EMA)], iters=5, resume=resume,
                     load_from=str(tmp_path / 'edited.pth'))  # fmt: skip
        with pytest.raises(DyRepError, match=word) as error:
            run.train()
        assert '\n' not in str(error.value)
    with pytest.raises(DyRepError, match=word):
        fuse_checkpoint(config, tmp_path / 'edited.pth', tmp_path / 'out.pth', size=8)
    assert not list(tmp_path.glob('out*'))
    # As the sentence says.
    for name in ('dyrep_mm', BRANCHES):
        content['meta'].pop(name)
    torch.save(content, tmp_path / 'plain.pth')
    if part in ('fused weight', 'branch'):
        start = str(tmp_path / 'plain.pth')
        run = runner(tmp_path / 'plain', [dict(HOOK)], iters=3, load_from=start)
        run.train()
        assert updates(tmp_path / 'plain/iter_3.pth') == [2]


def test_an_edited_average_is_refused(tmp_path, conv2):
    content = load_checkpoint(conv2)
    content['ema_state_dict']['module.backbone.conv2.weight'] += 1
    torch.save(content, tmp_path / 'edited.pth')
    run = runner(tmp_path / 'run', [dict(HOOK), dict(EMA)], iters=5, resume=True,
                 load_from=str(tmp_path / 'edited.pth'))  # fmt: skip
    with pytest.raises(DyRepError, match='fused weights in ema_state_dict are not those'):
        run.train()


def test_what_both_models_share_may_be_edited(tmp_path, conv2):
    """There is one of it."""
    content = load_checkpoint(conv2)
    content['state_dict']['head.weight'] = torch.full((2, 8), 3.0)
    torch.save(content, tmp_path / 'edited.pth')
    run = runner(tmp_path, [dict(HOOK)], iters=3, load_from=str(tmp_path / 'edited.pth'))
    call_at(run, lambda run: run.model.head.weight.eq(3).all() or 1 / 0, 'before_train')
    run.train()
    assert structure_of(run.model)


def test_fused_weights_that_were_wrong_from_the_start(tmp_path, conv2, config, monkeypatch):
    """The parts belong together, and are not the same function."""
    from dyrep_mm.engine import stock as module

    right = module.fused_state

    def wrong(*args):
        fused, biased = right(*args)
        return type(fused)((k, v * 1.001 if v.ndim == 4 else v) for k, v in fused.items()), biased

    monkeypatch.setattr(module, 'fused_state', wrong)
    hook = {**HOOK, 'scope': 'backbone.conv2', 'prune': False}
    runner(tmp_path / 'run', [hook], iters=3).train()
    with pytest.raises(DyRepError, match=r'not those of its branches: .*weight differs'):
        fuse_checkpoint(config, tmp_path / 'run/iter_3.pth', tmp_path / 'out.pth', size=8)
    assert not list(tmp_path.glob('out*'))


FORMS = {
    'a number': 5,
    'nothing': None,
    'empty': {},
    'no tensors': {'tensors': {'a': 1}, 'weights': 'raw', 'digest': ''},
    'names': {'tensors': {1: torch.zeros(1)}, 'weights': 'raw', 'digest': ''},
    'a list': {'tensors': [torch.zeros(1)], 'weights': 'raw', 'digest': ''},
    'another digest': {'tensors': {}, 'weights': 'raw', 'digest': 5},
    'other weights': {'tensors': {}, 'weights': 'mine', 'digest': ''},
    'no digest': {'tensors': {}, 'weights': 'raw'},
}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('place', ['meta', 'top'])
def test_what_lies_beside_is_checked(conv2, form, place):
    content = load_checkpoint(conv2)
    (content['meta'] if place == 'meta' else content)[BRANCHES] = FORMS[form]
    with pytest.raises(DyRepError, match='malformed') as error:
        from_stock(content)
    assert '\n' not in str(error.value)


# Fusing


@pytest.mark.parametrize('key', ['averaged', 'raw'])
def test_the_tool_writes_the_weights_that_were_there(tmp_path, saved, config, key):
    file = saved / 'iter_7.pth'
    if key == 'raw':
        runner(tmp_path / 'run', [dict(HOOK)], iters=3).train()
        file = tmp_path / 'run/iter_3.pth'
    said = []
    report = fuse_checkpoint(config, file, tmp_path / 'out.pth', size=8, say=said.append)
    assert report.weights == key
    assert said[0].startswith(f'fusing the {key} weights')
    before, after = load_checkpoint(file), load_checkpoint(tmp_path / 'out.pth')
    assert after.keys() == {'meta', 'state_dict'}
    assert BRANCHES not in after['meta']
    assert_equal_states(after['state_dict'], before['state_dict'])
    said, record = after['meta']['dyrep_mm'], before['meta']['dyrep_mm']
    assert said['fused'] == 'by tools/fuse.py'
    assert said['weights'] == key
    assert said['structure'] == {}
    assert said['grown'] == record['structure']
    assert len(said['journal']) == len(record['journal'])


# Published


def publish(library: str, source: Path, out: Path, monkeypatch, **options) -> Path:
    """What the publish tool of a library makes of a checkpoint."""
    root = Path(importlib.util.find_spec(library).origin).parent
    (file,) = root.glob('.mim/tools/*/publish_model.py')
    spec = importlib.util.spec_from_file_location(f'publish_{library}', file)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    load = torch.load  # the tools are older than `weights_only`
    monkeypatch.setattr(torch, 'load', lambda *a, **k: load(*a, **{'weights_only': False, **k}))
    extra = [Config({'dataset_type': None, 'no_ema': False, **options})]
    tool.process_checkpoint(str(source), str(out), *(extra if library == 'mmpretrain' else []))
    monkeypatch.undo()
    published: list[Path] = []
    while not published:  # some of them leave the renaming to another process
        published = list(out.parent.glob(f'{out.stem}[-_]*.pth'))
        time.sleep(0.01)
    return published[0]


@pytest.mark.parametrize('average', [False, True])
@pytest.mark.parametrize('library', ['mmdet', 'mmseg', 'mmpretrain', 'mmpretrain --no-ema'])
def test_published_files_work_fuse_and_start_a_run(tmp_path, config, monkeypatch, library, average):
    run = runner(tmp_path / 'run', [dict(HOOK), *([dict(EMA)] if average else [])], iters=5)
    run.train()
    library, _, raw = library.partition(' ')
    source = shutil.copy(tmp_path / 'run/iter_5.pth', tmp_path / 'source.pth')
    file = publish(library, source, tmp_path / 'public.pth', monkeypatch, no_ema=bool(raw))
    content = load_checkpoint(file)
    gone = {'mmdet': {'optimizer', BRANCHES}, 'mmpretrain': {'optimizer', 'ema_state_dict'}}
    assert not gone.get(library, {'optimizer'}) & content.keys()
    is_average = average and not raw
    model = average_of(run) if is_average else run.model
    assert_same(output_of(stock(file), images()), output_of(model, images()), scale=10)
    report = fuse_checkpoint(config, file, tmp_path / 'fused.pth', size=8)
    assert report.weights == ('averaged' if is_average else 'raw')
    assert_equal_states(
        load_checkpoint(tmp_path / 'fused.pth')['state_dict'], content['state_dict']
    )
    begun = []
    again = runner(tmp_path / 'on', [dict(HOOK), dict(EMA)], iters=3, load_from=str(file))
    call_at(again, lambda run: begun.append(copy.deepcopy(run.model)), 'before_train')
    again.train()
    assert_equal_states(begun[0].state_dict(), model.state_dict())
    assert structure_of(begun[0]) == structure_of(run.model)
    assert len(dyrep(again).journal) == 1


def test_an_average_without_its_branches_is_no_run_to_resume(tmp_path, conv2):
    content = load_checkpoint(conv2)
    del content[BRANCHES]
    torch.save(content, tmp_path / 'half.pth')
    options = {'iters': 5, 'load_from': str(tmp_path / 'half.pth')}
    run = runner(tmp_path / 'a', [dict(HOOK), dict(EMA)], resume=True, **options)
    with pytest.raises(DyRepError, match='no run can resume from this checkpoint, its ema_state'):
        run.train()
    run = runner(tmp_path / 'b', [dict(HOOK), dict(EMA)], **options)
    run.train()
    assert updates(tmp_path / 'b/iter_5.pth') == [2, 4]
