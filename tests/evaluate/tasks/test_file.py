"""Task files: their kinds, and every way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pennyweight.core.errors import DataError
from pennyweight.evaluate.tasks.file import LEAST_ITEMS, read_task
from tests.evaluate.tasks.examples import write

CHOICE = {"context": "a", "choices": ["b", "c"], "answer": 1}
BLANK = {"context": "a", "target": "b"}
PAIR = {"a": "x", "b": "y", "score": 1}


@pytest.mark.parametrize(
    ("item", "kind"), [(CHOICE, "multiple-choice"), (BLANK, "cloze"), ({**PAIR, "note": None}, "sentence-pairs")]
)
def test_the_fields_say_which_kind_it_is(tmp_path: Path, item: dict[str, Any], kind: str) -> None:
    items = [item | ({"score": number} if "score" in item else {}) for number in range(LEAST_ITEMS)]
    path = write(tmp_path / "task.jsonl", items)
    path.write_text("\n" + path.read_text())
    task = read_task(path)
    assert (task.metric.name, len(task.items), task.lines[0], task.lines[-1]) == (kind, LEAST_ITEMS, 2, LEAST_ITEMS + 1)


@pytest.mark.parametrize(
    ("good", "line", "said"),
    [
        (CHOICE, "{", "not valid JSON (Expecting property name enclosed in double quotes): give one object a line"),
        (CHOICE, "[1]", "[1] is no object: give one a line, cloze {context: a string, target: a string} or"),
        (CHOICE, {**CHOICE, "answer": 2}, "`answer` is 2: give the index of the right choice, 0 to 1"),
        (CHOICE, {**CHOICE, "answer": True}, "`answer` is True: give the index"),
        (CHOICE, {**CHOICE, "answer": "b"}, "`answer` is 'b': give the index"),
        (CHOICE, {**CHOICE, "choices": ["b"]}, "`choices` is ['b']: give a list of two or more strings that are not"),
        (CHOICE, {**CHOICE, "choices": ["b", ""]}, "`choices` is ['b', '']: give a list"),
        (CHOICE, {**CHOICE, "context": None}, "`context` is None: give a string"),
        (CHOICE, {"context": "a", "choices": ["b", "c"]},
         "`answer` is missing, and the lines before are multiple-choice: give the index of the right one, from 0"),
        (CHOICE, BLANK, "`choices` is missing, and the lines before are multiple-choice: give one file for each kind"),
        (BLANK, {**BLANK, "target": ""}, "`target` is '': give a string that is not empty"),
        (PAIR, {**PAIR, "score": "1"}, "`score` is '1': give a number"),
        (PAIR, '{"a": "x", "b": "y", "score": NaN}', "`score` is nan: give a number"),
        (PAIR, {**PAIR, "b": ["y"]}, "`b` is ['y']: give a string that is not empty"),
    ],
)  # fmt: skip
def test_a_line_that_is_wrong_is_named_with_its_field(tmp_path: Path, good: Any, line: Any, said: str) -> None:
    items = [json.dumps(good)] * LEAST_ITEMS
    items[6] = line if isinstance(line, str) else json.dumps(line)
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(items))
    with pytest.raises(DataError) as error:
        read_task(path)
    assert str(error.value).startswith(f"{path}, line 7: {said}")


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([{"question": "?", "answer": 1}] * 40,
         ", line 1: `question`, `answer`: these are the fields of no kind of task: give cloze {context"),
        ([CHOICE | BLANK] * 40, ", line 1: `context`, `choices`, `answer`, `target`: these are the fields of more"),
        ([PAIR] * 40, ": every `score` is 1: nothing correlates with it; give different ones"),
        ([BLANK] * 29, " has 29 items: give 30 or more, fewer say little"),
        ([], " has 0 items"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_task_is_refused(tmp_path: Path, items: list[Any], said: str) -> None:
    path = write(tmp_path / "task.jsonl", items)
    with pytest.raises(DataError) as error:
        read_task(path)
    assert str(error.value).startswith(f"{path}{said}")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read .No such file"):
        read_task(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_task(tmp_path / "binary")
