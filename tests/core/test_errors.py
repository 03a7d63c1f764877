"""What is said of the errors of libraries."""

from __future__ import annotations

import pytest

from pennyweight.core.errors import first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  \nbehind empty lines\nmore"), "behind empty lines"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("\n"), "ValueError"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, said: str) -> None:
    assert first_line(error) == said
