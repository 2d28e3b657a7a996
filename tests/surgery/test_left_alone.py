"""Every conv that must be left alone, with its sentence; and nets that fused themselves."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from dyrep_mm import expand, fuse, grow, structure_of
from dyrep_mm.errors import DyRepError
from dyrep_mm.surgery.candidates import FROZEN, candidates, survey
from dyrep_mm.surgery.usage import watch_use
from support.checks import assert_equal_states, assert_same
from support.convs import LEFT_ALONE, SEEN
from support.nets import image, output_of, snapshot, types_of


@pytest.mark.parametrize('name', LEFT_ALONE)
def test_it_is_left_alone_and_a_sentence_says_why(name):
    make, path, reason = LEFT_ALONE[name]
    model = make()
    assert survey(model)[path] == reason
    assert path not in candidates(model)
    state, types = snapshot(model), types_of(model)
    if reason != FROZEN and 'chosen' not in reason:  # those can, where someone asks for it
        with pytest.raises(DyRepError, match=f'{path}.*only a conv can grow|{path} cannot grow: '):
            grow(model, path)
    assert types_of(model) == types
    assert_equal_states(snapshot(model), state)


@pytest.mark.parametrize('name', SEEN)
def test_a_training_forward_shows_it(name):
    make, path, reason = SEEN[name]
    model = make()
    assert path in candidates(model)
    assert watch_use(model, [path], [torch.randn(2, 4, 8, 8)], model)[0].get(path) == reason


def test_a_conv_that_is_called_several_times_grows():
    """It is measured on what both calls give it, and fused into one."""
    make, path, _ = SEEN['called several times']
    model, x = make().double(), image(2, 4, 9, 9)
    before = output_of(model, x)
    grow(model, path)
    assert_same(output_of(model, x), before)
    assert_same(output_of(fuse(model), x), before)


@pytest.mark.parametrize('way', ['built fused', 'switched'])
@pytest.mark.parametrize(
    'backbone',
    [{'type': 'RepVGG', 'arch': 'A0', 'base_channels': 16}, {'type': 'MobileOne', 'arch': 's0'}],
    ids=lambda backbone: backbone['type'],
)
def test_nets_that_are_fused_already_stay_as_they_are(backbone, way):
    kind = f'mmpretrain.{backbone["type"]}'
    built = MODELS.build({**backbone, 'type': kind, 'deploy': way == 'built fused'})
    if way == 'switched':
        built.switch_to_deploy()
    model, x = nn.ModuleDict({'backbone': built}).eval(), image(1, 3, 32, 32, dtype=torch.float32)
    reasons = survey(model, 'backbone')
    assert reasons
    assert {reason.split(', ')[1] for reason in reasons.values()} == {
        'which re-parameterizes itself by switch_to_deploy()'
    }
    state, types, before = snapshot(model), types_of(model), built(x)[-1]
    expand(model, 'dbb')
    assert structure_of(model) == {}
    fused = fuse(model)
    assert types_of(model) == types_of(fused) == types
    assert_equal_states(snapshot(fused), state)
    assert torch.equal(fused['backbone'](x)[-1], before)
