"""Averaged models under models that change shape."""

from __future__ import annotations

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.model import BaseAveragedModel, averaged_model

import dyrep_mm
from dyrep_mm import grow
from dyrep_mm.engine.runner import refresh_average
from dyrep_mm.engine.transaction import Transaction
from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block
from dyrep_mm.surgery.tree import blocks_of, depth_of
from support.checks import assert_equal_states
from support.nets import make_net
from support.runs import PRUNING, call_at, dyrep, runner, with_branches

AVERAGES = [
    {'type': 'ExponentialMovingAverage', 'momentum': 0.2},
    {'type': 'StochasticWeightAverage'},
    {'type': 'MomentumAnnealingEMA', 'momentum': 0.1, 'gamma': 10},
    {'type': 'ExponentialMovingAverage', 'momentum': 0.2, 'interval': 2},
    {'type': 'mmdet.ExpMomentumEMA', 'momentum': 0.1, 'gamma': 10},
]
ITERS = 9


def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.5


def averaged(run) -> BaseAveragedModel:
    (hook,) = (h for h in run.hooks if isinstance(h, EMAHook))
    return hook.ema_model


@torch.no_grad()
def function_of(model) -> torch.Tensor:
    """What a model computes in eval mode."""
    modes = [module.training for module in model.modules()]
    result = model.eval()(images())
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    return result


def test_every_average_is_here():
    classes = {
        name
        for name, cls in vars(averaged_model).items()
        if isinstance(cls, type) and issubclass(cls, BaseAveragedModel)
    }
    assert classes - {'BaseAveragedModel'} <= {average['type'] for average in AVERAGES}


@pytest.mark.parametrize('buffers', [False, True], ids=['parameters', 'buffers'])
@pytest.mark.parametrize('average', AVERAGES, ids=lambda a: '-'.join(map(str, a.values())))
def test_average_follows(tmp_path, monkeypatch, average, buffers):
    """At every update the average has the model's shape and computes what it did; between
    updates it is the average that its class defines."""
    if '.' in average['type']:
        pytest.importorskip('mmdet')
    hook = {'type': 'EMAHook', 'ema_type': average['type'], 'update_buffers': buffers}
    hook |= {key: value for key, value in average.items() if key != 'type'}
    run = runner(tmp_path, [PRUNING, hook], iters=ITERS, every=100)
    jumps, seen = [], []
    change = Transaction.change

    def spy(transaction, *args):
        before, own = function_of(averaged(run).module), function_of(run.model)
        plan = change(transaction, *args)
        after = function_of(averaged(run).module)
        size = before.abs().max()
        jumps.append(((after - before).abs().max() / size).item())
        seen.append(((before - own).abs().max() / size).item())
        return plan

    def check(run):
        average, model = averaged(run), run.model
        module = average.module
        assert dyrep_mm.structure_of(module) == dyrep_mm.structure_of(model)
        assert list(module.state_dict()) == list(model.state_dict())
        assert not any(p.requires_grad for p in module.parameters())
        # It averages tensors that it holds, all of them, and none is the model's.
        held = module.state_dict() if buffers else dict(module.named_parameters())
        assert list(average.avg_parameters) == list(held)
        own = {t.data_ptr() for t in model.state_dict().values()}
        for name, tensor in average.avg_parameters.items():
            assert tensor.data_ptr() == held[name].data_ptr()
            assert tensor.data_ptr() not in own
        if not buffers:
            for mine, theirs in zip(module.buffers(), model.buffers(), strict=True):
                assert torch.equal(mine, theirs)

    monkeypatch.setattr(Transaction, 'change', spy)
    call_at(run, check)
    # An average by hand: what the class makes of the last average and the model.
    last = {}

    def remember(run):
        last.clear()
        last.update({n: t.clone() for n, t in averaged(run).module.named_parameters()})

    def expect(run):
        average = averaged(run)
        average.steps -= 1  # as when the average was taken
        steps = average.steps.item()
        own = dict(run.model.named_parameters())
        for name, tensor in average.module.named_parameters():
            expected = last[name]
            if steps == 0:
                expected = own[name]
            elif steps % average.interval == 0:
                average.avg_func(expected, own[name].detach(), torch.tensor(steps))
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0, msg=name)
        average.steps += 1

    call_at(run, remember, 'after_train_iter', 'ABOVE_NORMAL')  # after DyRep, before EMA
    call_at(run, expect)
    run.train()
    assert len(jumps) == 4
    assert max(jumps) < 1e-5
    assert min(seen) > 1e-4  # the average is another model than the one that trains
    pruned = [entry.pruned for entry in dyrep(run).journal]
    assert any(pruned)


@pytest.mark.parametrize('buffers', [False, True])
def test_average_before_it_starts(tmp_path, buffers):
    """Until `begin_iter` the hook copies by name, which fails for a name it does not know."""
    hook = {'type': 'EMAHook', 'momentum': 0.1, 'begin_iter': 5, 'update_buffers': buffers}
    run = runner(tmp_path, [PRUNING, hook], iters=8)
    equal = []
    call_at(
        run,
        lambda run: equal.append(
            all(
                torch.equal(a, b)
                for a, b in zip(
                    averaged(run).module.parameters(), run.model.parameters(), strict=True
                )
            )
        ),
    )
    run.train()
    assert equal[4]
    assert not equal[-1]


def test_static_structure_of_a_nested_kind(tmp_path):
    """A start with nested blocks gives them to the average, which is then the model."""
    structure = {
        'backbone.conv2': ['kxk', '1x1', '1x1-kxk'],
        'backbone.conv2.branches.1x1-kxk.conv': ['kxk', '1x1'],
        'backbone.conv2.branches.kxk': ['kxk', '1xk', 'identity'],
    }
    hook = {'type': 'dyrep_mm.DyRepHook', 'interval': None, 'structure': structure}
    run = runner(tmp_path, [hook, {'type': 'EMAHook'}], iters=3)
    call_at(
        run,
        lambda run: torch.testing.assert_close(
            function_of(averaged(run).module), function_of(run.model), rtol=1e-5, atol=1e-6
        ),
        'before_train',
    )
    run.train()
    assert dyrep_mm.structure_of(averaged(run).module) == structure


@pytest.mark.parametrize('buffers', [False, True])
def test_swaps_and_saves(tmp_path, buffers):
    """Validation sees the average and training goes on with the model; a checkpoint holds the
    average as the model and the model beside it."""
    hook = {'type': 'EMAHook', 'momentum': 0.2, 'update_buffers': buffers}
    hooks = [PRUNING, hook]
    run = runner(tmp_path, hooks, iters=8, every=4, val=4)
    seen = []

    def before(run):
        seen.append((function_of(averaged(run).module), function_of(run.model)))

    def during(run):
        average, own = seen[-1]
        torch.testing.assert_close(function_of(run.model), average, rtol=0, atol=0)
        torch.testing.assert_close(function_of(averaged(run).module), own, rtol=0, atol=0)

    def after(run):
        average, own = seen[-1]
        torch.testing.assert_close(function_of(run.model), own, rtol=0, atol=0)
        torch.testing.assert_close(function_of(averaged(run).module), average, rtol=0, atol=0)
        assert not torch.equal(average, own)

    call_at(run, before, 'before_val_epoch', 'VERY_HIGH')
    call_at(run, during, 'before_val_epoch', 'LOWEST')
    call_at(run, after, 'after_val_epoch', 'LOWEST')
    run.train()
    assert len(seen) == 2
    saved = with_branches(tmp_path / 'iter_8.pth')
    assert_equal_states(saved['state_dict'], averaged(run).module.state_dict())
    own = {k.removeprefix('module.'): v for k, v in saved['ema_state_dict'].items() if k != 'steps'}
    assert_equal_states(own, run.model.state_dict())

    tested = runner(
        tmp_path / 'test', hooks, iters=8, val=4, load_from=str(tmp_path / 'iter_8.pth')
    )
    score = tested.test()
    for name, value in score.items():
        assert value == run.message_hub.get_scalar(f'val/{name}').current()


def test_average_that_comes_first_is_refused(tmp_path):
    run = runner(tmp_path, [PRUNING, {'type': 'EMAHook', 'priority': 'VERY_HIGH'}], iters=4)
    with pytest.raises(DyRepError, match='higher priority than EMAHook'):
        run.train()


@pytest.mark.parametrize('priority', [40, 49])
def test_average_of_other_libraries(tmp_path, priority):
    """The EMA hook of mmpretrain, at the priorities that the zoo uses."""
    hook = {'type': 'mmpretrain.EMAHook', 'momentum': 0.1, 'priority': priority}
    run = runner(tmp_path, [PRUNING, hook], iters=6, every=3)
    run.train()
    again = runner(
        tmp_path / 'again', [PRUNING, hook], iters=6, every=3,
        load_from=str(tmp_path / 'iter_3.pth'), resume=True,
    )  # fmt: skip
    again.train()
    assert_equal_states(again.model.state_dict(), run.model.state_dict())
    assert_equal_states(averaged(again).state_dict(), averaged(run).state_dict())


class Average:
    """What mmengine's averaged models have that matters here."""

    def __init__(self, module, update_buffers):
        self.module, self.update_buffers = module, update_buffers
        self.avg_parameters = None


@pytest.mark.parametrize('update_buffers', [True, False])
def test_refresh_average(update_buffers):
    model = make_net()
    average = Average(model, update_buffers)
    grow(model, 'conv1')
    refresh_average(average)
    expected = model.state_dict() if update_buffers else dict(model.named_parameters())
    assert list(average.avg_parameters) == list(expected)
    for name, tensor in average.avg_parameters.items():
        assert tensor.data_ptr() == expected[name].data_ptr(), name


@pytest.mark.parametrize('buffers', [False, True], ids=['parameters', 'buffers'])
def test_validation_merges_once_and_sees_the_average(tmp_path, monkeypatch, buffers):
    """Kernels are kept for one validation or test; never across the swap of weights."""
    hook = {'type': 'EMAHook', 'momentum': 0.2, 'update_buffers': buffers}
    run = runner(tmp_path, [PRUNING, hook], epochs=4, val=1, every=100)
    merges, outputs = [], []
    kernel = Block.kernel
    monkeypatch.setattr(Block, 'kernel', lambda self: merges.append(self) or kernel(self))

    def start(run):
        # Kernels of the weights before the swap, were they kept.
        model, outer = run.model.eval(), blocks_of(run.model)
        with torch.no_grad():
            run.state = {
                'before': model(images()),
                'average': averaged(run).module.eval()(images()),
            }
        run.outer = sum(depth_of(model, path) == 0 for path in outer)

    def inside(run):
        outputs.append(run.model(images()))
        assert torch.equal(outputs[-1], run.state['average'])

    def swapped(run):
        merges.clear()

    def end(run):
        top = [b for p, b in blocks_of(run.model).items() if depth_of(run.model, p) == 0]
        assert all(merges.count(block) == 1 for block in top)
        with torch.no_grad():
            assert torch.equal(run.model(images()), run.state['before'])

    for phase in ('val', 'test'):
        call_at(run, start, f'before_{phase}_epoch', 'VERY_HIGH')
        call_at(run, swapped, f'before_{phase}_epoch', 'LOWEST')
        call_at(run, inside, f'after_{phase}_iter')
        call_at(run, end, f'after_{phase}_epoch', 'LOWEST')
    run.train()
    assert blocks_of(run.model)
    run.test()
    assert len(outputs) == 5 * 4
