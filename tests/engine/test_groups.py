"""Groups, options and schedules of parameters that come and go, against a model that had its
final shape from the start."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from mmengine.optim import scheduler
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.registry import MODELS

from dyrep_mm.engine.runner import unwrap
from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.optimizer import check_optimizer
from dyrep_mm.surgery.rewire import restore
from dyrep_mm.surgery.structure import structure_of
from support.checks import assert_same_run
from support.runs import FAST, PRUNING, TinyClassifier, call_at, dyrep, runner

#: Grows, nests, prunes, and prunes a conv without bias back to a plain one, which gains a bias.
SCRIPT = [
    {'grow': ['backbone.conv2', 'backbone.conv1']},
    {'grow': ['backbone.conv2.branches.1x1-kxk.conv', 'backbone.dw', 'backbone.conv3']},
    {'grow': ['backbone.conv2.branches.kxk'], 'prune': {'backbone.conv2': ['1xk', '1x1']}},
    {'prune': {'backbone.conv1': ['1x1', '1x1-kxk', '1x1-avg', '1xk', 'kx1']}},
]
UPDATES, ITERS = 4, 10  # an update after each of the first iterations


def scripted(script: list[dict] = SCRIPT) -> dict:
    """Settings of a hook that follows a script."""
    hook = {**FAST, 'type': 'ScriptedDyRepHook', 'script': script}
    return {**hook, 'interval': 1, 'calibration_batches': 1, 'end': len(script)}


def options_of(run) -> dict[str, dict]:
    """All options of the group of every parameter, by name."""
    optimizer, names = run.optim_wrapper.optimizer, {}
    for name, parameter in unwrap(run.model).named_parameters():
        (group,) = (g for g in optimizer.param_groups if any(p is parameter for p in g['params']))
        names[name] = {k: v for k, v in group.items() if not k.startswith('param')}
    return names


def histories(tmp_path: Path, hook: dict | None = None, **settings):
    """Options by parameter after every iteration: of a run with the hook, and of a run without
    it whose model is built in the final shape."""
    hook = hook or scripted()
    evolved = runner(tmp_path / 'evolved', [hook], iters=ITERS, every=100, **settings)
    model = settings.pop('model', {'type': 'TinyClassifier'})
    history, expected = [], []
    call_at(evolved, lambda run: history.append(options_of(run)))
    call_at(evolved, lambda run: check_optimizer(run.optim_wrapper.optimizer, run.model))
    evolved.train()
    final = MODELS.build(model)
    restore(final, structure_of(evolved.model))
    oracle = runner(tmp_path / 'oracle', iters=ITERS, every=100, model=final, **settings)
    call_at(oracle, lambda run: expected.append(options_of(run)))
    oracle.train()
    assert len(history) == len(expected) == ITERS
    return history, expected


def assert_as_expected(history: list[dict], expected: list[dict], since: int = UPDATES) -> None:
    assert history[-1].keys() == expected[-1].keys()
    for now, then in zip(history[since:], expected[since:], strict=True):
        for name, options in now.items():
            assert options == then[name], name
    # Before, for those that exist already.
    for now, then in zip(history[:since], expected[:since], strict=True):
        for name in now.keys() & then.keys():
            assert now[name] == then[name], name


#: Options of every scheduler; at its end each has changed what it schedules.
SCHEDULERS = {
    'Constant': {'factor': 0.5, 'end': 7},
    'CosineAnnealing': {'T_max': ITERS, 'eta_min': 1e-4},
    'Exponential': {'gamma': 0.9},
    'Linear': {'start_factor': 0.1, 'end': 8},
    'MultiStep': {'milestones': [3, 7], 'gamma': 0.3},
    'Step': {'step_size': 3, 'gamma': 0.5},
    'Poly': {'power': 0.9, 'eta_min': 1e-4, 'end': ITERS},
    'OneCycle': {'eta_max': 0.1, 'total_steps': ITERS},
    'CosineRestart': {'periods': [5, 5], 'restart_weights': [1, 0.5], 'eta_min': 1e-4},
    # No loss is greater by that much: it reduces after every validation.
    'ReduceOnPlateau': {
        'monitor': 'loss', 'rule': 'greater', 'threshold': 1e9, 'threshold_rule': 'abs',
        'patience': 0, 'factor': 0.5,
    },
}  # fmt: skip
TYPES = {
    name: [name + kind for kind in ('LR', 'Momentum') if name + kind != 'OneCycleMomentum']
    for name in SCHEDULERS
}
#: Gives almost every kind of parameter options of its own.
PARAMWISE = {
    'norm_decay_mult': 0.0,
    'bias_lr_mult': 2.0,
    'bias_decay_mult': 0.5,
    'dwconv_decay_mult': 0.1,
}
SGD = {'type': 'SGD', 'lr': 0.02, 'momentum': 0.9, 'weight_decay': 1e-3}
ADAM = {'type': 'AdamW', 'lr': 1e-3, 'weight_decay': 0.05}


def test_every_scheduler_is_here():
    classes = {
        name
        for name, cls in vars(scheduler).items()
        if inspect.isclass(cls) and issubclass(cls, _ParamScheduler)
    }
    assert {kind for kinds in TYPES.values() for kind in kinds} == {
        name for name in classes if not name.endswith('ParamScheduler')
    }


@pytest.mark.parametrize('groups', ['one', 'many'])
@pytest.mark.parametrize('name', SCHEDULERS)
def test_new_parameters_follow_the_schedule(tmp_path, name, groups):
    # Momentum schedulers write `betas` of an optimizer that has them.
    optimizer = ADAM if groups == 'many' else SGD
    settings = {
        'optim_wrapper': {
            'optimizer': optimizer,
            **({'paramwise_cfg': PARAMWISE} if groups == 'many' else {}),
        },
        'param_scheduler': [
            {'type': kind, 'by_epoch': name == 'ReduceOnPlateau', **SCHEDULERS[name]}
            for kind in TYPES[name]
        ],
    }
    if name == 'ReduceOnPlateau':
        settings['val'] = 2
    history, expected = histories(tmp_path, **settings)
    assert_as_expected(history, expected)
    keys = ['lr', 'betas' if optimizer is ADAM else 'momentum'][: len(TYPES[name])]
    for parameter in ('backbone.conv2.branches.kx1.conv.weight', 'backbone.conv1.bias'):
        for key in keys:
            # Since the last update it has been scheduled.
            values = {str(now[parameter][key]) for now in history[UPDATES - 1 :]}
            assert len(values) > 1, (parameter, key)
    lrs = {options['lr'] for options in history[UPDATES].values()}
    # One cycle sets every group to the same.
    assert len(lrs) == (2 if groups == 'many' and name != 'OneCycle' else 1)


def test_schedulers_in_a_row(tmp_path):
    """Warm-up, then cosine, with a momentum schedule beside them; the warm-up ends between
    two updates."""
    schedule = [
        {'type': 'LinearLR', 'start_factor': 0.1, 'by_epoch': False, 'end': 3},
        {'type': 'CosineAnnealingLR', 'by_epoch': False, 'begin': 3, 'T_max': ITERS - 3},
        {'type': 'CosineAnnealingMomentum', 'by_epoch': False, 'T_max': ITERS, 'eta_min': 0.5},
    ]
    wrapper = {'optimizer': SGD, 'paramwise_cfg': PARAMWISE}
    history, expected = histories(tmp_path, optim_wrapper=wrapper, param_scheduler=schedule)
    assert_as_expected(history, expected)
    assert len({now['head.weight']['lr'] for now in history}) >= ITERS - 2


def test_scaled_lr(tmp_path):
    """Automatic scaling changes the lr of the groups after the constructor."""
    history, expected = histories(
        tmp_path,
        optim_wrapper={'optimizer': SGD, 'paramwise_cfg': PARAMWISE},
        auto_scale_lr={'enable': True, 'base_batch_size': 16},
    )
    assert_as_expected(history, expected)
    assert history[-1]['backbone.conv2.branches.kx1.conv.weight']['lr'] == SGD['lr'] / 4


def wrapper(**paramwise) -> dict:
    return {'optimizer': SGD, 'paramwise_cfg': paramwise}


LAYERWISE = {'optimizer': ADAM, 'paramwise_cfg': {'layer_decay_rate': 0.7}}
LAYERWISE['constructor'] = 'mmpretrain.LearningRateDecayOptimWrapperConstructor'


@pytest.mark.parametrize(
    'optim_wrapper',
    [
        wrapper(norm_decay_mult=0.0),
        wrapper(bias_lr_mult=2.0, bias_decay_mult=0.0),
        wrapper(dwconv_decay_mult=0.0),
        wrapper(flat_decay_mult=0.0),
        wrapper(**PARAMWISE),
        wrapper(custom_keys={'backbone': {'lr_mult': 0.1}}),
        wrapper(custom_keys={'bn': {'decay_mult': 0.0}}),
        wrapper(custom_keys={'conv2': {'lr_mult': 0.1, 'momentum': 0.5}}, norm_decay_mult=0.0),
        wrapper(custom_keys={'backbone.bn2': {'lr_mult': 0.1}, 'dw': {'decay_mult': 0.0}}),
        LAYERWISE,
    ],
    ids=['norm', 'bias', 'dwconv', 'flat', 'all', 'stage', 'bn', 'conv', 'exact', 'layerwise'],
)
def test_new_parameters_have_what_the_config_gives_them(tmp_path, optim_wrapper):
    history, expected = histories(tmp_path, optim_wrapper=optim_wrapper)
    assert_as_expected(history, expected)
    assert len({str(options) for options in history[-1].values()}) > 1


@pytest.mark.parametrize('at', [2, 3, 6])
def test_layout_on_resume(tmp_path, at):
    """Torch restores state by position: the groups that a resume builds at once, from the
    structure, are those that grew one by one."""
    settings = {
        'optim_wrapper': wrapper(custom_keys={'conv2': {'lr_mult': 0.1}}, norm_decay_mult=0.0),
        'param_scheduler': {'type': 'CosineAnnealingLR', 'by_epoch': False, 'T_max': ITERS},
        'iters': ITERS,
    }
    whole = runner(tmp_path, [scripted()], **settings)
    whole.train()
    assert structure_of(whole.model)['backbone.conv1'] == []
    hook = scripted(SCRIPT[at:])
    file = str(tmp_path / f'iter_{at}.pth')
    again = runner(
        tmp_path / 'again', [{**hook, 'end': len(SCRIPT)}], **settings, load_from=file, resume=True
    )
    again.train()
    assert_same_run(whole, again)


def test_layer_decay_of_mmdet(tmp_path):
    """One group for each layer, which names its parameters."""
    from mmpretrain.models.backbones import ConvNeXt

    class LastOfConvNeXt(ConvNeXt):
        def forward(self, x):
            return super().forward(x)[-1]

    @MODELS.register_module(force=True)
    class TinyConvNeXt(TinyClassifier):
        def __init__(self):
            super().__init__(width=4)
            arch = {'depths': [1, 1, 1, 1], 'channels': [4, 4, 8, 8]}
            self.backbone = LastOfConvNeXt(arch, stem_patch_size=2, gap_before_final_norm=False)

    paths = [f'backbone.stages.{i}.0.depthwise_conv' for i in range(4)]
    steps = paths[:2], [paths[3], f'{paths[0]}.branches.kxk'], paths[2:3]
    script = [{'grow': step} for step in steps]
    constructor = 'mmdet.LearningRateDecayOptimizerConstructor'
    optim_wrapper = {
        'optimizer': ADAM,
        'constructor': constructor,
        'paramwise_cfg': {'decay_rate': 0.7, 'decay_type': 'layer_wise', 'num_layers': 6},
    }
    history, expected = histories(
        tmp_path,
        hook=scripted(script),
        model={'type': 'TinyConvNeXt'},
        optim_wrapper=optim_wrapper,
        size=32,
    )
    assert_as_expected(history, expected, since=3)


def test_names_beside_parameters_follow(tmp_path):
    """Torch keeps the names it was given and saves them."""
    run = runner(tmp_path, [scripted()], iters=ITERS)
    optimizer = run.build_optim_wrapper(run.optim_wrapper)
    optimizer.optimizer = torch.optim.SGD(run.model.named_parameters(), 0.01)
    run.optim_wrapper = optimizer
    run.train()
    (group,) = run.optim_wrapper.optimizer.param_groups
    assert group['param_names'] == [name for name, _ in run.model.named_parameters()]


OPTIMIZERS = [
    {'type': 'SGD', 'lr': 0.01, 'momentum': 0.9},
    {'type': 'SGD', 'lr': 0.01, 'momentum': 0.9, 'fused': True},
    {'type': 'SGD', 'lr': 0.01, 'momentum': 0.9, 'nesterov': True, 'foreach': True},
    {'type': 'Adam'},
    {'type': 'Adam', 'fused': True},
    {'type': 'Adam', 'amsgrad': True},
    {'type': 'AdamW', 'foreach': True},
    {'type': 'AdamW', 'fused': True},
    *({'type': name} for name in ('Adamax', 'NAdam', 'RAdam', 'RMSprop', 'Rprop', 'ASGD')),
    *({'type': name} for name in ('Adadelta', 'TorchAdafactor')),
]


@pytest.mark.parametrize('optimizer', OPTIMIZERS, ids=lambda o: '-'.join(map(str, o.values())))
def test_state_survives(tmp_path, optimizer):
    """Around every update, the state of what stays is the same tensors with the same values."""
    run = runner(
        tmp_path,
        [PRUNING],
        iters=9,
        every=100,
        optim_wrapper={'optimizer': {'lr': 1e-3, **optimizer}},
    )
    held, seen = {}, []

    def tensors(run):
        state = run.optim_wrapper.optimizer.state
        return {
            (p, key): value
            for p in run.model.parameters()
            for key, value in state.get(p, {}).items()
            if torch.is_tensor(value)
        }

    def before(run):
        held.clear()
        held.update({k: (value, value.clone()) for k, value in tensors(run).items()})

    def after(run):
        now, alive = tensors(run), set(run.model.parameters())
        kept = [(p, key) for p, key in held if p in alive]
        seen.append(len(held) - len(kept))
        assert kept
        for k in kept:
            assert now[k] is held[k][0]
            assert torch.equal(now[k], held[k][1])
        # Dead parameters have no state, and new ones no past.
        assert not any(now[k].any() for k in now.keys() - set(kept))

    call_at(run, before, 'after_train_iter', 'VERY_HIGH')
    call_at(run, after)
    run.train()
    assert len(dyrep(run).journal) == 4
    assert any(seen)  # something was pruned
    run.optim_wrapper.state_dict()


@pytest.mark.parametrize('kind', ['Adagrad', 'LBFGS'])
def test_optimizers_with_state_from_the_start_are_refused(tmp_path, kind):
    wrapper = {'optimizer': {'type': kind, 'lr': 0.01}}
    run = runner(tmp_path, [FAST], iters=4, optim_wrapper=wrapper)
    with pytest.raises(DyRepError, match=f'{kind}; use'):
        run.train()
