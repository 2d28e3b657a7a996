"""What is asked of mmengine's Runner: wrappers, optimizer, refusals, seeds."""

from __future__ import annotations

import copy
import hashlib
from typing import Any, cast

import torch
from mmengine.dist import broadcast, broadcast_object_list
from mmengine.hooks import EMAHook
from mmengine.model import (
    BaseAveragedModel,
    BaseTTAModel,
    MMSeparateDistributedDataParallel,
    is_model_wrapper,
)
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.runner import Runner
from torch import nn

from dyrep_mm.engine.checkpoint import latest_checkpoint
from dyrep_mm.errors import DyRepError


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP and test-time-augmentation wrappers."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = cast(nn.Module, model.module)
    return model


def averaged_models(runner: Runner) -> list[Any]:
    """The averaged models of the runner's EMA hooks."""
    hooks = (hook for hook in runner.hooks if isinstance(hook, EMAHook))
    return [hook.ema_model for hook in hooks if hasattr(hook, 'ema_model')]


def optimizer_of(runner: Runner) -> torch.optim.Optimizer | None:
    """The runner's optimizer; None where it has none, as in a test."""
    wrapper = runner.optim_wrapper
    return wrapper.optimizer if isinstance(wrapper, OptimWrapper) else None


def from_rank_0(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def param_settings(runner: Runner) -> dict[nn.Parameter, dict[str, Any]]:
    """What the config of the optimizer (``paramwise_cfg``) gives each parameter at the start.

    Empty if all of them have the same, or the runner was not built from a config. What is frozen
    now counts as if it trained: a hook may free it, or may not yet have done so after a resume.
    """
    config = runner.cfg.get('optim_wrapper')
    optimizer = optimizer_of(runner)
    if optimizer is None or len(optimizer.param_groups) < 2 or not isinstance(config, dict):
        return {}
    model = unwrap(runner.model)
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    runner.logger.disabled = True  # the constructor tells every option of every parameter
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        wrapper = build_optim_wrapper(model, copy.deepcopy(config))
    finally:
        runner.logger.disabled = False
        for parameter in frozen:
            parameter.requires_grad_(False)
    # A factor that mmengine notes beside what it multiplies is no setting.
    notes = ('params', 'param_names', 'lr_mult', 'decay_mult')
    return {
        parameter: {key: v for key, v in group.items() if key not in notes}
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }


def make_seed(*key: Any) -> int:
    """A seed that depends on ``key`` alone: the same on every rank and after a resume."""
    digest = hashlib.sha256('/'.join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:7], 'big')


def make_generator(*key: Any) -> torch.Generator:
    """A generator of that seed."""
    return torch.Generator().manual_seed(make_seed(*key))


def refuse_unsupported(runner: Any, hook: str = 'DyRepHook') -> None:
    """Raise ``DyRepError`` if the model of this runner cannot change its shape, as ``hook``, by its
    name, would have it."""
    refused = None
    if not isinstance(runner, Runner):
        refused = f'{type(runner).__name__}', "mmengine's Runner (runner_type='Runner')"
    elif isinstance(runner.optim_wrapper, OptimWrapperDict):
        refused = 'several optimizers (OptimWrapperDict)', 'one OptimWrapper'
    elif type(runner.optim_wrapper).__name__ == 'ApexOptimWrapper':
        refused = 'ApexOptimWrapper', 'AmpOptimWrapper'
    elif type(optimizer_of(runner)).__name__ == 'ZeroRedundancyOptimizer':
        refused = 'ZeroRedundancyOptimizer', 'the optimizer it wraps'
    elif isinstance(optimizer_of(runner), (torch.optim.Adagrad, torch.optim.LBFGS)):
        # They make the state of all parameters once.
        refused = type(optimizer_of(runner)).__name__, 'SGD, AdamW or another'
    elif is_model_wrapper(runner.model) and (
        not isinstance(runner.model, nn.parallel.DistributedDataParallel)
        or isinstance(runner.model, MMSeparateDistributedDataParallel)
    ):
        refused = type(runner.model).__name__, 'MMDistributedDataParallel'
    elif runner.cfg.get('compile') not in (None, False):  # an empty dict compiles
        refused = 'compile', 'compile=False, or compile the fused model'
    elif runner.cfg.get('efficient_conv_bn_eval', None):
        refused = 'efficient_conv_bn_eval', 'nothing: a block in eval mode is one conv already'
    elif any(hasattr(unwrap(runner.model), name) for name in ('teacher', 'student')):
        refused = 'a teacher and a student in one model', 'one model'
    if refused:
        raise DyRepError('{} does not work with {}; use {}'.format(hook, *refused))


def choose_resume(runner: Runner) -> None:
    """Resume from the newest complete checkpoint.

    mmengine would take the last one, even if a kill has left half of it.
    """
    if runner._resume and runner._load_from is None and not runner._has_loaded:
        runner._load_from = from_rank_0(latest_checkpoint(runner.work_dir))
        runner._resume = runner._load_from is not None


def broadcast_parameters(module: nn.Module) -> None:
    """Give every rank the parameters of rank 0, as DDP does with what it wraps: a branch is
    absorbed with BN statistics, and those are each rank's own."""
    for parameter in module.parameters():
        broadcast(parameter.data)


def rewrap(runner: Runner) -> None:
    """Wrap the model in DDP again: its reducer knows parameters from construction only."""
    if not is_model_wrapper(runner.model):
        return
    module = runner.model.module
    communication_hooks = runner.model._comm_hooks
    runner.model = None  # the old reducer's gradient hooks go with the old wrapper
    runner.model = runner.wrap_model(copy.deepcopy(runner.cfg.get('model_wrapper_cfg')), module)
    for hook, state in communication_hooks:
        runner.model.register_comm_hook(state, hook)


def refresh_averages(module: nn.Module) -> None:
    """Do :func:`refresh_average` for every averaged model that ``module`` is or contains."""
    for averaged in module.modules():
        if isinstance(averaged, BaseAveragedModel):
            refresh_average(averaged)


def refresh_average(averaged: Any) -> None:
    """Make mmengine's averaged model look at the present tensors of its module, by name, as
    its constructor does."""
    module = averaged.module
    averaged.avg_parameters = (
        module.state_dict() if averaged.update_buffers else dict(module.named_parameters())
    )
