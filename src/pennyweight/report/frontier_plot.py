"""The frontier as a plot: predicted loss against size, and where the chosen plan and uniform schemes lie."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pennyweight.core.errors import require
from pennyweight.plan.frontier import Frontier

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
# Text stays text, and what would differ from run to run is fixed.
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "pennyweight", "font.family": "sans-serif", "font.size": 10}
_LABEL_SIZE, _MARK_SIZE = 8, 5
# Where the left end of a label may stand, in points from its mark: near places first, those to the right before others.
_OFFSETS = sorted(
    ((right, up) for right in (7, 22, 40, 60, 85, -60, -80, -100) for up in range(-72, 73, 6)),
    key=lambda offset: abs(offset[1]) + abs(offset[0]) + (50 if offset[0] < 0 else 0),
)


@dataclass(frozen=True)
class Mark:
    """A plan at a place of its own. name: its label; empty for none."""

    name: str
    size_bytes: int
    loss: float


def frontier_svg(
    frontier: Frontier,
    *,
    title: str,
    chosen: Mark | None = None,
    uniform: Sequence[Mark] = (),
    measured: Sequence[Mark] = (),
) -> str:
    """An SVG document; the same text for the same arguments.

    A loss of 0 has no place on the logarithmic axis: the line leaves the plot there. Raises MissingExtraError without
    matplotlib.
    """
    matplotlib = require("matplotlib", extra="report")
    file = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure = frontier_figure(frontier, title=title, chosen=chosen, uniform=uniform, measured=measured)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def frontier_figure(
    frontier: Frontier, *, title: str, chosen: Mark | None, uniform: Sequence[Mark], measured: Sequence[Mark]
) -> Any:
    """The plot as a matplotlib Figure."""
    figure = require("matplotlib.figure", extra="report").Figure(figsize=(9, 5.5))
    figure.subplots_adjust(left=0.11, right=0.97, top=0.91, bottom=0.11)
    axes = figure.add_subplot()
    marks = [*([chosen] if chosen else []), *uniform, *measured]
    largest = max([point.size_bytes for point in frontier.points] + [mark.size_bytes for mark in marks])
    unit, name = next((unit for unit in _UNITS if largest >= unit[0]), _UNITS[-1])
    _draw(
        axes, [(point.size_bytes / unit, point.cost) for point in frontier.points], "best plan of each size", "-", "C0"
    )
    _draw(axes, _places(uniform, unit), "one scheme everywhere", "o", "C7")
    _draw(axes, _places(measured, unit), "measured", "x", "C3")
    _draw(axes, _places([chosen] if chosen else [], unit), "chosen plan", "D", "C1")
    if any(loss > 0 for line in axes.lines for loss in line.get_ydata()):
        axes.set_yscale("log", nonpositive="clip")
    axes.set(xlabel=f"size ({name})", ylabel="loss against the original")
    axes.set_title(textwrap.fill(title, 85), fontsize=11)
    axes.grid(which="both", alpha=0.2)
    # Below the best plans there is room.
    axes.legend(loc="lower left")
    _label(figure, axes, [(mark.name, mark.size_bytes / unit, mark.loss) for mark in marks if mark.name])
    return figure


def _places(marks: Sequence[Mark], unit: float) -> list[tuple[float, float]]:
    return [(mark.size_bytes / unit, mark.loss) for mark in marks]


def _draw(axes: Any, places: Sequence[tuple[float, float]], label: str, style: str, color: str) -> None:
    if places:
        axes.plot(*zip(*places, strict=True), style, color=color, label=label, markersize=_MARK_SIZE)


def _label(figure: Any, axes: Any, labels: Sequence[tuple[str, float, float]]) -> None:
    """Writes each name near its mark, joined by a thin line, where it covers least."""
    canvas = require("matplotlib.backends.backend_agg", extra="report").FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    points = [(float(x), float(y)) for line in axes.lines for x, y in axes.transData.transform(line.get_xydata())]
    boxes = [axes.get_legend().get_window_extent(renderer)]
    marks = points[len(axes.lines[0].get_xydata()) :]
    boxes += [type(boxes[0]).from_extents(x, y, x, y).padded(_MARK_SIZE) for x, y in marks]
    for name, x, y in labels:
        text = axes.annotate(
            name, (x, y), (0, 0), textcoords="offset points", fontsize=_LABEL_SIZE, verticalalignment="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip
        box = text.get_window_extent(renderer)
        across, up = axes.transData.transform((x, y))
        places = [_place(box, (float(across), float(up)), offset, figure.dpi / 72) for offset in _OFFSETS]
        place = min(places, key=lambda place: place.covers(points, boxes, axes.bbox))
        text.set_position(place.offset)
        text.set_horizontalalignment("left")
        boxes.append(place.box)
        points += place.leader


@dataclass(frozen=True)
class _Place:
    """Where a label may stand: the offset of its left end in points; its box and the line to its mark in pixels."""

    offset: tuple[float, float]
    box: Any
    leader: list[tuple[float, float]]

    def covers(self, points: Sequence[tuple[float, float]], boxes: Sequence[Any], frame: Any) -> int:
        """How much the label would cover; to leave the plot is worse than anything."""
        box = self.box.padded(3)
        outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
        overlaps = sum(bool(box.overlaps(other)) for other in boxes)
        crossings = sum(bool(other.contains(*point)) for other in boxes for point in self.leader)
        hidden = sum(bool(box.contains(*point)) for point in points)
        return 1000 * int(outside) + 10 * overlaps + 2 * crossings + hidden


def _place(box: Any, at: tuple[float, float], offset: tuple[float, float], pixels: float) -> _Place:
    right, up = offset[0] * pixels, offset[1] * pixels
    moved = type(box).from_bounds(at[0] + right, at[1] + up - box.height / 2, box.width, box.height)
    # What lies within the mark itself is no crossing.
    parts = [part / 8 for part in range(1, 8) if math.hypot(right, up) * part / 8 > 2 * _MARK_SIZE]
    return _Place(offset, moved, [(at[0] + right * part, at[1] + up * part) for part in parts])
