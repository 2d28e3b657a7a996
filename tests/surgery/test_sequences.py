"""Long random sequences of what can happen to a model, on networks of random geometry.

After every step the model computes what it did, the optimizer trains exactly its parameters, its
structure rebuilds it, and fusing gives a plain model that computes the same.

``DYREP_SEQUENCES`` sets how many sequences there are; ``make soak`` asks for more.
"""

from __future__ import annotations

import copy
import io
import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import dyrep_mm
from dyrep_mm import expand, fuse, grow, prune
from dyrep_mm.evolution.record import Record
from dyrep_mm.reparam.block import Block
from dyrep_mm.reparam.branches import fitting
from dyrep_mm.reparam.geometry import ConvSpec
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.optimizer import check_optimizer, sync_optimizer
from dyrep_mm.surgery.rewire import apply_structure, mirror
from dyrep_mm.surgery.structure import Plan, structure_of
from dyrep_mm.surgery.tree import blocks_of, get_module
from support.checks import assert_same
from support.nets import image, output_of, randomise

MAX_DEPTH, MAX_BLOCKS = 3, 8
SIZE = 9


@st.composite
def convs(draw: st.DrawFn) -> list[dict]:
    """Geometry of a chain of convs, as arguments of ``nn.Conv2d``."""
    chain, channels = [], draw(st.sampled_from([2, 4]))
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([1, 2, channels]))
        outputs = draw(st.sampled_from([channels, 2 * channels, 4]))
        outputs += -outputs % groups
        size = draw(st.sampled_from([(3, 3), (5, 5), (1, 3)]))
        dilation = draw(st.sampled_from([1, 2]))
        chain.append(
            {
                'in_channels': channels,
                'out_channels': outputs,
                'kernel_size': size,
                'stride': draw(st.sampled_from([1, 1, 2])),
                'padding': tuple(draw(st.integers(0, dilation * (k - 1))) for k in size),
                'dilation': dilation,
                'groups': groups,
                'bias': draw(st.booleans()),
            }
        )
        channels = outputs
    return chain


class Chain(nn.Module):
    """Convs with a BN behind each, and enough of a border that every geometry has an output."""

    def __init__(self, geometry: list[dict]):
        super().__init__()
        for i, options in enumerate(geometry):
            self.add_module(f'conv{i}', nn.Conv2d(**options))
            self.add_module(f'bn{i}', nn.BatchNorm2d(options['out_channels']))
        self.length = len(geometry)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.length):
            x = nn.functional.pad(x, (4, 4, 4, 4), value=0.1)
            x = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(x))
            x = nn.functional.softplus(x)
        return x.mean((2, 3))


def make(geometry: list[dict]) -> Chain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(Chain(geometry).double())


def make_optimizer(model: nn.Module, many: bool) -> torch.optim.Optimizer:
    groups = [{'params': [p]} for p in model.parameters()] if many else list(model.parameters())
    return torch.optim.SGD(groups, lr=1e-3, momentum=0.9, weight_decay=1e-4)


class Life(RuleBasedStateMachine):
    """What may happen to a model in training."""

    @initialize(geometry=convs(), many=st.booleans())
    def start(self, geometry: list[dict], many: bool) -> None:
        self.geometry, self.many = geometry, many
        self.x = torch.randn(
            3, geometry[0]['in_channels'], SIZE, SIZE, dtype=torch.float64,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        self.model = make(geometry)
        self.average = make(geometry).requires_grad_(False)
        self.optimizer = make_optimizer(self.model, many)
        self.groups = len(self.optimizer.param_groups)
        self.remember()

    @torch.no_grad()
    def outputs(self, *models: nn.Module) -> list[Tensor]:
        """What models compute in eval mode; modes are kept."""
        results = []
        for model in models or (self.model, self.average):
            modes = [(m, m.training) for m in model.modules()]
            results.append(model.eval()(self.x))
            for module, training in modes:
                module.training = training
        return results

    def remember(self) -> None:
        """The function has changed on purpose."""
        self.expected = self.outputs()

    def follow(self, plan: Plan) -> None:
        mirror(self.average, self.model, plan)
        before = dict(self.optimizer.state)
        sync_optimizer(self.optimizer, self.model)
        alive = set(self.model.parameters())
        for parameter, state in before.items():
            assert (self.optimizer.state.get(parameter) is state) == (parameter in alive)

    @precondition(lambda self: len(blocks_of(self.model)) < MAX_BLOCKS)
    @rule(data=st.data(), seed=st.integers(0, 99), scale=st.sampled_from([0.0, 0.01, 1.0]))
    def grow(self, data: st.DataObject, seed: int, scale: float) -> None:
        paths = candidates(self.model, max_depth=MAX_DEPTH)
        paths = [p for p in paths if fitting(ConvSpec.of(get_module(self.model, p)))]
        # Strips can grow too; `candidates` names square kernels alone.
        if not paths:
            return
        path = data.draw(st.sampled_from(sorted(paths)))
        fits = fitting(ConvSpec.of(get_module(self.model, path)))
        names = data.draw(st.lists(st.sampled_from(fits), min_size=1, unique=True))
        generator = torch.Generator().manual_seed(seed)
        weight = get_module(self.model, path).weight
        dyrep_mm.grow(self.model, path, names, init_scale=scale, generator=generator)
        assert get_module(self.model, path).origin.weight is weight
        self.follow(Plan([path]))

    @precondition(lambda self: blocks_of(self.model))
    @rule(data=st.data())
    def prune(self, data: st.DataObject) -> None:
        blocks = blocks_of(self.model)
        path = data.draw(st.sampled_from(sorted(blocks)))
        names = data.draw(
            st.lists(st.sampled_from(blocks[path].names[1:]), min_size=1, unique=True)
        )
        dyrep_mm.prune(self.model, path, names)
        self.follow(Plan([], {path: names}))

    @rule(steps=st.integers(1, 2))
    def train(self, steps: int) -> None:
        self.model.train()
        for _ in range(steps):
            self.optimizer.zero_grad()
            (self.model(self.x) - 1).square().mean().backward()
            self.optimizer.step()
        for mine, theirs in zip(
            self.average.state_dict().values(), self.model.state_dict().values(), strict=True
        ):
            if mine.is_floating_point():
                mine.lerp_(theirs, 0.1)
        self.remember()

    @rule(mode=st.booleans())
    def switch(self, mode: bool) -> None:
        self.model.train(mode)

    @rule(resume=st.booleans())
    def save_and_load(self, resume: bool) -> None:
        """Through a file, as plain data, into a model that was built anew."""
        file, checkpoint = io.BytesIO(), {'meta': {}}
        Record(structure=structure_of(self.model)).to_checkpoint(checkpoint)
        checkpoint |= {
            'state_dict': self.model.state_dict(),
            'average': self.average.state_dict(),
            'optimizer': self.optimizer.state_dict(),
        }
        torch.save(checkpoint, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        structure = Record.from_checkpoint(loaded).structure
        mode = self.model.training
        self.model = make(self.geometry).train(mode)
        self.average = make(self.geometry).requires_grad_(False)
        self.optimizer = make_optimizer(self.model, self.many)
        for model, state in ((self.model, 'state_dict'), (self.average, 'average')):
            apply_structure(model, structure, torch.Generator())
            model.load_state_dict(loaded[state], strict=True)
        sync_optimizer(self.optimizer, self.model)
        if resume:
            self.optimizer.load_state_dict(loaded['optimizer'])

    @invariant()
    def same_function(self) -> None:
        for actual, expected in zip(self.outputs(), self.expected, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)

    @invariant()
    def right_parameters(self) -> None:
        check_optimizer(self.optimizer, self.model)
        assert len(self.optimizer.param_groups) == self.groups
        order = {p: i for i, p in enumerate(self.model.parameters())}
        for group in self.optimizer.param_groups:
            places = [order[p] for p in group['params']]
            assert places == sorted(places)
        assert not any(p.requires_grad for p in self.average.parameters())

    @invariant()
    def structure_rebuilds(self) -> None:
        structure = structure_of(self.model)
        assert structure_of(self.average) == structure
        plain = make(self.geometry)
        apply_structure(plain, structure)
        assert structure_of(plain) == structure
        assert list(plain.state_dict()) == list(self.model.state_dict())

    @invariant()
    def fuses(self) -> None:
        modes = [m.training for m in self.model.modules()]
        for inputs in (None, self.x):
            fused = dyrep_mm.fuse(self.model, inputs)
            assert not blocks_of(fused)
            (actual,) = self.outputs(fused)
            torch.testing.assert_close(actual, self.expected[0], rtol=1e-7, atol=1e-9)
        # Every conv is followed by a norm: the fused model has the parameters of the plain one.
        assert list(fused.state_dict()) == list(make(self.geometry).state_dict())
        assert [m.training for m in self.model.modules()] == modes


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=int(os.environ.get('DYREP_SEQUENCES', '15')),
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


# Every geometry, in short sequences


@st.composite
def geometries(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel = draw(st.sampled_from([(3, 3), (5, 5), (1, 3), (3, 1), (5, 3)]))
    return {
        'in_channels': 4,
        'out_channels': draw(st.sampled_from([4, 8])),
        'kernel_size': kernel,
        'stride': draw(st.sampled_from([1, 2, (2, 1)])),
        'padding': draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        'dilation': draw(st.sampled_from([1, 2, (1, 2)])),
        'groups': groups,
        'bias': draw(st.booleans()),
    }


@settings(max_examples=25, deadline=None, derandomize=True)
@given(geometries(), st.data())
def test_any_sequence_of_edits_keeps_the_function(geometry, data):
    torch.manual_seed(0)

    def plain():
        conv = nn.Conv2d(**geometry)
        return nn.Sequential(conv, nn.BatchNorm2d(geometry['out_channels'])).double()

    model, x = randomise(plain()), image(2, 4, 12, 13)
    expected = output_of(model, x)
    for _ in range(data.draw(st.integers(1, 6))):
        edits = ['grow', 'prune', 'train', 'save', 'eval', 'step']
        edit = data.draw(st.sampled_from(edits))
        blocks, convs = blocks_of(model), candidates(model, max_depth=3)
        if edit == 'grow' and convs:
            path = data.draw(st.sampled_from(convs))
            names = fitting(ConvSpec.of(get_module(model, path)))
            grow(model, path, data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True)))
        elif edit == 'prune' and blocks:
            path = data.draw(st.sampled_from(sorted(blocks)))
            names = blocks[path].names[1:]
            chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
            prune(model, path, chosen)
        elif edit == 'train':
            model.train()
        elif edit == 'eval':
            model.eval()
        elif edit == 'step':
            randomise(model)
            expected = output_of(model, x)
        elif edit == 'save':
            twin = expand(plain().train(model.training), structure_of(model))
            twin.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
            model = twin
        assert_same(output_of(model, x), expected, edit, scale=10)
    fused = fuse(model, x)
    assert list(fused.state_dict()) == list(plain().state_dict())
    assert_same(output_of(fused, x), expected, scale=10)
    assert not any(isinstance(module, Block) for module in fused.modules())
