"""What is loaded into a model, whatever the model and the file have grown: a bare ``state_dict``,
another structure, other widths, other names, and files that are no checkpoint."""

from __future__ import annotations

import copy
import json
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook
from torch import nn

from dyrep_mm import expand, grow, prune, structure_of
from dyrep_mm.engine.checkpoint import (
    load_checkpoint,
    load_grown,
    load_structure,
    structure_in,
    weights_of,
)
from dyrep_mm.engine.converter import fuse_checkpoint
from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import Block
from dyrep_mm.surgery.optimizer import check_optimizer
from dyrep_mm.surgery.rewire import restore
from support.checks import assert_equal_states, assert_same
from support.nets import output_of, randomise
from support.processes import run_tool
from support.runs import (
    FAST,
    PRUNING,
    TinyClassifier,
    call_at,
    dyrep,
    runner,
    updates,
    with_branches,
    write_config,
)

KEEP = {'type': 'dyrep_mm.DyRepHook', 'interval': None}


def grown(width: int = 4, bias: bool = True) -> TinyClassifier:
    """A classifier with blocks in blocks and, if asked for, a conv and an inner conv that gained a
    bias."""
    torch.manual_seed(3)
    model = randomise(TinyClassifier(width))
    grow(model, 'backbone.conv2')
    grow(model, 'backbone.conv2.branches.1x1-kxk.conv', ['1x1', 'identity'])
    grow(model, 'backbone.conv3', ['1xk'])
    if bias:
        for path in ('backbone.conv1', 'backbone.conv2.branches.kx1.conv'):
            grow(model, path, ['1x1'])
            randomise(model)
            prune(model, path, ['1x1'])
        assert [names for names in structure_of(model).values() if not names] == [[], []]
    return randomise(model)


WRAPPINGS = {
    'bare': lambda state: state,
    'state_dict': lambda state: {'state_dict': state},
    'empty meta': lambda state: {'state_dict': state, 'meta': {}},
    'ddp': lambda state: {'state_dict': {f'module.{k}': v for k, v in state.items()}},
    'bare ddp': lambda state: OrderedDict((f'module.{k}', v) for k, v in state.items()),
}


@pytest.fixture(params=WRAPPINGS)
def bare(request, tmp_path) -> tuple[TinyClassifier, Path]:
    """A grown model, and a file with its ``state_dict`` and no record."""
    model = grown()
    torch.save(WRAPPINGS[request.param](model.state_dict()), tmp_path / 'bare.pth')
    return model, tmp_path / 'bare.pth'


def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


# A state_dict without meta


def test_a_state_dict_alone_is_tested(tmp_path, bare):
    model, file = bare
    run = runner(tmp_path, [KEEP], iters=2, val=1, load_from=str(file))
    run.test()
    assert structure_of(run.model) == structure_of(model)
    assert_equal_states(run.model.state_dict(), model.state_dict())
    assert_same(output_of(run.model, images()), output_of(model, images()))


@pytest.mark.parametrize('average', [False, True])
def test_a_state_dict_alone_starts_a_training(tmp_path, bare, average):
    model, file = bare
    hooks = [dict(FAST), *([{'type': 'EMAHook', 'strict_load': True}] if average else [])]
    if average and 'module.' in next(iter(torch.load(file).get('state_dict', torch.load(file)))):
        pytest.skip("mmengine's EMAHook does not know the names of DDP")
    run = runner(tmp_path, hooks, iters=3, load_from=str(file))
    seen = []
    call_at(run, lambda run: seen.append(copy.deepcopy(run.model)), 'before_train_epoch')
    call_at(run, lambda run: seen.append(copy.deepcopy(run.model)), 'before_train')
    run.train()
    assert structure_of(seen[0]) == structure_of(model)
    assert_equal_states(seen[0].state_dict(), model.state_dict())
    assert updates(tmp_path / 'iter_3.pth') == [2]


def test_a_state_dict_alone_is_no_run_to_resume(tmp_path, bare):
    _, file = bare
    run = runner(tmp_path, [KEEP], iters=3, load_from=str(file), resume=True)
    with pytest.raises(DyRepError, match=r'no run can resume .* load_from'):
        run.train()


def test_a_state_dict_alone_is_a_structure(tmp_path, bare):
    model, file = bare
    run = runner(tmp_path, [{**KEEP, 'structure': str(file)}], iters=2)
    run.train()
    blocks = {path: names for path, names in structure_of(model).items() if names}
    assert structure_of(run.model) == blocks == load_structure(file)


def test_a_state_dict_alone_fuses(tmp_path, bare):
    model, file = bare
    config = tmp_path / 'plain.py'
    config.write_text(
        "custom_imports = dict(imports=['support.runs'])\nmodel = dict(type='TinyClassifier')\n"
    )
    fuse_checkpoint(config, file, tmp_path / 'fused.pth', size=8)
    fused = load_checkpoint(tmp_path / 'fused.pth')['state_dict']
    plain = TinyClassifier()
    for name in fused.keys() - plain.state_dict().keys():
        path = name.removesuffix('.bias')
        plain.get_submodule(path).bias = nn.Parameter(fused[name])
    plain.load_state_dict(fused, strict=True)
    assert_same(output_of(plain, images()), output_of(model, images()), scale=10)


def test_the_command_line_knows_a_state_dict_alone(tmp_path):
    """Without the hook the model would be a random one."""
    torch.save(grown().state_dict(), tmp_path / 'bare.pth')
    plain = write_config(tmp_path / 'plain.py', None, val=1)
    said = run_tool('test', plain, tmp_path / 'bare.pth', code=1)
    assert 'no DyRepHook to rebuild it' in said.splitlines()[-1]


def test_branches_of_other_projects_are_no_blocks():
    names = {f'stage2.0.branches.{i}.0.conv1.weight': torch.zeros(1) for i in range(2)}
    assert structure_in({'state_dict': names}) is None


def test_a_record_that_is_not_of_the_weights(tmp_path, made):
    """In either direction, and neither is believed."""
    saved = with_branches(made / 'iter_5.pth')
    own = saved['meta']['dyrep_mm']['structure']
    more = {**own, 'backbone.dw.branches.kxk': ['kxk', '1x1']}
    for said in ({}, more, {path: names[:-1] for path, names in own.items()}):
        saved['meta']['dyrep_mm']['structure'] = said
        with pytest.raises(DyRepError, match='not that of its weights'):
            structure_in(saved)


# Another structure than the present one


def test_best_checkpoint_after_training(tmp_path):
    """Its structure is smaller; the same process tests it and trains on."""
    checkpoint = {'type': 'CheckpointHook', 'interval': 1}
    hooks = [{**PRUNING, 'interval': 1}, {'type': 'EMAHook'}]
    run = runner(tmp_path, hooks, epochs=5, val=1, default_hooks={'checkpoint': checkpoint})
    run.train()
    optimizer = run.optim_wrapper.optimizer
    for epoch in (2, 5, 1, 4):
        file = tmp_path / f'epoch_{epoch}.pth'
        saved = with_branches(file)
        run.load_checkpoint(str(file))
        assert structure_of(run.model) == saved['meta']['dyrep_mm']['structure']
        assert_equal_states(run.model.state_dict(), saved['state_dict'])
        check_optimizer(optimizer, run.model)
        again = runner(tmp_path / 'test', [KEEP], epochs=5, val=1, load_from=str(file))
        assert run.test() == again.test()
    run.load_checkpoint(str(tmp_path / 'epoch_1.pth'))
    run.train_loop._max_epochs = 8
    run.train()
    assert updates(tmp_path / 'epoch_8.pth', 'epoch') == [1, 2, 3, 4, 6, 6, 7]
    # None was at the end of epoch 5, which was the last: it comes with the next step.
    check_optimizer(optimizer, run.model)
    (average,) = (h.ema_model.module for h in run.hooks if isinstance(h, EMAHook))
    assert structure_of(average) == structure_of(run.model)


def test_plain_checkpoint_after_training(tmp_path, made):
    """The model is plain again, and the training that follows grows it anew."""
    run = runner(tmp_path, [dict(FAST)], iters=5)
    run.train()
    assert structure_of(run.model)
    file = made / 'plain/iter_5.pth'
    run.load_checkpoint(str(file))
    assert not structure_of(run.model)
    assert_equal_states(run.model.state_dict(), load_checkpoint(file)['state_dict'])
    held = [p for group in run.optim_wrapper.optimizer.param_groups for p in group['params']]
    assert [id(p) for p in held] == [id(p) for p in run.model.parameters()]
    run.train_loop._max_iters = 8
    run.train()
    assert updates(tmp_path / 'iter_8.pth') == [2, 4, 6]
    assert structure_of(run.model)


def test_other_operations_in_the_same_conv(tmp_path):
    files = []
    for names in (['1x1', '1xk'], ['identity'], ['1x1', '1x1-kxk']):
        model = randomise(TinyClassifier())
        grow(model, 'backbone.conv2', names)
        files.append(tmp_path / f'{len(files)}.pth')
        torch.save(model.state_dict(), files[-1])
    run = runner(tmp_path, [KEEP], iters=2)
    run.train()
    for file in [*files, *reversed(files)]:
        run.load_checkpoint(str(file))
        assert_equal_states(run.model.state_dict(), torch.load(file))
        check_optimizer(run.optim_wrapper.optimizer, run.model)


def test_a_file_without_the_backbone_leaves_its_blocks(tmp_path):
    run = runner(tmp_path, [{**KEEP, 'structure': 'dbb'}], iters=2)
    run.train()
    before, structure = copy.deepcopy(run.model.state_dict()), structure_of(run.model)
    torch.save({'head.bias': torch.ones(2)}, tmp_path / 'head.pth')
    run.load_checkpoint(str(tmp_path / 'head.pth'))
    assert structure_of(run.model) == structure != {}
    assert_equal_states(run.model.state_dict(), {**before, 'head.bias': torch.ones(2)})
    run.train_loop._max_iters = 4
    run.train()  # which has had its start
    assert structure_of(run.model) == structure


def test_training_twice_from_a_structure(tmp_path):
    """The second training goes on with what the first has made of it."""
    start = {'backbone.conv2': ['kxk', '1x1', '1xk', 'identity']}
    run = runner(tmp_path, [{**PRUNING, 'structure': start}], iters=5)
    run.train()
    after = structure_of(run.model)
    assert after != start
    seen = []
    call_at(run, lambda run: seen.append(structure_of(run.model)), 'before_train')
    scores = dyrep(run).rule.state_dict()
    call_at(
        run,
        lambda run: seen.append(dyrep(run).rule.state_dict()['sums'].equal(scores['sums'])),
        'before_train',
    )
    run.train_loop._max_iters = 9
    run.train()
    assert seen == [after, True]  # the scores of the interval go on too
    assert updates(tmp_path / 'iter_9.pth') == [2, 4, 6, 8]


# Other widths


@pytest.mark.parametrize('resume', [False, True])
@pytest.mark.parametrize('record', [False, True])
def test_another_width_is_refused(tmp_path, resume, record):
    wide = runner(tmp_path / 'wide', [{**KEEP, 'structure': 'dbb'}], iters=1,
                  model={'type': 'TinyClassifier', 'width': 8})  # fmt: skip
    wide.train()
    saved = load_checkpoint(tmp_path / 'wide/iter_1.pth')
    if not record:
        del saved['meta']['dyrep_mm']
    torch.save(saved, tmp_path / 'wide.pth')
    model = {'type': 'TinyClassifier', 'width': 6}
    run = runner(tmp_path, [KEEP], iters=2, model=model, load_from=str(tmp_path / 'wide.pth'),
                 resume=resume)  # fmt: skip
    names = [name for name, _ in run.model.named_modules()]
    with pytest.raises(DyRepError, match=r'has shape \(8, .*instead of \(6, ') as error:
        run.train()
    assert '\n' not in str(error.value)
    assert [name for name, _ in run.model.named_modules()] == names


def test_another_width_of_the_same_blocks_is_refused(tmp_path):
    """Nothing is built then; the weights would still not fit."""
    run = runner(tmp_path, [{**KEEP, 'structure': 'dbb'}], iters=1)
    run.train()
    torch.save(expand(TinyClassifier(8), structure_of(run.model)).state_dict(), tmp_path / 'w.pth')
    with pytest.raises(DyRepError, match='has shape'):
        run.load_checkpoint(str(tmp_path / 'w.pth'))


@pytest.mark.parametrize('resume', [False, True])
def test_another_head_is_refused_in_a_resume_alone(tmp_path, made, resume):
    """`load_from` is how people change the number of classes."""
    saved = load_checkpoint(made / 'iter_5.pth')
    saved['state_dict']['head.weight'] = torch.zeros(7, 8)
    torch.save(saved, tmp_path / 'seven.pth')
    run = runner(tmp_path, [dict(PRUNING)], iters=7, load_from=str(tmp_path / 'seven.pth'),
                 resume=resume)  # fmt: skip
    if resume:
        with pytest.raises(DyRepError, match=r'head.weight has shape \(7, 8\)'):
            run.train()
    else:
        run.train()


# The size of a structure


@pytest.fixture
def built(monkeypatch) -> list[Block]:
    """All blocks that are made from here on."""
    made, make = [], Block.__init__

    def init(block, *args, **kwargs):
        made.append(block)
        make(block, *args, **kwargs)

    monkeypatch.setattr(Block, '__init__', init)
    return made


def every_conv(levels: int, path: str) -> dict[str, list[str]]:
    """All operations in every conv of a conv, so many blocks deep."""
    structure, convs = {}, [path]
    for _ in range(levels):
        structure |= {conv: ['kxk', '1x1-kxk'] for conv in convs}
        convs = [f'{conv}.branches.{op}' for conv in convs for op in ('kxk', '1x1-kxk.conv')]
    return structure


def test_a_record_without_weights_builds_nothing(tmp_path, made, built):
    saved = load_checkpoint(made / 'plain/iter_5.pth')
    said = {'structure': every_conv(12, 'backbone.conv2')}
    assert len(said['structure']) == 4095
    saved['meta']['dyrep_mm'] = said
    torch.save(saved, tmp_path / 'bad.pth')
    run = runner(tmp_path, [KEEP], iters=2, load_from=str(tmp_path / 'bad.pth'))
    with pytest.raises(DyRepError, match='not that of its weights'):
        run.train()
    assert not built


def restored(model: nn.Module, file: Path) -> None:
    """As fusing does it."""
    loaded, structure = load_grown(file)
    restore(model, structure, weights_of(loaded))


@pytest.mark.parametrize('trick', ['small', 'expanded', 'sparse', 'meta'])
def test_names_without_the_bytes_build_nothing(tmp_path, built, trick):
    """The right names, and tensors of another shape or of no content."""
    whole = expand(TinyClassifier(), every_conv(4, 'backbone.conv2')).state_dict()
    built.clear()
    shrink = {
        'small': lambda tensor: torch.zeros(1),
        'expanded': lambda tensor: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape),
        'sparse': lambda tensor: torch.zeros(tensor.shape).to_sparse(),
        'meta': lambda tensor: tensor.to('meta'),
    }[trick]
    state = {k: shrink(v) if '.branches.' in k else v for k, v in whole.items()}
    torch.save({'state_dict': state}, tmp_path / 'bad.pth')
    run = runner(tmp_path, [KEEP], iters=2, load_from=str(tmp_path / 'bad.pth'))
    with pytest.raises(DyRepError):
        run.train()
    assert len(built) <= 1  # one is compared with the file
    assert structure_of(run.model) == {}
    with pytest.raises(DyRepError):
        restored(TinyClassifier(), tmp_path / 'bad.pth')


def test_a_structure_without_weights_is_bounded_by_the_model(tmp_path, built):
    """3 levels of everything are real; 4,095 blocks in a conv are not."""
    structure = every_conv(12, '0')
    (tmp_path / 'small.json').write_text(json.dumps(structure))
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))
    with pytest.raises(DyRepError, match='more than 64 times as large'):
        expand(model, load_structure(tmp_path / 'small.json'))
    held = sum(p.numel() for block in built for p in block.branches.parameters())
    assert held < 300 * 16 * 16 * 9  # convs count once in each block that they lie in
    assert structure_of(model) == {}
    expand(model, every_conv(3, '0'))


# Other names


@pytest.mark.parametrize(
    ('names', 'revise'),
    [
        (lambda name: name.replace('backbone.', 'encoder.'), [(r'^encoder\.', 'backbone.')]),
        (lambda name: f'net.{name}', [(r'^net\.', '')]),
        (lambda name: name.removeprefix('backbone.'), [('^(?!head)', 'backbone.')]),
        (lambda name: name.replace('conv2', 'c2'), [('c2', 'conv2')]),
        (lambda name: name.replace('head', 'fc'), [('^fc', 'head')]),
        (lambda name: f'module.{name}', [(r'^module\.', '')]),
        (
            lambda name: re.sub('conv[23]', lambda m: {'conv2': 'conv3'}.get(m[0], 'conv2'), name),
            [('conv2', 'third'), ('conv3', 'conv2'), ('third', 'conv3')],
        ),
    ],
)
@pytest.mark.parametrize('record', [False, True])
def test_revised_names(tmp_path, names, revise, record):
    """The Runner renames after the hook has seen the file."""
    model = grown()
    saved = {'state_dict': {names(name): t for name, t in model.state_dict().items()}}
    if record:
        said = {names(f'{path}.')[:-1]: ops for path, ops in structure_of(model).items()}
        if next(iter(said)).startswith('module.'):
            said = {path.removeprefix('module.'): ops for path, ops in said.items()}
        saved['meta'] = {'dyrep_mm': {'structure': said}}
    torch.save(saved, tmp_path / 'other.pth')
    run = runner(tmp_path, [KEEP], iters=1)
    run.load_checkpoint(str(tmp_path / 'other.pth'), revise_keys=revise)
    assert structure_of(run.model) == structure_of(model)
    assert_equal_states(run.model.state_dict(), model.state_dict())
    run.train()
    assert structure_of(run.model) == structure_of(model)


def test_names_that_stay_wrong(tmp_path):
    state = {f'other.{name}': t for name, t in grown().state_dict().items()}
    torch.save(state, tmp_path / 'other.pth')
    run = runner(tmp_path, [KEEP], iters=3, val=1)
    for revise in ([(r'^module\.', '')], [(r'^other\.', 'another.')]):
        with pytest.raises(DyRepError, match=r'no module named|another model'):
            run.load_checkpoint(str(tmp_path / 'other.pth'), revise_keys=revise)
    run.load_checkpoint(str(tmp_path / 'other.pth'), revise_keys=[(r'^other\.', '')])
    torch.save(run.model, tmp_path / 'model.pth')  # nothing of the loading is left on it


# Files that are no checkpoint


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


NONE = {
    'a tensor': torch.zeros(3),
    'a list': [torch.zeros(3)],
    'a number': 5,
    'nothing': None,
    'a dict of nothing': {},
    'a dict of ints': {'a': 1},
    'state_dict is a list': {'meta': {}, 'state_dict': [1]},
    'state_dict is None': {'meta': {}, 'state_dict': None},
    'state_dict of ints': {'meta': {}, 'state_dict': {'backbone.conv1.weight': 1}},
    'empty state_dict': {'meta': {}, 'state_dict': {}},
    'no state_dict': {'meta': {}},
    'names are ints': {'state_dict': {1: torch.zeros(3)}},
    'names are tuples': {('backbone', 'conv1'): torch.zeros(3)},
    'some names are ints': {'state_dict': {'backbone.conv1.weight': torch.zeros(3), 7: None}},
    'a structure that is nested': {
        'meta': {'dyrep_mm': {'structure': {'a': nested(300)}}},
        'state_dict': {'head.bias': torch.zeros(2)},
    },
}


@pytest.mark.parametrize('case', NONE)
def test_no_checkpoint(tmp_path, case):
    """One sentence from every reader."""
    file = tmp_path / 'bad.pth'
    torch.save(NONE[case], file)
    run = runner(tmp_path, [KEEP], iters=2, load_from=str(file))
    with pytest.raises(DyRepError) as error:
        run.train()
    said = [str(error.value)]
    for read in (load_grown, load_structure):
        with pytest.raises(DyRepError) as error:
            read(file)
        said.append(str(error.value))
    assert all('\n' not in sentence and len(sentence) < 600 for sentence in said)


SCORES = {
    'sparse': lambda sums: sums.to_sparse(),
    'float32': lambda sums: sums.float(),
    'complex': lambda sums: sums.to(torch.complex128),
    'ints': lambda sums: sums.long(),
    'meta': lambda sums: sums.to('meta'),
}


@pytest.mark.parametrize('place', ['sums', 'counts'])
@pytest.mark.parametrize('case', SCORES)
def test_scores_of_another_form(tmp_path, made, case, place):
    bad = load_checkpoint(made / 'iter_5.pth')
    scores = bad['dyrep_mm']['scores']
    scores[place] = SCORES[case](scores[place])
    torch.save(bad, tmp_path / 'bad.pth')
    run = runner(
        tmp_path, [dict(PRUNING)], iters=9, load_from=str(tmp_path / 'bad.pth'), resume=True
    )
    with pytest.raises(DyRepError, match=place):
        run.train()


#: What may be given for a structure, and a word of what is said.
SOURCES = {
    'a number': (5, 'dbb, dbb7, repvgg'),
    'a list': ([['kxk', '1x1']], 'dbb, dbb7, repvgg'),
    'true': (True, 'dbb, dbb7, repvgg'),
    'capitals': ('DBB', 'dbb, dbb7, repvgg'),
    'no name': ('', 'dbb, dbb7, repvgg'),
    'a folder': ('.', 'dbb, dbb7, repvgg'),
    'a long name': ('x' * 5000, 'dbb, dbb7, repvgg'),
    'a nul': ('a\0b', 'dbb, dbb7, repvgg'),
    'no such JSON': ('none.json', 'No such file'),
}


@pytest.mark.parametrize('case', SOURCES)
def test_no_structure(tmp_path, case):
    source, word = SOURCES[case]
    run = runner(tmp_path, [dict(KEEP)], iters=2)
    dyrep(run).structure = source
    with pytest.raises(DyRepError, match=word) as error:
        run.train()
    assert '\n' not in str(error.value)


JSON = {
    'nested': '[' * 100_000,
    'closed': '[' * 100_000 + ']' * 100_000,
    'nested mapping': '{"a":' * 100_000,
    'nested 900': '{"a": ' + '[' * 900 + ']' * 900 + '}',
    'a list': '[]',
    'a number': '5',
    'a text': '"dbb"',
    'nothing': '',
    'NaN': 'NaN',
    'not UTF-8': b'\xff\xfe{}',
    'a name with a line break': '{"a\\nb": 5}',
    'an operation with a line break': '{"a": ["kxk", "a\\nb"]}',
    'one operation a million times': json.dumps({'a': ['kxk'] * 1_000_000}),
}


@pytest.mark.parametrize('case', JSON)
def test_no_structure_file(tmp_path, case):
    file = tmp_path / 'bad.json'
    file.write_bytes(JSON[case] if isinstance(JSON[case], bytes) else JSON[case].encode())
    with pytest.raises(DyRepError) as error:
        load_structure(file)
    assert '\n' not in str(error.value)
    assert len(str(error.value)) < 600
    run = runner(tmp_path, [{**KEEP, 'structure': str(file)}], iters=2)
    with pytest.raises(DyRepError):
        run.train()
