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
    load_checkpoint,
    load_strictly,
    load_structure,
    save_atomically,
)
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import KEY, Record
from dyrep_mm.registry import TASK_UTILS
from dyrep_mm.reparam.block import gain_bias
from dyrep_mm.surgery.fuse import fuse
from dyrep_mm.surgery.rewire import apply_structure, expand
from dyrep_mm.surgery.structure import PRESETS
from dyrep_mm.surgery.tree import Scope, blocks_of, depth_of, get_module
from dyrep_mm.version import __version__


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
        init_scale: float = 0.01,
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
    size: int = 128,
    tolerance: float = 1e-6,
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
    loaded = load_checkpoint(checkpoint, trust=trust)
    record = Record.from_checkpoint(loaded)
    if record.structure is None:
        raise DyRepError(f'{checkpoint} holds no structure: it is a checkpoint of a plain run')
    if not Path(config).is_file():
        raise DyRepError(f'there is no config file {config}')
    if not (folder := Path(out).resolve().parent).is_dir():
        raise DyRepError(f'{folder} is no folder to write {Path(out).name} into')
    cfg = Config.fromfile(config)
    model = build_model(cfg)
    apply_structure(model, record.structure, torch.Generator())
    load_strictly(model, loaded['state_dict'], checkpoint)
    weights = 'EMA weights' if 'ema_state_dict' in loaded else 'weights'
    say(f'fusing the {weights} that a test of {checkpoint} uses: {len(blocks_of(model))} blocks')

    inputs = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    fused = fuse(model, inputs, forward=features)
    plain = build_model(cfg)
    names = plain.state_dict().keys()
    biased = [n.removesuffix('.bias') for n in fused.state_dict() if n not in names]
    for path in biased:
        gain_bias(get_module(plain, path))
        say(f'{path} gains a bias: no BN takes its output, so its plain config must have one')
    load_strictly(plain, fused.state_dict(), checkpoint)

    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    error32 = difference(model, plain, inputs)
    error64 = difference(model.double(), plain.double(), inputs.double())
    say(f'relative difference of outputs: {error64:.1e} in float64, {error32:.1e} in float32')
    if not error64 <= tolerance:
        raise DyRepError(
            f'the fused model differs by {error64:.1e} in float64, more than {tolerance:.0e}: '
            f'{out} is not written'
        )
    kept = {'dataset_meta', 'epoch', 'iter'} & loaded['meta'].keys()
    meta = {
        **{name: _plain(loaded['meta'][name]) for name in sorted(kept)},
        KEY: {
            'fused': True,
            'source': Path(checkpoint).name,
            'weights': weights,
            'version': __version__,
            'structure': {},
        },
    }
    save_atomically({'meta': meta, 'state_dict': state}, out)
    say(f'wrote {out}')
    return FuseReport(weights, len(blocks_of(model)), biased, error64, error32)


def _plain(value: Any) -> Any:
    """``value`` without classes that ``torch.load(weights_only=True)`` refuses."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(value)
    if hasattr(value, 'tolist'):
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
