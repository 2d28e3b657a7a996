"""The index of the configs, in the form of OpenMMLab."""

from __future__ import annotations

import pytest
import yaml
from mmpretrain.apis.model import ModelHub

from support.processes import ROOT

INDEX = ROOT / 'model-index.yml'
FILES = yaml.safe_load(INDEX.read_text())['Import']
MODELS = [m for file in FILES for m in yaml.safe_load((ROOT / file).read_text())['Models']]


def test_every_config_of_the_tables_is_in_it():
    folders = ('classification', 'ablations', 'detection', 'segmentation')
    paths = [p for f in folders for p in (ROOT / 'configs' / f).glob('*.py')]
    paths += (ROOT / 'configs').glob('*.py')
    expected = sorted(str(path.relative_to(ROOT)) for path in paths)
    assert sorted(model['Config'] for model in MODELS) == expected
    assert sorted(m['Name'] for m in MODELS) == sorted({m['Name'] for m in MODELS})


@pytest.mark.parametrize('file', FILES)
def test_it_claims_nothing_that_was_not_measured(file):
    said = yaml.safe_load((ROOT / file).read_text())
    names = {collection['Name'] for collection in said['Collections']}
    for model in said['Models']:
        assert not model.keys() & {'Results', 'Weights'}
        assert model['In Collection'] in names
    for collection in said['Collections']:
        assert (ROOT / collection['README']).is_file()


def test_mmpretrain_takes_the_index():
    ModelHub.register_model_index(INDEX, config_prefix=ROOT)
    found = ModelHub.get('resnet18_dyrep_8xb32-120e_in1k')
    assert found.in_collection == 'DyRep'
    assert found.config.default_hooks.dyrep.type == 'dyrep_mm.DyRepHook'
