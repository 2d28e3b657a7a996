"""Blocks in heads: fused on what the heads take, and verified there."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import nn

from dyrep_mm import expand, structure_of
from dyrep_mm.engine import converter
from dyrep_mm.engine.converter import build_model, fuse_checkpoint
from dyrep_mm.engine.passes import Passes, features_of, image_channels, tensors_in
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import Record
from dyrep_mm.surgery.candidates import survey
from dyrep_mm.surgery.structure import altered
from dyrep_mm.surgery.tree import blocks_of
from support.checks import assert_same
from support.nets import image, randomise

BN = {'type': 'BN'}
RESNET = {
    'type': 'ResNet',
    'depth': 18,
    'stem_channels': 8,
    'base_channels': 8,
    'norm_cfg': BN,
    'norm_eval': False,
}
FPN = {'type': 'FPN', 'in_channels': [8, 16, 32, 64], 'out_channels': 8, 'num_outs': 5}
MEAN = {'mean': [127.0] * 3, 'std': [60.0] * 3}


def segmentor(*heads: dict, kind: str = 'EncoderDecoder', **more) -> dict:
    common = {'num_classes': 3, 'channels': 6, 'norm_cfg': BN}
    return {
        'default_scope': 'mmseg',
        'model': {
            'type': kind,
            'data_preprocessor': {'type': 'SegDataPreProcessor', **MEAN},
            'backbone': {**RESNET, 'type': 'ResNetV1c'},
            'decode_head': [common | head for head in heads] if heads[1:] else common | heads[0],
            'auxiliary_head': [
                {**common, 'type': 'FCNHead', 'in_channels': 32, 'in_index': 2, 'num_convs': 2},
                {**common, 'type': 'FCNHead', 'in_channels': 16, 'in_index': 1, 'num_convs': 1},
            ],
            'train_cfg': {},
            'test_cfg': {'mode': 'whole'},
            **more,
        },
    }


def detector(kind: str, **parts) -> dict:
    model = {'type': kind, 'backbone': RESNET, 'neck': FPN, **parts}
    return {'default_scope': 'mmdet', 'model': model}


def one_stage(kind: str, head: str, **more) -> dict:
    settings = {'num_classes': 3, 'in_channels': 8, 'feat_channels': 8, 'stacked_convs': 2}
    return detector(kind, bbox_head={'type': head, **settings, 'norm_cfg': BN, **more})


def two_stage(**roi_head) -> dict:
    extractor = {
        'type': 'SingleRoIExtractor',
        'roi_layer': {'type': 'RoIAlign', 'output_size': 7, 'sampling_ratio': 0},
        'out_channels': 8,
        'featmap_strides': [4, 8, 16, 32],
    }
    settings = {'type': 'StandardRoIHead', 'bbox_roi_extractor': extractor}
    return detector(
        'FasterRCNN',
        rpn_head={
            'type': 'RPNHead',
            'in_channels': 8,
            'feat_channels': 8,
            'num_convs': 2,
            'anchor_generator': {
                'type': 'AnchorGenerator',
                'scales': [8],
                'ratios': [1.0],
                'strides': [4, 8, 16, 32, 64],
            },
        },
        roi_head={**settings, **roi_head},
        train_cfg={'rpn': {}, 'rcnn': {}},
        test_cfg={'rpn': {}, 'rcnn': {}},
    )


BOX_HEAD = {
    'type': 'Shared4Conv1FCBBoxHead',
    'in_channels': 8,
    'conv_out_channels': 8,
    'fc_out_channels': 16,
    'num_classes': 3,
    'norm_cfg': BN,
}
MASK_HEAD = {
    'type': 'FCNMaskHead',
    'num_convs': 2,
    'in_channels': 8,
    'conv_out_channels': 8,
    'num_classes': 3,
    'norm_cfg': BN,
}
MASK_EXTRACTOR = {
    'type': 'SingleRoIExtractor',
    'roi_layer': {'type': 'RoIAlign', 'output_size': 14, 'sampling_ratio': 0},
    'out_channels': 8,
    'featmap_strides': [4, 8, 16, 32],
}
YOLOX = {
    'default_scope': 'mmdet',
    'model': {
        'type': 'YOLOX',
        'backbone': {'type': 'CSPDarknet', 'deepen_factor': 0.33, 'widen_factor': 0.125},
        'neck': {
            'type': 'YOLOXPAFPN',
            'in_channels': [32, 64, 128],
            'out_channels': 8,
            'num_csp_blocks': 1,
        },
        'bbox_head': {
            'type': 'YOLOXHead',
            'num_classes': 3,
            'in_channels': 8,
            'feat_channels': 8,
        },
    },
}
RTM = {
    'anchor_generator': {'type': 'MlvlPointGenerator', 'strides': [8, 16, 32, 64, 128]},
    'bbox_coder': {'type': 'DistancePointBBoxCoder'},
    'with_objectness': False,
}


@MODELS.register_module(force=True)
class ConvHead(nn.Module):
    """A head of mmpretrain with a conv."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, feats):
        return self.fc(self.bn(self.conv(feats[-1])).relu().mean((2, 3)))


@MODELS.register_module(force=True)
class Own(BaseModel):
    """A model of a user: no ``extract_feat``, and an auxiliary head that training alone calls."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.decode_head = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        )
        self.auxiliary_head = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        )

    def forward(self, inputs, data_samples=None, mode='tensor'):
        features = self.backbone(inputs)
        if mode == 'loss':
            return {'loss': (self.decode_head(features) - self.auxiliary_head(features)).mean()}
        return self.decode_head(features)


def box_and_mask(model, x):
    features = model.extract_feat(x)
    head = model.roi_head
    return head.bbox_head(features[0][..., :7, :7]), head.mask_head(features[0][..., :14, :14])


def all_of(*names):
    def run(model, x):
        features = model.extract_feat(x)
        return [model.get_submodule(name)(features) for name in names]

    return run


#: Config, scope, how many blocks, and what the library computes with the heads.
HEADS = {
    'FCNHead and two auxiliary ones': (
        segmentor({'type': 'FCNHead', 'in_channels': 64, 'in_index': 3}),
        ['decode_head', 'auxiliary_head'],
        8,
        all_of('decode_head', 'auxiliary_head.0', 'auxiliary_head.1'),
    ),
    'OCRNet': (
        segmentor(
            {'type': 'FCNHead', 'in_channels': 64, 'in_index': 3},
            {'type': 'OCRHead', 'in_channels': 64, 'in_index': 3, 'ocr_channels': 4},
            kind='CascadeEncoderDecoder',
            num_stages=2,
        ),
        ['decode_head', 'auxiliary_head'],
        9,
        lambda m, x: m(x),
    ),
    'YOLOX': (YOLOX, 'bbox_head', 12, all_of('bbox_head')),
    'RetinaNet, one norm for all levels': (
        one_stage(
            'RetinaNet',
            'RetinaHead',
            anchor_generator={
                'type': 'AnchorGenerator',
                'scales': [4],
                'ratios': [1.0],
                'strides': [4, 8, 16, 32, 64],
            },
        ),
        'bbox_head',
        6,
        all_of('bbox_head'),
    ),
    'FCOS': (one_stage('FCOS', 'FCOSHead'), 'bbox_head', 7, all_of('bbox_head')),
    'RTMDet': (one_stage('RTMDet', 'RTMDetHead', **RTM), 'bbox_head', 6, all_of('bbox_head')),
    'RTMDet, convs and norms of each level': (
        one_stage('RTMDet', 'RTMDetSepBNHead', share_conv=False, pred_kernel_size=3, **RTM),
        'bbox_head',
        30,
        all_of('bbox_head'),
    ),
    'Faster R-CNN': (
        two_stage(bbox_head=BOX_HEAD),
        ['roi_head', 'rpn_head'],
        6,
        lambda m, x: m.roi_head.bbox_head(m.extract_feat(x)[0][..., :7, :7]),
    ),
    'Mask R-CNN, neck too': (
        two_stage(bbox_head=BOX_HEAD, mask_head=MASK_HEAD, mask_roi_extractor=MASK_EXTRACTOR),
        ['roi_head', 'neck'],
        10,
        box_and_mask,
    ),
    'Cascade R-CNN': (
        two_stage(
            type='CascadeRoIHead',
            num_stages=2,
            stage_loss_weights=[1, 0.5],
            bbox_head=[BOX_HEAD, BOX_HEAD],
        ),
        'roi_head',
        8,
        lambda m, x: [h(m.extract_feat(x)[0][..., :7, :7]) for h in m.roi_head.bbox_head],
    ),
    'a head of mmpretrain': (
        {
            'default_scope': 'mmpretrain',
            'model': {
                'type': 'ImageClassifier',
                'backbone': RESNET,
                'head': {'type': 'mmengine.ConvHead'},
            },
        },
        'head',
        1,
        lambda m, x: m(x),
    ),
    'a model of its own': (
        {'model': {'type': 'Own'}},
        None,
        3,
        lambda m, x: [m(x), m.auxiliary_head(m.backbone(x))],
    ),
}


def write(tmp_path, config: dict, scope, structure='dbb'):
    """Config and checkpoint files of a grown model with random norms, and the model."""
    file, checkpoint = tmp_path / 'config.py', tmp_path / 'grown.pth'
    Config(config).dump(file)
    plain = build_model(Config.fromfile(file))
    plain.init_weights()  # some heads give the exponential of their last conv
    model = randomise(expand(plain, structure, scope=scope))
    content = {'meta': {}, 'state_dict': model.state_dict()}
    Record(structure_of(model)).to_checkpoint(content)
    torch.save(content, checkpoint)
    return file, checkpoint, model.eval()


@pytest.mark.parametrize('case', HEADS)
def test_fused_heads_are_those_of_the_plain_config(tmp_path, case):
    config, scope, count, run = HEADS[case]
    torch.manual_seed(0)
    file, checkpoint, model = write(tmp_path, config, scope)
    assert len(blocks_of(model)) == count
    said = []
    report = fuse_checkpoint(file, checkpoint, tmp_path / 'out.pth', say=said.append)
    assert report.blocks == count
    assert not report.biased
    assert not [line for line in said if 'by itself' in line]
    # Without a bias that the config does not give, so that nothing is dropped.
    plain = build_model(Config.fromfile(file))
    plain.load_state_dict(torch.load(tmp_path / 'out.pth')['state_dict'], strict=True)
    with torch.no_grad():
        x = torch.randn(1, 3, 128, 128)
        outputs = zip(tensors_in(run(model, x)), tensors_in(run(plain, x)), strict=True)
        for before, after in outputs:
            assert_same(after, before, case, scale=10)


@pytest.mark.parametrize('case', HEADS)
def test_a_wrong_head_is_not_written(tmp_path, case, monkeypatch):
    """Whichever block is wrong: it is run where the model runs it."""
    config, scope, _, _ = HEADS[case]
    torch.manual_seed(0)
    file, checkpoint, model = write(tmp_path, config, scope)
    right = converter.fuse

    def wrong(model, inputs, **options):
        fused = right(model, inputs, **options)
        fused.get_submodule(last).weight.data.mul_(1.001)
        return fused

    monkeypatch.setattr(converter, 'fuse', wrong)
    last = list(blocks_of(model))[-1]
    with pytest.raises(DyRepError, match='not written'):
        fuse_checkpoint(file, checkpoint, tmp_path / 'out.pth')
    assert not (tmp_path / 'out.pth').exists()


def test_branch_of_train_mode_alone_is_fused_with_its_norm(tmp_path):
    config = segmentor({'type': 'DDRHead', 'in_channels': 8, 'num_classes': 3})
    config['model'] |= {
        'backbone': {'type': 'DDRNet', 'channels': 4, 'ppm_channels': 4, 'norm_cfg': BN},
        'auxiliary_head': None,
    }
    config['model']['decode_head'] |= {'in_channels': 16, 'channels': 8}
    file, checkpoint, model = write(tmp_path, config, 'decode_head')
    assert list(blocks_of(model)) == ['decode_head.head.0.conv', 'decode_head.aux_head.0.conv']
    report = fuse_checkpoint(file, checkpoint, tmp_path / 'out.pth')
    assert not report.biased
    plain = build_model(Config.fromfile(file))
    plain.load_state_dict(torch.load(tmp_path / 'out.pth')['state_dict'], strict=True)
    with torch.no_grad():
        x = torch.randn(2, 8, 16, 16)
        before, after = (m.decode_head.aux_head(x) for m in (model, plain))
        assert_same(after, before)


@pytest.mark.parametrize('head', ['RTMDetSepBNHead', 'RetinaSepBNHead'])
def test_convs_that_levels_share_with_norms_of_their_own_do_not_grow(head):
    """They would have to take the bias of one conv into the norms of all levels."""
    more = {'num_ins': 5} if head == 'RetinaSepBNHead' else RTM
    kind = 'RetinaNet' if head == 'RetinaSepBNHead' else 'RTMDet'
    if head == 'RetinaSepBNHead':
        more['anchor_generator'] = {
            'type': 'AnchorGenerator',
            'scales': [4],
            'ratios': [1.0],
            'strides': [4, 8, 16, 32, 64],
        }
    model = build_model(Config(one_stage(kind, head, **more)))
    verdicts = {
        path: reason for path, reason in survey(model, 'bbox_head').items() if '_convs.' in path
    }
    assert verdicts
    assert set(verdicts.values()) == {'its weight is shared with another module'}


def test_part_that_no_forward_reaches_is_named_and_verified_by_itself(tmp_path):
    config, _, _, _ = HEADS['a model of its own']
    file, checkpoint, _ = write(tmp_path, config, None)
    original = converter.build_model

    def with_strange_head(cfg):
        model = original(cfg)
        model.strange = nn.Module()
        model.strange.conv = nn.Conv2d(8, 8, 3, padding=1)
        return model

    model = with_strange_head(Config.fromfile(file))
    randomise(expand(model, 'dbb', scope='strange'))
    content = {'meta': {}, 'state_dict': model.state_dict()}
    Record(structure_of(model)).to_checkpoint(content)
    torch.save(content, checkpoint)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter, 'build_model', with_strange_head)
        report = fuse_checkpoint(file, checkpoint, tmp_path / 'out.pth', say=said.append)
    assert not report.biased
    assert [line.split()[0] for line in said if 'by itself' in line] == ['strange.conv']


def test_passes_leave_the_model_alone():
    config, scope, _, _ = HEADS['FCNHead and two auxiliary ones']
    model = expand(build_model(Config(config)), 'dbb', scope=scope).double().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, random = image(2, 3, 64, 64), torch.get_rng_state()
    passes = Passes(model, x, altered(model))
    assert not passes.unreached
    assert [call.path for call in passes.calls] == ['', 'auxiliary_head.0', 'auxiliary_head.1']
    passes(model, x)
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_the_backbone_of_a_two_stage_detector_takes_one_call():
    """Its own forward wants proposals: what the features need is seen while they are computed."""
    model = expand(build_model(Config(two_stage(bbox_head=BOX_HEAD))), 'dbb', scope='backbone')
    passes = Passes(model.double(), image(2, 3, 64, 64), altered(model))
    assert not passes.unreached
    assert [(call.path, call.source) for call in passes.calls] == [('', 'features')]


def test_a_model_in_float64_may_make_float32_of_positions():
    class Placed(Own):
        def __init__(self):
            super().__init__()
            self.place = nn.Linear(1, 8)

        def forward(self, inputs, data_samples=None, mode='tensor'):
            places = torch.linspace(0, 1, inputs.shape[-1], dtype=torch.float32)
            features = self.backbone(inputs) + self.place(places[:, None]).T[:, None]
            return self.decode_head(features)

    model, x = expand(Placed(), 'dbb', scope='decode_head').double(), image(2, 3, 9, 9)
    passes = Passes(model, x, altered(model))
    assert not passes.unreached
    (output,) = tensors_in(passes(model, x))
    assert output.dtype == torch.float64
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize('channels', [1, 3, 4, 7])
@pytest.mark.parametrize('focus', [False, True])
def test_channels_are_those_of_the_first_layer(channels, focus):
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Conv2d(5, 2, 1)
            self.first = nn.Conv2d(channels * (4 if focus else 1), 5, 1)

        def forward(self, x):
            if focus:
                x = nn.functional.pixel_unshuffle(x, 2)
            return self.last(self.first(x))

    assert image_channels(Folded(), (8, 8)) == channels


def test_features_of_a_model_without_heads():
    assert features_of(nn.Conv2d(3, 2, 1), torch.randn(1, 3, 4, 4)) is None
