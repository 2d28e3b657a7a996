"""tools/digits.py: what it writes, and what a second run does."""

import contextlib
import importlib.util
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from support.processes import ROOT

pytest.importorskip('sklearn')


def _load_tool():
    path = ROOT / 'tools' / 'digits.py'
    spec = importlib.util.spec_from_file_location('digits_tool', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


digits = _load_tool()
SMALL = digits.Options(digits.FORMS, size=64, train=6, val=4, seed=3)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'digits'
    assert digits.write_dataset(out, SMALL)
    return out


def _annotations(dataset, split):
    return json.loads((dataset / 'annotations' / f'instances_{split}.json').read_text())


def _bytes(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def _fails(capsys, *argv):
    """Runs the command line, which must fail, and returns its last words."""
    with pytest.raises(SystemExit) as failure:
        digits.main([str(arg) for arg in argv])
    assert failure.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ')
    assert error.count('\n') == 1
    return error


def test_no_scan_is_in_both_splits(dataset):
    split = digits.split_sources(1797, seed=3)
    assert sorted(np.concatenate(list(split.values()))) == list(range(1797))
    for name, pool in split.items():
        used = {box['source'] for box in _annotations(dataset, name)['annotations']}
        assert used
        assert used <= set(pool)


@pytest.mark.parametrize('split', digits.SPLITS)
def test_boxes_are_tight_and_agree_with_the_label_maps(dataset, split):
    coco = _annotations(dataset, split)
    assert len(coco['images']) == getattr(SMALL, split)
    names = {category['id']: category['name'] for category in coco['categories']}
    assert names == {digit + 1: str(digit) for digit in range(10)}
    for image in coco['images']:
        labels = np.array(Image.open(dataset / 'labels' / split / f'{image["id"]:06d}.png'))
        photo = Image.open(dataset / 'images' / split / image['file_name'])
        assert labels.shape == photo.size == (image['height'], image['width']) == (64, 64)
        boxes = [box for box in coco['annotations'] if box['image_id'] == image['id']]
        assert 1 <= len(boxes) <= digits.MAX_DIGITS
        for box in boxes:
            x, y, width, height = box['bbox']
            assert 0 <= x < x + width <= 64
            assert 0 <= y < y + height <= 64
            digit = labels[y : y + height, x : x + width]
            assert set(np.unique(digit)) <= {0, box['category_id']}
            for edge in (digit[0], digit[-1], digit[:, 0], digit[:, -1]):
                assert edge.any()
            assert np.count_nonzero(digit) == box['area']
            digit[:] = 0
        assert not labels.any(), 'a digit without a box'


def test_labels_are_those_of_the_scans(dataset):
    targets = digits.load_sources().targets
    for box in _annotations(dataset, 'train')['annotations']:
        assert box['category_id'] == targets[box['source']] + 1


def test_crops_lie_in_a_folder_per_class(dataset):
    for split in digits.SPLITS:
        folders = sorted(path.name for path in (dataset / 'crops' / split).iterdir())
        assert folders == list('0123456789')
        crops = list((dataset / 'crops' / split).glob('*/*.jpg'))
        assert len(crops) == getattr(SMALL, split) * digits.CROPS_PER_SCENE
        assert Image.open(crops[0]).size == (21, 21)


def test_pycocotools_reads_the_annotations(dataset):
    coco_api = pytest.importorskip('pycocotools.coco')
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_api.COCO(str(dataset / 'annotations' / 'instances_val.json'))
    assert len(coco.getImgIds()) == SMALL.val
    assert min(coco.getAnnIds()) == 1


def test_same_options_give_the_same_bytes(dataset, tmp_path):
    digits.write_dataset(tmp_path / 'again', SMALL)
    assert _bytes(tmp_path / 'again') == _bytes(dataset)


def test_more_scenes_keep_the_first_ones(dataset, tmp_path):
    digits.write_dataset(tmp_path / 'more', digits.Options(digits.FORMS, 64, 7, 4, seed=3))
    more = _bytes(tmp_path / 'more')
    images = {path: data for path, data in _bytes(dataset).items() if path.suffix != '.json'}
    assert len(more) > len(images)
    assert images.items() <= more.items()


def test_second_run_changes_nothing(tmp_path, capsys):
    argv = ['--out', str(tmp_path / 'd'), '--size', '64', '--train', '2', '--val', '1']
    argv += ['--forms', 'detection']
    digits.main(argv)
    assert 'written' in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    digits.main(argv)
    assert 'nothing to do' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before
    assert [path.name for path in tmp_path.iterdir()] == ['d'], 'a temporary folder is left'
    assert not (tmp_path / 'd' / 'labels').exists()
    assert not (tmp_path / 'd' / 'crops').exists()

    assert 'other options (val)' in _fails(capsys, *argv, '--val', 2)
    digits.main([*argv, '--val', '2', '--overwrite'])
    assert len(_annotations(tmp_path / 'd', 'val')['images']) == 2


def test_a_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / 'thesis.txt').write_text('years of work')
    error = _fails(capsys, '--out', tmp_path, '--overwrite')
    assert str(tmp_path) in error
    assert 'choose another --out' in error
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.txt']


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, '_write_crops', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        digits.write_dataset(tmp_path / 'd', SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('option', 'value', 'says'),
    [
        ('--size', 8, 'size must be at least 32, got 8'),
        ('--train', 0, 'train must be at least 1, got 0'),
        ('--val', -1, 'val must be at least 1, got -1'),
        ('--seed', -5, 'seed must be at least 0, got -5'),
    ],
)
def test_bad_options_end_in_one_sentence(tmp_path, capsys, option, value, says):
    assert says in _fails(capsys, '--out', tmp_path / 'd', option, value)
    assert not list(tmp_path.iterdir())


def test_missing_scikit_learn_ends_in_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    assert 'scikit-learn' in _fails(capsys, '--out', tmp_path / 'd')
