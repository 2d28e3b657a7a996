"""One process of distributed runs: ``python -m support.ranks FOLDER RANK WORLD``."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import MODELS
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import dyrep_mm
from dyrep_mm.engine import transaction
from dyrep_mm.engine.runner import unwrap
from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.candidates import left_alone
from dyrep_mm.surgery.optimizer import check_optimizer
from dyrep_mm.surgery.tree import blocks_of
from support.checks import without_times
from support.nets import randomise
from support.runs import PRUNING, SEARCH, TinyBackbone, TinyClassifier, call_at, dyrep, runner

WRAPPER = {
    'type': 'MMDistributedDataParallel',
    'device_ids': None,
    'broadcast_buffers': False,
    'find_unused_parameters': False,
}


def digest(*states: dict) -> str:
    """A fingerprint of tensors and their names."""
    text = hashlib.sha256()
    for state in states:
        for name, tensor in state.items():
            text.update(name.encode())
            text.update(tensor.detach().cpu().numpy().tobytes())
    return text.hexdigest()


class Inputs(Hook):
    """Notes what every iteration trains on."""

    def __init__(self, sums: list[float]):
        self.sums = sums

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.sums.append(data_batch['inputs'].sum().item())


def train(folder: Path, hooks: list[dict] | None = None, **more) -> dict:
    """A run; what every rank reports of each iteration."""
    more = {'iters': 9, 'every': 3, 'launcher': 'pytorch', **more}
    more.setdefault('model_wrapper_cfg', dict(WRAPPER))
    run = runner(folder / 'run', [dict(PRUNING)] if hooks is None else hooks, **more)
    report: dict[str, Any] = {name: [] for name in ('weights', 'structure', 'inputs', 'wrapper')}
    average = [hook for hook in run.hooks if isinstance(hook, EMAHook)]

    def look(run):
        model = unwrap(run.model)
        check_optimizer(run.optim_wrapper.optimizer, model)
        # Statistics of BN in train mode are each rank's own, as in any DDP run.
        states = [dict(model.named_parameters())]
        states += [dict(hook.ema_model.module.named_parameters()) for hook in average]
        report['weights'].append(digest(*states))
        report['structure'].append(dyrep_mm.structure_of(model))
        wrapper = run.model
        report['wrapper'].append(
            {
                'type': type(wrapper).__name__,
                'find_unused_parameters': wrapper.find_unused_parameters,
                'broadcast_buffers': wrapper.broadcast_buffers,
                'gradient_as_bucket_view': wrapper.gradient_as_bucket_view,
                'bucket_bytes_cap': wrapper.bucket_bytes_cap,
                'detect_anomalous_params': wrapper.detect_anomalous_params,
                'communication_hooks': len(wrapper._comm_hooks),
            }
        )

    run.register_hook(Inputs(report['inputs']), 'LOWEST')
    call_at(run, look)
    report['call'] = lambda: run.train()
    report['run'] = run
    return report


def finish(report: dict) -> dict:
    report.pop('call')()
    journal = dyrep(report.pop('run')).journal
    return {**report, 'journal': without_times([asdict(entry) for entry in journal])}


def case_average(folder: Path, rank: int) -> dict:
    """Every rank sees other data, as samplers give it, and keeps an average."""
    return finish(train(folder, [dict(PRUNING), {'type': 'EMAHook', 'momentum': 0.2}]))


def case_seeds(folder: Path, rank: int) -> dict:
    """Every rank has a seed of its own. DDP gives the parameters of rank 0 to all, so they are
    looked at before it: new branches must be the same already."""
    hooks = [{**PRUNING, 'metric': 'random', 'prune': False}]
    report = train(folder, hooks, randomness={'seed': 3, 'diff_rank_seed': True})
    report['unwrapped'], rewrap = [], transaction.rewrap

    def spy(run):
        report['unwrapped'].append(digest(dict(unwrap(run.model).named_parameters())))
        rewrap(run)

    transaction.rewrap = spy
    report['own'] = report['run'].seed
    try:
        return finish(report)
    finally:
        transaction.rewrap = rewrap


def case_scores(folder: Path, rank: int) -> dict:
    """Ranks that disagree on scores and importances follow rank 0."""
    report = train(folder)
    rule = dyrep(report['run']).rule
    watch = rule.watch

    def watch_and_disagree(model):
        watch(model)
        if rule.score is not None:
            means = rule.score.means
            rule.score.means = lambda generator: {
                path: score + (i if rank == 0 else -i)
                for i, (path, score) in enumerate(means(generator).items())
            }

    rule.watch = watch_and_disagree
    return finish(report)


def case_losses(folder: Path, rank: int) -> dict:
    """A score that draws batches of its own, each rank others."""
    report = train(folder, [{**PRUNING, 'metric': 'grasp'}])
    rule, report['scores'] = dyrep(report['run']).rule, []
    decide = rule.decide

    def decide_and_tell(model, generator):
        plan = decide(model, generator)
        report['scores'].append(plan.scores)
        return plan

    rule.decide = decide_and_tell
    return finish(report)


def case_wrapper(folder: Path, rank: int) -> dict:
    """Settings of the wrapper and a communication hook, which counts its calls."""
    calls: list[int] = []

    def communicate(state, bucket):
        calls.append(len(bucket.parameters()))
        return allreduce_hook(state, bucket)

    more = {'gradient_as_bucket_view': True, 'bucket_cap_mb': 1, 'detect_anomalous_params': True}
    report = train(folder, model_wrapper_cfg={**WRAPPER, **more})
    run = report['run']
    call_at(run, lambda run: run.model.register_comm_hook(None, communicate), 'before_train')
    parameters: list[int] = []
    call_at(run, lambda run: parameters.append(len(list(run.model.parameters()))))
    report = finish(report)
    report['communicated'] = calls
    report['parameters'] = parameters
    return report


def case_resume(folder: Path, rank: int) -> dict:
    """A run, and again from its newest whole checkpoint: the last one is torn."""
    hooks = [dict(PRUNING), {'type': 'EMAHook', 'momentum': 0.2}]
    whole = finish(train(folder, hooks))
    dist.barrier()
    if rank == 0:
        file = folder / 'run/iter_9.pth'
        file.write_bytes(file.read_bytes()[:5000])
    dist.barrier()
    again = finish(train(folder, hooks, resume=True))
    return {'whole': whole['weights'], 'again': again['weights']}


@MODELS.register_module(force=True)
class UnevenBackbone(TinyBackbone):
    """Rank 1 alone sends what is infinite through ``conv2``, and leaves out ``dw``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rank = dist.get_rank()
        x = self.bn1(self.conv1(x)).relu()
        with torch.no_grad():
            second = self.conv2(x / (0 if rank else 1)).nan_to_num(0, 0, 0)
        x = self.bn3(self.conv3(self.bn2(second) + x)).relu()
        return x if rank else self.dw_bn(self.dw(x))


@MODELS.register_module(force=True)
class UnevenClassifier(TinyClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = UnevenBackbone()


def case_uneven(folder: Path, rank: int) -> dict:
    """All convs at once; what one rank cannot measure stays plain on both."""
    hook = {**PRUNING, 'metric': 'random', 'grow_per_update': 99, 'prune': False, 'max_depth': 1}
    report = train(
        folder,
        [hook],
        model={'type': 'UnevenClassifier'},
        model_wrapper_cfg={**WRAPPER, 'find_unused_parameters': True},
    )
    run = report['run']
    report = finish(report)
    return {**report, 'left_alone': left_alone(unwrap(run.model))}


def case_accumulate(folder: Path, rank: int) -> dict:
    wrapper = {'optimizer': {'type': 'SGD', 'lr': 0.05}, 'accumulative_counts': 2}
    return finish(train(folder, optim_wrapper=wrapper, iters=10))


def case_fixed(folder: Path, rank: int) -> dict:
    """Norms with fixed statistics, which are measured again at every update."""
    hook = {**PRUNING, 'metric': 'snip', 'branch_norm': 'fixed'}
    report = train(folder, [hook, {'type': 'EMAHook', 'momentum': 0.2}])
    model = unwrap(report['run'].model)
    report = finish(report)
    norms = [n for block in blocks_of(model).values() for n in block.added_norms]
    report['statistics'] = digest(*(dict(norm.named_buffers()) for norm in norms))
    return report


def case_search(folder: Path, rank: int) -> dict:
    """All ranks draw the same branches, and learn the same of them, each on its own data."""
    hook = {**SEARCH, 'seed': None, 'keep': 0.4}
    report = train(
        folder,
        [hook, {'type': 'EMAHook', 'momentum': 0.2}],
        randomness={'seed': 3, 'diff_rank_seed': True},
    )
    run, report['masks'], report['alphas'] = report['run'], [], []

    def look(run):
        if rule := dyrep(run).rule.sampler:
            report['alphas'].append(rule.alphas.tolist())

    def draw(run):
        blocks = blocks_of(unwrap(run.model)).values()
        report['masks'].append([branch.is_on for block in blocks for branch in block.added])

    call_at(run, draw, 'before_train_iter')
    call_at(run, look)
    return finish(report)


def case_sampled(folder: Path, rank: int) -> dict:
    """Half of a batch in each process and synchronised norms, against all of it in one: how far
    outputs, gradients and statistics are apart, relative to the largest."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 4, 3, padding=1, bias=False), torch.nn.BatchNorm2d(4)
    ).double()
    block = dyrep_mm.grow(model, '0', branch_norm='sampled')
    randomise(model)
    x = torch.randn(4, 4, 6, 7, dtype=torch.float64)
    split = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    results = []
    for module, images in ((block, x), (split, x[2 * rank :][:2])):
        leaf = images.clone().requires_grad_()
        out = module(leaf)
        out.sin().sum().backward()
        grads = [parameter.grad for parameter in module.parameters()]
        buffers = [buffer.double() for buffer in module.buffers()]
        maps = [out.detach(), leaf.grad]
        if module is split:
            for grad in grads:
                dist.all_reduce(grad)
        else:
            maps = [whole[2 * rank :][:2] for whole in maps]
        results.append([*maps, *grads, *buffers])
    pairs = list(zip(*results, strict=True))
    size = max(one.abs().max() for one, _ in pairs)
    return {'apart': max(((a - b).abs().max() / size).item() for a, b in pairs)}


def spoil(run, rank: int, at: int) -> None:
    """Let the loss of iteration ``at`` be NaN, as far as the last rank knows."""

    def nan(self, runner, batch_idx, data_batch=None, outputs=None):
        if rank and runner.iter + 1 == at:
            outputs['loss'] = torch.tensor(float('nan'))

    run.register_hook(type('Spoil', (Hook,), {'after_train_iter': nan})(), 'VERY_HIGH')


def case_loss(folder: Path, rank: int) -> dict:
    """One rank alone has a loss that is not finite when an update is due."""
    report, said = train(folder), []
    run = report['run']
    run.logger.warning = lambda line, *_: said.append(line)
    spoil(run, rank, at=4)
    report = finish(report)
    return {**report, 'said': [line for line in said if 'the loss is' in line]}


def case_stop(folder: Path, rank: int) -> dict:
    """The same where the run shall end."""
    run = train(folder, [{**PRUNING, 'stop_on_invalid_loss': True}])['run']
    spoil(run, rank, at=4)
    return {'said': refusal(run), 'iter': run.iter}


def refusal(run) -> str:
    try:
        run.train()
    except DyRepError as error:
        return str(error)
    return 'not refused'


def case_refuse(folder: Path, rank: int) -> dict:
    """What the hook says of wrappers that it does not support."""
    said = {}
    for name, more in {
        'MMSeparateDistributedDataParallel': {'device_ids': None},
        'MMFullyShardedDataParallel': {},
    }.items():
        try:
            run = runner(
                folder / name,
                [dict(PRUNING)],
                iters=4,
                launcher='pytorch',
                model_wrapper_cfg={'type': name, **more},
            )
        except Exception:  # torch wants an accelerator: let the model pretend
            run = runner(
                folder / name,
                [dict(PRUNING)],
                iters=4,
                launcher='pytorch',
                model_wrapper_cfg=dict(WRAPPER),
            )
            run.model = pretend(name, run.model.module)
        said[name] = refusal(run)
    return said


def pretend(name: str, module: torch.nn.Module) -> torch.nn.Module:
    """A module of a wrapper class that was not initialised."""
    from mmengine.registry import MODEL_WRAPPERS

    wrapper = object.__new__(MODEL_WRAPPERS.get(name))
    torch.nn.Module.__init__(wrapper)
    wrapper.__dict__['_modules']['module'] = module
    wrapper.__dict__['_modules']['_fsdp_wrapped_module'] = module
    wrapper.train_step = lambda *_: None
    return wrapper


CASES: dict[str, Callable[[Path, int], dict]] = {
    name.removeprefix('case_'): call
    for name, call in list(globals().items())
    if name.startswith('case_')
}


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=world
    )
    report = {name: call(folder / name, rank) for name, call in CASES.items()}
    (folder / f'report_{rank}.json').write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
