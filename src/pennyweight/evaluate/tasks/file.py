"""The file of a task: JSON lines, one item each, all of one kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.core.errors import DataError
from pennyweight.core.registry import provided
from pennyweight.evaluate.tasks.base import FieldError, TaskMetric

# Below that many items a standard error means little.
LEAST_ITEMS = 30


@dataclass(frozen=True)
class Task:
    """items of one kind, and the numbers of their lines; sha256 of the file's content."""

    path: Path
    metric: TaskMetric[Any]
    items: Sequence[Any]
    lines: Sequence[int]
    sha256: str


def read_task(path: Path) -> Task:
    """The items of a file; its kind is that whose fields its lines have, which may have others too. Raises DataError
    that names file, line and field."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise DataError(f"--task {path}: it cannot be read ({error.strerror}): give a file of JSON lines") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): give JSON lines") from error
    records = {number: _record(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if len(records) < LEAST_ITEMS:
        raise DataError(f"{path} has {len(records)} items: give {LEAST_ITEMS} or more, fewer say little")
    metric = _metric(path, *next(iter(records.items())))
    items = [_item(path, number, record, metric) for number, record in records.items()]
    try:
        metric.check(items)
    except FieldError as error:
        raise DataError(f"{path}: {error}") from error
    return Task(path, metric, items, list(records), hashlib.sha256(content).hexdigest())


def _record(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not valid JSON ({error.msg}): give one object a line") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number}: {line.strip():.60} is no object: give one a line, {_allowed()}")
    return record


def _metric(path: Path, number: int, record: Mapping[str, Any]) -> TaskMetric[Any]:
    found = [metric for metric in _metrics() if metric.fields.keys() <= record.keys()]
    if len(found) == 1:
        return found[0]
    given = ", ".join(f"`{field}`" for field in record) or "no fields"
    which = "these are the fields of no kind of task" if not found else "these are the fields of more than one"
    raise DataError(f"{path}, line {number}: {given}: {which}: give {_allowed()}")


def _item(path: Path, number: int, record: Mapping[str, Any], metric: TaskMetric[Any]) -> Any:
    missing = [field for field in metric.fields if field not in record]
    if missing:
        is_other = any(one.fields.keys() <= record.keys() for one in _metrics())
        remedy = "give one file for each kind" if is_other else f"give {metric.fields[missing[0]]}"
        raise DataError(f"{path}, line {number}: `{missing[0]}` is missing, and the lines before are {metric.name}: "
                        f"{remedy}")  # fmt: skip
    try:
        return metric.item(record)
    except FieldError as error:
        raise DataError(f"{path}, line {number}: {error}") from error


def _metrics() -> list[TaskMetric[Any]]:
    return list(provided("evaluate.tasks").values())


def _allowed() -> str:
    kinds = [
        f"{metric.name} {{{', '.join(f'{field}: {what}' for field, what in metric.fields.items())}}}"
        for metric in _metrics()
    ]
    return " or ".join(kinds)
