"""Training batches for calibration, and the random streams left alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dataset import DefaultSampler
from mmengine.runner import Runner
from torch.utils.data import DataLoader, IterableDataset

from dyrep_mm.engine.runner import unwrap
from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.tree import in_scope


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random streams of python, numpy and torch as they were."""
    python, numeric, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numeric)
        torch.set_rng_state(torch_cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def calibration_loader(loader: DataLoader, seed: int) -> DataLoader:
    """A second loader over the dataset of ``loader``, with a sampler and a seed of its own.

    The training loader, its sampler and its workers never notice.
    """
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        raise DyRepError(
            'calibration needs a dataset with a length, not an IterableDataset; '
            'set calibration_batches=0 to start from the statistics of white input'
        )
    batch_size = loader.batch_size or loader.batch_sampler.batch_size
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=DefaultSampler(dataset, shuffle=True, seed=seed),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=len(dataset) >= batch_size,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator().manual_seed(seed),
    )


def calibration_batches(runner: Runner, count: int, seed: int) -> Iterator[Any]:
    """``count`` training batches, fewer if the dataset is shorter."""
    return islice(iter(calibration_loader(runner.train_dataloader, seed)), count)


def calibration_forward(runner: Runner, paths: list[str]) -> Callable[[Any], None]:
    """A function that runs on a batch what of the model reaches the modules at ``paths``."""
    model = unwrap(runner.model)
    backbone = getattr(model, 'backbone', None)
    only_backbone = backbone is not None and all(in_scope(p, 'backbone') for p in paths)

    def forward(batch: Any) -> None:
        with runner.optim_wrapper.optim_context(model):
            data = model.data_preprocessor(batch, True)
            if only_backbone and isinstance(data, dict) and 'inputs' in data:
                backbone(data['inputs'])
            else:
                model._run_forward(data, mode='loss')

    return forward
