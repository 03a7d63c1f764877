"""The plot of a frontier: what it names, where its marks lie, that it is the same every time and needs its extra."""

from __future__ import annotations

import sys
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import pytest

from pennyweight.core.errors import MissingExtraError
from pennyweight.plan.frontier import Frontier, Point, frontier
from pennyweight.report.frontier_plot import Mark, frontier_figure, frontier_svg
from tests.plan.instances import groups_of, mixture_of_experts

LINE = frontier(mixture_of_experts(60, 8))
LOW, MIDDLE, HIGH = LINE.points[0], LINE.points[40], LINE.points[-1]
MARKS: dict[str, Any] = {
    "chosen": Mark("the plan", MIDDLE.size_bytes, MIDDLE.cost),
    "uniform": [Mark(f"int4-g{size}", MIDDLE.size_bytes + 100 * size, MIDDLE.cost * 1.5) for size in (32, 64, 128)],
    "measured": [Mark("", MIDDLE.size_bytes, MIDDLE.cost * 1.1)],
}


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_it_names_all_that_it_shows() -> None:
    shown = texts(frontier_svg(LINE, title="A title", **MARKS))
    expected = ["A title", "size (MB)", "the plan", "int4-g32", "int4-g64", "int4-g128", "best plan of each size",
                "one scheme everywhere", "measured", "chosen plan"]  # fmt: skip
    assert [text for text in expected if text not in shown] == []
    assert "one scheme everywhere" not in texts(frontier_svg(LINE, title="A title"))


def test_the_same_arguments_give_the_same_bytes() -> None:
    first = frontier_svg(LINE, title="A title", **MARKS)
    assert frontier_svg(LINE, title="A title", **MARKS) == first
    assert "<dc:date>" not in first


def test_lines_and_marks_lie_where_they_belong() -> None:
    axes = frontier_figure(LINE, title="", **MARKS).axes[0]
    line, uniform, measured, chosen = (line.get_xydata().tolist() for line in axes.lines)
    assert line == [[point.size_bytes / 1e6, point.cost] for point in LINE.points]
    assert uniform == [[mark.size_bytes / 1e6, mark.loss] for mark in MARKS["uniform"]]
    assert measured == [[MIDDLE.size_bytes / 1e6, MIDDLE.cost * 1.1]]
    assert chosen == [[MIDDLE.size_bytes / 1e6, MIDDLE.cost]]
    assert axes.get_yscale() == "log"


def test_labels_of_marks_close_together_do_not_overlap() -> None:
    crowd = [Mark(f"scheme-{i}", MIDDLE.size_bytes + i, MIDDLE.cost * (1 + i / 50)) for i in range(8)]
    figure = frontier_figure(LINE, title="", chosen=MARKS["chosen"], uniform=crowd, measured=())
    figure.canvas.draw()
    text_box = type(figure.text(0, 0, "")).get_window_extent
    boxes = [text_box(text) for text in figure.axes[0].texts]
    assert len(boxes) == 9
    assert not [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]
    assert all(figure.bbox.containsx(box.x1) and figure.bbox.containsy(box.y1) for box in boxes)


@pytest.mark.parametrize(
    ("size_bytes", "unit"), [(5, "kB"), (5_000, "kB"), (5_000_000, "MB"), (5 * 10**9, "GB"), (5 * 10**12, "GB")]
)
def test_sizes_have_a_unit_that_suits_them(size_bytes: int, unit: str) -> None:
    line = Frontier((("a",),), (Point(size_bytes // 2, 1.0, (None,)), Point(size_bytes, 0.0, (None,))))
    assert f"size ({unit})" in texts(frontier_svg(line, title=""))


def test_a_loss_of_zero_everywhere_can_be_drawn() -> None:
    assert "best plan of each size" in texts(frontier_svg(frontier(groups_of([[(5, 0.0)]])), title=""))


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib is needed here: pip install 'pennyweight\[report\]'"):
        frontier_svg(LINE, title="")
