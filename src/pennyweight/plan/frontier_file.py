"""The frontier as JSON: each point says what changed since the one before it, so a file of all points stays readable.

    {"pennyweight_frontier": 1, "weights": 262144,
     "groups": [["layers.0.q_proj", "layers.0.k_proj"], ["layers.0.down_proj"]],
     "points": [{"size_bytes": 73728, "bpw": 2.25, "predicted_loss": 0.91,
                 "changes": {"layers.0.q_proj": "int2-g64", "layers.0.down_proj": "int2-g64"}},
                {"size_bytes": 81920, "bpw": 2.5, "predicted_loss": 0.47,
                 "changes": {"layers.0.down_proj": "int3-g64"}}]}

A group is called by its first site; the first point lists every group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pennyweight.core.errors import UsageError
from pennyweight.core.files import to_json, write_text
from pennyweight.plan.choices import choice_name, named_choice
from pennyweight.plan.frontier import Frontier, Point
from pennyweight.schemes import Scheme

_VERSION = 1


def frontier_record(frontier: Frontier) -> dict[str, Any]:
    """The frontier as plain mappings and lists."""
    return {
        "pennyweight_frontier": _VERSION,
        "weights": frontier.weights,
        "groups": [list(sites) for sites in frontier.sites],
        "points": list(_point_records(frontier)),
    }


def _point_records(frontier: Frontier) -> Iterator[dict[str, Any]]:
    before: tuple[object, ...] = (object(),) * len(frontier.sites)
    for point in frontier.points:
        bpw = frontier.bpw(point)
        yield {
            "size_bytes": point.size_bytes,
            **({} if bpw is None else {"bpw": bpw}),
            "predicted_loss": point.cost,
            "changes": {
                sites[0]: choice_name(scheme)
                for sites, scheme, old in zip(frontier.sites, point.schemes, before, strict=True)
                if scheme is not old and scheme != old
            },
        }
        before = point.schemes


def write_frontier(path: Path, frontier: Frontier) -> None:
    """Write `path` whole or not at all; the same bytes for the same frontier."""
    write_text(path, to_json(frontier_record(frontier)))


def read_frontier(path: Path) -> Frontier:
    """The frontier that `write_frontier` wrote; raises UsageError for anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["pennyweight_frontier"] != _VERSION:
            raise UsageError(f"version {record['pennyweight_frontier']} is not {_VERSION}")
        groups = tuple(tuple(sites) for sites in record["groups"])
        points = tuple(_points(record["points"], [sites[0] for sites in groups]))
        return Frontier(groups, points, record["weights"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"{path} is not a frontier that this version can read ({what}): write it again") from error


def _points(records: list[dict[str, Any]], names: list[str]) -> Iterator[Point]:
    schemes: dict[str, Scheme | None] = {}
    for record in records:
        schemes |= {name: named_choice(text) for name, text in record["changes"].items()}
        yield Point(record["size_bytes"], record["predicted_loss"], tuple(schemes[name] for name in names))
