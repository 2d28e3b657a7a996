"""Small images in memory, a batch at a time: for networks that train faster than files are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmpretrain.registry import DATASETS as SOURCES
from mmpretrain.structures import DataSample
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from dyrep_mm.errors import DyRepError
from dyrep_mm.registry import DATASETS, FUNCTIONS


@FUNCTIONS.register_module()
def as_it_is(batch: Any) -> Any:
    """The ``collate_fn`` of a data set that makes batches itself."""
    return batch


@DATASETS.register_module()
class ImagesInMemory(Dataset):
    """All images of a classification data set, read once, cropped and flipped a batch at a time.

    Images of 32x32 pixels cost more to read, crop and pack one by one than a small network costs to
    train on them. A batch of this data set costs about as much as ten images of theirs. It needs
    ``collate_fn=dict(type='dyrep_mm.as_it_is')`` in its loader, and draws from the random stream of
    torch in the process that loads, so ``num_workers=0``.

    Args:
        dataset: Config of a data set of mmpretrain whose items hold ``img`` (h, w, 3), all of one
            size, and ``gt_label``: its pipeline reads images and packs nothing.
        padding: Pixels of black on every side, of which a random crop of the size of the image is
            taken; 0 takes no crop (He et al. 2015, section 4.2).
        flip: Mirror every second image, at random.
        test_mode: Each image has a data sample of its own, as validation needs; otherwise one data
            sample holds the labels of the batch, (n,).

    Raises:
        DyRepError: the images have different sizes.
    """

    def __init__(
        self, dataset: dict, padding: int = 0, flip: bool = False, test_mode: bool = False
    ):
        source = SOURCES.build({'_scope_': 'mmpretrain', **dataset})
        items = [source[index] for index in range(len(source))]
        if len({item['img'].shape for item in items}) > 1:
            raise DyRepError('ImagesInMemory needs images of one size')
        stacked = np.stack([item['img'] for item in items])
        # Channels stay last in memory, as files have them: crops copy longer runs, and convs on a
        # GPU keep the format.
        images = torch.from_numpy(stacked).permute(0, 3, 1, 2)
        self.size = images.shape[2:]
        self.images = pad(images, (padding,) * 4)
        self.labels = torch.tensor([item['gt_label'] for item in items])
        self.padding, self.flip, self.test_mode = padding, flip, test_mode
        self.metainfo = source.metainfo

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A batch: ``inputs`` (n, 3, h, w) of bytes, and ``data_samples``."""
        chosen = torch.as_tensor(indices)
        labels = self.labels[chosen]
        parts = labels.split(1) if self.test_mode else [labels]
        return {
            'inputs': self._images(chosen),
            'data_samples': [DataSample().set_gt_label(part) for part in parts],
        }

    def _images(self, chosen: Tensor) -> Tensor:
        count = len(chosen)
        if self.padding:
            y, x = torch.randint(2 * self.padding + 1, (2, count))
            windows = self.images.unfold(2, self.size[0], 1).unfold(3, self.size[1], 1)
            images = windows[chosen, :, y, x]  # one copy: the larger images are not gathered first
        else:
            images = self.images[chosen]
        if self.flip:
            mirrored = torch.rand(count) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images
