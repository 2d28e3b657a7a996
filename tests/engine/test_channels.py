"""What a run says while it trains: visualiser backends, the log."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.registry import VISBACKENDS
from mmengine.visualization import BaseVisBackend

from dyrep_mm.engine.channels import labels_of, scalars_of, structure_image
from dyrep_mm.evolution.record import Entry
from support.runs import PRUNING, dyrep, runner

NAMES = {
    *('parameters', 'multiply_adds', 'average_parameters', 'average_multiply_adds', 'blocks'),
    *('branches', 'grown_score', 'runner_up_score', 'step_seconds', 'update_seconds'),
}


@VISBACKENDS.register_module(force=True)
class Told(BaseVisBackend):
    """Keeps what it is told."""

    def __init__(self, save_dir: str):
        super().__init__(save_dir)
        self.scalars: list[tuple[int, dict]] = []
        self.images: list[tuple[int, str, np.ndarray]] = []

    def _init_env(self) -> None:
        pass

    @property
    def experiment(self) -> Told:
        return self

    def add_scalars(self, scalar_dict, step=0, file_path=None, **kwargs) -> None:
        self.scalars.append((step, dict(scalar_dict)))

    def add_image(self, name, image, step=0, **kwargs) -> None:
        self.images.append((step, name, image))


def told(work_dir: Path, *backends: str, **more):
    """A run with these visualiser backends, after it trained."""
    backends = [{'type': name} for name in backends]
    visualizer = {'type': 'Visualizer', 'vis_backends': backends, 'name': str(work_dir)}
    run = runner(work_dir, [dict(PRUNING)], visualizer=visualizer, **more)
    run.train()
    return run


@pytest.mark.parametrize('unit', [{'iters': 7}, {'epochs': 5}])
def test_every_backend_is_told_of_every_update(tmp_path, unit):
    """With the step that the loss has: complete iterations, also where epochs are counted."""
    run = told(tmp_path, 'Told', **unit)
    (backend,) = run.visualizer._vis_backends.values()
    journal = dyrep(run).journal
    own = [(s, said) for s, said in backend.scalars if any('dyrep' in name for name in said)]
    steps = [2, 4, 6] if 'iters' in unit else [8, 16]
    assert [step for step, _ in own] == [step for step, *_ in backend.images] == steps
    for (_, said), entry in zip(own, journal, strict=True):
        assert said == scalars_of(entry)
        assert said['dyrep/parameters'] == entry.parameters
    assert own[0][1].keys() == {f'dyrep/{name}' for name in NAMES}
    # The loss goes on, and by steps that never fall, which W&B wants.
    everything = [step for step, _ in backend.scalars]
    assert everything == sorted(everything)
    assert len(everything) == len(own) + run.iter
    for _, name, image in backend.images:
        assert '/' not in name
        assert image.dtype == np.uint8
        assert image.shape[2] == 3


def test_files_of_the_local_backend(tmp_path):
    """Updates have lines of their own among the scalars, no part in the log of training, and one
    image each."""
    run = told(tmp_path, 'LocalVisBackend', iters=5)
    folder = Path(run._log_dir) / 'vis_data'
    lines = [json.loads(line) for line in (folder / 'scalars.json').read_text().splitlines()]
    own = [line for line in lines if 'dyrep/blocks' in line]
    assert [line['step'] for line in own] == [2, 4]
    # mmdet's reader takes a line for one of training where its first name has no slash.
    assert all(list(line)[-1] == 'step' for line in own)
    assert all(name.startswith('dyrep/') for line in own for name in list(line)[:-1])
    (log,) = folder.glob('2*.json')
    assert 'dyrep' not in log.read_text()
    images = sorted((folder / 'vis_image').iterdir())
    assert [image.name for image in images] == ['dyrep_structure_2.png', 'dyrep_structure_4.png']
    assert all(cv2.imread(str(image)) is not None for image in images)


def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = told(tmp_path, 'TensorboardVisBackend', iters=5)
    events = EventAccumulator(str(Path(run._log_dir) / 'vis_data')).Reload()
    assert {f'dyrep/{name}' for name in NAMES} <= set(events.Tags()['scalars'])
    assert [e.step for e in events.Scalars('dyrep/blocks')] == [2, 4]
    assert [e.step for e in events.Images('dyrep_structure')] == [2, 4]


def test_mmengines_own_log_is_what_it_was(tmp_path):
    """The message hub holds, and its lines tell, nothing of updates."""
    run = told(tmp_path / 'own', iters=5)
    plain = runner(tmp_path / 'plain', iters=5)
    plain.train()
    assert run.message_hub.log_scalars.keys() == plain.message_hub.log_scalars.keys()


def test_the_log_of_a_run(tmp_path):
    run = runner(tmp_path, [dict(PRUNING)], iters=5, log_level='INFO')
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    run.logger.addHandler(handler)
    run.train()
    own = [line for line in lines if re.match('DyRep(: average| update)', line)]
    first, second, last = own
    assert re.match(
        r'DyRep update 1 at iteration 2: grew (\S+) \(score \S+, runner-up (?!\1)\S+ \S+\) to kxk, '
        r'.*\n    1 block, \d branches, \S+ M parameters \(average \S+, plain \S+\), '
        r'\S+ G multiply-adds \(average \S+, plain \S+\), '
        r'\S+ times the cost of plain, until now \S+ s a step \(plain \S+\)$',
        first,
    )
    assert re.search(r'pruned \S+ \(\S+\).* of \S+ \(mean \S+, spread \S+, threshold 0\)', second)
    assert last.startswith('DyRep: average of 5 iterations: ')
    assert last.endswith(' times the time of plain training')


def test_the_image_has_a_row_for_each_block():
    """Also for one that lost its last branch, and for numbers that are none."""
    entry = Entry(3, 'epoch', 15, {'a.conv1': ['kxk', '1x1']}, {'a.conv2': ['1x1']})
    one = {'a.conv1': {'1x1': 0.01, 'kx1': 0.02}}
    odd = {'1x1': float('inf'), 'kx1': float('nan')}
    heights = [
        structure_image(Entry(3, 'epoch', 15), rows).shape[0]
        for rows in ({}, one, {**one, 'b': {'1x1': 0.0}}, {**one, 'b': {}, 'c': odd})
    ]
    assert heights[0] == heights[1] < heights[2] < heights[3]
    assert structure_image(entry, one).shape[0] == heights[2]


def test_labels_are_short():
    """Without what all outer blocks begin with; what lies in a block has an arrow for each."""
    inner = 'net.layer1.conv.branches.1x1-kxk.conv'
    paths = ['net.layer1.conv', inner, f'{inner}.branches.kxk', 'net.layer2.conv']
    arrow = '\N{DOWNWARDS ARROW WITH TIP RIGHTWARDS}'
    expected = ['layer1.conv', f'{arrow} 1x1-kxk', f'{arrow}{arrow} kxk', 'layer2.conv']
    assert labels_of(paths) == expected
    assert labels_of(['backbone.conv1']) == ['conv1']
    assert labels_of([]) == []
