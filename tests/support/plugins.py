"""A branch, a score and a rule from outside of the package, in a run that may be killed:
``python -m support.plugins WORK_DIR [KILL_AT]``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import HOOKS
from torch import Tensor, nn

import dyrep_mm
from dyrep_mm import DyRepHook
from dyrep_mm.evolution.saliency import GradientScore
from dyrep_mm.reparam.branches import Branch, kernel_of
from dyrep_mm.surgery.candidates import candidates
from dyrep_mm.surgery.structure import Plan
from dyrep_mm.surgery.tree import blocks_of
from support.runs import call_at, runner

ITERS = 9


@dyrep_mm.register_branch('0-twin')
class Twin(Branch):
    """A second conv of the same geometry. Its name sorts before all of Table 1."""

    def build(self, norm, generator) -> None:
        spec = self.spec
        self.conv = nn.Conv2d(
            *(spec.in_channels, spec.out_channels, spec.kernel_size),
            *(spec.stride, spec.padding, spec.dilation, spec.groups),
            bias=False,
        )
        nn.init.kaiming_normal_(self.conv.weight, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def stages(self):
        return [(kernel_of(self.conv), self.bn)]


@dyrep_mm.register_score('largest')
class Largest(GradientScore):
    """The largest absolute gradient."""

    def measure(self, weights: list[Tensor], grads: list[Tensor]) -> Tensor:
        return torch.stack([grad.abs().max() for grad in grads])[None]


class Alternate:
    """A rule that grows and prunes by turns: the conv, or the branch, at a place that the number
    of observed iterations gives."""

    def __init__(self) -> None:
        self.observed = torch.zeros((), dtype=torch.int64)

    def watch(self, model: nn.Module) -> None:
        pass

    def observe(self, optimizer: torch.optim.Optimizer) -> None:
        self.observed += 1

    def decide(self, model: nn.Module, generator: torch.Generator) -> Plan:
        n, blocks = self.observed.item(), blocks_of(model)
        if n % 4 == 0:
            path = list(blocks)[-1]
            return Plan(prune={path: blocks[path].names[1:2]})
        able = candidates(model, 'backbone', 1, ['1x1', '0-twin'])
        path = list(able)[n % len(able)]
        return Plan({path: able[path]})

    def state_dict(self) -> dict[str, Any]:
        return {'observed': self.observed.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        self.observed.copy_(state['observed'])
        return True


@HOOKS.register_module(force=True)
class AlternateDyRepHook(DyRepHook):
    """The hook with another rule."""

    def make_rule(self) -> Alternate:
        return Alternate()


HOOK = {'interval': 2, 'calibration_batches': 2, 'prune_threshold': 0.0}
KINDS = {
    'score and branch': {
        'type': 'dyrep_mm.DyRepHook',
        'metric': 'largest',
        'branches': ['kx1', '0-twin', '1x1'],
        **HOOK,
    },
    'rule': {'type': 'AlternateDyRepHook', **HOOK},
}


def run(work_dir: str, kind: str, kill_at: int | None = None) -> None:
    """Train; kill the process after an iteration, if one is named."""
    made = runner(work_dir, [KINDS[kind], {'type': 'EMAHook'}], iters=ITERS, resume=True)

    def kill(runner) -> None:
        if runner.iter + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    call_at(made, kill)
    made.train()


if __name__ == '__main__':
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
