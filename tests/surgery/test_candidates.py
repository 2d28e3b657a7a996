"""What can grow and why not, and what the presets choose."""

import pytest
from torch import nn
from torchvision.models import resnet18, resnet50

from dyrep_mm import expand, grow, structure_of
from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.branches import BRANCHES
from dyrep_mm.surgery.candidates import candidates, survey
from support.checks import assert_same
from support.nets import image, make_net, output_of

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
    assert candidates(model) == ['good', 'wrapped']
    assert verdicts.keys() - {'good', 'wrapped'} == REASONS.keys()


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


def test_convs_inside_blocks_are_candidates():
    model = make_net()
    grow(model, 'conv1')
    inside = ['conv1.branches.kxk', 'conv1.branches.1x1-kxk.conv']
    assert candidates(model) == ['stem', *inside, 'dw', 'conv2']
    assert candidates(model, 'conv1') == inside
    assert candidates(model, max_depth=1) == ['stem', 'dw', 'conv2']
    assert candidates(model, max_depth=2) == candidates(model)
    grow(model, inside[1])
    deeper = candidates(model, inside[1])
    assert len(deeper) == 2
    assert not set(deeper) & set(candidates(model, max_depth=2))
    assert set(deeper) <= set(candidates(model, max_depth=3))


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
