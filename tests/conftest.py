"""What holds for all tests: one thread, and the same random numbers for each."""

from __future__ import annotations

import pytest
import torch

pytest.register_assert_rewrite('support.checks', 'support.processes')


@pytest.fixture(scope='session', autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
