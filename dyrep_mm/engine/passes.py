"""How to run a model with its heads: its own forward, and calls of what that leaves out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.block import origin_of
from dyrep_mm.surgery.tree import get_module, modes_kept

IMAGES, FEATURES, REGIONS, NOISE = 'images', 'features', 'regions', 'noise'


@dataclass(frozen=True)
class Call:
    """A call of a module.

    Attributes:
        path: Of the module; the empty one is the model.
        source: The arguments: the images, the features, regions cut out of the first map of the
            features, one of their maps, by number, or noise.
        channels: Of the noise.
    """

    path: str
    source: str | int
    channels: int = 0


class Passes:
    """The calls that run a model and the heads that its own forward leaves out.

    The model's own forward comes first, for an OpenMMLab model the one of mode ``'tensor'``. It
    leaves auxiliary heads out, and that of a two-stage detector needs proposals. A part that it
    does not reach lies in a head: the outermost module around the part that takes the features,
    or regions of them, is called on them. Where none does, as in a branch that runs in train mode
    alone, it is the outermost one that takes a map of noise with as many channels as the part.

    Args:
        model: Any model that takes images.
        inputs: Images (n, c, h, w), of the model's dtype.
        parts: Paths of the modules to reach.

    Attributes:
        calls: What is called.
        unreached: Those of ``parts`` that no call reaches.

    Raises:
        DyRepError: the model does not run on the images.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, parts: Iterable[str]):
        self.calls: list[Call] = []
        self.unreached = list(parts)
        features = None

        def find_features() -> Any:
            nonlocal features
            features = features_of(model, inputs)
            return features

        with _evaluation(model):
            trouble = self._try(model, Call('', IMAGES), partial(own_forward, model, inputs))
            if self.unreached or not self.calls:  # it may be a model without them
                self._try(model, Call('', FEATURES), find_features)
            if not self.calls:
                raise DyRepError(
                    f'{type(model).__name__} does not run on images of {shape_of(inputs)}: '
                    f'{trouble}'
                )
            for path in list(self.unreached):
                self._reach(model, path, inputs, features)

    def __call__(self, model: nn.Module, inputs: Tensor) -> list[Any]:
        """The outputs of all calls, with ``model`` in eval mode."""
        with _evaluation(model):
            needed = any(call.source != IMAGES for call in self.calls)
            features = features_of(model, inputs) if needed else None
            return [_output(model, call, inputs, features) for call in self.calls]

    def _reach(self, model: nn.Module, path: str, inputs: Tensor, features: Any) -> None:
        """Find a call that reaches the module at ``path``."""
        names = path.split('.')
        holders = ['.'.join(names[:end]) for end in range(1, len(names))]
        calls = [
            Call(holder, source)
            for holder in holders
            for source in _sources(get_module(model, holder), features)
        ]
        channels = origin_of(get_module(model, path)).in_channels
        calls += [Call(holder, NOISE, channels) for holder in holders]
        for call in calls:
            if path in self.unreached:
                self._try(model, call, partial(_output, model, call, inputs, features))

    def _try(self, model: nn.Module, call: Call, run: Callable[[], Any]) -> str | None:
        """Keep ``call`` if it works, as ``run`` shows, and reaches a part that no other does; else
        say why not."""
        reached: set[str] = set()
        handles = [
            get_module(model, path).register_forward_hook(lambda *_, path=path: reached.add(path))
            for path in self.unreached
        ]
        try:
            output = run()
        except Exception as error:  # of any code, on what it may not be made for
            return first_line(error)
        finally:
            for handle in handles:
                handle.remove()
        if not tensors_in(output):
            return 'no tensor comes out'
        if reached or not self.calls:
            self.calls.append(call)
            self.unreached = [path for path in self.unreached if path not in reached]
        return None


def own_forward(model: nn.Module, inputs: Tensor) -> Any:
    """The output of ``model``; of an OpenMMLab model in mode ``'tensor'``."""
    modes = 'mode' in inspect.signature(model.forward).parameters
    return model(inputs, mode='tensor') if modes else model(inputs)


def features_of(model: nn.Module, inputs: Tensor) -> Any:
    """What the heads of ``model`` take: the output of its neck, or of its backbone where it has no
    neck; None where it has neither."""
    if hasattr(model, 'extract_feat'):
        return cast(Any, model).extract_feat(inputs)
    seen: dict[str, Any] = {}
    handles = [
        child.register_forward_hook(lambda _m, _a, output, name=name: seen.update({name: output}))
        for name, child in model.named_children()
        if name in ('backbone', 'neck')
    ]
    try:
        own_forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen.get('neck', seen.get('backbone'))


class _Found(Exception):
    """The first layer was called; with the channels of its input, and those that it takes."""


def image_channels(model: nn.Module, size: tuple[int, int]) -> int:
    """How many channels the images of ``model`` have, by the first conv or BN that it calls; 3
    where that cannot be told.

    Args:
        model: Any model that takes images.
        size: Height and width of an image to try with, pixels.
    """

    def stop(layer: nn.Module, args: tuple) -> None:
        takes = layer.in_channels if isinstance(layer, _ConvNd) else layer.num_features
        raise _Found(args[0].shape[1], takes)

    layers = [m for m in model.modules() if isinstance(m, (_ConvNd, _BatchNorm))]
    handles = [layer.register_forward_pre_hook(stop) for layer in layers]
    tried = 3
    try:
        with _evaluation(model):
            own_forward(model, next(model.parameters()).new_zeros(2, tried, *size))
    except _Found as found:
        # A model that folds pixels into channels first, as YOLOX does, shows a multiple.
        seen, takes = found.args
        channels = tried * takes // seen
        return channels if channels * seen == tried * takes else tried
    except Exception:  # the forward that follows says it better
        return tried
    finally:
        for handle in handles:
            handle.remove()
    return tried


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = output.values()
    nested = isinstance(output, Iterable) and not isinstance(output, (str, bytes))
    return [t for item in output for t in tensors_in(item)] if nested else []


def noise_for(channels: int, images: Tensor) -> Tensor:
    """Two random maps (2, channels, 32, 32) like ``images``, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, 32, 32, generator=generator).to(images)


def shape_of(images: Tensor) -> str:
    """Channels, height and width of ``images``, to be read."""
    return 'x'.join(map(str, images.shape[1:]))


def first_line(error: Exception) -> str:
    """The type of an error, and what it says first."""
    return f'{type(error).__name__} {error}'.strip().split('\n')[0]


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; what is drawn at random is the same each time."""
    with ExitStack() as stack:
        for context in (modes_kept(model), torch.no_grad(), torch.random.fork_rng(devices=[])):
            stack.enter_context(context)
        for module in model.modules():
            if getattr(module._parameters.get('weight'), 'dtype', None) == torch.float64:
                stack.callback(module.register_forward_pre_hook(_in_double).remove)
        torch.manual_seed(0)
        model.eval()
        yield


def _in_double(_module: nn.Module, args: tuple) -> tuple:
    """Arguments in float64: some models make float32 of positions, whatever they get."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _sources(module: nn.Module, features: Any) -> list[str | int]:
    """What a head may take, the most likely first."""
    if hasattr(module, 'roi_feat_size'):
        return [REGIONS]
    return [FEATURES, *range(len(tensors_in(features)))]


def _output(model: nn.Module, call: Call, inputs: Tensor, features: Any) -> Any:
    if call.source == IMAGES:
        return own_forward(model, inputs)
    if call.path == '':
        return features
    module = get_module(model, call.path)
    if call.source == FEATURES:
        value = features
    elif call.source == NOISE:
        value = noise_for(call.channels, inputs)
    elif call.source == REGIONS:
        size = cast(Any, module).roi_feat_size
        value = adaptive_avg_pool2d(tensors_in(features)[0], size)
    else:
        value = tensors_in(features)[cast(int, call.source)]
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    return module(*[value] * max(len(needed), 1))
