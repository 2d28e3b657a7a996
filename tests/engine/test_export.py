"""ONNX files of real models, run in onnxruntime by themselves."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor, nn

import dyrep_mm
from dyrep_mm.engine.converter import build_model, relative_difference
from dyrep_mm.engine.export import PoolingByProducts, check_onnx, export_onnx, part_of
from dyrep_mm.engine.passes import tensors_in
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Record
from support.checks import assert_same
from support.nets import randomise
from support.processes import run_tool
from support.runs import resnet_config

onnx = pytest.importorskip('onnx', reason='onnx is not installed')
runtime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')

BN = {'type': 'BN'}
RESNET = {
    'type': 'ResNet',
    'depth': 18,
    'stem_channels': 8,
    'base_channels': 8,
    'norm_cfg': BN,
    'norm_eval': False,
}
FCOS = {
    'type': 'FCOS',
    'backbone': RESNET,
    'neck': {'type': 'FPN', 'in_channels': [8, 16, 32, 64], 'out_channels': 8, 'num_outs': 5},
    'bbox_head': {
        'type': 'FCOSHead',
        'num_classes': 3,
        'in_channels': 8,
        'feat_channels': 8,
        'norm_cfg': BN,
    },
}


def segmentor(kind, **head):
    common = {'num_classes': 3, 'channels': 6, 'norm_cfg': BN, 'in_channels': 64, 'in_index': 3}
    return {
        'type': 'EncoderDecoder',
        'data_preprocessor': {'type': 'SegDataPreProcessor', 'mean': [127.0] * 3, 'std': [9.0] * 3},
        'backbone': {**RESNET, 'type': 'ResNetV1c'},
        'decode_head': {**common, 'type': kind, **head},
        'test_cfg': {'mode': 'whole'},
    }


def built(model: dict, scope: str) -> nn.Module:
    return randomise(build_model(Config({'default_scope': scope, 'model': model})))


def classifier(tmp_path) -> nn.Module:
    return randomise(build_model(resnet_config(tmp_path / 'run', iters=8)))


MODELS = {
    'classifier': (classifier, ('batch', 'size'), ['logits'], lambda m, x: m(x)),
    'detector': (
        lambda _: built(FCOS, 'mmdet'),
        ('batch', 'size'),
        [f'features_{i}' for i in range(5)],
        lambda m, x: m.extract_feat(x),
    ),
    'segmentor': (
        lambda _: built(segmentor('FCNHead'), 'mmseg'),
        ('batch', 'size'),
        ['logits'],
        lambda m, x: m(x),
    ),
    # Its maps of 4x4 are pooled to 3x3, for which ONNX has no operator.
    'PSPNet': (
        lambda _: built(segmentor('PSPHead', pool_scales=(1, 2, 3)), 'mmseg'),
        ('batch',),
        ['logits'],
        lambda m, x: m(x),
    ),
}


@pytest.mark.parametrize('kind', MODELS)
def test_the_file_computes_what_the_model_does(tmp_path, kind):
    build, dynamic, names, run = MODELS[kind]
    model, out, said = build(tmp_path), tmp_path / 'out.onnx', []
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    about = {'source': 'epoch_1.pth'}
    report = export_onnx(model, torch.randn(2, 3, 128, 128), out, about=about, say=said.append)
    assert (report.dynamic, report.outputs) == (dynamic, names)
    assert all(torch.equal(state[n], tensor) for n, tensor in model.state_dict().items())
    content = onnx.load(out)
    onnx.checker.check_model(content)
    props = {p.key: p.value for p in content.metadata_props}
    assert props['dyrep_mm.exported'] == report.what
    assert props['dyrep_mm.left_out'] == report.left_out
    assert props['dyrep_mm.source'] == 'epoch_1.pth'
    assert report.what in said[-1]
    assert report.left_out in said[-1]
    fixed = [line for line in said if 'fixed at 128x128' in line]
    assert len(fixed) == ('size' not in dynamic)
    # Numbers and sizes that the check of the export has not seen.
    session = runtime.InferenceSession(out, providers=['CPUExecutionProvider'])
    assert [output.name for output in session.get_outputs()] == names
    for shape in [(5, 3, 128, 128), (2, 3, 96, 224)][: len(dynamic)]:
        x = torch.randn(shape)
        got = [torch.from_numpy(array) for array in session.run(None, {'images': x.numpy()})]
        with torch.no_grad():
            expected = tensors_in(run(model, x))
        assert [t.shape for t in got] == [t.shape for t in expected]
        assert relative_difference(got, expected) < 1e-3


def test_what_is_left_out_is_said(tmp_path):
    part = part_of(built(FCOS, 'mmdet'))
    assert part.what == 'backbone and neck of FCOS'
    assert part.left_out == 'bbox_head and the choice of boxes, which mmdeploy exports'
    assert 'neck' not in part_of(built({**FCOS, 'neck': None}, 'mmdet')).what
    assert part_of(classifier(tmp_path)).what == 'logits of ImageClassifier'


class Small(BaseModel):
    """One conv, and what the subclasses make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.of(self.conv(inputs))

    def of(self, x: Tensor) -> Tensor:
        return x


class OfOneSize(Small):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(4, 16, 16))

    def of(self, x):
        return x + self.position


class CountsPlaces(Small):
    """A number of the trace, in the graph as a constant."""

    def of(self, x):
        return x * float(x.shape[-1])


class CountsImages(Small):
    def of(self, x):
        return x * float(len(x))


class Factors(Small):
    """By an operator that ONNX has not."""

    def of(self, x):
        return torch.linalg.svdvals(x)


@pytest.mark.parametrize(
    ('kind', 'dynamic', 'word'),
    [
        (Small, ('batch', 'size'), None),
        (OfOneSize, ('batch',), 'the model takes no other'),
        (CountsPlaces, ('batch',), 'onnxruntime differs by'),
        (CountsImages, ('size',), 'the number of images is fixed at 1: onnxruntime differs by'),
    ],
)
def test_what_holds_for_the_traced_images_alone_is_not_promised(tmp_path, kind, dynamic, word):
    said = []
    images = torch.randn(2, 3, 16, 16)
    report = export_onnx(kind(), images, tmp_path / 'out.onnx', say=said.append)
    assert report.dynamic == dynamic
    assert word is None or any(word in line for line in said)
    assert len(said) == 1 + (2 - len(dynamic))
    shape = runtime.InferenceSession(tmp_path / 'out.onnx').get_inputs()[0].shape
    assert shape[0] == ('batch' if 'batch' in dynamic else 1)
    assert shape[2:] == (['height', 'width'] if 'size' in dynamic else [16, 16])


def test_a_wrong_graph_is_refused_and_leaves_no_file(tmp_path, monkeypatch):
    right = torch.onnx.export

    def wrong(whole, *arguments, **options):
        with torch.no_grad():
            whole.model.conv.weight.mul_(1.01)
            right(whole, *arguments, **options)
            whole.model.conv.weight.div_(1.01)

    monkeypatch.setattr(torch.onnx, 'export', wrong)
    with pytest.raises(
        DyRepError, match=r'forward of Small cannot be exported.*differs by'
    ) as error:
        export_onnx(Small(), torch.randn(2, 3, 16, 16), tmp_path / 'out.onnx')
    assert '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_model_that_onnx_cannot_hold_gets_a_sentence(tmp_path, capfd):
    with pytest.raises(DyRepError, match='Factors cannot be exported to ONNX without') as error:
        export_onnx(Factors(), torch.randn(2, 3, 16, 16), tmp_path / 'out.onnx')
    assert 'svd' in str(error.value)
    assert '\n' not in str(error.value)
    assert capfd.readouterr() == ('', '')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['onnx', 'onnxruntime'])
def test_a_missing_package_gets_a_sentence(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DyRepError, match=f'needs {name}, which is not installed: pip install'):
        check_onnx()


@pytest.mark.parametrize(('n', 'bins'), [(4, 3), (7, 2), (10, 6), (5, 5), (2, 3)])
def test_pooling_by_products(n, bins):
    x = torch.randn(2, 3, n, n + 1, dtype=torch.float64)
    with PoolingByProducts():
        made = torch.nn.functional.adaptive_avg_pool2d(x, (bins, 2))
    assert_same(made, torch.nn.functional.adaptive_avg_pool2d(x, (bins, 2)))


def test_the_tool_writes_both_files_and_shows_the_spreads(tmp_path):
    config = resnet_config(tmp_path / 'run', iters=8)
    config.dump(tmp_path / 'config.py')
    model = randomise(build_model(config))
    torch.save({'state_dict': model.backbone.state_dict()}, tmp_path / 'before.pth')
    dyrep_mm.expand(model, {f'backbone.layer{i}.0.conv1': ['kxk', '1x1'] for i in (1, 2)})
    randomise(model)
    content = {'meta': {}, 'state_dict': model.state_dict()}
    Record(dyrep_mm.structure_of(model)).to_checkpoint(content)
    torch.save(content, tmp_path / 'grown.pth')
    common = [tmp_path / 'config.py', tmp_path / 'grown.pth', tmp_path / 'out.pth']
    options = ['--onnx', tmp_path / 'out.onnx', '--report', '--before', tmp_path / 'before.pth']
    printed = run_tool('fuse', *common, *options)
    assert 'backbone.layer2.0.conv1' in printed
    assert 'with its norm before' in printed
    assert 'most at risk in int8' in printed
    assert 'logits of ImageClassifier' in printed
    content = onnx.load(tmp_path / 'out.onnx')
    props = {p.key: p.value for p in content.metadata_props}
    assert json.loads(props['dyrep_mm.preprocessing'])['mean'] == [127.0] * 3
    assert (tmp_path / 'out.pth').exists()
    (tmp_path / 'out.pth').unlink()
    for options, word in [
        (['--onnx', tmp_path / 'out.onx'], '--onnx must end in .onnx'),
        (['--onnx', tmp_path / 'nowhere/out.onnx'], 'is no folder'),
        (['--before', tmp_path / 'before.pth'], '--before is for --report'),
        (['--report', '--before', tmp_path / 'none.pth'], 'there is no checkpoint file'),
    ]:
        assert word in run_tool('fuse', *common, *options, code=1)
        assert not (tmp_path / 'out.pth').exists()
