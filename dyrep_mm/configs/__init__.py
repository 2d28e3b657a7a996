"""The configs of this project where it is installed: by path, and in Python style beside this file.

mmengine keeps a list of the packages that ``_base_ = 'package::...'`` may name, and dyrep_mm is not
in it. An expression needs no list::

    _base_ = __import__('dyrep_mm').config_path('fpn_r50_dyrep_coco.py')
"""

from pathlib import Path
from typing import Any

from dyrep_mm.errors import DyRepError

_PACKAGE = Path(__file__).parents[1]


def config_path(name: str) -> str:
    """The file of a config in text style, for ``_base_``, ``Config.fromfile`` or a command.

    Args:
        name: As ``configs/`` has it: ``'fpn_r50_dyrep_coco.py'``, ``'_base_/methods/dyrep.py'``.

    Raises:
        DyRepError: there is no such config.
    """
    # A wheel has them where OpenMMLab's have theirs, a checkout beside the package.
    for folder in (_PACKAGE / '.mim' / 'configs', _PACKAGE.parent / 'configs'):
        if folder.is_dir():
            if (folder / name).is_file():
                return str(folder / name)
            raise DyRepError(f'there is no config {name!r:.200} in {folder}')
    raise DyRepError(f'this installation of dyrep_mm has no configs, {name!r:.200} for one')


def load_config(name: str) -> dict[str, Any]:
    """All that a config in text style says, with its bases, for one in Python style.

    The wheels of the libraries have configs in text style alone, and one style cannot inherit from
    the other. Here the values cross over.

    Args:
        name: See :func:`config_path`.
    """
    from mmengine.config import Config  # here: the core needs torch alone

    return Config.fromfile(config_path(name)).to_dict()
