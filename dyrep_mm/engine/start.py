"""What a run starts with: the weights of a file, a structure, and something that can change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyrep_mm.engine.checkpoint import Once, check_weights, load_structure, weights_of
from dyrep_mm.engine.pretrained import handovers_in
from dyrep_mm.engine.transaction import Transaction
from dyrep_mm.errors import DyRepError
from dyrep_mm.reparam.branches import kernel_of
from dyrep_mm.reparam.kernels import add
from dyrep_mm.surgery.candidates import FROZEN, candidates, left_alone, preset, survey
from dyrep_mm.surgery.copies import with_copies
from dyrep_mm.surgery.rewire import absent, structure_errors
from dyrep_mm.surgery.structure import PRESETS, Plan, Structure, structure_from_names
from dyrep_mm.surgery.tree import Scope, blocks_of, get_module, in_scope


class Reception:
    """Makes a model such that it can take the weights of a file, or refuses them.

    mmengine may still rename the weights (``runner.load_checkpoint(revise_keys=...)``) after it
    has shown them: the names that count are those that the model is about to load.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def receive(
        self,
        transaction: Transaction,
        structure: Structure,
        weights: Mapping[str, Tensor],
        resumes: bool,
        received: Callable[[bool], None],
    ) -> None:
        """Prepare for ``weights``, and once more where they are renamed.

        Args:
            transaction: Of the run.
            structure: Of the weights.
            weights: By name.
            resumes: Whether all weights must be there, or those of blocks alone.
            received: Is told whether the structure of the model changed.

        Raises:
            DyRepError: the weights are not of this model; where they may still be renamed, at the
                load.
        """
        refused: DyRepError | None = None
        try:
            received(_prepare(transaction, structure, weights, resumes))
        except DyRepError as error:
            if resumes:
                raise
            refused = error

        def on_load(state: dict[str, Any]) -> None:
            renamed = weights_of(state)
            if renamed.keys() == weights.keys():
                if refused is not None:
                    raise refused
                return
            others = structure_from_names(renamed)
            received(_prepare(transaction, others, renamed, resumes))

        self.close()
        self._handle = transaction.model.register_load_state_dict_pre_hook(Once(on_load))

    def close(self) -> None:
        """Wait for no load."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _prepare(
    transaction: Transaction, structure: Structure, weights: Mapping[str, Tensor], resumes: bool
) -> bool:
    """Make the model such that it can take these weights, or refuse them; whether it changed."""
    model = transaction.model
    # Copies whose weights are not in the file follow, as those of a pretrained backbone.
    missing = {
        copied: source
        for copied, source in transaction.copies.items()
        if not any(name.startswith(f'{copied}.') for name in weights)
    }
    weights = with_copies(weights, missing)
    changed = transaction.restore(with_copies(structure, missing), weights)
    check_weights(model, weights, resumes)
    for path, handover in handovers_in(model).items():
        handover.finish(get_module(model, path))  # the weights that are loaded last win
    return changed


def start_from(
    transaction: Transaction, source: Any, scope: Scope, *key: Any, compensate: bool = True
) -> None:
    """Give the model the structure that the option ``structure`` names.

    Args:
        transaction: Of the run.
        source: A name in ``PRESETS``, a mapping or a file.
        scope: With a name, where to look.
        key: Seeds the new branches.
        compensate: Whether the convs take the kernels of their branches out of their own, so that
            the model computes what it did.

    Raises:
        DyRepError: there is no such structure, or it does not fit the model.
    """
    model = transaction.model
    if isinstance(source, str) and source in PRESETS:
        structure = preset(model, source, scope=scope)
    else:
        structure = load_structure(source)
    with structure_errors():
        before = blocks_of(model).keys()
        transaction.change(Plan(grow=absent(model, structure)), *key)
    if not compensate:
        for made in (model, *(averaged.module for averaged in transaction.averages)):
            _give_back(made, before)


@torch.no_grad()
def _give_back(model: nn.Module, but: Iterable[str]) -> None:
    """Undo what blocks took out of their convs when they were made, outer ones first."""
    for path, block in blocks_of(model).items():
        if path not in but:
            kernel = add(map(kernel_of, block.added), block.kernel_size)
            block.origin.weight.add_(kernel.weight)


def check_that_something_can_change(
    model: nn.Module, scope: Scope, max_depth: int, branches: Sequence[str] | None
) -> str | None:
    """Refuse a run in which nothing can ever grow or be pruned.

    Returns:
        What to warn of; None if something can change now.

    Raises:
        DyRepError: nothing can, whatever happens.
    """
    inside = (path for path in blocks_of(model) if in_scope(path, scope))
    if any(inside) or candidates(model, scope, max_depth, branches):
        return None
    if left_alone(model):  # it was tried
        return None
    verdicts = survey(model, scope, branches)
    where = 'the model' if scope is None else f'scope {scope!r}'
    if FROZEN in verdicts.values():
        # Candidates are looked up at every update.
        return f'no conv in {where} can grow until one that is frozen is freed'
    reasons = [f'{path}: {why}' for path, why in verdicts.items()]
    raise DyRepError(
        f'no conv in {where} can grow'
        + (f' ({"; ".join(reasons[:3])})' if reasons else ': it has no conv above 1x1')
    )
