"""How a training forward uses the convs that are to grow: can a block stand in their place?"""

from __future__ import annotations

import copy
import enum
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyrep_mm.reparam.block import Block, origin_of
from dyrep_mm.surgery.tree import get_module, outermost, replace, state_kept


class Verdict(enum.IntEnum):
    """Why a conv stays plain; ``FIT`` if it need not. The worst one of all processes counts."""

    FIT = 0
    NO_BATCH = 1
    UNUSED = 2
    FEW = 3
    NOT_FINITE = 4
    BYPASSED = 5

    @property
    def reason(self) -> str:
        """The verdict as a clause."""
        return {
            Verdict.FIT: 'it can be measured',
            Verdict.NO_BATCH: 'there was no training batch to measure it on',
            Verdict.UNUSED: 'its own forward was not called in training',
            Verdict.FEW: 'a training batch gave it less than two values for each channel',
            Verdict.NOT_FINITE: 'its activations in training were not finite',
            Verdict.BYPASSED: 'its weight is used or changed outside of its own forward',
        }[self]


def watch_use(
    model: nn.Module,
    paths: Sequence[str],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
) -> tuple[dict[str, str], Counter[str]]:
    """Run training batches and see how the convs at ``paths`` are used, before they grow.

    A block is right where the conv's own forward runs and nothing else multiplies its weight
    with activations. For the time a twin stands for each conv: a shallow copy, with the same
    parameters. A way around the module tree (a list of convs, a bound method,
    ``F.conv2d(x, conv.weight)``) then is a product with the weight while the twin does not run.

    Batches run to their end, until every conv was called. The model, with its
    buffers, modes and plain attributes, is left as it was. Every process gets the same answer.

    Args:
        model: Contains the convs.
        paths: Of convs, outside of blocks or inside one.
        batches: Training batches; no more are taken than are needed.
        forward: Runs the model on one batch as training does.

    Returns:
        Why a conv must stay plain, by path; and how often one batch calls the outermost module
        of each path, which is the conv or the block around it.
    """
    if not paths:
        return {}, Counter()
    holders = {path: outermost(model, path) for path in paths}
    convs = {path: origin_of(get_module(model, path)) for path in paths}
    device = convs[paths[0]].weight.device
    running: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    most: Counter[str] = Counter()
    few: set[str] = set()
    unused = list(paths)
    ran = False

    def enter(holder: str, *_: Any) -> None:
        running[holder] += 1

    def leave(holder: str, _module: nn.Module, _args: Any, output: Any) -> None:
        running[holder] -= 1
        calls[holder] += 1
        if isinstance(output, Tensor) and has_few_values(output):
            few.add(holder)

    products = _Products(model, convs, lambda path: running[holders[path]] > 0)
    with ExitStack() as stack:
        stack.enter_context(state_kept(model))
        for holder in dict.fromkeys(holders.values()):
            module = stack.enter_context(_twin(model, holder))
            handle = module.register_forward_pre_hook(partial(enter, holder), prepend=True)
            stack.callback(handle.remove)
            handle = module.register_forward_hook(partial(leave, holder), always_call=True)
            stack.callback(handle.remove)
        for batch in batches:
            calls.clear()
            with products:
                forward(batch)
            products.note_replaced()
            ran = True
            most |= calls
            # A conv that one process calls is in use.
            called = worst_of([int(holders[path] in most) for path in paths], device)
            unused = [path for path, is_called in zip(paths, called, strict=True) if not is_called]
            if not unused:
                break

    def verdict(path: str) -> Verdict:
        if path in products.bypassed:
            return Verdict.BYPASSED
        if holders[path] in few:
            return Verdict.FEW
        if path in unused:
            return Verdict.UNUSED if ran else Verdict.NO_BATCH
        return Verdict.FIT

    return reasons_of({path: verdict(path) for path in paths}, device), most


def has_few_values(output: Tensor) -> bool:
    """Whether a map (..., channels, h, w) has less than two values for each channel: no batch
    statistics."""
    return output.numel() < 2 * output.shape[-3]


def worst_of(values: Sequence[int], device: torch.device) -> list[int]:
    """The largest over all processes, for each of several values."""
    if not in_parallel():
        return list(values)
    worst = torch.tensor(values, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.tolist()


def reasons_of(verdicts: dict[str, Verdict], device: torch.device) -> dict[str, str]:
    """Reasons by path, without what is fit; the same in all processes."""
    worst = zip(verdicts, worst_of(list(verdicts.values()), device), strict=True)
    return {path: Verdict(value).reason for path, value in worst if value != Verdict.FIT}


def in_parallel() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def _twin(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """Let a shallow copy stand at ``path``, which has the parameters of the conv there and hooks
    of its own. A block stays: nothing but its tree leads to what is in it."""
    module = get_module(model, path)
    if isinstance(module, Block):
        yield module
        return
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if name.startswith('_forward_'):
            vars(twin)[name] = copy.copy(value)
    replace(model, path, twin)
    try:
        yield twin
    finally:
        replace(model, path, module)


class _Products(TorchDispatchMode):
    """Notes which weights are multiplied with activations while their conv does not run.

    What is derived from a weight (a cast, a view, a standardised weight) counts as the weight.
    An average of weights, such as a momentum encoder, does not: it ends in a parameter of its own.
    A product of a weight with itself is a penalty and no use.

    Args:
        model: Of which the weights are part.
        convs: Of the weights, by path.
        is_running: Whether the conv at a path, or the block around it, is in its forward.

    Attributes:
        bypassed: The paths that were found.
    """

    #: Operations that multiply and sum, besides those with ``conv`` in their name.
    NAMES = frozenset(
        {'mm', 'addmm', 'bmm', 'baddbmm', 'addbmm', 'mv', 'addmv', 'dot', 'linear', 'matmul'}
    )

    def __init__(
        self, model: nn.Module, convs: dict[str, nn.Conv2d], is_running: Callable[[str], bool]
    ):
        super().__init__()
        self.model = model
        self.convs = convs
        self.is_running = is_running
        self.bypassed: set[str] = set()
        # By address of the storage. A derived tensor is held: its address must not be used again.
        self.weights: dict[int, list[tuple[range, str]]] = {}
        self.derived: dict[int, tuple[Tensor, set[str]]] = {}
        self.casts: set[int] = set()
        for path, conv in convs.items():
            weight = conv.weight
            start = weight.data_ptr()
            extent = range(start, start + weight.numel() * weight.element_size())
            self.weights.setdefault(_address(weight), []).append((extent, path))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sources = [self._sources(t) for t in inputs]
        paths = set().union(*sources)
        if not paths or 'backward' in name:
            return output
        results = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        if func._schema.is_mutable:
            self.bypassed |= set().union(*map(self._weights_in, results))
        idle = {path for path in paths if not self.is_running(path)}
        if 'conv' in name or name in self.NAMES:
            present = _addresses(self.model) - {_address(c.weight) for c in self.convs.values()}
            for tensor, source in zip(inputs, sources, strict=True):
                address = _address(tensor)
                if address in self.derived:
                    if address in present:  # an average, which is a parameter now
                        continue
                    used = source if address not in self.casts else source & idle
                else:
                    used = source & idle
                self.bypassed |= {p for p in used if not all(p in s for s in sources)}
        elif name == '_to_copy' and self._weights_in(inputs[0]):
            # Autocast keeps a cast of a weight, also beyond the forward of the conv.
            self.casts |= set(map(_address, results))
            self._derive(results, paths)
        elif idle:
            self._derive(results, idle)
        return output

    def note_replaced(self) -> None:
        """Count as bypassed what has another storage than before (``weight.data = ...``)."""
        self.bypassed |= {p for p, c in self.convs.items() if p not in self._weights_in(c.weight)}

    def _derive(self, tensors: list[Tensor], paths: set[str]) -> None:
        apart = _addresses(self.model) | {-1}
        for tensor in tensors:
            if (address := _address(tensor)) not in apart:
                known = self.derived.get(address, (tensor, set()))[1]
                self.derived[address] = tensor, known | paths

    def _sources(self, tensor: Tensor) -> set[str]:
        """Paths of the weights that ``tensor`` is, or is derived from."""
        derived = self.derived.get(_address(tensor), (tensor, set()))[1]
        return derived | self._weights_in(tensor)

    def _weights_in(self, tensor: Tensor) -> set[str]:
        """Paths of the weights that ``tensor`` is, or is a view of."""
        if (address := _address(tensor)) not in self.weights:
            return set()
        at = tensor.data_ptr()
        return {path for extent, path in self.weights[address] if at in extent}


def _address(tensor: Tensor) -> int:
    """Where the storage of ``tensor`` is; -1 if it has none, as a sparse tensor."""
    try:
        return tensor.untyped_storage().data_ptr() or -1
    except (NotImplementedError, RuntimeError):
        return -1


def _addresses(model: nn.Module) -> set[int]:
    return {_address(t) for tensors in (model.parameters(), model.buffers()) for t in tensors}
