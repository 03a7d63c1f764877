"""`pennyweight demo`: the whole journey on the model that the project ships."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import typer

from pennyweight.cli.console import mebibytes, put_json, say, table

# Scheme of each row, and how its codes are chosen: rounding alone, or an effort.
_ROWS = (
    ("int8-g128", "fast"),
    ("int4-g128", "nearest"),
    ("int4-g128", "fast"),
    ("int4-g128", "normal"),
    ("int3-g128", "normal"),
    ("int2-g64", "normal"),
)


def demo(
    out: str | None = typer.Option(None, help="Keep the results in this new directory.  [default: a temporary one]"),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """The whole journey on the model that is shipped.

    Quantize it at several widths, evaluate and verify each, and show what was gained and lost.
    """
    from pennyweight.core.errors import UsageError

    if out is not None and Path(out).exists():
        raise UsageError(f"{out} exists: choose another --out, or remove it")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(out or scratch)
        directory.mkdir(parents=True, exist_ok=True)
        rows = _rows(directory)
    if as_json:
        put_json({"rows": rows})
        return
    _print(rows)
    if out:
        print(f"\nKept in {out}. Try: pennyweight run {out}/int4-g128-normal --prompt 'It was a dark night, and'")


def _rows(directory: Path) -> list[dict[str, Any]]:
    import pennyweight
    from pennyweight.evaluate.compare import evaluate
    from pennyweight.evaluate.proved import quantize

    model = Path(pennyweight.__file__).parent / "demo_model"
    rows: list[dict[str, Any]] = []
    for scheme, how in _ROWS:
        target = directory / f"{scheme}-{how}"
        say(f"{scheme}, {how}: quantizing, verifying, evaluating")
        asked: dict[str, Any] = {"solver": how} if how == "nearest" else {"effort": how}
        report = quantize(model, target, scheme=scheme, samples=32, device="cpu", **asked)
        found = evaluate(str(target), against=str(model), source=str(model / "held-out.txt"))
        rows.append(
            {
                "scheme": scheme,
                "how": how,
                "size_bytes": report.size_bytes,
                "original_bytes": found.reference_size_bytes,
                "bpw_sites": report.bpw_sites,
                "perplexity": found.perplexity,
                "reference_perplexity": found.reference_perplexity,
                "kl_mean": found.kl_mean,
                "kl_stderr": found.kl_stderr,
                "top1_agreement": found.top1_agreement,
                "verified": report.verified,
                "seconds": report.seconds,
            }
        )
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    original = rows[0]
    lines = [
        [
            "original, bfloat16",
            mebibytes(original["original_bytes"]),
            "16",
            f"{original['reference_perplexity']:.2f}",
            "0",
            "100 %",
            "-",
            "-",
        ]
    ]
    for row in rows:
        lost = 100 * (row["perplexity"] / row["reference_perplexity"] - 1)
        lines.append(
            [
                f"{row['scheme']}, {row['how']}",
                mebibytes(row["size_bytes"]),
                f"{row['bpw_sites']:.2f}",
                f"{row['perplexity']:.2f} ({lost:+.1f} %)",
                f"{row['kl_mean']:.5f}",
                f"{100 * row['top1_agreement']:.1f} %",
                row["verified"],
                f"{row['seconds']:.0f} s",
            ]
        )
    header = ["", "size", "bits a weight", "perplexity", "KL to original", "same top token", "verified", "time"]
    table(header, lines)
    print("\nBits a weight count the quantized linear maps with their scales; embeddings stay in bfloat16.")
    print("Perplexity, KL and agreement are measured on text that the model never saw.")
    print("Verified: opened with transformers, no key missing, logits equal to those of our own decoding.")
