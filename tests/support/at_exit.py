"""Tells at exit what is left of a process group; what is registered first runs last."""

import atexit
import gc

from torch import distributed
from torch.nn.parallel import DistributedDataParallel


def tell() -> None:
    wrapped = any(isinstance(found, DistributedDataParallel) for found in gc.get_objects())
    left = distributed.is_initialized() or wrapped  # the threads stop with the last that holds it
    print('process group at exit:', 'left' if left else 'none', flush=True)


atexit.register(tell)
