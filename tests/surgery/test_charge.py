"""What a training step costs with blocks as they run, beside the plain model."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dyrep_mm import grow, prune
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.charge import Costs
from dyrep_mm.surgery.cost import SizeWatch, multiply_adds
from dyrep_mm.surgery.tree import blocks_of
from support.checks import assert_equal_states
from support.nets import as_on_a_gpu, image, make_net, norms_of, snapshot

INNER = 'conv1.branches.1x1-kxk.conv'


def counted(model, x):
    """By hooks on every conv and linear layer in a forward that runs every branch by itself."""
    total, handles = [], []

    def count(module, _args, output):
        total.append(output.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(count))
    model.train()(x)
    for handle in handles:
        handle.remove()
    return sum(total) / len(x)


def ran(model, x):
    """By torch's count of what a forward really runs; it must contain no average pooling, which
    the CPU runs as a conv."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2 / len(x)


def sizes_of(model, *batches):
    watch = SizeWatch(model)
    for x in batches:
        model(x)
    return watch.finish()


MODES = ('linear', 'merged', 'small maps', 'autocast', 'another device')


def in_mode(mode):
    """A net, images, and a context to train in; whether branches count one by one."""
    model = make_net().train()
    x = image(2, 3, 5, 5) if mode == 'small maps' else image(2, 3, 17, 18)
    context = nullcontext()
    if mode == 'linear':
        for norm in norms_of(model):
            norm.eval()
    if mode == 'autocast':
        model, x = model.float(), x.float()
        context = torch.autocast('cpu', torch.bfloat16)
    if mode == 'another device':
        context = as_on_a_gpu()
    return model, x, context


def costs_of(model, x):
    watch, costs = SizeWatch(model), Costs()
    model(x)
    costs.learn(watch.finish(), watch.images, watch.autocast)
    return costs


NO_POOLING = ['1x1', '1x1-kxk', '1xk', 'kx1', 'identity']


@pytest.mark.parametrize('mode', MODES)
def test_the_cost_is_what_runs(mode):
    """Of a net that grew, learned from the plain one."""
    model, x, context = in_mode(mode)
    with context:
        costs, plain = costs_of(model, x), ran(model, x)
        assert costs.of(model)() == 1.0
        for path, operations in candidates(model, branches=NO_POOLING).items():
            grow(model, path, operations[1:])
        for path in (INNER, 'conv1.branches.kxk', f'{INNER}.branches.kx1.conv'):
            names = ['1x1', '1x1-kxk'] if path.endswith('kx1.conv') else NO_POOLING
            grow(model, path, names)
        for norm in norms_of(model):
            norm.train(mode != 'linear')
        cost = costs.of(model)
        assert cost.plain == plain
        assert cost() > 1
        assert cost() * plain == pytest.approx(ran(model, x), rel=1e-12)


@pytest.mark.parametrize('mode', ['small maps', 'autocast', 'another device'])
def test_where_nothing_merges_branches_count_one_by_one(mode):
    model, x, context = in_mode(mode)
    with context:
        costs = costs_of(model, x)
        grow(model, 'conv1')
        grow(model, 'conv2')
        assert costs.of(model)() * costs.of(model).plain == pytest.approx(counted(model, x))


def test_a_linear_block_costs_its_conv_and_its_kernels():
    """The more images share the kernels, the less."""
    model, x, _ = in_mode('linear')
    watch = SizeWatch(model)
    model(x)
    sizes = watch.finish()
    few, many = Costs(), Costs()
    few.learn(sizes, 2)
    many.learn(sizes, 2000)
    growth = {'conv1': ['kxk', '1x1-kxk', '1xk']}
    assert few.of(model)(growth) > many.of(model)(growth) > 1
    # The product of the two kernels, once for all images; some more for its bias.
    extra = (few.of(model)(growth) - 1) * few.of(model).plain * 2
    assert 1 <= extra / (8 * 8 * 8 * 9) < 1.2


@pytest.mark.parametrize('mode', MODES)
def test_changes_cost_what_the_model_costs_after_them(mode):
    model, x, context = in_mode(mode)
    with context:
        costs = costs_of(model, x)
        steps = [
            ({'conv1': None}, {}),
            ({INNER: None, 'dw': None, 'conv1.branches.kxk': None}, {}),
            ({f'{INNER}.branches.kx1.conv': None, 'conv2': None}, {'conv1': ['1x1', '1x1-avg']}),
            ({}, {'dw': 'all', INNER: ['kx1'], 'conv1.branches.kxk': ['identity']}),
            ({}, {INNER: ['1xk'], 'conv1': ['1x1-kxk']}),
            ({}, {'conv1.branches.kxk': 'all', 'conv1': 'all', 'conv2': 'all'}),
        ]
        for grown, pruned in steps:
            for path, names in pruned.items():
                if names == 'all':
                    pruned[path] = blocks_of(model)[path].names[1:]
            able = candidates(model)
            strip = ['kxk', '1x1', '1x1-kxk', '1x1-avg']  # of a conv that never grows by itself
            names = {path: able.get(path, strip) for path in grown}
            expected = costs.of(model)(names, pruned)
            for path in grown:
                grow(model, path, names[path][1:])
            for path in sorted(pruned, key=len, reverse=True):
                prune(model, path, pruned[path])
            for norm in norms_of(model):
                norm.train(mode != 'linear')
            assert costs.of(model)() == pytest.approx(expected, rel=1e-12)
        assert expected == 1.0


def test_across_processes_no_branch_merges():
    model, x, _ = in_mode('merged')
    watch, costs = SizeWatch(model), Costs()
    model(x)
    sizes = watch.finish()
    costs.learn(sizes, watch.images)
    growth = {'conv1': ['kxk', '1x1', 'identity', '1x1-avg']}
    mixed = costs.of(model)(growth)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    pointwise = nn.ModuleDict({'conv1': nn.Conv2d(8, 8, 1)})
    extra = 2 * multiply_adds(pointwise, {'conv1': sizes['conv1']})
    assert costs.of(model)(growth) != mixed
    assert (costs.of(model)(growth) - 1) * costs.of(model).plain == pytest.approx(extra)


def test_new_blocks_are_prepared():
    model, x, _ = in_mode('merged')
    plain = costs_of(model, x)
    linear = Costs(lambda block: block.eval())
    watch = SizeWatch(model)
    model(x)
    linear.learn(watch.finish(), watch.images)
    growth = {'conv1': ['kxk', '1x1', '1xk', 'kx1']}
    assert linear.of(model)(growth) == 1.0 < plain.of(model)(growth)


def test_asking_for_the_cost_changes_nothing():
    model, x, _ = in_mode('merged')
    costs = costs_of(model, x)
    grow(model, 'conv1')
    model.conv1.branches['1x1'].register_forward_hook(lambda *_: pytest.fail('it was run'))
    before, numbers = snapshot(model), torch.get_rng_state()
    cost = costs.of(model)
    assert cost({'dw': candidates(model)['dw']}, {'conv1': ['1x1']}) != cost()
    assert_equal_states(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), numbers)


def test_a_conv_of_unknown_size_costs_without_limit():
    model, x, _ = in_mode('merged')
    watch, costs = SizeWatch(model), Costs()
    model.conv1(x.new_zeros(2, 8, 6, 6))
    costs.learn(watch.finish(), watch.images)
    able = candidates(model)
    assert costs.of(model)({'dw': able['dw']}) == math.inf
    assert 1 < costs.of(model)({'conv1': able['conv1']}) < math.inf


def test_copies_grow_and_cost_too():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.online = make_net().train()
            self.target = make_net().requires_grad_(False)
            self.target.load_state_dict(self.online.state_dict())

        def forward(self, x):
            return self.online(x), self.target(x)

    model, x = Pair(), image(2, 3, 17, 18)
    watch, both, one = SizeWatch(model), Costs(), Costs()
    model(x)
    sizes = watch.finish()
    both.learn(sizes, 2, copies={'target': 'online'})
    one.learn(sizes, 2)
    growth = {'online.conv1': ['kxk', '1xk', 'kx1']}
    assert both.of(model)(growth) - 1 == pytest.approx(2 * (one.of(model)(growth) - 1))


def test_layers_of_another_head_count_nothing():
    model, x, _ = in_mode('merged')
    costs = Costs()
    costs.learn({**sizes_of(model, x), 'gone': [[1, 5, 5]]}, 2)
    assert costs.of(model)() == 1.0
