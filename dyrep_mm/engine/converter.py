"""Between plain and multi-branch models, for configs and for ``tools/fuse.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import (
    revert_sync_batchnorm,
)
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from dyrep_mm.engine.checkpoint import (
    load_grown,
    load_strictly,
    load_structure,
    save_atomically,
    weights_of,
)
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import KEY
from dyrep_mm.registry import TASK_UTILS
from dyrep_mm.reparam.block import gain_bias
from dyrep_mm.surgery.fuse import fuse
from dyrep_mm.surgery.rewire import INIT_SCALE, expand, restore
from dyrep_mm.surgery.structure import PRESETS
from dyrep_mm.surgery.tree import Scope, blocks_of, depth_of, get_module
from dyrep_mm.version import __version__

#: Height and width of the images on which a fused model is verified, pixels.
IMAGE_SIZE = 128

#: Largest accepted relative difference of outputs in float64.
TOLERANCE = 1e-6


@TASK_UTILS.register_module()
class DyRepConverter:
    """Expands plain models and fuses multi-branch ones.

    Args:
        structure: ``'dbb'``, ``'dbb7'``, ``'repvgg'``, a Structure, a Structure file or a
            checkpoint.
        kernel_sizes: With a name, the square kernel sizes to expand.
        scope: With a name, dotted prefix, or several, to look in.
        init_scale: Importance of a new branch relative to its conv.
    """

    def __init__(
        self,
        structure: str | Mapping = 'dbb',
        kernel_sizes: Iterable[int] = (3,),
        scope: Scope = 'backbone',
        init_scale: float = INIT_SCALE,
    ):
        named = isinstance(structure, str) and structure in PRESETS
        self.structure = structure if named else load_structure(structure)
        self.options = {
            'kernel_sizes': tuple(kernel_sizes),
            'scope': scope,
            'init_scale': init_scale,
        }

    def expand(self, model: nn.Module) -> nn.Module:
        """Give ``model`` the structure, in place; the same function in eval mode."""
        return expand(model, self.structure, **self.options)

    def fuse(self, model: nn.Module, inputs: Tensor | None = None) -> nn.Module:
        """A plain copy of ``model``, see :func:`dyrep_mm.fuse`."""
        return fuse(model, inputs, forward=features)


@dataclass(frozen=True)
class FuseReport:
    """What :func:`fuse_checkpoint` did.

    Attributes:
        weights: Which weights of the checkpoint were fused.
        blocks: How many blocks became convs.
        biased: Convs that gained a bias, since no BN takes their output.
        error64: See :func:`relative_difference`, in float64.
        error32: The same in float32.
    """

    weights: str
    blocks: int
    biased: list[str]
    error64: float
    error32: float


def features(model: nn.Module, inputs: Tensor) -> Any:
    """What ``model`` computes from images (n, 3, h, w): the features of its backbone and neck
    where it is an OpenMMLab model, else its output."""
    extract = getattr(model, 'extract_feat', model)
    return extract(inputs)


def build_model(config: Config) -> nn.Module:
    """The model of a config, on CPU, in eval mode, its weights not initialised."""
    init_default_scope(config.get('default_scope', 'mmengine'))
    return revert_sync_batchnorm(MODELS.build(config.model)).eval()


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = output.values()
    return [t for item in output for t in tensors_in(item)] if isinstance(output, Iterable) else []


def relative_difference(first: Any, second: Any) -> float:
    """Largest difference of two outputs, each tensor relative to its own largest value."""
    pairs = zip(tensors_in(first), tensors_in(second), strict=True)
    return max(((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item() for a, b in pairs)


@torch.no_grad()
def difference(model: nn.Module, fused: nn.Module, inputs: Tensor) -> float:
    """:func:`relative_difference` of the features of both, and of the blocks that no feature
    needs, as in a head, each on an input of its own."""
    reached: set[nn.Module] = set()
    blocks = {p: b for p, b in blocks_of(model).items() if depth_of(model, p) == 0}
    handles = [b.register_forward_hook(lambda b, *_: reached.add(b)) for b in blocks.values()]
    errors = [relative_difference(features(model, inputs), features(fused, inputs))]
    for handle in handles:
        handle.remove()
    for path, block in blocks.items():
        if block not in reached:
            x = torch.randn(
                2, block.in_channels, 32, 32, generator=torch.Generator().manual_seed(0)
            )
            x = x.to(inputs)
            errors.append(relative_difference(block(x), get_module(fused, path)(x)))
    return max(errors)


def fuse_checkpoint(
    config: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    size: int = IMAGE_SIZE,
    tolerance: float = TOLERANCE,
    trust: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> FuseReport:
    """Turn a checkpoint with a structure into a plain one, verified.

    The model is rebuilt from config and structure, fused, reloaded with ``strict=True`` into
    the plain model of the config, and both are compared on random images. ``out`` is written
    only if they agree.

    Args:
        config: Config file; a DyRep hook in it does not matter.
        checkpoint: Checkpoint of a run with DyRep.
        out: The file to write: ``state_dict`` of the plain model and ``meta``.
        size: Height and width of the two random images, pixels.
        tolerance: Largest accepted relative difference in float64.
        trust: Load a checkpoint that holds more than plain data.
        say: Is told what happens.

    Raises:
        DyRepError: the checkpoint cannot be read, does not fit the config, holds no
            structure, or the fused model differs.
    """
    loaded, structure = load_grown(checkpoint, trust=trust)
    if not Path(config).is_file():
        raise DyRepError(f'there is no config file {config}')
    if not (folder := Path(out).resolve().parent).is_dir():
        raise DyRepError(f'{folder} is no folder to write {Path(out).name} into')
    cfg = Config.fromfile(config)
    model = build_model(cfg)
    restore(model, structure, weights_of(loaded))
    load_strictly(model, weights_of(loaded), checkpoint)
    weights = 'EMA weights' if 'ema_state_dict' in loaded else 'weights'
    blocks = len(blocks_of(model))
    say(f'fusing the {weights} that a test of {checkpoint} uses: {blocks} blocks')

    inputs = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    plain, biased = build_model(cfg), []
    fused = fuse(model, inputs, forward=features)
    for path in _transplant(fused, plain, checkpoint):
        biased.append(path)
        say(f'{path} gains a bias: no BN takes its output, so its plain config must have one')
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    error32 = difference(model, plain, inputs)
    error64 = difference(model.double(), plain.double(), inputs.double())
    say(f'relative difference of outputs: {error64:.1e} in float64, {error32:.1e} in float32')
    if not error64 <= tolerance:
        raise DyRepError(
            f'the fused model differs by {error64:.1e} in float64, more than {tolerance:.0e}: '
            f'{out} is not written'
        )
    save_atomically(_fused_checkpoint(loaded['meta'], checkpoint, weights, state), out)
    say(f'wrote {out}')
    return FuseReport(weights, blocks, biased, error64, error32)


def _transplant(fused: nn.Module, plain: nn.Module, source: str | Path) -> list[str]:
    """Load the weights of ``fused`` into the plain model of the config, strictly; returns the
    convs that had to gain a bias for it."""
    names = plain.state_dict().keys()
    biased = [name.removesuffix('.bias') for name in fused.state_dict() if name not in names]
    for path in biased:
        gain_bias(get_module(plain, path))
    load_strictly(plain, fused.state_dict(), source)
    return biased


def _fused_checkpoint(
    meta: Mapping, source: str | Path, weights: str, state: dict[str, Tensor]
) -> dict[str, Any]:
    """The content of a fused file: plain data, and from where it comes."""
    kept = {'dataset_meta', 'epoch', 'iter'} & meta.keys()
    said = {
        'fused': True,
        'source': Path(source).name,
        'weights': weights,
        'version': __version__,
        'structure': {},
    }
    return {
        'meta': {**{name: _plain(meta[name]) for name in sorted(kept)}, KEY: said},
        'state_dict': state,
    }


def _plain(value: Any) -> Any:
    """``value`` without classes that ``torch.load(weights_only=True)`` refuses."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(value)
    if hasattr(value, 'tolist'):
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
