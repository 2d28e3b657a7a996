"""What holds for all tests: one thread, the same random numbers, a GPU for those that need one."""

from __future__ import annotations

import pytest
import torch

pytest.register_assert_rewrite('support.checks', 'support.processes')

#: The files that take longest. They start first, so that no worker has one left when the others are
#: done; xdist itself would start those with the most tests.
LONGEST = (
    'test_tools.py',
    'test_projects.py',
    'test_pipelines.py',
    'test_kill.py',
    'test_inference.py',
    'test_study.py',
    'test_sequences.py',
    'test_plugins.py',
    'test_copies.py',
    'test_budget.py',
    'test_distributed.py',
    'test_resume.py',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='needs a GPU'))


@pytest.fixture(scope='session', autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
