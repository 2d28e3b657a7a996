"""The hook in real runs: what it changes, what it leaves alone, what it refuses."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

import dyrep_mm
from dyrep_mm import DyRepHook
from dyrep_mm.engine.checkpoint import load_checkpoint
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Record
from dyrep_mm.surgery.optimizer import check_optimizer
from dyrep_mm.surgery.tree import blocks_of
from support.checks import assert_equal_states
from support.runs import PRUNING, call_at, dyrep, resnet_config, resnet_runner, runner, updates

HOOK = {**PRUNING, 'interval': 3}
INNER = 'backbone.conv2.branches.1x1-kxk.conv'

NAN, INF = float('nan'), float('inf')
FLAGS = ('prune', 'prune_relative', 'recompute', 'stop_on_invalid_loss', 'by_epoch', 'compensate')
COUNTS = ('interval', 'end', 'grow_per_update', 'calibration_batches', 'max_depth')
NUMBERS = ('init_scale', 'prune_threshold', 'prune_below', 'max_cost')
OPTIONS = (*FLAGS, *COUNTS, *NUMBERS, 'scope', 'metric', 'branches', 'structure', 'seed', 'preset')


def state_of(run) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in run.model.state_dict().items()}


@HOOKS.register_module(force=True)
class Witness(Hook):
    """Notes what every iteration trains on, the random streams, and checks the optimizer."""

    priority = 'LOWEST'

    def __init__(self):
        self.batches, self.random, self.losses = [], [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        check_optimizer(runner.optim_wrapper.optimizer, runner.model)
        self.batches.append([image.mean().item() for image in data_batch['inputs']])
        self.random.append(torch.get_rng_state())
        self.losses.append(outputs['loss'].item())


def witnessed(tmp_path: Path, hooks: list[dict], **settings):
    run = resnet_runner(tmp_path, custom_hooks=[*hooks, {'type': 'Witness'}], **settings)
    run.train()
    (witness,) = (hook for hook in run.hooks if isinstance(hook, Witness))
    return run, witness


@pytest.mark.parametrize('unit', [{'iters': 16}, {'epochs': 4}])
def test_grows_prunes_and_tells(tmp_path, unit):
    hook = {**HOOK, 'interval': 3 if 'iters' in unit else 1}
    run = resnet_runner(tmp_path, hook=hook, **unit)
    run.train()
    saved = load_checkpoint(sorted(tmp_path.glob('epoch_*.pth'))[-1])
    said = saved['meta']['dyrep_mm']
    assert said['structure'] == dyrep_mm.structure_of(run.model) != {}
    unit_name = 'iteration' if 'iters' in unit else 'epoch'
    entries = Record.from_checkpoint(saved).journal
    assert {entry.unit for entry in entries} == {unit_name}
    times = [entry.at for entry in entries]
    assert times == ([3, 6, 9, 12, 15] if 'iters' in unit else [1, 2, 3])
    assert all(len(entry.grown) == 1 for entry in entries)
    assert any(entry.pruned for entry in entries)


def test_nothing_but_the_model_changes(tmp_path):
    """Until the first update a run is the run without the hook, and after it the data, their
    order and the random streams still are."""
    _, plain = witnessed(tmp_path / 'plain', [], iters=8)
    hook = HOOK
    run, grown = witnessed(tmp_path / 'grown', [hook], iters=8)
    assert blocks_of(run.model)
    assert grown.batches == plain.batches
    assert all(torch.equal(a, b) for a, b in zip(grown.random, plain.random, strict=True))
    assert grown.losses[:3] == plain.losses[:3]
    # The first loss after growing: the branches start at a hundredth.
    assert grown.losses[3] == pytest.approx(plain.losses[3], rel=5e-3)


@pytest.mark.parametrize('at', [3, 4, 6])
@pytest.mark.parametrize('ema', [False, True])
def test_resumed_run_is_the_run_never_stopped(tmp_path, at, ema):
    hooks = [HOOK]
    hooks += [{'type': 'EMAHook'}] if ema else []
    save = {'checkpoint': {'type': 'CheckpointHook', 'interval': at, 'by_epoch': False}}
    whole = resnet_runner(tmp_path / 'whole', custom_hooks=hooks, iters=10, default_hooks=save)
    whole.train()
    first = resnet_runner(tmp_path / 'parts', custom_hooks=hooks, iters=10, default_hooks=save)
    first.train()
    second = resnet_runner(
        tmp_path / 'second',
        custom_hooks=hooks,
        iters=10,
        default_hooks=save,
        load_from=str(tmp_path / f'parts/iter_{at}.pth'),
        resume=True,
    )
    second.train()
    assert dyrep_mm.structure_of(second.model) == dyrep_mm.structure_of(whole.model)
    assert_equal_states(state_of(second), state_of(whole))
    kept = whole.optim_wrapper.optimizer.state_dict()['state']
    resumed = second.optim_wrapper.optimizer.state_dict()['state']
    assert kept.keys() == resumed.keys()
    for key, state in kept.items():
        assert torch.equal(state['momentum_buffer'], resumed[key]['momentum_buffer'])
    if ema:
        averages = [
            r._hooks[[type(h).__name__ for h in r._hooks].index('EMAHook')] for r in (whole, second)
        ]
        assert_equal_states(averages[0].ema_model.state_dict(), averages[1].ema_model.state_dict())


def test_momentum_of_the_conv_survives_an_update(tmp_path):
    class Before(Hook):
        priority = 'VERY_HIGH'

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 2:
                state = runner.optim_wrapper.optimizer.state
                self.state = {
                    n: (p, state[p]['momentum_buffer'], state[p]['momentum_buffer'].clone())
                    for n, p in runner.model.named_parameters()
                }

    class After(Hook):
        priority = 'LOWEST'

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 2:
                self.optimizer = runner.optim_wrapper.optimizer
                self.state = dict(self.optimizer.state)
                self.now = {id(p): s['momentum_buffer'].clone() for p, s in self.state.items()}

    run = resnet_runner(tmp_path, hook=HOOK, iters=4)
    before, after = Before(), After()
    run.register_hook(before, before.priority)
    run.register_hook(after, after.priority)
    run.train()
    (path,) = blocks_of(run.model)
    parameter = before.state[f'{path}.weight'][0]
    assert blocks_of(run.model)[path].origin.weight is parameter
    for parameter, buffer, value in before.state.values():
        assert after.state[parameter]['momentum_buffer'] is buffer
        assert torch.equal(after.now[id(parameter)], value)


def test_ends_when_told(tmp_path):
    run = resnet_runner(tmp_path, hook={**HOOK, 'end': 6}, iters=12)
    run.train()
    assert updates(tmp_path / 'epoch_1.pth') == [3, 6]


@pytest.mark.parametrize('structure', ['dbb', 'repvgg', 'file', 'checkpoint'])
def test_static_structure(tmp_path, structure):
    import json

    fixed = {'backbone.layer1.0.conv1': ['kxk', '1x1', 'identity']}
    if structure == 'file':
        (tmp_path / 's.json').write_text(json.dumps(fixed))
        start = str(tmp_path / 's.json')
    elif structure == 'checkpoint':
        torch.save(
            {'meta': {'dyrep_mm': {'structure': fixed}}, 'state_dict': {}}, tmp_path / 's.pth'
        )
        start = str(tmp_path / 's.pth')
    else:
        start = structure
    hook = {'interval': None, 'structure': start, 'calibration_batches': 1}
    run = resnet_runner(tmp_path / 'run', hook=hook, iters=3)
    run.train()
    made = dyrep_mm.structure_of(run.model)
    if structure in ('file', 'checkpoint'):
        assert made == fixed
    else:
        assert len(made) == 16  # every 3x3 conv of a ResNet-18 but the stem's 7x7
    check_optimizer(run.optim_wrapper.optimizer, run.model)


def test_gradient_accumulation_scores_complete_gradients(tmp_path):
    wrapper = {
        'type': 'OptimWrapper',
        'accumulative_counts': 2,
        'optimizer': {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9},
        'clip_grad': {'max_norm': 1.0},
    }
    hook = {**HOOK, 'interval': 5}
    run = resnet_runner(tmp_path, custom_hooks=[hook], iters=9, optim_wrapper=wrapper)
    counts = []
    hook = dyrep(run)
    update = hook.update

    def spy(run):
        counts.append((run.iter + 1, hook.rule.score.counts.unique().tolist()))
        return update(run)

    hook.update = spy
    run.train()
    # Due after iteration 5, in the middle of a window: the update waits for the step at 6.
    assert counts == [(6, [3.0])]


def test_frozen_stages_never_grow_and_norm_eval_holds(tmp_path):
    backbone = {
        'type': 'mmdet.ResNet',
        'depth': 18,
        'stem_channels': 8,
        'base_channels': 8,
        'frozen_stages': 2,
        'norm_eval': True,
        'out_indices': (3,),
    }

    cfg = resnet_config(tmp_path, hook={**HOOK, 'interval': 1, 'metric': 'snip'}, iters=8)
    cfg.model.backbone = backbone
    from mmengine.runner import Runner

    run = Runner.from_cfg(cfg)
    run.train()
    paths = list(blocks_of(run.model))
    assert paths
    assert not [
        p for p in paths if p.startswith(('backbone.conv1', 'backbone.layer1', 'backbone.layer2'))
    ]
    for block in blocks_of(run.model).values():
        assert block.is_linear
        assert all(p.requires_grad for p in block.parameters())


def test_test_uses_the_structure(tmp_path):
    run = resnet_runner(tmp_path, hook=HOOK, iters=8)
    run.train()
    again = resnet_runner(
        tmp_path / 'again', hook=HOOK, iters=8, load_from=str(tmp_path / 'epoch_1.pth')
    )
    again.load_or_resume()
    assert dyrep_mm.structure_of(again.model) == dyrep_mm.structure_of(run.model)
    assert_equal_states(state_of(again), state_of(run))


@pytest.mark.parametrize(
    ('options', 'word'),
    [
        ({'interval': 0}, 'interval'),
        ({'interval': 2.5}, 'interval'),
        ({'metric': 'magic'}, 'magic'),
        ({'branches': ['3x3']}, '3x3'),
        ({'branches': '1x1'}, 'list'),
        ({'grow_per_update': -1}, 'grow_per_update'),
        ({'calibration_batches': -1}, 'calibration_batches'),
        ({'max_depth': 0}, 'max_depth'),
        ({'init_scale': float('nan')}, 'init_scale'),
        ({'prune_threshold': -0.1}, 'prune_threshold'),
        ({'end': -1}, 'end'),
        ({'max_cost': 1}, 'above 1'),
        *(({'preset': value}, "preset must be 'paper'") for value in ('Paper', 'official', 5, [])),
        ({'compensate': False}, 'set structure'),
        *(({name: NAN}, name) for name in OPTIONS),
        *(({name: object()}, name) for name in OPTIONS),
        *(({name: ()}, name) for name in OPTIONS),
        *(({name: value}, name) for name in FLAGS for value in ('no', 'False', 0, 1, [])),
        *(({name: value}, name) for name in COUNTS for value in (True, '3', 1e3, INF, [1])),
        *(({name: value}, name) for name in NUMBERS for value in (True, '3', INF, -INF, [1.0])),
        *(
            ({'scope': value}, 'scope')
            for value in (5, True, [], [5], ['backbone', None], {'a': 1})
        ),
        *(({'structure': value}, 'structure') for value in (5, True, [], ['dbb'], '', b'dbb')),
        ({'structure': {'backbone.conv1': 'kxk'}}, 'structure'),
        ({'structure': {'backbone.conv1': ['kxk', 'nonsense']}}, 'nonsense'),
        *(({'branches': value}, 'branches') for value in ([], ['kxk'], ['kxk', 'kxk'], 1.5, [5])),
        *(({'branches': value}, 'branches') for value in (0, -1, True, 'most')),
        *(({'metric': value}, 'metric') for value in (None, 5, ['snip'], {'snip': 1}, '')),
        ({'by_epoch': 'iteration'}, 'by_epoch'),
    ],
)
def test_options_without_meaning(options, word):
    with pytest.raises(DyRepError, match=word) as error:
        DyRepHook(**options)
    assert '\n' not in str(error.value)


PAPER = {
    'metric': 'synflow',
    'grow_per_update': 1,
    'branches': ['kxk', '1x1', '1x1-kxk', '1x1-avg', '1xk', 'kx1', 'identity'],
    'init_scale': 0.01,
    'calibration_batches': 20,
    'prune_threshold': 0.02,
    'prune_relative': False,
    'prune_below': None,
    'max_cost': None,
    'max_depth': 2,
}


def test_the_preset_is_the_paper():
    assert {name: getattr(DyRepHook(preset='paper'), name) for name in PAPER} == PAPER


@pytest.mark.parametrize(
    ('args', 'options'),
    [
        ((), {'metric': 'snip', 'branches': ['1x1'], 'prune_threshold': 0.5, 'max_depth': 1}),
        ((), {'metric': 'snip', 'prune_below': 0.1, 'max_cost': 1.2}),
        ((3, True, 9, 'backbone', 'random'), {'init_scale': 1.0}),
    ],
)
def test_options_beside_the_preset_override_it(args, options):
    hook = DyRepHook(*args, **options, preset='paper')
    expected = PAPER | ({'metric': 'random'} if args else {}) | options
    assert {name: getattr(hook, name) for name in PAPER} == expected
    assert hook.schedule.interval == (args[0] if args else ...)


def test_the_preset_leaves_pruning_off():
    assert DyRepHook(preset='paper', prune=False).prune_threshold is None


def test_a_config_sees_the_options_of_the_hook():
    assert 'preset' in inspect.signature(DyRepHook).parameters
    with pytest.raises(TypeError, match='intervall'):
        DyRepHook(preset='paper', intervall=3)


def test_the_name_of_an_option_without_a_class(tmp_path):
    with pytest.raises(TypeError, match='intervall'):
        runner(tmp_path, [{'type': 'dyrep_mm.DyRepHook', 'intervall': 1}])


def test_a_structure_of_the_wrong_type_is_told_the_names():
    with pytest.raises(DyRepError, match='dbb, dbb7, repvgg'):
        DyRepHook(structure=5)


@pytest.mark.parametrize(
    'options',
    [
        {'scope': None},
        {'scope': ('backbone', 'head')},
        {'branches': ('1x1',)},
        {'structure': Path('structure.json')},
        {'seed': -1},
        {'init_scale': 0},
        {'prune_threshold': 1},
        {'prune_relative': True, 'prune_threshold': 0.5, 'prune_below': 0.1},
        {'calibration_batches': 0, 'grow_per_update': 0, 'end': 0},
        {'interval': None, 'by_epoch': None},
    ],
)
def test_options_with_a_meaning(options):
    DyRepHook(**options)


def test_scope_none_is_everywhere(tmp_path):
    run = runner(tmp_path, [{**PRUNING, 'scope': None}], iters=5)
    run.train()
    assert blocks_of(run.model)
    assert dyrep(run).journal[0].scores.keys() == {
        f'backbone.{name}' for name in ('conv1', 'conv2', 'conv3', 'dw')
    }


# One hook


@pytest.mark.parametrize('where', ['twice', 'beside the base'])
@pytest.mark.parametrize('scopes', [('backbone', 'backbone'), ('backbone.conv1', 'backbone.conv2')])
def test_two_hooks_are_refused(tmp_path, where, scopes):
    first, second = ({**PRUNING, 'scope': scope} for scope in scopes)
    if where == 'twice':
        run = runner(tmp_path, [first, second], iters=5)
    else:
        run = runner(tmp_path, [second], iters=5, default_hooks={'dyrep': first})
    with pytest.raises(DyRepError, match=r'default_hooks\.dyrep') as error:
        run.train()
    assert '\n' not in str(error.value)
    assert not list(tmp_path.glob('*.pth'))


def test_scope_bounds_pruning(tmp_path):
    """Blocks elsewhere, as a structure or a checkpoint brings them, stay as they are."""
    names = ['kxk', '1x1', '1xk', 'kx1']
    start = {f'backbone.{conv}': names for conv in ('conv1', 'conv2')}
    hook = {**PRUNING, 'scope': 'backbone.conv2', 'structure': start, 'grow_per_update': 0}
    run = runner(tmp_path, [hook], iters=7)
    run.train()
    pruned = [path for entry in dyrep(run).journal for path in entry.pruned]
    assert set(pruned) == {'backbone.conv2'}
    assert dyrep_mm.structure_of(run.model)['backbone.conv1'] == names


def test_blocks_outside_of_the_scope_can_not_change(tmp_path):
    start = {'backbone.conv1': ['kxk', '1x1', '1xk']}
    hook = {**PRUNING, 'scope': 'head', 'structure': start}
    with pytest.raises(DyRepError, match="no conv in scope 'head' can grow"):
        runner(tmp_path, [hook], iters=7).train()


@pytest.mark.parametrize(
    ('hook', 'word'),
    [
        ({'interval': 3, 'scope': 'backbones'}, 'backbones'),
        ({'interval': 8}, 'never reached'),
        ({'interval': 1, 'by_epoch': True}, 'by_epoch'),
        ({'interval': 3, 'scope': 'head'}, 'can grow'),
        (
            {'interval': 3, 'scope': 'backbone.conv1', 'branches': ['identity']},
            'none of identity fits it',
        ),
        ({'interval': None, 'structure': 'nonsense.json'}, 'nonsense.json'),
        ({'interval': None, 'structure': 'nonsense.pth'}, 'nonsense.pth'),
        ({'interval': None, 'structure': {'backbone.layer9': ['kxk', '1x1']}}, 'layer9'),
        ({'interval': None, 'structure': {'backbone.conv1': ['kxk', 'identity']}}, 'identity'),
    ],
)
def test_what_a_run_refuses(tmp_path, hook, word):
    run = resnet_runner(tmp_path, hook=hook, iters=8)
    with pytest.raises(DyRepError, match=word):
        run.train()
    assert not list(tmp_path.glob('*.pth'))


def test_loss_that_is_not_finite_ends_the_run_if_told_to(tmp_path):
    settings = {
        'batch_size': 4,
        'num_workers': 0,
        'collate_fn': {'type': 'pseudo_collate'},
        'dataset': {'type': 'Images', 'size': 32, 'packed': True, 'poison': 5},
        'sampler': {'type': 'DefaultSampler', 'shuffle': False},
    }
    hook = {**HOOK, 'stop_on_invalid_loss': True}
    run = resnet_runner(tmp_path, hook=hook, epochs=5, train_dataloader=settings)
    with pytest.raises(DyRepError, match='loss is nan at iteration 2'):
        run.train()
    assert not list(tmp_path.glob('*.pth'))


def test_checkpoint_of_another_model(tmp_path):
    torch.save({'meta': {}, 'state_dict': {'a': torch.zeros(1)}}, tmp_path / 'other.pth')
    run = resnet_runner(tmp_path, hook=HOOK, iters=8, load_from=str(tmp_path / 'other.pth'))
    with pytest.raises(DyRepError, match='another model'):
        run.train()


def test_damaged_structure_record(tmp_path):
    run = resnet_runner(tmp_path, hook=HOOK, iters=8)
    run.train()
    good = load_checkpoint(tmp_path / 'epoch_1.pth')
    for damage, word in (
        ({'backbone.layer7': ['kxk', '1x1']}, 'layer7'),
        ({'backbone.conv1': 'kxk'}, 'lists'),
        ([], 'maps paths'),
        ({'backbone.conv1': ['kxk', 'nonsense']}, 'nonsense'),
    ):
        bad = copy.deepcopy(good)
        bad['meta']['dyrep_mm']['structure'] = damage
        torch.save(bad, tmp_path / 'bad.pth')
        run = resnet_runner(tmp_path / 'x', hook=HOOK, iters=8, load_from=str(tmp_path / 'bad.pth'))
        with pytest.raises(DyRepError, match=word):
            run.train()


def test_one_line_in_any_scope():
    """The dotted type is found from every library's registry, without custom imports."""
    from mmengine.registry import HOOKS as ROOT
    from mmengine.registry import DefaultScope

    for scope in ('mmdet', 'mmseg', 'mmpretrain', 'mmengine'):
        with DefaultScope.overwrite_default_scope(scope):
            assert isinstance(ROOT.build({'type': 'dyrep_mm.DyRepHook', 'interval': 1}), DyRepHook)


@pytest.mark.parametrize('recompute', [False, True])
def test_the_hook_says_whether_to_recompute(tmp_path, recompute):
    hook = {'interval': 2, 'calibration_batches': 1, 'recompute': recompute}
    run = resnet_runner(tmp_path, hook=hook, iters=5)
    run.train()
    blocks = blocks_of(run.model).values()
    assert blocks
    assert all(block.recompute is recompute for block in blocks)


def test_activation_checkpointing_of_mmengine_goes_on_working(tmp_path):
    """It wraps the forward of modules above the blocks, also of those that grow later."""
    from mmengine.runner import Runner

    hook = {'interval': 2, 'calibration_batches': 1, 'metric': 'snip'}
    cfg = resnet_config(tmp_path, hook=hook, iters=6)
    cfg.activation_checkpointing = ['backbone.layer1', 'backbone.layer4']
    run = Runner.from_cfg(cfg)
    run.train()
    assert len(blocks_of(run.model)) == 2
    for parameter in run.model.parameters():
        assert parameter.isfinite().all()


# A start that does not compensate


def test_convs_may_keep_their_kernels_at_the_start(tmp_path):
    """Of the model and of its average; the branches are the same either way."""
    start = {
        'backbone.conv2': ['kxk', '1x1', '1x1-kxk', 'identity'],
        INNER: ['kxk', '1x1', '1x1-avg'],
    }

    def started(name, **options):
        hook = {**HOOK, 'interval': None, 'structure': start, 'init_scale': 1.0, **options}
        run = runner(tmp_path / name, [hook, {'type': 'EMAHook'}], iters=1)
        seen = {}

        def look(run):
            averaged = next(h for h in run.hooks if hasattr(h, 'ema_model')).ema_model.module
            seen.update(model=state_of(run), average=dict(averaged.state_dict()))
            seen['average'] = {k: v.clone() for k, v in seen['average'].items()}

        call_at(run, look, 'before_train')
        run.train()
        return seen

    plain = started('plain', structure=None)['model']
    kept, taken = started('kept', compensate=False), started('taken')
    assert_equal_states(kept['model'], kept['average'])
    assert kept['model'].keys() == taken['model'].keys()
    origins = {
        'backbone.conv2.branches.kxk.weight': 'backbone.conv2.weight',
        f'{INNER}.branches.kxk.weight': None,
    }
    for name, value in kept['model'].items():
        if name not in origins:
            assert torch.equal(value, taken['model'][name])
            continue
        assert (value - taken['model'][name]).abs().max() > 1e-2
        if origins[name]:
            torch.testing.assert_close(value, plain[origins[name]], rtol=0, atol=1e-6)
