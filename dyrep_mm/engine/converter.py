"""Between plain and multi-branch models, for configs and for ``tools/fuse.py``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import HOOKS, MODELS, init_default_scope
from torch import Tensor, nn

from dyrep_mm.engine.base import StructureHook
from dyrep_mm.engine.checkpoint import (
    grown_in,
    load_checkpoint,
    load_strictly,
    load_structure,
    save_atomically,
    weights_of,
)
from dyrep_mm.engine.passes import (
    Passes,
    first_line,
    image_channels,
    noise_for,
    shape_of,
    tensors_in,
)
from dyrep_mm.engine.pretrained import DyRepPretrained
from dyrep_mm.engine.progress import stage
from dyrep_mm.engine.stock import BRANCHES, is_stock, norms_in, weights_said
from dyrep_mm.errors import DyRepError
from dyrep_mm.evolution.record import KEY
from dyrep_mm.registry import TASK_UTILS
from dyrep_mm.reparam.block import gain_bias, origin_of
from dyrep_mm.surgery.fuse import fuse, fused_state
from dyrep_mm.surgery.outputs import Norms, following_norms
from dyrep_mm.surgery.rewire import INIT_SCALE, expand, restore
from dyrep_mm.surgery.structure import PRESETS, altered, listed, misfits
from dyrep_mm.surgery.tree import Scope, blocks_of, get_module
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
        self.structure: Any = structure if named else load_structure(structure)
        self.options: dict[str, Any] = {
            'kernel_sizes': tuple(kernel_sizes),
            'scope': scope,
            'init_scale': init_scale,
        }

    def expand(self, model: nn.Module) -> nn.Module:
        """Give ``model`` the structure, in place; the same function in eval mode."""
        return expand(model, self.structure, **self.options)

    def fuse(self, model: nn.Module, inputs: Tensor | None = None) -> nn.Module:
        """A plain copy of ``model``, see :func:`dyrep_mm.fuse`."""
        if inputs is None:
            return fuse(model)
        return fuse(model, inputs, forward=Passes(model, inputs, altered(model)))


@dataclass(frozen=True)
class FuseReport:
    """What :func:`fuse_checkpoint` did.

    Attributes:
        weights: Which weights of the checkpoint were fused: ``raw`` or ``averaged``.
        blocks: How many blocks became convs.
        biased: Convs that gained a bias, since no BN takes their output.
        error64: See :func:`relative_difference`, in float64.
        error32: The same in float32, with the weights as they are in the file.
        fused: Paths of the convs that were blocks, or had gained a bias.
        model: The plain model with these weights, in float32.
        images: The images that it was verified on, in float32.
    """

    weights: str
    blocks: int
    biased: list[str]
    error64: float
    error32: float
    fused: list[str] = field(repr=False)
    model: nn.Module = field(repr=False)
    images: Tensor = field(repr=False)


def read_config(path: str | Path) -> Config:
    """The config of a file.

    Raises:
        DyRepError: there is no such file, or it is no config with a model.
    """
    if not Path(path).is_file():
        raise DyRepError(f'there is no config file {path}')
    try:
        config = Config.fromfile(path)
    except Exception as error:  # a config is code
        raise DyRepError(f'config file {path} cannot be read: {first_line(error)}') from error
    if not isinstance(config.get('model'), dict):
        raise DyRepError(f'config file {path} has no model')
    return config


def build_model(config: Config) -> nn.Module:
    """The model of a config, on CPU, in eval mode, its weights not initialised.

    Raises:
        DyRepError: a type in it is unknown, or an argument is wrong.
    """
    init_default_scope(config.get('default_scope', 'mmengine'))
    try:
        model = MODELS.build(copy.deepcopy(config.model))  # some models add to it
    except Exception as error:  # of any class that a config names
        raise DyRepError(
            f'the model of {config.filename} cannot be built: {first_line(error)}'
        ) from error
    return revert_sync_batchnorm(model).eval()


def relative_difference(first: Any, second: Any) -> float:
    """Largest difference of two outputs, each tensor relative to its own largest value; not finite
    where one of them is not."""
    gaps = []
    for one, other in zip(tensors_in(first), tensors_in(second), strict=True):
        if one.numel():
            a, b = one.double(), other.double()
            # A head may put out infinities, which are equal.
            largest = torch.where(a.isfinite(), a, 0.0).abs().max().clamp_min(1e-30)
            gaps.append((torch.where(a == b, 0.0, a - b).abs().max() / largest).item())
    return next((gap for gap in gaps if not math.isfinite(gap)), max(gaps, default=0.0))


@torch.no_grad()
def difference(
    model: nn.Module, fused: nn.Module, inputs: Tensor, passes: Passes, norms: Norms
) -> float:
    """:func:`relative_difference` of all that both put out, and of the blocks that no pass reaches,
    each on an input of its own, behind the norm that follows where one is known."""
    pairs = [(passes(model, inputs), passes(fused, inputs))]
    for path in passes.unreached:
        block, conv = get_module(model, path), get_module(fused, path)
        x = noise_for(origin_of(block).in_channels, inputs)
        outputs = block(x), conv(x)
        for norm in norms.get(path, ())[:1]:
            outputs = get_module(model, norm)(outputs[0]), get_module(fused, norm)(outputs[1])
        pairs.append(outputs)
    return relative_difference(*zip(*pairs, strict=True))


def fuse_checkpoint(
    config: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    size: int | Sequence[int] | None = None,
    tolerance: float = TOLERANCE,
    trust: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> FuseReport:
    """Turn a checkpoint of a training into one for deployment, verified.

    The model with its branches is rebuilt from config and structure, fused in float64, reloaded
    with ``strict=True`` into the plain model of the config, and both are compared on random
    images, heads included. The fused weights that the checkpoint holds must be those, to the
    rounding of their dtype. ``out`` is written only if all agree, and has no branches.

    Args:
        config: Config file; a DyRep hook in it does not matter.
        checkpoint: Checkpoint of a run with DyRep.
        out: The file to write: ``state_dict`` of the plain model and ``meta``, with the config
            without DyRep.
        size: Height and width of the two random images, pixels, or one number for both. By
            default :data:`IMAGE_SIZE`, or for a model that does not take it a size that the
            config names.
        tolerance: Largest accepted relative difference in float64.
        trust: Load a checkpoint that holds more than plain data.
        say: Is told what happens.

    Raises:
        DyRepError: an argument is wrong, the checkpoint cannot be read, does not fit the config,
            holds no structure or a number that is not finite, no image is found that the model
            takes, the fused model differs, or the checkpoint holds other fused weights.
    """
    sizes = None if size is None else [check_size(size)]
    if not 0 <= tolerance < math.inf:
        raise DyRepError(f'tolerance is a finite number of at least 0, got {tolerance}')
    _check_out(out, checkpoint)
    stage('reading the checkpoint')
    stored = load_checkpoint(checkpoint, trust=trust)
    loaded, structure = grown_in(stored, checkpoint)
    cfg = read_config(config)
    model, plain = build_model(cfg), build_model(cfg)
    restore(model, structure, weights_of(loaded))
    load_strictly(model, weights_of(loaded), checkpoint)
    check_finite(model, checkpoint)
    weights, blocks = weights_said(loaded), len(blocks_of(model))
    say(f'fusing the {weights} weights that a test of {checkpoint} uses: {blocks} blocks')

    stage('looking for images that the model takes')
    # In float64, which holds the model's own numbers; the file gets them rounded once.
    exact, biased = copy.deepcopy(model).double(), []
    dtypes = {name: tensor.dtype for name, tensor in plain.state_dict().items()}
    inputs, passes = find_passes(exact, plain, sizes or [IMAGE_SIZE, *sizes_in(cfg)])
    for path in passes.unreached:
        say(f'{path} is in no forward that could be made: it is verified by itself')
    stage('fusing')
    seen = following_norms(exact, altered(exact), inputs, passes)
    trained = norms_in(loaded)
    norms = {**seen, **{path: trained[path] for path in passes.unreached if path in trained}}
    if is_stock(stored):
        _check_stored(weights_of(stored), exact, trained, seen, checkpoint)
    fused = fuse(exact, inputs, forward=passes, norms=norms)
    plain.double()
    for path in _transplant(fused, plain, checkpoint):
        biased.append(path)
        dtypes[f'{path}.bias'] = dtypes[f'{path}.weight']
        why = 'no BN takes its output' if path not in passes.unreached else 'it has no known BN'
        say(f'{path} gains a bias: {why}, so its plain config must have one')
    stage('verifying in float64')
    error64 = difference(exact, plain, inputs, passes, norms)
    state = {name: tensor.to(dtypes[name]) for name, tensor in plain.state_dict().items()}
    if is_stock(stored) and state.keys() == stored['state_dict'].keys():
        state = dict(stored['state_dict'])  # the same but for the order of rounding
    stage('verifying in float32')
    error32 = difference(model, plain.float(), inputs.float(), passes, norms)
    say(
        f'relative difference of outputs on images of {shape_of(inputs)}: '
        f'{error64:.1e} in float64, {error32:.1e} in float32'
    )
    if not error64 <= tolerance:
        raise DyRepError(
            f'the fused model differs by {error64:.1e} in float64, more than {tolerance:.0e}: '
            f'{out} is not written'
        )
    meta = {**loaded['meta'], 'cfg': plain_config(cfg).pretty_text}
    save_atomically(_fused_checkpoint(meta, checkpoint, weights, state), out)
    say(f'wrote {out}')
    parts = list(altered(exact))
    return FuseReport(weights, blocks, biased, error64, error32, parts, plain, inputs.float())


def _check_stored(
    state: Mapping[str, Tensor],
    exact: nn.Module,
    trained: Norms,
    seen: Norms,
    checkpoint: str | Path,
) -> None:
    """Raise ``DyRepError`` unless the fused weights in a checkpoint are those of its branches.

    Args:
        state: They themselves.
        exact: The model with branches, in float64.
        trained: Norms that followed in the training, which the biases went into.
        seen: Norms that follow in eval mode, of what can be called.
        checkpoint: The file.
    """
    for path, norms in trained.items():
        if norms and set(seen.get(path, norms)) != set(norms):
            raise DyRepError(
                f'the fused weights in {checkpoint} are not those of its branches: in eval mode '
                f'the output of {path} goes elsewhere than into {norms[0]}'
            )
    expected, _ = fused_state(exact, trained, exact.state_dict())
    wrong = misfits(expected, state) or [
        f'{name} differs'
        for name, tensor in expected.items()
        if tensor.is_floating_point() and not _is_rounded(state[name], tensor)
    ]
    if wrong:
        raise DyRepError(
            f'the fused weights in {checkpoint} are not those of its branches: {listed(wrong)}'
        )


def _is_rounded(tensor: Tensor, exact: Tensor) -> bool:
    """Whether ``tensor`` is ``exact`` to the rounding of its dtype, relative to the largest."""
    bound = 4 * torch.finfo(tensor.dtype).eps * exact.abs().max() if exact.numel() else 0
    return bool(((tensor.double() - exact).abs() <= bound).all())


def find_passes(
    model: nn.Module, plain: nn.Module, sizes: Iterable[int | tuple[int, int]]
) -> tuple[Tensor, Passes]:
    """Two random images that ``model`` takes, in float64, and how to run it on them.

    Args:
        model: With blocks, in float64.
        plain: The same without blocks.
        sizes: Heights and widths to try, pixels. The first is taken that reaches all blocks, else
            the one that reaches most.

    Raises:
        DyRepError: ``model`` takes none of them.
    """
    found: list[tuple[Tensor, Passes]] = []
    trouble = []
    for size in dict.fromkeys(map(check_size, sizes)):
        shape = (2, image_channels(plain, size), *size)
        try:
            inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
            found.append((inputs, Passes(model, inputs, altered(model))))
        except DyRepError as error:
            trouble.append(str(error))
        except RuntimeError as error:  # too large for the memory
            trouble.append(f'no images of {size[0]}x{size[1]}: {first_line(error)}')
        else:
            if not found[-1][1].unreached:
                break
    if not found:
        raise DyRepError(f'{trouble[0]}; --size gives the height and width that it takes')
    return min(found, key=lambda pair: len(pair[1].unreached))


def sizes_in(config: Any) -> list[tuple[int, int]]:
    """Heights and widths of images that a config names, its model first."""
    if isinstance(config, Config):
        rest = (config.get(f'{part}_dataloader') for part in ('test', 'val', 'train'))
        return [size for part in (config.model, *rest) for size in sizes_in(part)]
    found = []
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name in ('size', 'scale') or name.endswith(('_size', '_scale', '_shape')):
                pair = (value, value) if isinstance(value, int) else value
                if isinstance(pair, (tuple, list)) and [type(n) for n in pair] == [int, int]:
                    # Pipelines say width first.
                    found += [size for size in (tuple(pair), tuple(pair[::-1])) if min(size) > 0]
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        found += [size for value in config for size in sizes_in(value)]
    return found


def check_finite(model: nn.Module, source: str | Path) -> None:
    """Raise ``DyRepError`` if a weight or a statistic of a norm in ``model`` is not finite."""
    weights = {name for name, _ in model.named_parameters()}
    bad = [
        name
        for name, tensor in model.state_dict().items()
        if name in weights or name.endswith(('.running_mean', '.running_var'))
        if not tensor.isfinite().all()
    ]
    if bad:
        raise DyRepError(
            f'{source} holds numbers that are not finite, in {len(bad)} tensors, {bad[0]} first: '
            'there is nothing to fuse'
        )


#: What the names of our hooks, of those that derive from them, and of our initialiser end with.
OUR_NAMES = ('DyRepHook', 'RepNASHook', 'DyRepPretrained')


def names_dyrep(kind: Any) -> bool:
    """Whether the ``type`` in a config is of DyRep, or a hook that derives from DyRep's."""
    if isinstance(kind, str):
        if kind.startswith('dyrep_mm.') or kind.endswith(OUR_NAMES):
            return True
        kind = HOOKS.get(kind)
    return isinstance(kind, type) and issubclass(kind, (StructureHook, DyRepPretrained))


def plain_config(config: Config) -> Config:
    """``config`` without what trains with DyRep: hook, initialiser, import."""
    plain = copy.deepcopy(config)
    hooks = plain.get('default_hooks') or {}
    for name in [name for name, hook in hooks.items() if hook and names_dyrep(hook.get('type'))]:
        hooks.pop(name)
    if plain.get('custom_hooks'):
        plain.custom_hooks = [
            h for h in plain.custom_hooks if not (h and names_dyrep(h.get('type')))
        ]
    if plain.get('custom_imports'):
        imports = plain.custom_imports.get('imports') or []
        imports = [imports] if isinstance(imports, str) else imports
        plain.custom_imports.imports = [m for m in imports if m.split('.')[0] != 'dyrep_mm']
    _drop_initialisers(plain.model)
    return plain


def _drop_initialisers(part: Any) -> None:
    """Take DyRep's initialisers out of the config of a model, in place."""
    if isinstance(part, dict):
        init = part.get('init_cfg')
        if isinstance(init, (list, tuple)):
            part['init_cfg'] = [i for i in init if not names_dyrep(i.get('type'))]
        elif isinstance(init, dict) and names_dyrep(init.get('type')):
            part['init_cfg'] = None
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for value in part:
            _drop_initialisers(value)


def check_size(size: int | Sequence[int]) -> tuple[int, int]:
    """``size`` as height and width, pixels.

    Raises:
        DyRepError: it is neither a number nor two of them, or one is below 1.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    pair = pair * 2 if len(pair) == 1 else pair
    if len(pair) != 2 or min(pair) < 1:
        raise DyRepError(
            f'size is a height and a width of at least 1 pixel, got {"x".join(map(str, pair))}'
        )
    return pair


def _check_out(out: str | Path, checkpoint: str | Path) -> None:
    """Refuse where nothing can be written, before the work."""
    if not (folder := Path(out).resolve().parent).is_dir():
        raise DyRepError(f'{folder} is no folder to write {Path(out).name} into')
    if Path(out).is_dir():
        raise DyRepError(f'{out} is a folder: name the file to write')
    if Path(out).resolve() == Path(checkpoint).resolve():
        raise DyRepError(f'{out} is the checkpoint itself: name another file to write')


def _transplant(fused: nn.Module, plain: nn.Module, source: str | Path) -> list[str]:
    """Load the weights of ``fused`` into the plain model of the config, strictly; returns the
    convs that had to gain a bias for it."""
    names = plain.state_dict().keys()
    biased = [name.removesuffix('.bias') for name in fused.state_dict() if name not in names]
    for path in biased:
        gain_bias(cast(nn.Conv2d, get_module(plain, path)))
    load_strictly(plain, fused.state_dict(), source)
    return biased


def _fused_checkpoint(
    meta: Mapping, source: str | Path, weights: str, state: dict[str, Tensor]
) -> dict[str, Any]:
    """The content of a fused file: plain data, and from where it comes."""
    trained = meta[KEY] if isinstance(meta.get(KEY), Mapping) else {}
    said = {
        'fused': 'by tools/fuse.py',
        'source': Path(source).name,
        'weights': weights,
        'version': __version__,
        'structure': {},  # of these weights
        'grown': _plain(trained.get('structure')),
        'journal': _plain(trained.get('journal', [])),
    }
    kept = {name: value for name, value in meta.items() if name != BRANCHES}
    return {
        # Inferencers need `cfg` and `dataset_meta`; the rest says where the weights come from.
        'meta': {**_plain(kept), KEY: said},
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
