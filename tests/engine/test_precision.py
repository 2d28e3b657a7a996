"""Mixed precision, fused optimizers, accumulation and clipping: what the scores are made of."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim.optimizer import amp_optimizer_wrapper

from dyrep_mm.surgery.optimizer import check_optimizer
from dyrep_mm.surgery.tree import get_module
from support.checks import assert_same_run
from support.runs import FAST, PRUNING, call_at, dyrep, runner

SGD = {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9}
OPTIMIZERS = [SGD, {**SGD, 'fused': True}, {'type': 'AdamW', 'fused': True}]
NO_UPDATE = {**FAST, 'interval': 100, 'by_epoch': False}


@pytest.fixture
def _amp_on_cpu(monkeypatch):
    """Let mmengine's wrapper, which asks for an accelerator, use torch's scaler for the CPU."""
    scaler = functools.partial(torch.amp.GradScaler, 'cpu')
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', scaler)


def amp(optimizer: dict, loss_scale: Any = 'dynamic', **more: Any) -> dict:
    return {
        'type': 'AmpOptimWrapper',
        'optimizer': dict(optimizer),
        'loss_scale': loss_scale,
        'dtype': 'bfloat16',
        **more,
    }


def identify(optimizer: Any) -> str:
    return '-'.join(map(str, optimizer.values())) if isinstance(optimizer, dict) else ''


@pytest.mark.usefixtures('_amp_on_cpu')
@pytest.mark.parametrize('clip', [None, {'max_norm': 0.1}], ids=['', 'clip'])
@pytest.mark.parametrize('count', [1, 2], ids=['', 'accumulate'])
@pytest.mark.parametrize('optimizer', OPTIMIZERS, ids=identify)
def test_the_scale_of_the_loss_does_not_matter(tmp_path, optimizer, count, clip):
    """A power of two scales exactly: run, scores and choices are the same bit for bit."""
    runs = []
    for scale in (1.0, 4096.0):
        wrapper = amp(optimizer, scale, accumulative_counts=count, clip_grad=clip)
        run = runner(tmp_path / str(scale), [PRUNING], iters=9, every=100, optim_wrapper=wrapper)
        call_at(run, lambda run: check_optimizer(run.optim_wrapper.optimizer, run.model))
        run.train()
        runs.append(run)
    assert len(dyrep(runs[0]).journal) == 4
    assert_same_run(*runs)


class Overflow(Hook):
    """Makes one gradient infinite in the backward of one iteration."""

    def __init__(self, at: int):
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            # Of a parameter that is not scored: the other gradients stay finite.
            weight = runner.model.head.weight
            self.handle = weight.register_hook(lambda grad: grad * float('inf'))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.at:
            self.handle.remove()


@pytest.mark.usefixtures('_amp_on_cpu')
@pytest.mark.parametrize('clip', [None, {'max_norm': 0.1}], ids=['', 'clip'])
@pytest.mark.parametrize('count', [1, 2], ids=['', 'accumulate'])
@pytest.mark.parametrize('optimizer', OPTIMIZERS, ids=identify)
def test_an_iteration_that_overflows_counts_nothing(tmp_path, optimizer, count, clip):
    wrapper = amp(optimizer, {'init_scale': 4096.0}, accumulative_counts=count, clip_grad=clip)
    run = runner(tmp_path, [NO_UPDATE], iters=101, every=100, optim_wrapper=wrapper)
    run.register_hook(Overflow(at=2), 'NORMAL')
    history = []

    def look(run):
        state = dyrep(run).rule.state_dict()
        weights = [p.detach().clone() for p in run.model.parameters()]
        history.append((state, weights, run.optim_wrapper.loss_scaler.get_scale()))
        if len(history) == 6:
            run.train_loop._max_iters = 6
            run.train_loop.stop_training = True

    call_at(run, look)
    run.train()
    at = 2 if count == 1 else 3  # the step that the gradients of iteration 2 belong to
    for i in range(1, 6):
        (then, before, scale), (now, after, next_scale) = history[i - 1 : i + 1]
        steps = (i + 1) % count == 0
        skipped = i == at
        assert (next_scale < scale) == skipped
        gathered = steps and not skipped
        assert torch.equal(now['counts'], then['counts'] + gathered), i
        assert torch.equal(now['sums'], then['sums']) == (not gathered), i
        moved = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert moved == gathered
        assert now['sums'].isfinite().all()


@pytest.mark.usefixtures('_amp_on_cpu')
@pytest.mark.parametrize('clip', [None, {'max_norm': 0.1}], ids=['', 'clip'])
@pytest.mark.parametrize('optimizer', OPTIMIZERS, ids=identify)
def test_a_loss_that_overflows_ends_no_run(tmp_path, optimizer, clip):
    """The scaler skips its step and lowers the scale, as in a plain run; the update that was due
    takes the next step."""
    scales, said = [], []
    for hooks in ([PRUNING], []):
        wrapper = amp(optimizer, {'init_scale': 4096.0}, clip_grad=clip)
        run = runner(tmp_path / str(len(hooks)), hooks, iters=7, every=100, optim_wrapper=wrapper)
        run.logger.warning = lambda line, *_: said.append(line) if 'the loss is' in line else None
        forward = run.model.forward

        def overflow(*args, mode='tensor', run=run, forward=forward, **kwargs):
            result = forward(*args, mode=mode, **kwargs)
            late = mode == 'loss' and run.iter + 1 == 4
            return {'loss': result['loss'] * float('inf')} if late else result

        run.model.forward = overflow
        run.train()
        assert run.iter == 7
        assert all(p.isfinite().all() for p in run.model.parameters())
        scales.append(run.optim_wrapper.loss_scaler.get_scale())
        if hooks:
            assert [entry.at for entry in dyrep(run).journal] == [2, 5, 6]
    assert scales == [2048.0, 2048.0]
    assert len(said) == 1


@pytest.mark.parametrize('clip', [None, {'max_norm': 0.05}], ids=['', 'clip'])
@pytest.mark.parametrize('count', [1, 2, 3])
def test_scores_are_of_the_complete_gradient(tmp_path, count, clip):
    """Against gradients computed anew from the batches of each window."""
    wrapper = {'optimizer': SGD, 'accumulative_counts': count, 'clip_grad': clip}
    run = runner(
        tmp_path, [{**NO_UPDATE, 'metric': 'snip'}], iters=101, every=100, optim_wrapper=wrapper
    )
    expected: dict[str, list[float]] = {}
    sums: list[torch.Tensor] = []

    class Autograd(Hook):
        grads: dict[str, torch.Tensor] = {}

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            model = copy.deepcopy(runner.model).train()
            loss = model(**data_batch, mode='loss')['loss'] / count
            loss.backward()
            for name, p in model.named_parameters():
                self.grads[name] = self.grads.get(name, 0) + p.grad
            if (runner.iter + 1) % count == 0:
                norm = torch.stack([g.norm() for g in self.grads.values()]).norm().item()
                factor = min(1.0, clip['max_norm'] / norm) if clip else 1.0
                assert not clip or factor < 1
                for path in dyrep(runner).rule.operations:
                    weight, grad = get_module(model, path).weight, self.grads[f'{path}.weight']
                    score = (weight * grad * factor).abs().sum().item()
                    expected.setdefault(path, []).append(score)
                self.grads = {}

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            state = dyrep(runner).rule.state_dict()
            assert set(state['counts'].tolist()) == {(runner.iter + 1) // count}
            sums.append(state['sums'][0])
            if runner.iter == 5:
                runner.train_loop._max_iters = 6

    run.register_hook(Autograd(), 'LOWEST')
    run.train()
    by_hand = torch.tensor([sum(scores) for scores in expected.values()], dtype=torch.float64)
    assert len(next(iter(expected.values()))) == 6 // count
    torch.testing.assert_close(sums[-1], by_hand, rtol=1e-4, atol=0)


@pytest.mark.usefixtures('_amp_on_cpu')
@pytest.mark.parametrize('optimizer', OPTIMIZERS, ids=identify)
def test_resumed_with_its_scaler(tmp_path, optimizer):
    settings = {'iters': 9, 'every': 3, 'optim_wrapper': amp(optimizer, {'init_scale': 512.0})}
    whole = runner(tmp_path, [PRUNING], **settings)
    whole.train()
    file = str(tmp_path / 'iter_3.pth')
    again = runner(tmp_path / 'again', [PRUNING], **settings, load_from=file, resume=True)
    again.train()
    assert_same_run(whole, again)


@pytest.mark.usefixtures('_amp_on_cpu')
@pytest.mark.parametrize('optimizer', OPTIMIZERS, ids=identify)
def test_growing_under_autocast(tmp_path, optimizer):
    """Kernels, statistics and importances stay in the precision of the parameters."""
    run = runner(tmp_path, [PRUNING], iters=9, every=100, optim_wrapper=amp(optimizer))
    run.train()
    for name, tensor in run.model.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64), name
        assert tensor.isfinite().all(), name
