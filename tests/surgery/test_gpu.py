"""What only an accelerator can show; skipped without one."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from dyrep_mm import grow, prune
from dyrep_mm.evolution.operations import operations_of
from dyrep_mm.evolution.saliency import SCORES, make_score
from dyrep_mm.reparam.norms import BRANCH_NORMS
from dyrep_mm.surgery.calibration import calibrate
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.tree import blocks_of
from support.nets import randomise

pytestmark = pytest.mark.gpu

CUDA = 'cuda'


@contextmanager
def tf32(allowed):
    """Let convs and matrix products round to TF32, or not."""
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept


def pair(channels=32, stride=1, groups=1, **options):
    """A conv and its BN on the GPU, grown there, with importances as large as the conv's."""
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=groups, bias=False)
    net = randomise(nn.Sequential(conv, nn.BatchNorm2d(channels))).to(CUDA)
    generator = torch.Generator().manual_seed(1)
    grow(net, '0', init_scale=0.3, generator=generator, **options)
    return net.train()


def step(net, x):
    """Output, gradient of the input, and gradients of the parameters, in double precision."""
    x = x.detach().requires_grad_()
    out = net(x)
    weights = torch.linspace(-1, 1, out.numel(), device=CUDA).view_as(out)
    grads = torch.autograd.grad((out.float() * weights).sum(), [x, *net.parameters()])
    return [tensor.detach().double() for tensor in (out, *grads)]


def distance(first, second):
    """Relative to the largest value; what should be 0, as a shift in front of a BN, relative to
    the largest of all."""
    floor = 1e-2 * max(tensor.abs().max() for tensor in second)
    return max(
        ((a - b).abs().max() / torch.maximum(b.abs().max(), floor)).item()
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize('last', [False, True], ids=['', 'channels_last'])
@pytest.mark.parametrize('recompute', [False, True], ids=['', 'recompute'])
@pytest.mark.parametrize(('stride', 'groups'), [(1, 1), (2, 1), (1, 4)])
@pytest.mark.parametrize('branch_norm', ['batch', 'fixed'])
def test_a_step_is_that_of_double_precision(branch_norm, stride, groups, recompute, last):
    net = pair(stride=stride, groups=groups, branch_norm=branch_norm)
    for block in blocks_of(net).values():
        block.recompute = recompute
    x = torch.randn(4, 32, 40, 41, device=CUDA)
    if last:
        net, x = (t.to(memory_format=torch.channels_last) for t in (net, x))
    expected = step(copy.deepcopy(net).double(), x.double())
    for allowed, bound in ((False, 2e-3), (True, 0.1)):
        with tf32(allowed):
            assert distance(step(copy.deepcopy(net), x), expected) < bound
    if last:
        assert net(x).is_contiguous(memory_format=torch.channels_last)


def test_branches_run_and_do_not_merge_with_the_statistics_of_a_batch():
    (block,) = blocks_of(pair()).values()
    assert not block.may_merge(torch.randn(4, 32, 40, 40, device=CUDA))


@pytest.mark.parametrize('allowed', [False, True], ids=['', 'tf32'])
def test_growing_and_pruning_keep_the_function(allowed):
    """Kernels are merged in double precision, whatever convs round to."""
    net = randomise(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))).to(CUDA)
    x = torch.randn(4, 64, 28, 28, device=CUDA)
    exact = copy.deepcopy(net.eval()).double()(x.double())
    with tf32(allowed), torch.no_grad():
        grow(net, '0', init_scale=1.0)
        assert distance([copy.deepcopy(net).double()(x.double())], [exact]) < 1e-6
        prune(net, '0', ['1x1', '1x1-kxk', '1x1-avg'])
        assert distance([copy.deepcopy(net).double()(x.double())], [exact]) < 1e-6


@pytest.mark.parametrize('branch_norm', BRANCH_NORMS)
@pytest.mark.parametrize('metric', SCORES)
def test_an_iteration_waits_for_nothing(metric, branch_norm):
    """No copy to the host, which would wait until the GPU has done all its work."""
    net = pair(branch_norm=branch_norm)
    x = torch.randn(4, 32, 64, 64, device=CUDA)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    score = make_score(metric, operations_of(net, candidates(net)))

    def iterate():
        net(x).square().mean().backward()
        score.gather()
        optimizer.step()
        optimizer.zero_grad()

    iterate()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        iterate()
        iterate()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert all(torch.isfinite(torch.tensor(list(score.means(torch.Generator()).values()))))


@pytest.mark.parametrize('fused', [False, True], ids=['', 'fused'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_scores_know_nothing_of_the_loss_scale(dtype, fused):
    """An iteration that overflows is not counted."""
    means = []
    for scale in (2.0**10, 2.0**14):
        torch.manual_seed(0)
        net = pair()
        x = torch.randn(4, 32, 40, 40, device=CUDA)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=fused)
        scaler = torch.amp.GradScaler(CUDA, init_scale=scale)
        score = make_score('snip', operations_of(net, candidates(net)))
        optimizer.register_step_pre_hook(
            lambda used, *_, score=score: score.gather(
                getattr(used, 'grad_scale', None), getattr(used, 'found_inf', None)
            )
        )
        for number in range(4):
            with torch.autocast(CUDA, dtype):
                loss = net(x).float().square().mean()
            scaler.scale(loss * (float('inf') if number == 2 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        means.append(score.means(torch.Generator()))
    assert means[0] == pytest.approx(means[1], rel=2e-2)


def test_growing_measures_on_the_gpu_as_on_the_cpu():
    net = pair()
    twin = copy.deepcopy(net).cpu()
    batches = [torch.randn(4, 32, 28, 28) for _ in range(3)]
    with tf32(False):
        for model, device in ((net, CUDA), (twin, 'cpu')):
            moved = [batch.to(device) for batch in batches]
            assert not calibrate(model, blocks_of(model), moved, model)
    ours, theirs = net.state_dict(), twin.state_dict()
    assert (
        distance([t.cpu().double() for t in ours.values()], [t.double() for t in theirs.values()])
        < 1e-3
    )
