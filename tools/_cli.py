"""What the command line tools share."""

import argparse
import atexit
import gc
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import distributed

from dyrep_mm.cli.common import check_out, sentence
from dyrep_mm.engine.checkpoint import load_checkpoint, structure_in
from dyrep_mm.engine.converter import read_config
from dyrep_mm.engine.stock import from_stock, is_stock
from dyrep_mm.errors import DyRepError

__all__ = [
    'add_common',
    'build_runner',
    'check_local',
    'check_out',
    'has_hook',
    'load_config',
    'sentence',
]


def add_common(parser: argparse.ArgumentParser) -> None:
    """The flags that training and testing share."""
    parser.add_argument('--work-dir', help='folder for logs and checkpoints')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of the config: key=value, lists as key="[a,b]" or key=a,b',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def load_config(args: argparse.Namespace) -> Config:
    """The config with the flags of :func:`add_common` applied."""
    config = read_config(args.config)
    config.launcher = args.launcher
    if args.cfg_options is not None:
        config.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        config.work_dir = args.work_dir
    elif config.get('work_dir') is None:
        config.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    return config


def build_runner(config: Config) -> Runner:
    """The runner that the config asks for; several processes without an accelerator use gloo,
    which mmengine's own launcher does not. At exit the processes leave their group."""
    atexit.register(leave_group)
    if config.launcher == 'pytorch' and get_device() == 'cpu':
        distributed.init_process_group('gloo')
        config.model_wrapper_cfg = {
            'type': 'MMDistributedDataParallel',
            'broadcast_buffers': False,
            'find_unused_parameters': config.get('find_unused_parameters', False),
            **config.get('model_wrapper_cfg', {}),
            'device_ids': None,
        }
    return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)


def leave_group() -> None:
    """Stop the threads of the process group, if there is one. Where they outlive the interpreter,
    gloo's abort the process now and then, and the launcher calls a good run a failure."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()  # the model wrapper holds the group, and cycles hold the wrapper


def check_local(path: str | None, config: Config) -> None:
    """Read a local checkpoint, so that one that is damaged, or needs a structure that no hook of
    ``config`` rebuilds, ends here: to go on with branches, and of an early file of 0.1.0 always."""
    if path is None or '://' in path:
        return
    checkpoint = load_checkpoint(path)
    needed = bool(config.get('resume')) or not is_stock(checkpoint)
    try:
        structure = structure_in(from_stock(checkpoint))
    except DyRepError as error:
        raise DyRepError(f'{path}: {error}') from None
    if structure and needed and not has_hook(config):
        raise DyRepError(
            f'{path} has a structure and {config.filename} no DyRepHook to rebuild it: '
            'add the hook to the config, or fuse the checkpoint with tools/fuse.py'
        )


#: What the names of our hooks end with.
HOOK_NAMES = ('DyRepHook', 'RepNASHook')


def has_hook(config: Config) -> bool:
    """Whether a hook that rebuilds a structure is among those of a config."""
    hooks = [*config.get('default_hooks', {}).values(), *(config.get('custom_hooks') or [])]
    types = (hook.get('type') for hook in hooks if hook)
    return any(str(getattr(t, '__name__', t)).endswith(HOOK_NAMES) for t in types)
