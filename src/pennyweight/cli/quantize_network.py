"""`pennyweight quantize --for onnxruntime`: a network of torch, an encoder of transformers, to an ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pennyweight.cli.console import Bar, mebibytes, put_json, set_jobs

if TYPE_CHECKING:
    from pennyweight.evaluate.network.record import NetworkRecord, SiteReport

RUNTIMES = ("onnxruntime", "openvino")
# Options of the command that say nothing of such a network.
LANGUAGE_OPTIONS = (
    "max_kl", "plan", "rotate", "transform", "solver", "staged", "refine", "recover", "loss_aware", "importance"
)  # fmt: skip
# Sites with the largest errors that are named; the record has all.
_NAMED = 5


def quantize_network(source: str, out: str, asked: Mapping[str, Any]) -> None:
    """The network that `source` names, into the directory `out`, with the options of the command by name.

    Raises UsageError for options that a network has no use for.
    """
    from pennyweight.evaluate.network.quantize import quantize_module
    from pennyweight.models.network.source import TextAmount, named_batches, named_network

    _refuse_others(asked)
    set_jobs(asked["jobs"])
    text = TextAmount(asked["samples"], asked["length"], asked["seed"])
    found = named_network(source, asked["calibration"], text=text, trust_remote_code=asked["trust_remote_code"])
    scheme = asked["scheme"] if asked["bits"] is None else f"int{asked['bits']}-channel"
    task = None if asked["task"] is None else named_batches(asked["task"])
    made = quantize_module(
        found.net, scheme=scheme, calibration=found.batches,
        example=found.example, out=out, runtime=asked["runtime"], evaluate=task, effort=asked["effort"],
        size=asked["size"], bpw=asked["bpw"], max_loss=asked["max_loss"],
        keep=asked["keep"] or (), at=asked["at"] or (), ranges=asked["ranges"],
        equalize=asked["equalize"], verify=asked["verify"], seed=asked["seed"], tell=_teller(),
    )  # fmt: skip
    put_json(_summary(out, made.record)) if asked["as_json"] else _print(out, made.record)


def _teller() -> Callable[[str, int, int], None]:
    """A bar for each step of the run, on a terminal."""
    bars: dict[str, Bar] = {}

    def tell(step: str, done: int, total: int) -> None:
        if step not in bars:
            bars[step] = Bar(step)
        bars[step].show(done, total)

    return tell


def _refuse_others(asked: Mapping[str, Any]) -> None:
    from pennyweight.core.errors import UsageError

    names = [f"--{name.replace('_', '-')}" for name in LANGUAGE_OPTIONS if asked[name] not in (None, False)]
    if names:
        raise UsageError(
            f"{', '.join(names)}: for language models; --for {asked['runtime']} writes networks that answer in one pass"
        )
    if asked["device"] not in ("auto", "cpu"):
        raise UsageError(f"--device {asked['device']}: networks are quantized on the CPU; leave it out")


def _summary(out: str, record: NetworkRecord) -> dict[str, Any]:
    return {
        "out": out,
        "size_bytes": int(record.sizes["file_bytes"]),
        **record.sizes,
        "sites": len(record.sites),
        "edges": len(record.edges),
        "kept": dict(record.kept),
        "fallbacks": {name: list(notes) for name, notes in record.fallbacks.items()},
        "notes": list(record.notes),
        "seconds": record.seconds,
        "verified": record.verified,
        **record.measured(),
    }


def _print(out: str, record: NetworkRecord) -> None:
    sizes = record.sizes
    print(f"{out}: {mebibytes(int(sizes['file_bytes']))}, the float file {mebibytes(int(sizes['float_file_bytes']))}")
    schemes = ", ".join(dict.fromkeys(site.scheme for site in record.sites))
    print(f"  {len(record.sites)} weights quantized ({schemes}), {len(record.edges)} values rounded between them")
    _print_errors(record.sites)
    for name, reason in {**record.kept, **record.refused}.items():
        print(f"  kept in float: {name}: {reason}")
    for note in record.notes:
        print(f"  {note}")
    if record.fallbacks:
        print(f"  {len(record.fallbacks)} weights carry notes: see pennyweight.json")
    for one in record.latency:
        print(f"  {one.runtime}: {one.quantized_ms:.3g} ms, the float file {one.float_ms:.3g} ms")
    for warning in record.warnings:
        print(f"  warning: {warning}")
    print(f"  {record.seconds:.0f} s; verified: {record.verified}")


def _print_errors(sites: Sequence[SiteReport]) -> None:
    """The sites whose outputs changed most, behind all that was rounded before them."""
    known = {site.name: site.output_error for site in sites if site.output_error is not None}
    for name, error in sorted(known.items(), key=lambda one: -one[1])[:_NAMED]:
        print(f"  {name}: error of its output {100 * error:.2g} %")
