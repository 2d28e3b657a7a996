"""Writes a small real dataset: handwritten digits on photographs.

The digits (8x8 scans, 1797 of them) and the two photographs come with scikit-learn, so nothing is
downloaded. A scene is a crop of a photograph with digits pasted at random scales and positions.
The digits are split into train and val before any scene is made: no scan is seen in both.

    python tools/digits.py --out data/digits

writes, according to ``--forms``::

    data/digits/
      digits.json                          the options it was written with
      images/{train,val}/*.jpg             detection and segmentation: the scenes
      annotations/instances_{train,val}.json   detection: COCO format
      labels/{train,val}/*.png             segmentation: 0 is background, digit d is d + 1
      crops/{train,val}/{0..9}/*.jpg       classification: small scenes of one digit
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dyrep_mm.engine.progress import track

FORMS = ('detection', 'segmentation', 'classification')
SPLITS = ('train', 'val')
MANIFEST = 'digits.json'
VAL_SHARE = 0.2  # of the scans
MAX_DIGITS = 4  # in a scene
DIGIT_SIDE = (1 / 5, 1 / 2)  # of the side of a scene, before the blank margin is cut off
CROPS_PER_SCENE = 4
CROP = 1 / 3  # side of a crop, of the side of a scene
CROP_DIGIT_SIDE = (3 / 5, 1)  # of the side of a crop
EDGE = 0.5  # opacity from which a pixel belongs to the digit
DIMMING = 0.45  # of the photographs, for the bright INK to stand out: meant to be learnt in minutes
INK = (175, 255)  # of each colour channel
PLACEMENTS = 20  # attempts to find room for a digit


@dataclasses.dataclass(frozen=True)
class Options:
    """What the data depends on: the same options give the same bytes.

    Attributes:
        forms: Names out of ``FORMS``.
        size: Side of a scene, in pixels. Classification crops have a third of it.
        train: Number of scenes for training.
        val: Number of scenes for validation.
        seed: Seed of the split and of every scene.
    """

    forms: tuple[str, ...] = ('detection', 'classification')
    size: int = 192
    train: int = 400
    val: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.forms or not set(self.forms) <= set(FORMS):
            raise ValueError(f'forms must be some of {FORMS}, got {self.forms}')
        for name, least in (('size', 32), ('train', 1), ('val', 1), ('seed', 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f'{name} must be at least {least}, got {value}')
        # The order in which forms are asked for does not matter.
        object.__setattr__(self, 'forms', tuple(form for form in FORMS if form in self.forms))


class Sources(NamedTuple):
    """The raw material: ``scans`` is (1797, 8, 8) in [0, 1], with one ``target`` each."""

    scans: np.ndarray
    targets: np.ndarray
    photos: list[np.ndarray]


class Digit(NamedTuple):
    """One pasted digit; ``box`` is its tight (x, y, width, height), ``area`` its pixels."""

    target: int
    source: int
    box: tuple[int, int, int, int]
    area: int


class Scene(NamedTuple):
    """An RGB ``image`` (size, size, 3), its ``labels`` (size, size) and its digits."""

    image: np.ndarray
    labels: np.ndarray
    digits: list[Digit]


def load_sources() -> Sources:
    """Reads the scans and photographs that come with scikit-learn."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    return Sources(digits.images / 16, digits.target, load_sample_images().images)


def split_sources(count: int, seed: int) -> dict[str, np.ndarray]:
    """Splits the indices of ``count`` scans into disjoint train and val indices."""
    order = np.random.default_rng(seed).permutation(count)
    held_out = round(count * VAL_SHARE)
    return {'train': np.sort(order[held_out:]), 'val': np.sort(order[:held_out])}


def make_scene(
    rng: np.random.Generator,
    sources: Sources,
    pool: np.ndarray,
    size: int,
    max_digits: int,
    digit_side: tuple[float, float],
) -> Scene:
    """Pastes one to ``max_digits`` digits, without overlap, on a crop of a photograph.

    Args:
        rng: Generator that decides everything about the scene.
        sources: Scans and photographs.
        pool: Indices of the scans that may be used.
        size: Side of the scene, in pixels.
        max_digits: Most digits to paste; fewer where there is no room.
        digit_side: Smallest and largest side of a pasted scan, as shares of ``size``.

    Returns:
        The scene; a digit's box and its labels come from one mask, so the two always agree.
    """
    image = _photo_crop(rng, sources.photos, size)
    labels = np.zeros((size, size), np.uint8)
    digits = []
    sides = np.rint(np.multiply(digit_side, size)).astype(int)
    for source in rng.choice(pool, rng.integers(1, max_digits + 1), replace=False):
        opacity = _enlarge(sources.scans[source], rng.integers(*sides, endpoint=True))
        mask = opacity > EDGE
        height, width = mask.shape
        for _ in range(PLACEMENTS):
            x, y = rng.integers(size - width + 1), rng.integers(size - height + 1)
            window = np.s_[y : y + height, x : x + width]
            if not labels[window].any():
                break
        else:
            continue
        ink = rng.uniform(*INK, 3)
        image[window] += opacity[..., None] * (ink - image[window])
        target = int(sources.targets[source])
        labels[window][mask] = target + 1
        box = (int(x), int(y), width, height)
        digits.append(Digit(target, int(source), box, int(mask.sum())))
    return Scene(image.round().astype(np.uint8), labels, digits)


def _photo_crop(rng: np.random.Generator, photos: list[np.ndarray], size: int) -> np.ndarray:
    """Cuts a random square out of a random photograph, dimmed, in floats, of side ``size``."""
    from PIL import Image

    photo = photos[rng.integers(len(photos))]
    height, width = photo.shape[:2]
    side = rng.integers(min(size, height, width), min(height, width), endpoint=True)
    y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
    crop = Image.fromarray(photo[y : y + side, x : x + side])
    return np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC), np.float64) * DIMMING


def _enlarge(scan: np.ndarray, side: int) -> np.ndarray:
    """Scales a scan to ``side`` and cuts it to the box of its ink; returns opacities."""
    from PIL import Image

    grey = Image.fromarray((scan * 255).astype(np.uint8))
    large = np.asarray(grey.resize((side, side), Image.Resampling.BICUBIC), np.float64)
    opacity = np.clip(large / 255 * 2 - 0.5, 0, 1)  # strokes opaque, their holes open
    rows, columns = np.nonzero(opacity > EDGE)
    return opacity[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def write_dataset(out: Path, options: Options, overwrite: bool = False) -> bool:
    """Writes the dataset to ``out``, whole or not at all.

    Args:
        out: Folder to write; one that this function did not write is never touched.
        options: What to write.
        overwrite: Whether to replace a dataset written with other options.

    Returns:
        Whether anything was written: ``False`` where ``out`` holds this very dataset.

    Raises:
        ValueError: If ``out`` is something else, or was written with other options.
    """
    out = out.resolve()
    wanted = json.loads(json.dumps(dataclasses.asdict(options)))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        found = _read_manifest(out)
        if found == wanted:
            return False
        if not overwrite:
            differ = [key for key in wanted if found.get(key) != wanted[key]]
            raise ValueError(
                f'{out} was written with other options ({", ".join(differ)}): '
                'give --overwrite to replace it or choose another --out'
            )
    sources = load_sources()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as folder:
        new, old = Path(folder, 'new'), Path(folder, 'old')
        new.mkdir()
        for split, pool in split_sources(len(sources.scans), options.seed).items():
            if {'detection', 'segmentation'} & set(options.forms):
                _write_scenes(new, split, sources, pool, options)
            if 'classification' in options.forms:
                _write_crops(new, split, sources, pool, options)
        (new / MANIFEST).write_text(json.dumps(wanted, indent=2) + '\n')
        if out.exists():
            out.rename(old)
        new.rename(out)
    return True


def _read_manifest(out: Path) -> dict:
    try:
        manifest = json.loads((out / MANIFEST).read_text())
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict):
        raise ValueError(f'{out} exists and is not a dataset of this tool: choose another --out')
    return manifest


def _scene_rng(options: Options, split: str, form: str, index: int) -> np.random.Generator:
    # A scene of its own seed does not depend on how many others there are.
    return np.random.default_rng([options.seed, SPLITS.index(split), FORMS.index(form), index])


def _write_scenes(
    root: Path, split: str, sources: Sources, pool: np.ndarray, options: Options
) -> None:
    """Writes images, and their COCO annotations and label maps as far as asked for."""
    images, annotations = [], []
    for index in track(range(getattr(options, split)), f'drawing scenes to {split}'):
        rng = _scene_rng(options, split, 'detection', index)
        scene = make_scene(rng, sources, pool, options.size, MAX_DIGITS, DIGIT_SIDE)
        name = f'{index:06d}.jpg'
        _save(root / 'images' / split / name, scene.image)
        if 'segmentation' in options.forms:
            _save(root / 'labels' / split / f'{index:06d}.png', scene.labels)
        images.append(
            {'id': index, 'file_name': name, 'width': options.size, 'height': options.size}
        )
        for digit in scene.digits:
            annotations.append(
                {
                    'id': len(annotations) + 1,  # COCO takes an id of 0 for "no match"
                    'image_id': index,
                    'category_id': digit.target + 1,
                    'bbox': digit.box,
                    'area': digit.area,
                    'iscrowd': 0,
                    'source': digit.source,
                }
            )
    if 'detection' in options.forms:
        categories = [{'id': digit + 1, 'name': str(digit)} for digit in range(10)]
        content = {'images': images, 'annotations': annotations, 'categories': categories}
        path = root / 'annotations' / f'instances_{split}.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))


def _write_crops(
    root: Path, split: str, sources: Sources, pool: np.ndarray, options: Options
) -> None:
    """Writes small scenes of one digit that fills most of them, in a folder per class."""
    for digit in range(10):
        (root / 'crops' / split / str(digit)).mkdir(parents=True)  # a class may stay empty
    side = round(options.size * CROP)
    count = getattr(options, split) * CROPS_PER_SCENE
    for index in track(range(count), f'drawing digits to {split}'):
        rng = _scene_rng(options, split, 'classification', index)
        scene = make_scene(rng, sources, pool, side, 1, CROP_DIGIT_SIDE)
        _save(
            root / 'crops' / split / str(scene.digits[0].target) / f'{index:06d}.jpg', scene.image
        )


def _save(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)  # JPEG only; label maps stay exact


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    defaults = Options()
    parser = argparse.ArgumentParser(description='Writes handwritten digits on photographs.')
    parser.add_argument('--out', type=Path, default=Path('data/digits'), help='folder to write')
    parser.add_argument('--forms', nargs='+', choices=FORMS, default=defaults.forms)
    parser.add_argument('--size', type=int, default=defaults.size, help='side of a scene, pixels')
    parser.add_argument('--train', type=int, default=defaults.train, help='scenes for training')
    parser.add_argument('--val', type=int, default=defaults.val, help='scenes for validation')
    parser.add_argument('--seed', type=int, default=defaults.seed)
    parser.add_argument('--overwrite', action='store_true', help='replace other options')
    args = parser.parse_args(argv)
    try:
        options = Options(tuple(args.forms), args.size, args.train, args.val, args.seed)
        written = write_dataset(args.out, options, args.overwrite)
    except ImportError as error:
        parser.exit(1, f'error: {error}: pip install scikit-learn pillow\n')
    except (ValueError, OSError) as error:
        parser.exit(1, f'error: {error}\n')
    print(f'{args.out}: {"written" if written else "already there, nothing to do"}')


if __name__ == '__main__':
    main()
