"""Images in memory are those of the data set, cropped and flipped a batch at a time."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from mmengine.runner import Runner

from dyrep_mm import ImagesInMemory
from dyrep_mm.errors import DyRepError

READ = [{'type': 'LoadImageFromFile'}]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """12 images in 3 classes; each pixel says where it is."""
    root = tmp_path_factory.mktemp('images')
    place = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for index in range(12):
        file = root / 'train' / 'abc'[index % 3] / f'{index}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        image = np.stack([place + 100, np.full_like(place, index), place + 1], axis=2)
        cv2.imwrite(str(file), image)
    return root


def images(folder, **options):
    source = {'type': 'CustomDataset', 'data_root': str(folder), 'data_prefix': 'train'}
    return ImagesInMemory({**source, 'pipeline': READ}, **options)


@pytest.mark.parametrize('test_mode', [False, True])
def test_every_image_has_its_label(folder, test_mode):
    batch = images(folder, test_mode=test_mode).__getitems__(range(12))
    assert batch['inputs'].shape == (12, 3, 8, 8)
    assert batch['inputs'].dtype == torch.uint8
    assert len(batch['data_samples']) == (12 if test_mode else 1)
    labels = torch.cat([sample.gt_label for sample in batch['data_samples']])
    assert torch.equal(batch['inputs'][:, 1, 0, 0] % 3, labels.byte())


def test_crops_and_flips_are_those_of_the_padded_image(folder):
    """Each image is one of all crops, mirrored or not; all offsets and both sides come."""
    data = images(folder, padding=1, flip=True)
    plain = images(folder)
    seen = set()
    for _ in range(40):
        batch = data.__getitems__(range(12))['inputs']
        for index in range(12):
            padded = torch.nn.functional.pad(plain[index]['inputs'][0], (1, 1, 1, 1))
            crops = {
                (y, x, mirrored): window.flip(2) if mirrored else window
                for y in range(3)
                for x in range(3)
                for mirrored in (False, True)
                for window in [padded[:, y : y + 8, x : x + 8]]
            }
            (found,) = (key for key, crop in crops.items() if torch.equal(crop, batch[index]))
            seen.add(found)
    assert len(seen) == 18


def test_the_random_stream_of_torch_decides(folder):
    data = images(folder, padding=2, flip=True)
    torch.manual_seed(1)
    first = data.__getitems__(range(12))['inputs']
    torch.manual_seed(1)
    assert torch.equal(data.__getitems__(range(12))['inputs'], first)


def test_a_loader_of_mmengine_takes_batches_as_they_are(folder):
    loader = Runner.build_dataloader(
        {
            'batch_size': 5,
            'num_workers': 0,
            'sampler': {'type': 'DefaultSampler', 'shuffle': False},
            'collate_fn': {'type': 'dyrep_mm.as_it_is'},
            'dataset': {
                'type': 'dyrep_mm.ImagesInMemory',
                'dataset': {
                    **{'type': 'CustomDataset', 'data_root': str(folder), 'data_prefix': 'train'},
                    'pipeline': READ,
                },
            },
        },
        seed=0,
    )
    assert loader.dataset.metainfo['classes'] == ('a', 'b', 'c')
    assert [len(batch['inputs']) for batch in loader] == [5, 5, 2]


def test_images_of_two_sizes_are_refused(folder, tmp_path):
    for size in (8, 9):
        file = tmp_path / 'train' / 'a' / f'{size}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.zeros((size, size, 3), np.uint8))
    with pytest.raises(DyRepError, match='images of one size'):
        images(tmp_path)
