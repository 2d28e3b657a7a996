"""What mmengine's local backend wrote beside a run: its scalars and its config."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

#: Of a line of scalars, what is no metric.
_NO_METRIC = ('step', 'time', 'data_time', 'epoch', 'iter', 'memory')


@dataclass
class Log:
    """The scalars of a run, those of its resumes included.

    Attributes:
        steps: For each line of the training log how many iterations were complete, how many
            epochs had begun (None where the log does not count them), and its values.
        validations: For each validation how many iterations, by what the log has, and how many
            epochs were complete (None where iterations are counted), and its metrics.
        config: Settings, see :func:`settings_in`.
        started: When the first process of the run began.
        touched: When a line was added last.
    """

    steps: list[tuple[int, int | None, dict[str, float]]] = field(default_factory=list)
    validations: list[tuple[int, int | None, dict[str, float]]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    started: datetime | None = None
    touched: datetime | None = None


def read_log(work_dir: str | Path) -> Log:
    """The scalars in a work directory; a later process replaces what it did again."""
    log = Log()
    for file in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        config = settings_in(_text(file.with_name('config.py')))
        _append(log, list(_lines(file)), config)
        log.config = config or log.config
        begun = _time(file.parents[1].name)
        log.started = log.started or begun
        log.touched = datetime.fromtimestamp(file.stat().st_mtime)
    return log


def _append(log: Log, lines: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> None:
    steps: list[tuple[int, int | None, dict[str, float]]] = []
    validations: list[tuple[int, int | None, dict[str, float]]] = []
    by_epoch = counts_epochs(config)
    last, complete = 0, 0
    for line in lines:
        values = {k: float(v) for k, v in line.items() if _is_number(v)}
        if 'iter' in values:
            last = int(values['iter'])
            epoch = int(values['epoch']) if 'epoch' in values else None
            if by_epoch is None:
                by_epoch = epoch is not None
            steps.append((last, epoch, values))
        elif metrics := _metrics(values):
            complete = int(values.get('step', 0))
            if by_epoch:
                validations.append((last, complete, metrics))
            else:  # `log_metric_by_epoch` is True by default, and there are no epochs then
                validations.append((max(last, complete), None, metrics))
    if not steps:
        return  # a validation or a test alone
    first = steps[0][0]
    log.steps = [step for step in log.steps if step[0] < first] + steps
    start = validations[0][:2] if validations else None
    if start is not None:
        kept = [v for v in log.validations if v[0] < start[0] and v[:2] != start]
        log.validations = kept + validations


def _metrics(values: Mapping[str, float]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if name not in _NO_METRIC and not name.lower().startswith('dyrep')
    }


def _lines(file: Path) -> Iterator[Mapping[str, Any]]:
    for text in _text(file).splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # a process that was killed, or is writing now
            continue
        if isinstance(line, dict):
            yield line


def _text(file: Path) -> str:
    try:
        return file.read_text(errors='replace')
    except OSError:
        return ''


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _time(name: str) -> datetime | None:
    try:
        return datetime.strptime(name, '%Y%m%d_%H%M%S')
    except ValueError:
        return None


def counts_epochs(config: Mapping[str, Any]) -> bool | None:
    """Whether the training loop of a config counts epochs; None if the config does not say."""
    loop = config.get('train_cfg')
    if not isinstance(loop, Mapping):
        return None
    if type(loop.get('by_epoch')) is bool:
        return loop['by_epoch']
    if isinstance(loop.get('type'), str) and 'Based' in loop['type']:
        return 'Epoch' in loop['type']
    return 'max_epochs' in loop if {'max_epochs', 'max_iters'} & loop.keys() else None


def settings_in(text: str) -> dict[str, Any]:
    """The assignments of a dumped config that are plain data.

    The text comes from a file of somebody else: it is parsed and never run.
    """
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found = {}
    for statement in body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            found[statement.targets[0].id] = _data(statement.value)
    return found


def _data(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        return {word.arg: _data(word.value) for word in node.keywords if word.arg is not None}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {k.value: _data(v) for k, v in pairs if isinstance(k, ast.Constant)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_data(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
