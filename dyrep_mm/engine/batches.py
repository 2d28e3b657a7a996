"""Training batches for calibration, and the random streams left alone."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.dist import all_gather_object, all_reduce
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from dyrep_mm.engine.runner import unwrap
from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.tree import state_kept


@contextmanager
def random_state_kept(seed: int) -> Iterator[None]:
    """Start the random streams of python, numpy and torch from ``seed``, and leave them as they
    were."""
    python, numeric, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numeric)
        torch.set_rng_state(torch_cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def can_draw(runner: Runner) -> bool:
    """Whether batches can be drawn from the training data beside the training."""
    return not isinstance(runner.train_dataloader.dataset, IterableDataset)


def check_batches(runner: Runner) -> None:
    """Raise ``DyRepError`` if there are no batches for calibration."""
    if not can_draw(runner):
        raise DyRepError(
            'calibration needs a dataset with a length, not an IterableDataset; '
            'set calibration_batches=0 to start from the statistics of white input'
        )


def batch_sampler_before(loader: DataLoader) -> Any:
    """A copy of the batch sampler of ``loader``, to be taken before the training takes a batch.

    In the middle of an epoch a batch sampler has images in hand, and may stand where a copy of it
    never gives a batch.
    """
    return None if loader.batch_size is not None else _copy(loader.batch_sampler, loader.dataset)


def calibration_loader(loader: DataLoader, seed: int, before: Any = None) -> DataLoader:
    """A second loader over the dataset of ``loader``, with a sampler and a seed of its own.

    It makes batches as ``loader`` does, with a copy of its batch sampler if that is a special one.
    The training loader, its samplers and its workers never notice.

    Args:
        loader: Of the training.
        seed: Of the sampler.
        before: See :func:`batch_sampler_before`; by default the batch sampler as it is.
    """
    dataset = loader.dataset
    sampler = _own_sampler(loader, seed)
    if loader.batch_size is not None:
        batching = {
            'batch_size': loader.batch_size,
            'sampler': sampler,
            # A process whose share is less than a batch has that one.
            'drop_last': _length(sampler) >= loader.batch_size,
        }
    elif loader.batch_sampler is None:  # an index stands for a batch
        batching = {'batch_size': None, 'sampler': sampler}
    else:
        theirs = loader.batch_sampler if before is None else before
        batching = {'batch_sampler': _own_batch_sampler(loader, theirs, sampler)}
    return DataLoader(
        dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator().manual_seed(seed),
        **batching,
    )


class _Passes(DefaultSampler):
    """Several passes over a dataset, each in another order: enough to fill batches of images that
    are alike, and not endless where they never fill."""

    count = 10

    def __iter__(self) -> Iterator[int]:
        for number in range(self.count):
            self.set_epoch(number)
            yield from super().__iter__()


def _own_sampler(loader: DataLoader, seed: int) -> Any:
    """A shuffling sampler; a copy of the training's where that one may choose among the images."""
    dataset = loader.dataset
    theirs = getattr(loader.batch_sampler, 'sampler', loader.sampler)
    usual = (DefaultSampler, InfiniteSampler, RandomSampler, SequentialSampler)
    if not isinstance(theirs, usual) and (own := _copy(theirs, dataset)) is not None:
        return own
    special = loader.batch_size is None and loader.batch_sampler is not None
    return (_Passes if special else DefaultSampler)(dataset, shuffle=True, seed=seed)


def _own_batch_sampler(loader: DataLoader, theirs: Any, sampler: Any) -> Any:
    """A copy of the training's batch sampler that draws from ``sampler``."""
    own = _copy(theirs, loader.dataset, (getattr(theirs, 'sampler', None), sampler))
    if own is not None:
        return own
    size = getattr(theirs, 'batch_size', None)
    if type(size) is not int:
        size = _length(sampler) / max(1, _length(theirs))
        size = max(1, round(size)) if math.isfinite(size) else 1
    return BatchSampler(sampler, size, drop_last=False)


def _copy(sampler: Any, dataset: Any, instead: tuple[Any, Any] | None = None) -> Any:
    """A deep copy that shares the data sets and has another object ``instead`` of one of its
    own; None if there is no copy, as of a running iterator."""
    same, sets = {}, [dataset]
    while sets:
        found = sets.pop()
        if id(found) not in same and isinstance(found, Dataset):
            same[id(found)] = found
            sets += [getattr(found, 'dataset', None), *getattr(found, 'datasets', ())]
    if instead is not None and instead[0] is not None:
        same[id(instead[0])] = instead[1]
    try:
        return copy.deepcopy(sampler, same)
    except Exception:  # any class may fail in its own way
        return None


def _length(sampler: Any) -> float:
    """How many images this process draws; infinite if the sampler does not say."""
    try:
        return len(sampler)
    except (TypeError, NotImplementedError):
        return math.inf


def calibration_batches(runner: Runner, count: int, seed: int, before: Any = None) -> Iterator[Any]:
    """``count`` training batches, fewer if the dataset is shorter; as many on every rank."""
    check_batches(runner)
    batches = iter(calibration_loader(runner.train_dataloader, seed, before))
    for _ in range(count):
        batch = next(batches, None)
        # A rank that went on alone would wait for the others in SyncBN.
        if not all(all_gather_object(batch is not None)):
            return
        yield batch


def calibration_forward(runner: Runner) -> Callable[[Any], None]:
    """A function that does with a batch what training does, without the step.

    A copy of the preprocessor is used: some keep a state, such as the present size of images.
    """
    model: Any = unwrap(runner.model)
    preprocessor = copy.deepcopy(model.data_preprocessor)

    def forward(batch: Any) -> None:
        with runner.optim_wrapper.optim_context(model):
            model._run_forward(preprocessor(batch, True), mode='loss')

    return forward


#: How many batches :func:`mean_over_losses` takes.
LOSSES = 4


def mean_over_losses(
    runner: Runner, measure: Callable[[Tensor], Tensor], seed: int, before: Any = None
) -> Tensor | None:
    """The mean of what ``measure`` makes of the losses of a few training batches, of which training
    notices nothing. Every process must call it.

    The model runs as in training but in full precision, and nothing of what the forwards change
    in it stays.

    Args:
        runner: Holds the model and the data.
        measure: Takes a loss with its graph; what it returns has the same shape each time.
        seed: Of the batches.
        before: See :func:`batch_sampler_before`.

    Returns:
        The mean over batches and processes; None where no batch can be drawn.
    """
    if not can_draw(runner):
        return None
    model: Any = unwrap(runner.model)
    total, count = None, 0
    preprocessor = copy.deepcopy(model.data_preprocessor)
    with random_state_kept(seed), state_kept(model), torch.enable_grad():
        for batch in calibration_batches(runner, LOSSES, seed, before):
            losses = model._run_forward(preprocessor(batch, True), mode='loss')
            value = measure(model.parse_losses(losses)[0])
            total, count = value if total is None else total + value, count + 1
    if total is None:
        return None
    mean = total / count
    all_reduce(mean, 'mean')
    return mean
