"""DyRep for OpenMMLab: convs that grow into multi-branch blocks while a model trains."""

from dyrep_mm.surgery import expand, fuse, grow, prune, structure_of
from dyrep_mm.version import __version__

__all__ = ['DyRepHook', '__version__', 'expand', 'fuse', 'grow', 'prune', 'structure_of']


def __getattr__(name: str):
    # The core is torch only: mmengine is imported when the hook is asked for.
    if name == 'DyRepHook':
        from dyrep_mm.hook import DyRepHook

        return DyRepHook
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
