"""What can grow and why not, and what the presets choose."""

import warnings

import pytest
import timm
import torch
from mmengine.registry import MODELS
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import prune
from torchvision.models import resnet18, resnet50

from dyrep_mm import expand, grow, structure_of
from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.branches import BRANCHES, ORIGIN
from dyrep_mm.surgery.candidates import candidates, survey
from support.checks import assert_same
from support.nets import image, make_net, output_of, randomise

# What can grow


class Other(nn.Conv2d):
    """Subclass with other math."""

    def forward(self, x):
        return super().forward(x) ** 2


class Wrapped(nn.Conv2d):
    """Stands for mmcv's conv, which is known by name."""


Wrapped.__module__, Wrapped.__qualname__ = 'mmcv.cnn.bricks.wrappers', 'Conv2d'


class Deployable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def switch_to_deploy(self):
        """As RepVGG's."""


class ModulatedDeformConv2dPack(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_offset = nn.Conv2d(4, 18, 3)


class Odd(nn.Module):
    """One conv for every reason not to grow."""

    def __init__(self):
        super().__init__()
        self.good = nn.Conv2d(4, 4, 3)
        self.wrapped = Wrapped(4, 4, 3)
        self.shared1 = nn.Conv2d(4, 4, 3)
        self.shared2 = nn.Conv2d(4, 4, 3)
        self.shared2.weight = self.shared1.weight
        self.twice = nn.ModuleList([nn.Conv2d(4, 4, 3)] * 2)
        self.frozen = nn.Conv2d(4, 4, 3).requires_grad_(False)
        self.other = Other(4, 4, 3)
        with pytest.warns(FutureWarning, match='weight_norm'):
            self.weight_norm = nn.utils.weight_norm(nn.Conv2d(4, 4, 3))
        self.parametrized = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))
        self.even = nn.Conv2d(4, 4, 2)
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect')
        self.deploy = Deployable()
        self.deform = ModulatedDeformConv2dPack()
        self.point = nn.Conv2d(4, 4, 1)
        self.strip = nn.Conv2d(4, 4, (1, 3))  # the paper grows all KxK convs
        self.transposed = nn.ConvTranspose2d(4, 4, 3)
        self.one_dimensional = nn.Conv1d(4, 4, 3)


REASONS = {
    'shared1': 'shared',
    'twice.0': 'shared',
    'shared2': 'shared',
    'frozen': 'frozen',
    'other': 'Other',
    'weight_norm': 'computed from other',
    'parametrized': 'more than a conv',
    'even': r'\(2, 2\) is not odd',
    'reflect': 'reflect',
    'deploy.conv': 'Deployable, which re-parameterizes itself',
    'deform.conv_offset': 'deformable',
}


def test_survey_says_why():
    model = Odd()
    verdicts = survey(model)
    assert [path for path, reason in verdicts.items() if reason is None] == ['good', 'wrapped']
    assert list(candidates(model)) == ['good', 'wrapped']
    other = {'strip', 'transposed', 'one_dimensional'}
    assert verdicts.keys() - {'good', 'wrapped'} == REASONS.keys() | other


@pytest.mark.parametrize('path', REASONS)
def test_every_reason(path):
    model = Odd()
    with pytest.raises(AssertionError, match=REASONS[path]):
        raise AssertionError(survey(model)[path])
    if path != 'frozen':
        with pytest.raises(DyRepError, match=REASONS[path]):
            grow(model, path)


@pytest.mark.parametrize('path', ['point', 'transposed', 'one_dimensional'])
def test_what_is_no_candidate_cannot_grow(path):
    with pytest.raises(DyRepError, match=path):
        grow(Odd(), path)


def test_candidates_say_what_fits():
    """And a conv that none of the wanted branches fits is no candidate."""
    model = make_net()
    assert candidates(model)['conv1'] == [ORIGIN, *BRANCHES]
    assert candidates(model, branches=['identity', '1x1'])['conv2'] == [ORIGIN, '1x1']
    assert list(candidates(model, branches=['identity'])) == ['conv1', 'dw']
    assert survey(model, branches=['identity'])['stem'] == 'none of identity fits it'


def test_convs_inside_blocks_are_candidates():
    model = make_net()
    grow(model, 'conv1')
    inside = ['conv1.branches.kxk', 'conv1.branches.1x1-kxk.conv']
    assert list(candidates(model)) == ['stem', *inside, 'dw', 'conv2']
    assert list(candidates(model, 'conv1')) == inside
    assert list(candidates(model, max_depth=1)) == ['stem', 'dw', 'conv2']
    assert candidates(model, max_depth=2) == candidates(model)
    grow(model, inside[1])
    deeper = candidates(model, inside[1])
    assert len(deeper) == 2
    assert not set(deeper) & set(candidates(model, max_depth=2))
    assert set(deeper) <= set(candidates(model, max_depth=3))


# What re-parameterizes itself


def having(method, call=lambda self: None):
    """A block of one conv, of a class that has the method."""
    block = type('Part', (nn.Module,), {method: call})()
    block.conv = nn.Conv2d(4, 4, 3)
    return block


@pytest.mark.parametrize(
    'name',
    [
        'switch_to_deploy',  # RepVGG, MobileOne, YOLOv6
        'reparameterize',  # timm
        'reparametrize',
        'reparam',
        'fuse',  # timm's RepViT, LeViT, EfficientViT
        'merge_kernel',  # RepLKNet
        'repvgg_convert',
        'fuse_repvgg_block',  # YOLOv7
        'fuse_convs',
        'get_equivalent_kernel_bias',
        '_fuse_bn_tensor',
        'convert_to_deploy',
    ],
)
def test_a_part_that_makes_itself_plain(name):
    model = nn.Sequential(having(name), nn.Sequential(nn.Conv2d(4, 4, 3)))
    assert list(candidates(model)) == ['1.0']
    with pytest.raises(DyRepError, match=rf'inside a Part, which re-parameterizes.*{name}\(\)'):
        grow(model, '0.conv')


def test_a_word_for_it_is_not_enough():
    """What needs features, or is no method, or belongs to a whole model, does not count."""
    with_features = having('fuse', lambda self, features: None)
    static = having('fuse', staticmethod(lambda features: None))
    attribute = having('other')
    attribute.fuse = True
    child = having('other')
    child.fuse = nn.Conv2d(4, 4, 1)
    for model in (with_features, static, attribute, child):
        assert 'conv' in candidates(model)
        assert '0.conv' in candidates(nn.Sequential(model))
    assert list(candidates(having('fuse'))) == ['conv']


@pytest.mark.parametrize('net', ['repvgg_a0', 'mobileone_s0', 'repvit_m0_9', 'fastvit_t8'])
def test_timm_makes_its_nets_plain_as_ever(net):
    """Whatever of them grew."""
    model = randomise(timm.create_model(net)).eval()  # RepViT makes itself plain in float32 alone
    for path in list(candidates(model))[::4]:
        grow(model, path)
    x = image(1, 3, 64, 64, dtype=torch.float32)
    before = output_of(model, x)
    assert_same(output_of(reparameterize_model(model), x), before, scale=100)


@pytest.mark.parametrize(
    ('net', 'number'),
    [
        ('resnet18', 17),
        ('hrnet_w18_small', 65),
        ('mobilenetv3_small_050', 12),
        ('ghostnet_100', 42),
    ],
)
def test_nets_of_timm_that_grow(net, number):
    model = timm.create_model(net)
    assert len(candidates(model)) == number
    assert len(candidates(nn.ModuleDict({'timm_model': model}))) == number


@pytest.mark.parametrize(
    ('backbone', 'number'),
    [
        ({'type': 'ResNet', 'depth': 18}, 17),
        ({'type': 'VGG', 'depth': 11}, 8),
        ({'type': 'RepVGG', 'arch': 'A0'}, 0),
        ({'type': 'MobileOne', 'arch': 's0'}, 0),
        ({'type': 'RepLKNet', 'arch': '31B'}, 0),
    ],
    ids=str,
)
def test_nets_of_mmpretrain(backbone, number):
    built = MODELS.build({**backbone, 'type': f'mmpretrain.{backbone["type"]}'})
    assert len(candidates(nn.ModuleDict({'backbone': built}))) == number


# What hangs on a conv


def nothing(*_):
    """Any hook."""


def computed_bias(conv):
    conv.bias = None
    del conv._parameters['bias']
    conv.register_forward_pre_hook(
        lambda conv, _: setattr(conv, 'bias', conv.weight.sum((1, 2, 3)))
    )


def other_forward(conv):
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) + 1


WORN = {
    'forward hook': lambda conv: conv.register_forward_hook(nothing),
    'forward hook with kwargs': lambda conv: conv.register_forward_hook(nothing, with_kwargs=True),
    'pre-forward hook': lambda conv: conv.register_forward_pre_hook(nothing),
    'backward hook': lambda conv: conv.register_full_backward_hook(nothing),
    'backward pre-hook': lambda conv: conv.register_full_backward_pre_hook(nothing),
    'state hook': lambda conv: conv.register_state_dict_post_hook(nothing),
    'load hook': lambda conv: conv.register_load_state_dict_post_hook(nothing),
    'gradient hook': lambda conv: conv.weight.register_hook(nothing),
    'accumulation hook': lambda conv: conv.weight.register_post_accumulate_grad_hook(nothing),
    'pruned weight': lambda conv: prune.l1_unstructured(conv, 'weight', 0.5),
    'pruned bias': lambda conv: prune.random_unstructured(conv, 'bias', 0.5),
    'pruned channels': lambda conv: prune.ln_structured(conv, 'weight', 0.5, 2, 0),
    'weight norm': nn.utils.weight_norm,
    'spectral norm': nn.utils.spectral_norm,
    'parametrized': nn.utils.parametrizations.weight_norm,
    'parametrized bias': lambda conv: nn.utils.parametrize.register_parametrization(
        conv, 'bias', nn.Tanh()
    ),
    'computed bias': computed_bias,
    'own forward': other_forward,
    'another parameter': lambda conv: conv.register_parameter('scale', nn.Parameter(torch.ones(1))),
    'a buffer': lambda conv: conv.register_buffer('mask', torch.ones(1)),
    'a module': lambda conv: conv.add_module('adapter', nn.Conv2d(4, 4, 1)),
}


@pytest.mark.parametrize('inside', [False, True], ids=['plain', 'in a block'])
@pytest.mark.parametrize('name', WORN)
def test_a_conv_with_something_on_it_is_left_alone(name, inside):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)).double()
    path = '0'
    if inside:
        grow(model, '0')
        path = '0.branches.kxk'
    conv = model.get_submodule(path)
    assert path in candidates(model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        WORN[name](conv)
    assert path not in candidates(model)
    assert survey(model)[path]
    with pytest.raises(DyRepError, match=f'{path} cannot grow: '):
        grow(model, path)


def test_it_may_grow_again_without_it():
    model = make_net()
    handle = model.conv1.register_forward_hook(nothing)
    assert 'conv1' not in candidates(model)
    handle.remove()
    prune.identity(model.conv2, 'weight')
    assert 'conv2' not in candidates(model)
    prune.remove(model.conv2, 'weight')
    assert {'conv1', 'conv2'} <= candidates(model).keys()


def test_hooks_beside_a_conv_do_not_matter():
    model = nn.Sequential(make_net())
    model.register_forward_hook(nothing)
    model[0].bn1.register_forward_hook(nothing)
    assert len(candidates(model)) == 4


# Presets


@pytest.mark.parametrize(
    ('model', 'name', 'millions'),
    [
        (resnet18, 'dbb', '26.3'),  # Table 3
        (resnet50, 'dbb', '40.7'),  # Table 3
        (resnet50, 'dbb7', '48.3'),  # Table 8
    ],
)
def test_presets_have_the_parameters_of_the_paper(model, name, millions):
    model = expand(model(), name)
    assert f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f}' == millions


@pytest.mark.parametrize(
    ('name', 'operations'),
    [
        ('dbb', ['kxk', '1x1', '1x1-kxk', '1x1-avg']),
        ('dbb7', ['kxk', *BRANCHES]),
        ('repvgg', ['kxk', '1x1', 'identity']),
    ],
)
def test_presets(name, operations):
    model, x = make_net(), image()
    before = output_of(model, x)
    expand(model, name)
    structure = structure_of(model)
    assert list(structure) == ['conv1', 'dw', 'conv2']  # the stem is 5x5
    assert structure['conv1'] == operations
    assert structure['conv2'] == [n for n in operations if n != 'identity']  # channels, stride
    assert structure['dw'] == [n for n in operations if n != '1x1-avg']  # dilation
    assert_same(output_of(model, x), before)
    expand(model, name, kernel_sizes=(3, 5))
    assert structure_of(model).keys() == {'stem', 'conv1', 'dw', 'conv2'}


def test_preset_in_scope():
    model = nn.ModuleDict({'backbone': make_net(), 'backbone2': make_net(), 'head': make_net()})
    expand(model, 'repvgg', scope='backbone')
    assert {path.split('.')[0] for path in structure_of(model)} == {'backbone'}
    expand(model, 'repvgg', scope=['head', 'backbone'])
    assert {path.split('.')[0] for path in structure_of(model)} == {'backbone', 'head'}
