"""How long a plan takes for a large mixture of experts, and how far it is from the best there is.

    python -m benchmarks.allocation [--out FILE]

60 blocks x 256 experts x 3 linear maps with 12 schemes each, of one size or of very different sizes, and budgets from
just above the smallest plan to just below the largest. The distance is to the allocation's own lower bound; that this
bound holds, and that small instances are solved exactly, is what tests/plan/test_allocate.py checks with scipy's milp.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.results_file import circumstances, heading, save, table
from pennyweight.plan.allocate import allocate
from pennyweight.plan.choices import smallest
from tests.plan.instances import mixture_of_experts

GROUPS, CHOICES = 60 * 256 * 3, 12
# Between the smallest plan and the largest.
SHARES = (0.01, 0.05, 0.2, 0.5, 0.9)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.allocation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="JSON to write, .md beside it (default: in benchmarks/results)")
    arguments = parser.parse_args()
    facts = circumstances("benchmarks.allocation")
    found = []
    for same_size in (True, False):
        groups = mixture_of_experts(GROUPS, CHOICES, same_size=same_size)
        least, most = smallest(groups), sum(max(choice.size_bytes for choice in group.choices) for group in groups)
        for share in SHARES:
            budget = int(least + share * (most - least))
            start = time.perf_counter()
            plan = allocate(groups, budget)
            found.append({
                "sizes": "one" if same_size else "many",
                "budget": budget,
                "left": 1 - plan.size_bytes / budget,
                "seconds": round(time.perf_counter() - start, 2),
                "above_bound": plan.cost / plan.lower_bound - 1,
            })  # fmt: skip
    rows = [
        [one["sizes"], f"{one['budget']:,}", f"{100 * one['left']:.5f} %", f"{one['seconds']:.2f}",
         f"{100 * one['above_bound']:.6f} %"]
        for one in found
    ]  # fmt: skip
    notes = "\n- seconds: at most 5 are allowed; above the bound: 0.1 %.\n"
    head = ["sizes", "bytes asked", "left", "seconds", "cost above its lower bound"]
    markdown = "\n".join([heading(f"Allocation of {GROUPS:,} linear maps", facts), table(head, rows), notes])
    save("allocation", {**facts, "plans": found}, markdown, out=arguments.out)


if __name__ == "__main__":
    main()
