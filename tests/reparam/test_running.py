"""The reasons for the speed, not the seconds: what runs, and what is kept."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from mmengine.model.utils import _BatchNormXd
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dyrep_mm
from dyrep_mm.reparam.block import Block, kernels_kept
from support.checks import assert_same
from support.nets import as_on_a_gpu, branchwise, image, make_block, norms_of, randomise


class Operations(TorchDispatchMode):
    """Counts what runs, by name; views and questions about dtypes too if not told otherwise."""

    NO_WORK = ('_unsafe_view', 'detach', 'promote_types')

    def __init__(self, views: bool = True):
        super().__init__()
        self.counts = Counter()
        self.views = views

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.views or not (func.is_view or name in self.NO_WORK or name.startswith('empty')):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def grown_block() -> Block:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)).double()
    dyrep_mm.grow(model, '0')
    randomise(model)
    return model[0]


def saved_bytes(block: Block, x: torch.Tensor) -> int:
    """Bytes of maps that the backward keeps, each storage once."""
    known = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        is_map = tensor.ndim == 4 and len(tensor) == len(x)  # and not a merged kernel
        if storage.data_ptr() not in known and is_map:
            storages[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    assert out.requires_grad
    return sum(size for size, _ in storages.values())


def test_a_frozen_block_is_one_conv():
    block = grown_block().train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with Operations() as operations:
        block(torch.rand(2, 8, 9, 9, dtype=torch.float64))
    assert operations.counts['convolution'] == 1
    assert operations.counts['native_batch_norm'] == 0


def fixed_block() -> Block:
    block = grown_block().train()
    block.set_branch_norm('fixed', training=True)
    return block


def test_merging_takes_few_operations():
    """On an accelerator these are what it costs. There were 167 of them, forward and backward,
    before the norms of a block folded at once; views do no work."""
    block = fixed_block()
    x = torch.rand(2, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    with Operations(views=False) as operations:
        block(x).sum().backward()
    assert operations.counts['convolution'] == operations.counts['convolution_backward'] == 1
    # Three for the kernel of `1x1-kxk`, two for its shift, one for `1x1-avg`.
    assert operations.counts['bmm'] == 6
    around = 4  # the conv, the sum, and what their backward runs
    assert operations.counts.total() - around <= 167 // 2


def test_merging_keeps_one_kernel_for_the_backward():
    """The one that the conv keeps; the rest is computed again from the parameters."""
    block = fixed_block()
    known = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.shape == block.origin.weight.shape:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(torch.rand(2, 8, 9, 9, dtype=torch.float64, requires_grad=True))
    assert len(kept) == 1


def test_inference_merges_once():
    block = grown_block().eval()
    x = torch.rand(2, 8, 9, 9, dtype=torch.float64)
    with torch.no_grad(), dyrep_mm.kernels_kept(block):
        block(x)
        with Operations() as operations:
            block(x)
    assert operations.counts == {'convolution': 1}


@pytest.mark.parametrize('kind', [nn.BatchNorm2d, _BatchNormXd], ids=['BN', 'reverted SyncBN'])
def test_in_training_a_1x1_merges_too(kind):
    """Four convs run, for `kxk` with all that merges, `1x1-kxk`, `1xk` and `kx1`, and one that is
    the pooling; three norms; and three sums, in place."""
    block = grown_block().train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = kind
    with Operations() as operations:
        block(torch.rand(2, 8, 9, 9, dtype=torch.float64))
    assert operations.counts['convolution'] == 5
    assert operations.counts['native_batch_norm'] == 3
    assert not {'stack', 'cat'} & operations.counts.keys()


@pytest.mark.parametrize('side', [7, 8])
def test_merging_costs_no_more_than_it_saves(side):
    """It happens only on maps with at least eight times as many places as channels."""
    block = grown_block().train()
    with Operations() as operations:
        block(torch.rand(1, 8, side, side, dtype=torch.float64))
    assert operations.counts['native_batch_norm'] == (3 if side == 8 else 8)


def autocast(block, x):
    with torch.autocast('cpu', torch.bfloat16):
        block(x)


def half(block, x):
    block.bfloat16()(x.bfloat16())


class OtherNorm(nn.BatchNorm2d):
    """Computes in its own way, as SyncBN does."""

    def forward(self, x):
        return super().forward(x)


def other_norms(block, x):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = OtherNorm
    block(x)


def watched(block, x):
    handle = block.branches['1x1'].bn.register_forward_hook(lambda *_: None)
    block(x)
    handle.remove()


def elsewhere(block, x):
    with as_on_a_gpu():
        block(x)


@pytest.mark.parametrize('run', [autocast, half, other_norms, watched, elsewhere])
def test_all_branches_run_where_merging_is_not_sure(run):
    block = grown_block().float().train()
    with Operations() as operations:
        run(block, torch.rand(2, 8, 9, 9))
    assert operations.counts['native_batch_norm'] == 8
    assert operations.counts['add_'] >= len(block.added)
    assert not {'stack', 'cat', 'sum', 'add'} & operations.counts.keys()


def test_a_trace_shows_all_branches():
    """Who counts multiply-adds from a trace counts those of the structure."""
    block = grown_block().float().train()
    trace = torch.jit.trace(block, torch.rand(2, 8, 9, 9), check_trace=False)
    assert str(trace.inlined_graph).count('aten::batch_norm') == 8


def test_what_a_block_in_training_keeps():
    """The input, its averages over windows for `1x1-avg`, and one map for each branch that runs."""
    block = grown_block().train()
    x = torch.rand(2, 8, 32, 32, dtype=torch.float64, requires_grad=True)
    assert saved_bytes(block, x) == x.untyped_storage().nbytes() * (1 + 1 + 3)


@pytest.mark.parametrize('watch', [False, True])
def test_recomputing_keeps_the_input_alone(watch):
    block = grown_block().train()
    x = torch.rand(2, 8, 32, 32, dtype=torch.float64, requires_grad=True)
    block.recompute = True
    if watch:  # all branches run
        block.branches['1x1'].register_forward_hook(lambda *_: None)
    assert saved_bytes(block, x) == x.untyped_storage().nbytes()


def test_recomputing_computes_the_same():
    kept = grown_block().train()
    again = copy.deepcopy(kept)
    again.recompute = True
    inputs = [torch.rand(2, 8, 9, 9, dtype=torch.float64) for _ in range(2)]
    for x in inputs:  # twice: statistics are recorded once in each step
        results = []
        for block in (kept, again):
            leaf = x.clone().requires_grad_()
            out = block(leaf)
            out.square().sum().backward()
            results.append((out, leaf.grad, *(p.grad for p in block.parameters())))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    for (name, one), other in zip(kept.named_buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert [m.momentum for m in kept.modules() if isinstance(m, nn.BatchNorm2d)] == [
        m.momentum for m in again.modules() if isinstance(m, nn.BatchNorm2d)
    ]


# Which branches run


def calls_of(block):
    """List that gets a name for every branch that runs."""
    calls = []
    for name, branch in block.branches.items():
        branch.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def test_who_watches_the_branches_in_train_mode_sees_them_all():
    block, x = make_block(), image(2, 4, 8, 8)
    calls = calls_of(block)
    block.eval()(x)
    assert calls == []
    block.train()(x)
    assert calls == block.names


def test_frozen_norms_mean_one_conv():
    """``norm_eval=True``: the modules train, their norms do not."""
    block, x = make_block(), image(2, 4, 8, 8)
    calls = calls_of(block)
    block.train()
    for bn in norms_of(block):
        bn.eval()
    assert block.is_linear
    block(x).sum().backward()
    assert calls == []
    assert all(p.grad is not None for p in block.parameters())
    norms_of(block)[-1].train()
    assert not block.is_linear
    block(x)
    assert calls == block.names


# The kept kernel


@pytest.fixture
def counted(monkeypatch):
    """A block in eval mode, and the list that grows with every merge."""
    block, merges = make_block().eval(), []
    kernel = Block.kernel
    monkeypatch.setattr(Block, 'kernel', lambda self: merges.append(1) or kernel(self))
    return block, merges


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_a_kernel_is_kept_where_that_is_asked_for(counted, mode):
    block, merges = counted
    x = image(2, 4, 8, 8)
    with mode():
        for _ in range(2):
            first = block(x)
        assert len(merges) == 2
        with kernels_kept(block):
            for _ in range(3):
                assert torch.equal(block(x), first)
            assert len(merges) == 3
        block(x)
        assert len(merges) == 4


def test_gradients_have_a_graph_of_their_own_each_time(counted):
    block, merges = counted
    with kernels_kept(block):
        for _ in range(2):
            block(image(2, 4, 8, 8)).sum().backward()
    assert len(merges) == 2


def test_keeping_inside_of_keeping(counted):
    block, merges = counted
    with torch.no_grad(), kernels_kept(nn.Sequential(block)):
        with kernels_kept(block):
            block(image(2, 4, 8, 8))
        for _ in range(2):
            block(image(2, 4, 8, 8))
        assert len(merges) == 2
        copied = copy.deepcopy(block)
        for _ in range(2):
            copied(image(2, 4, 8, 8))
        assert len(merges) == 4


def test_an_error_ends_keeping(counted):
    block, merges = counted
    with pytest.raises(ZeroDivisionError), kernels_kept(block):
        raise ZeroDivisionError
    with torch.no_grad():
        for _ in range(2):
            block(image(2, 4, 8, 8))
    assert len(merges) == 2


def change_parameter(block):
    with torch.no_grad():
        block.branches['1x1'].conv.weight.mul_(2)


def change_buffer(block):
    block.branches['1x1'].bn.running_mean.add_(1)


def load(block):
    block.load_state_dict({k: v + v for k, v in block.state_dict().items()})


def load_assigned(block):
    block.load_state_dict({k: v + v for k, v in block.state_dict().items()}, assign=True)


def step(block):
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    with torch.enable_grad():
        block(image(2, 4, 8, 8)).square().mean().backward()
    optimizer.step()


def foreach_step(block):
    optimizer = torch.optim.AdamW(block.parameters(), 0.1, foreach=True)
    with torch.enable_grad():
        block(image(2, 4, 8, 8)).square().mean().backward()
    optimizer.step()


def fused_step(block):
    """It leaves the versions of tensors as they were."""
    optimizer = torch.optim.SGD(block.parameters(), 0.1, fused=True)
    with torch.enable_grad():
        block(image(2, 4, 8, 8)).square().mean().backward()
    optimizer.step()


def train_a_little(block):
    block.train()(image(2, 4, 8, 8))
    block.eval()


def frozen_statistics(block):
    for bn in norms_of(block):
        bn.train()
    block(image(2, 4, 8, 8))
    for bn in norms_of(block):
        bn.eval()


def absorb(block):
    block.branches['1x1'].bn.bias.data += 1
    block.absorb(['1x1'])


def average(block):
    """A swap through ``data`` that is followed by ``eval()``, as mmengine's EMA hook does."""
    change_data(block)
    block.eval()


def train_and_back(block):
    block.train()
    block.eval()
    change_data(block)


def replace_data(block):
    for parameter in block.parameters():
        parameter.data = parameter.data * 2


def replace_data_twice(block):
    """So that memory may be where it was."""
    replace_data(block)
    replace_data(block)


def set_vector(block):
    vector = nn.utils.parameters_to_vector(block.parameters())
    nn.utils.vector_to_parameters(vector * 2, block.parameters())


def new_parameters(block):
    for module in block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 2))


def new_branch(block):
    block.branches['1x1'].conv = copy.deepcopy(block.branches['1x1'].conv)
    block.branches['1x1'].conv.weight.mul_(2)


def change_data(block):
    for parameter in block.parameters():
        parameter.data.mul_(2)


def change_numpy(block):
    for parameter in block.parameters():
        parameter.detach().numpy()[:] *= 2


NOTICED = [
    change_parameter,
    change_buffer,
    load,
    load_assigned,
    step,
    foreach_step,
    fused_step,
    train_a_little,
    frozen_statistics,
    absorb,
    average,
    train_and_back,
    replace_data,
    replace_data_twice,
    set_vector,
    new_parameters,
    new_branch,
]


@pytest.mark.parametrize('change', [*NOTICED, change_data, change_numpy])
def test_no_answer_with_old_weights(change):
    block, x = make_block().eval(), image(2, 4, 8, 8)
    with torch.no_grad():
        before = block(x)
        change(block)
        after = block(x)
        assert_same(after, branchwise(block, x))
        assert not torch.allclose(after, before)


@pytest.mark.parametrize('change', NOTICED)
def test_kept_kernel_is_dropped(change):
    block, x = make_block().eval(), image(2, 4, 8, 8)
    with torch.no_grad(), kernels_kept(block):
        before = block(x)
        change(block)
        after = block(x)
        assert_same(after, branchwise(block, x))
        assert not torch.allclose(after, before)


@pytest.mark.parametrize('change', [change_data, change_numpy])
def test_no_answer_with_old_weights_after_keeping(change):
    block, x = make_block().eval(), image(2, 4, 8, 8)
    with torch.no_grad():
        with kernels_kept(block):
            block(x)
        change(block)
        assert_same(block(x), branchwise(block, x))
        with kernels_kept(block):
            assert_same(block(x), branchwise(block, x))


@pytest.mark.parametrize('dynamic', [False, True])
def test_a_compiled_block_has_no_old_weights(dynamic):
    block, x = make_block().eval(), image(2, 4, 8, 8)
    torch.compiler.reset()
    compiled = torch.compile(block, backend='eager', dynamic=dynamic)
    with torch.no_grad(), kernels_kept(block):
        assert_same(compiled(x), branchwise(block, x))
        change_data(block)
        assert_same(compiled(x), branchwise(block, x))


def test_kept_kernel_follows_the_dtype():
    block, x = make_block().eval(), image(2, 4, 8, 8)
    with torch.no_grad(), kernels_kept(block):
        before = block(x)
        assert_same(block.float()(x.float()), before.float())


def test_inference_mode():
    block, x = make_block().eval(), image(2, 4, 8, 8)
    expected = block(x).detach()
    with torch.inference_mode():
        assert_same(block(x), expected)
    with torch.no_grad():
        assert_same(block(x), expected)
    block(x).sum().backward()
