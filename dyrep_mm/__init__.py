"""DyRep for OpenMMLab: convs that grow into multi-branch blocks while a model trains."""

from importlib import import_module
from typing import Any

from dyrep_mm.configs import config_path
from dyrep_mm.evolution import gain as _gain  # noqa: F401, registers scores
from dyrep_mm.evolution import metrics as _metrics  # noqa: F401, registers scores
from dyrep_mm.evolution.saliency import register_score
from dyrep_mm.reparam.block import kernels_kept
from dyrep_mm.reparam.branches import register_branch
from dyrep_mm.surgery.fuse import fuse
from dyrep_mm.surgery.optimizer import sync_optimizer
from dyrep_mm.surgery.rewire import expand, grow, prune
from dyrep_mm.surgery.structure import structure_of
from dyrep_mm.version import __version__

# The core is torch only: mmengine is imported when one of these is asked for.
_FOR_MMENGINE = {
    'DyRepHook': 'dyrep_mm.engine.hook',
    'DyRepPretrained': 'dyrep_mm.engine.pretrained',
    'DyRepConverter': 'dyrep_mm.engine.converter',
    'PlainVGG': 'dyrep_mm.backbones',
    'RepNASHook': 'dyrep_mm.engine.repnas',
    'ImagesInMemory': 'dyrep_mm.datasets',
}

__all__ = [
    'DyRepConverter',
    'DyRepHook',
    'DyRepPretrained',
    'ImagesInMemory',
    'PlainVGG',
    'RepNASHook',
    '__version__',
    'config_path',
    'expand',
    'fuse',
    'grow',
    'kernels_kept',
    'prune',
    'register_branch',
    'register_score',
    'structure_of',
    'sync_optimizer',
]


def __getattr__(name: str) -> Any:
    if name in _FOR_MMENGINE:
        return getattr(import_module(_FOR_MMENGINE[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
