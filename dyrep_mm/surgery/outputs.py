"""Where the outputs of convs and blocks go: the norms that take them, found by watching a forward.

In eval mode such a norm can take over a bias: its running mean less the bias is the same function.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyrep_mm.surgery.tree import get_module, modes_kept

#: Paths of the norms that take all that a conv or block puts out, by its path; an empty list where
#: something else takes it.
Norms = dict[str, list[str]]


class OutputWatch:
    """Sees, while it is open, which norms take the outputs of some modules.

    Args:
        model: Its forward is watched.
        paths: Of the convs and blocks.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]):
        self._model = model
        self._paths = list(paths)
        self._uses = _Uses()
        self._taken: dict[_BatchNorm, list[str | None]] = defaultdict(list)
        self._absorbed: dict[str, set[int]] = defaultdict(set)
        self._handles: list[Any] = []

    def __enter__(self) -> OutputWatch:
        # By path, at this moment: another module may stand there for the time of a forward.
        sources = {path: get_module(self._model, path) for path in self._paths}
        inside = {id(m) for source in sources.values() for m in source.modules()}
        for path, module in sources.items():
            self._handles.append(module.register_forward_hook(self._on_output(path)))
        for norm in self._model.modules():
            if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
                if id(norm) not in inside:
                    self._handles.append(norm.register_forward_pre_hook(self._before_norm))
                    self._handles.append(norm.register_forward_hook(self._after_norm))
        self._uses.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._uses.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def note(self, values: Any) -> None:
        """Say that ``values``, a tensor or nested ones, are used by something else than a norm."""
        self._uses.note(values)

    def norms(self) -> Norms:
        """What was found, of every module that was called."""
        found: Norms = {path: [] for path in self._uses.made.values()}
        names: dict[int, list[str]] = defaultdict(list)  # a norm may have several
        for name, module in self._model.named_modules(remove_duplicate=False):
            names[id(module)].append(name)
        unclear = set(self._uses.elsewhere)
        for norm, makers in self._taken.items():
            if len(set(makers)) > 1:
                unclear.update(path for path in makers if path is not None)
            elif makers[0] is not None:
                found[makers[0]] += names[id(norm)]
        outputs = Counter(self._uses.made.values())
        return {
            path: [] if path in unclear or len(self._absorbed[path]) != outputs[path] else norms
            for path, norms in found.items()
        }

    def _on_output(self, path: str) -> Callable:
        return lambda _module, _args, output: self._uses.note_output(path, output)

    def _before_norm(self, norm: _BatchNorm, args: tuple) -> None:
        self._uses.in_norm = True
        path = self._uses.maker(args[0])
        self._taken[norm].append(path)
        if path is not None:
            self._absorbed[path].add(args[0].untyped_storage().data_ptr())

    def _after_norm(self, *_: Any) -> None:
        self._uses.in_norm = False


class _Uses(TorchDispatchMode):
    """Notes which outputs are used by anything but a norm, views and in-place changes included."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, str] = {}  # storage of an output -> path of its module
        self.kept: list[Tensor] = []  # alive, so that a storage means one output
        self.elsewhere: set[str] = set()
        self.in_norm = False

    def note_output(self, path: str, output: Tensor) -> None:
        self.made[output.untyped_storage().data_ptr()] = path
        self.kept.append(output)

    def maker(self, value: Any) -> str | None:
        """Path of the module that made ``value``, if it is a watched tensor."""
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return None
        return self.made.get(value.untyped_storage().data_ptr())

    def note(self, values: Any) -> None:
        self.elsewhere.update(p for v in tree_leaves(values) if (p := self.maker(v)) is not None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not self.in_norm:
            self.note((args, kwargs))
        return func(*args, **(kwargs or {}))


def following_norms(
    model: nn.Module,
    paths: Iterable[str],
    inputs: Any,
    forward: Callable[[nn.Module, Any], Any],
) -> Norms:
    """The BNs that take the outputs of the modules at ``paths``, found by watching one forward in
    eval mode.

    A path has norms if every output of its module goes into BNs that take nothing else, and
    nowhere but there.
    """
    with modes_kept(model), torch.no_grad():
        model.eval()
        with OutputWatch(model, paths) as watch:
            result = forward(model, inputs)
        watch.note(result)
    return watch.norms()


#: Training forwards that are watched at most; what none of them calls is of no stock model.
_PATIENCE = 100


def watch_training(
    model: nn.Module, wanted: Callable[[], Iterable[str]], learn: Callable[[Norms], None]
) -> list[Any]:
    """Watch the training forwards of ``model``, those before which something is wanted.

    Args:
        model: Is called by its training.
        wanted: Paths of the convs and blocks of which nothing is known.
        learn: Takes what a forward has shown.

    Returns:
        Handles, each with a ``remove``.
    """
    watches: list[OutputWatch] = []
    left = _PATIENCE

    def before(module: nn.Module, _args: Any) -> None:
        nonlocal left
        if module.training and left and not watches and (paths := list(wanted())):
            left -= 1
            watches.append(OutputWatch(model, paths).__enter__())

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        if watches:
            watch = watches.pop()
            watch.__exit__(None, None, None)
            if output is not None:  # it did not end
                watch.note(output)
                learn(watch.norms())

    return [
        model.register_forward_pre_hook(before),
        model.register_forward_hook(after, always_call=True),
    ]
