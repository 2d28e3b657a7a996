"""From a model with blocks to the plain one."""

import copy

import pytest
import torch
from torch import nn

from dyrep_mm import expand, fuse, grow, prune, structure_of
from dyrep_mm.surgery.fuse import fused_state
from dyrep_mm.surgery.outputs import OutputWatch, following_norms, watch_training
from dyrep_mm.surgery.structure import altered
from dyrep_mm.surgery.tree import get_module
from support.checks import assert_same, assert_untouched
from support.nets import image, make_net, make_pair, nest, output_of, randomise, snapshot, types_of


def whole(model):
    """All of a model that a user can compare."""
    return snapshot(model), types_of(model), [m.training for m in model.modules()]


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('build', [lambda m: m, lambda m: expand(m, 'dbb7'), nest])
def test_fuse_with_inputs_is_the_plain_model(build, training):
    model, plain, x = build(make_net()).train(training), make_net(seed=5), image()
    randomise(model)
    before, (state, types, modes) = output_of(model, x), whole(model)
    fused = fuse(model, x)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert types_of(fused) == types_of(plain)
    assert_same(output_of(fused, x), before)
    plain.load_state_dict(fused.state_dict(), strict=True)
    assert_same(output_of(plain, x), before)
    assert structure_of(fused) == {}
    # The argument is left alone.
    assert_untouched(model, state, types)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(output_of(model, x), before)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fused.modules())
    ours = {t.data_ptr() for t in model.state_dict().values()}
    assert not ours & {t.data_ptr() for t in fused.state_dict().values()}


def test_fuse_without_inputs_keeps_the_biases_on_the_convs():
    model, x = nest(make_net()), image()
    fused, plain = fuse(model), make_net()
    assert types_of(fused) == types_of(plain)
    extra = fused.state_dict().keys() - plain.state_dict().keys()
    assert extra == {'stem.bias', 'conv1.bias', 'dw.bias'}
    assert_same(output_of(fused, x), output_of(model, x))
    for name in ('stem_bn', 'bn1', 'dw_bn', 'bn2'):
        statistics = get_module(model, name).running_mean
        assert torch.equal(get_module(fused, name).running_mean, statistics)


def test_fuse_in_float32_rounds_once():
    model = nest(make_net()).float()
    x = image(dtype=torch.float32)
    fused = fuse(model, x)
    assert {p.dtype for p in fused.parameters()} == {torch.float32}
    assert_same(output_of(fused, x), output_of(model, x))
    exact = output_of(copy.deepcopy(model).double(), x.double())
    assert (output_of(fused.double(), x.double()) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_fuse_of_a_plain_model_is_a_copy():
    model, x = make_net(), image()
    fused = fuse(model, x)
    assert fused is not model
    assert_untouched(fused, snapshot(model), types_of(model))


def test_fuse_keeps_a_bias_of_the_convs_own():
    model, x = make_pair(bias=True), image(2, 4, 8, 8)
    grow(model, '0')
    randomise(model)
    mean = model[1].running_mean.clone()
    for fused in (fuse(model), fuse(model, x)):
        assert list(fused.state_dict())[:2] == ['0.weight', '0.bias']
        assert torch.equal(fused[1].running_mean, mean)
        assert_same(output_of(fused, x), output_of(model, x))


def test_fuse_takes_a_forward():
    model, x = make_pair(), image(2, 4, 8, 8)
    grow(model, '0')
    randomise(model)
    seen = []
    fused = fuse(model, {'image': x}, forward=lambda m, data: seen.append(m) or m(data['image']))
    assert len(seen) == 1
    assert fused[0].bias is None
    assert_same(output_of(fused, x), output_of(model, x))


class Wired(nn.Module):
    """Two convs and two norms, wired by a function."""

    def __init__(self, wiring):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.n = nn.BatchNorm2d(4)
        self.m = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.wiring = wiring

    def forward(self, x):
        return self.wiring(self, x)


def both_uses(s, x):
    y = s.a(x)
    return s.n(y) + y


def views(s, x):
    y = s.a(x)
    return s.n(y) + y.flatten(1)[:, :1, None, None]


def other_first(s, x):
    y = s.a(x)
    z = y * 2
    return s.n(y) + z


def in_place_after(s, x):
    y = s.a(x)
    return s.n(y) + s.relu(y)


def two_norms(s, x):
    y = s.a(x)
    return s.n(y) + s.m(y)


def uneven(s, x):
    y = s.a(x)
    return s.n(y) + s.m(y) + s.a(x + 1)


WIRINGS = {
    # wiring, and the convs whose bias goes into a norm
    'a norm each': (lambda s, x: s.n(s.a(x)) + s.m(s.b(x)), 'ab'),
    'in a row': (lambda s, x: s.m(s.b(s.n(s.a(x)))), 'ab'),
    'called twice': (lambda s, x: s.n(s.a(x)) + s.n(s.a(x + 1)) + s.b(x), 'a'),
    'a norm for each call': (lambda s, x: s.n(s.a(x)) + s.m(s.a(x + 1)) + s.b(x), 'a'),
    'dropout between': (lambda s, x: s.n(s.drop(s.a(x))) + s.b(x), None),
    'a shared norm': (lambda s, x: s.n(s.a(x)) + s.n(s.b(x)), ''),
    'a norm that sees more': (lambda s, x: s.n(s.a(x)) + s.n(x) + s.m(s.b(x)), 'b'),
    'a shared norm, and a call without': (
        lambda s, x: s.n(s.a(x)) + s.n(s.b(x)) + s.a(x + 1),
        '',
    ),
    'a norm that sees more, and a call without': (
        lambda s, x: s.n(s.a(x)) + s.n(x) + s.a(x + 1) + s.b(x),
        '',
    ),
    'the sum': (lambda s, x: s.n(s.a(x) + s.b(x)), ''),
    'no norm': (lambda s, x: s.a(x) + s.b(x), ''),
    'one call without norm': (lambda s, x: s.n(s.a(x)) + s.a(x + 1) + s.b(x), ''),
    'two norms for an output': (two_norms, None),
    'two norms for an output, none for the other': (uneven, ''),
    'unused': (lambda s, x: s.n(s.a(x)), 'a'),
    'relu between': (lambda s, x: s.n(torch.relu(s.a(x))) + s.b(x), ''),
    'relu in place between': (lambda s, x: s.n(s.relu(s.a(x))) + s.b(x), ''),
    'used elsewhere too': (both_uses, ''),
    'used elsewhere before': (other_first, ''),
    'used elsewhere through a view': (views, ''),
    'changed in place after the norm': (in_place_after, ''),
    'no conv': (lambda s, x: s.n(x), ''),
}


@pytest.mark.parametrize('case', WIRINGS)
def test_fuse_whatever_the_wiring(case):
    wiring, folded = WIRINGS[case]
    model, x = randomise(Wired(wiring).double()), image(2, 4, 7, 8)
    for path in 'ab':
        grow(model, path)
    randomise(model)
    before = output_of(model, x)
    fused = fuse(model, x)
    assert_same(output_of(fused, x), before)
    assert_same(output_of(fused, x + 3), output_of(model, x + 3))
    if folded is not None:
        gone = {path for path in 'ab' if get_module(fused, path).bias is None}
        assert gone == set(folded)


def test_fuse_where_the_output_is_returned_too():
    def wiring(s, x):
        y = s.a(x)
        return torch.stack([s.n(y), s.m(s.b(x))]), y

    model, x = randomise(Wired(wiring).double()), image(2, 4, 7, 8)
    grow(model, 'a')
    randomise(model)
    fused = fuse(model, x)
    for output, expected in zip(output_of(fused, x), output_of(model, x), strict=True):
        assert_same(output, expected)


def test_fuse_of_a_conv_that_gained_a_bias():
    model, x = make_pair(), image(2, 4, 8, 8)
    block = grow(model, '0')
    randomise(model)
    prune(model, '0', block.names[1:])
    assert model[0].bias is not None
    fused = fuse(model, x)
    assert fused[0].bias is None
    assert not hasattr(fused[0], 'gained_bias')
    assert_same(output_of(fused, x), output_of(model, x))
    kept = fuse(model)
    assert kept[0].bias is not None
    assert_same(output_of(kept, x), output_of(model, x))


def test_fuse_of_a_model_that_is_a_block():
    """The model is any module, so also the block itself."""
    model, x = make_pair(), image(2, 4, 8, 8)
    block = grow(model, '0')
    randomise(model)
    fused = fuse(block)
    assert type(fused) is nn.Conv2d
    assert_same(output_of(fused, x), output_of(block, x))


# The weights alone


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('build', [lambda m: m, lambda m: expand(m, 'dbb7'), nest])
def test_fused_state_of_other_weights(build, prefix):
    """Of an average, say: the function of a model that has them, and the model is not touched."""
    model, x = randomise(build(make_net())), image()
    other = randomise(copy.deepcopy(model))
    before = whole(model)
    norms = following_norms(model, altered(model), x, lambda model, x: model(x))
    state = {prefix + name: tensor for name, tensor in other.state_dict().items()}
    steps = torch.ones(())
    fused, biased = fused_state(model, norms, {'steps': steps, **state}, prefix)
    assert not biased
    assert fused.pop('steps') is steps
    plain = make_net()
    assert [prefix + name for name in plain.state_dict()] == list(fused)
    plain.load_state_dict({k.removeprefix(prefix): v for k, v in fused.items()}, strict=True)
    assert_same(output_of(plain, x), output_of(other, x))
    assert_untouched(model, *before[:2])
    # What is the same in both models is the same tensor.
    for name, tensor in fused.items():
        if name in state and not name.endswith('running_mean'):
            assert tensor is state[name]


def test_fused_state_of_a_conv_that_gained_a_bias():
    model, x = make_pair(), image(2, 4, 8, 8)
    block = grow(model, '0')
    randomise(model)
    prune(model, '0', block.names[1:])
    state = model.state_dict()
    fused, biased = fused_state(model, {'0': ['1']}, state)
    assert not biased
    assert fused['0.weight'] is state['0.weight']
    plain = make_pair()
    plain.load_state_dict(fused, strict=True)
    assert_same(output_of(plain, x), output_of(model, x))
    kept, biased = fused_state(model, {}, state)
    assert biased == ['0']
    assert torch.equal(kept['0.bias'], state['0.bias'])


def test_fused_state_leaves_a_block_of_which_tensors_are_missing():
    model = nest(make_net())
    state = {k: v for k, v in model.state_dict().items() if not k.startswith('conv1.branches.1x1.')}
    fused, _ = fused_state(model, {}, state)
    assert all(fused[name] is state[name] for name in state if name.startswith('conv1.'))
    assert 'stem.weight' in fused


@pytest.mark.parametrize('case', WIRINGS)
def test_norms_are_seen_in_a_training_forward(case):
    """The same as in eval mode, for plain convs and blocks; a dropout counts in training."""
    wiring, folded = WIRINGS[case]
    model, x = randomise(Wired(wiring).double()).train(), image(2, 4, 7, 8)
    for grown in (False, True):
        if grown:
            grow(model, 'a')
            randomise(model)
        with OutputWatch(model, 'ab') as watch:
            output = model(x)
        watch.note(output)
        if case != 'dropout between' and folded is not None:
            assert {path for path, norms in watch.norms().items() if norms} == set(folded)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_training_is_watched_until_all_is_known():
    model, x = make_net().train(), image()
    unknown, learnt, forwards = ['stem', 'conv1'], [], []
    handles = watch_training(
        model, lambda: forwards.append(1) or unknown, lambda norms: learnt.append(norms)
    )
    model.eval()(x)
    assert not learnt
    model.train()(x)
    assert learnt == [{'stem': ['stem_bn'], 'conv1': ['bn1']}]
    unknown.clear()
    model(x)
    assert len(learnt) == 1
    unknown.append('stem')
    with pytest.raises(RuntimeError):
        model(x[:, :1])  # a forward that fails leaves nothing behind
    model(x)
    assert learnt[-1] == {'stem': ['stem_bn']}
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(forwards) == 4
