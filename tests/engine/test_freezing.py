"""What the user keeps out of training, freezes and frees: with blocks it is as without them."""

from __future__ import annotations

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS

from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.optimizer import check_optimizer
from dyrep_mm.surgery.structure import structure_of
from dyrep_mm.surgery.tree import blocks_of
from support.checks import assert_same_run
from support.runs import FAST, PRUNING, TinyClassifier, call_at, dyrep, runner

LEFT_OUT = ('backbone.conv1.', 'backbone.bn1.')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class WithoutTheFirst:
    """An optimizer of all parameters but those of :data:`LEFT_OUT`, frozen or not."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        self.options = {k: v for k, v in optim_wrapper_cfg['optimizer'].items() if k != 'type'}

    def __call__(self, model):
        held = [p for n, p in model.named_parameters() if not n.startswith(LEFT_OUT)]
        return OptimWrapper(torch.optim.SGD(held, **self.options))


@MODELS.register_module(force=True)
class FrozenClassifier(TinyClassifier):
    """The backbone is frozen by the constructor.

    Args:
        frozen: Whether it is.
    """

    def __init__(self, frozen: bool = True):
        super().__init__()
        self.backbone.requires_grad_(not frozen)


@HOOKS.register_module(force=True)
class Freeing(Hook):
    """Frees the backbone before an iteration; as hooks do, some time after ours.

    Args:
        at: The iteration.
        remembered: Free the parameters that the backbone had at the start; all by default.
        once: Only at that iteration, not after a later resume.
    """

    priority = 'LOW'

    def __init__(self, at: int = 4, remembered: bool = False, once: bool = False):
        self.at, self.remembered, self.once = at, remembered, once

    def before_run(self, runner):
        self.held = list(runner.model.backbone.parameters())

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at or (runner.iter > self.at and not self.once):
            backbone = runner.model.backbone
            for parameter in self.held if self.remembered else backbone.parameters():
                parameter.requires_grad = True


FROZEN = {'type': 'FrozenClassifier'}


def moved(before, model):
    return {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize('momentum', [0.0, 0.9])
@pytest.mark.parametrize(
    'hook',
    [
        {**FAST, 'scope': 'backbone.conv2'},
        {**PRUNING, 'metric': 'snip'},  # conv1, whose gradient nobody sets to zero, is in scope
        {**FAST, 'interval': None, 'structure': 'dbb'},
        {**FAST, 'interval': None, 'structure': {'backbone.conv1': ['kxk', '1x1']}},
    ],
    ids=['scope', 'pruning', 'all-blocks', 'only-block'],
)
def test_what_the_optimizer_leaves_out_stays(tmp_path, hook, momentum):
    settings = {
        'iters': 9,
        'optim_wrapper': {
            'constructor': 'WithoutTheFirst',
            'optimizer': {'type': 'SGD', 'lr': 0.05, 'momentum': momentum},
        },
    }
    run = runner(tmp_path / 'a', [hook], **settings)
    start = {}
    # A structure to start from takes the branches' kernels out of the conv.
    call_at(run, lambda run: start.update(values(run.model)), 'before_train', 'LOWEST')
    call_at(run, lambda run: check_optimizer(run.optim_wrapper.optimizer, run.model))
    run.train()
    assert structure_of(run.model)
    still = {n for n in start if n.startswith(LEFT_OUT)}
    assert len(still) >= 3
    assert moved(start, run.model) & still == set()
    if hook['interval']:
        assert 'backbone.conv1' not in structure_of(run.model)
        grown = [path for entry in dyrep(run).journal for path in entry.grown]
        assert len(grown) >= 2
    again = runner(
        tmp_path / 'b',
        [hook],
        **settings,
        load_from=str(tmp_path / 'a' / 'iter_5.pth'),
        resume=True,
    )
    again.train()
    assert_same_run(run, again)


@pytest.mark.parametrize('remembered', [False, True], ids=['all', 'remembered'])
@pytest.mark.parametrize('interval', [None, 3])
def test_branches_train_once_the_conv_is_freed(tmp_path, interval, remembered):
    """Finding 1 of the review: a structure on a frozen backbone that a hook frees."""
    structure = {'backbone.conv2': ['kxk', '1x1', '1x1-kxk'], 'backbone.dw': ['kxk', 'identity']}
    hook = {**FAST, 'interval': interval, 'structure': structure}
    run = runner(
        tmp_path, [hook, {'type': 'Freeing', 'remembered': remembered}], iters=8, model=FROZEN
    )
    history = []
    call_at(run, lambda run: history.append(values(run.model)))
    call_at(run, lambda run: check_optimizer(run.optim_wrapper.optimizer, run.model))
    run.train()
    names = [n for n in history[0] if '.branches.' in n and '.kxk.' not in n]
    assert len(names) == 11
    for name in names:
        assert all(torch.equal(now[name], history[0][name]) for now in history[:4]), name
        # The BN behind the block takes a shift away: its gradient is rounding.
        assert name.endswith('bn.bias') or not torch.equal(history[4][name], history[3][name]), name
    trained = {p for group in run.optim_wrapper.optimizer.param_groups for p in group['params']}
    assert {p for p in run.model.parameters() if p.requires_grad} == trained


@pytest.mark.parametrize(
    ('model', 'freeing', 'again'),
    [
        (FROZEN, {'at': 1}, FROZEN),  # case a
        (FROZEN, {'at': 1, 'once': True}, FROZEN),  # the resumed run never frees it
        ({'type': 'TinyClassifier'}, None, FROZEN),  # case b
        (FROZEN, {'at': 1}, {'type': 'TinyClassifier'}),
    ],
    ids=['frozen-freed', 'frozen-stays', 'trainable-frozen', 'frozen-trainable'],
)
@pytest.mark.parametrize('kind', ['SGD', 'AdamW'])
def test_resume_where_other_parameters_are_frozen(tmp_path, kind, model, freeing, again):
    """Finding 2 of the review: the layout of the optimizer follows from the structure alone."""
    optimizer = {'type': kind, 'lr': 0.01, **({'momentum': 0.9} if kind == 'SGD' else {})}
    hooks = [{**FAST, 'interval': 2}]
    if freeing:
        hooks.append({'type': 'Freeing', **freeing})
    settings = {'iters': 9, 'optim_wrapper': {'optimizer': optimizer}}
    run = runner(tmp_path / 'a', hooks, **settings, model=model)
    states = {}

    def note(run):
        if run.iter == 4:
            states.update(state_by_name(run))

    call_at(run, note)
    run.train()
    file = str(tmp_path / 'a' / 'iter_5.pth')
    resumed = runner(tmp_path / 'b', hooks, **settings, model=again, load_from=file, resume=True)
    loaded = {}
    call_at(resumed, lambda run: loaded.update(state_by_name(run)), 'before_train', 'LOWEST')
    resumed.train()
    assert len(states) > 20
    assert loaded.keys() == states.keys()
    for key, value in states.items():
        assert torch.equal(loaded[key], value), key
    if freeing and not freeing.get('once'):
        assert_same_run(run, resumed)


def state_by_name(run):
    state = run.optim_wrapper.optimizer.state
    return {
        (name, key): value.clone()
        for name, p in run.model.named_parameters()
        for key, value in state.get(p, {}).items()
        if torch.is_tensor(value)
    }


@pytest.mark.parametrize('remembered', [False, True], ids=['all', 'remembered'])
@pytest.mark.parametrize('metric', ['snip', 'random', 'synflow', 'vote'])
def test_a_backbone_that_is_freed_later_grows(tmp_path, metric, remembered):
    hooks = [{**FAST, 'metric': metric}, {'type': 'Freeing', 'remembered': remembered}]
    run = runner(tmp_path, hooks, iters=11, model=FROZEN)
    call_at(run, lambda run: check_optimizer(run.optim_wrapper.optimizer, run.model))
    run.train()
    journal = {entry.at: list(entry.grown) for entry in dyrep(run).journal}
    assert not journal[2]
    assert not journal[4]
    assert journal[8]
    assert journal[10]
    assert all(p.requires_grad for p in run.model.parameters())


def test_a_backbone_that_is_freed_later_resumes(tmp_path):
    hooks = [{**FAST, 'metric': 'snip'}, {'type': 'Freeing'}]
    run = runner(tmp_path / 'whole', hooks, iters=11, model=FROZEN)
    run.train()
    for at in (3, 5, 7, 9):
        again = runner(
            tmp_path / f'from{at}', hooks, iters=11, model=FROZEN,
            load_from=str(tmp_path / 'whole' / f'iter_{at}.pth'), resume=True,
        )  # fmt: skip
        again.train()
        assert_same_run(run, again)


def test_only_lasting_obstacles_are_refused(tmp_path):
    """`frozen` may pass, `none of identity fits it` does not."""
    hook = {**FAST, 'branches': ['identity'], 'scope': ['backbone.conv1', 'backbone.conv3']}
    run = runner(tmp_path, [hook], iters=4, model=FROZEN)
    with pytest.raises(DyRepError, match=r'no conv in scope .* none of identity fits it'):
        run.train()
    run = runner(tmp_path, [{**hook, 'scope': 'backbone'}], iters=4, model=FROZEN)
    run.train()
    assert not blocks_of(run.model)
