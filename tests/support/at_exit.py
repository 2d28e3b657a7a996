"""Tells at exit whether a process group is left; what is registered first runs last."""

import atexit

from torch import distributed


def tell() -> None:
    print('process group at exit:', 'left' if distributed.is_initialized() else 'none', flush=True)


atexit.register(tell)
