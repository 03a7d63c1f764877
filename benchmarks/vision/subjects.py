"""The networks that are measured, with trained weights, and the problems that they become.

A problem lies in benchmarks/.cache under the hash of its content, so nothing about it is made twice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.results_file import cache
from benchmarks.subjects import minilm_files
from benchmarks.vision import data as read
from benchmarks.vision import float_file, networks
from benchmarks.vision.judges import Agreement, Judge, Spearman, Top1
from benchmarks.vision.problem import (
    ABOUT_FILE,
    FLOAT_FILE,
    WEIGHTS_FILE,
    Arrays,
    Problem,
    built,
    of_onnx,
)

_CALIBRATION_SENTENCES = 600


@dataclass(frozen=True)
class Subject:
    """problem    what tools are given
    of_float   float32 [n, width]: outputs of the float file on the judged inputs, in ONNX Runtime
    about      where the inputs come from, for the reader
    """

    name: str
    problem: Problem
    judge: Judge
    of_float: NDArray[np.float32]
    about: str


def resnet20(data: Path) -> Subject | str:
    """ResNet-20 on CIFAR-10, or why it cannot be measured."""
    return _of_small_pictures("resnet20", data, spread=False)


def resnet20_spread(data: Path) -> Subject | str:
    """The same function with channel ranges that differ by factors of 1 to 100."""
    return _of_small_pictures("resnet20-spread", data, spread=True)


def _of_small_pictures(name: str, data: Path, *, spread: bool) -> Subject | str:
    weights = data / "models" / "resnet20-cifar10" / WEIGHTS_OF_DATA
    if not weights.is_file():
        return "the data directory has no models/resnet20-cifar10 (--data)"
    net = networks.ResNet20()
    net.load_state_dict(load_file(weights))
    if spread:
        networks.spread_ranges_(net)
    (judged, labels), (calibration, _) = (read.small_pictures(data, part) for part in ("test", "calibration"))
    parts = {"judged": {"images": judged}, "calibration": {"images": calibration}}
    about = "calibrated on 600 CIFAR-10 pictures, judged on 2,000 of the test set"
    if not spread:
        images, wanted = read.small_pictures(data, "train")
        parts["train"] = {"images": images, "labels": wanted}
        about += ", trained on 5,000"
    problem = _problem(name, {"builder": "resnet20", "config": None, "inputs": ["images"]}, net.state_dict(), parts)
    return _subject(name, problem, Top1(labels), about)


def mobilenetv2(data: Path) -> Subject | str:
    """MobileNetV2 on ImageNet pictures, or why it cannot be measured."""
    weights = data / "models" / "mobilenetv2-imagenet" / WEIGHTS_OF_DATA
    if not weights.is_file():
        return "the data directory has no models/mobilenetv2-imagenet (--data)"
    state = load_file(weights)
    # Its first output is a background class that no picture has.
    state |= {name: state[name][1:] for name in ("classifier.weight", "classifier.bias")}
    parts = {
        name: read.large_pictures(data, is_calibration=name == "calibration") for name in ("calibration", "judged")
    }
    problem = _problem(
        "mobilenetv2",
        {"builder": "mobilenetv2", "config": None, "inputs": ["images"]},
        state,
        {name: {"images": images} for name, (images, _) in parts.items()},
    )
    about = "calibrated on every fifth of 500 ImageNet pictures, judged on the other 400"
    return _subject("mobilenetv2", problem, Agreement(parts["judged"][1]), about)


def minilm(data: Path) -> Subject | str:
    """all-MiniLM-L6-v2 as a sentence encoder, or why it cannot be measured."""
    found = minilm_files(data)
    if isinstance(found, str):
        return found
    from transformers import AutoTokenizer

    path, files = found
    tokenizer = AutoTokenizer.from_pretrained(path)
    (dev, _, _), (test, pairs, scores) = (read.sentence_pairs(files[part]) for part in ("dev", "test"))
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    state = {f"encoder.{name}": tensor for name, tensor in load_file(path / WEIGHTS_OF_DATA).items()}
    wanted = networks.sentence_encoder(config).state_dict()
    length = networks.SENTENCE_TOKENS
    problem = _problem(
        "minilm",
        {"builder": "sentence-encoder", "config": config, "inputs": ["input_ids", "attention_mask"]},
        {name: tensor for name, tensor in state.items() if name in wanted},
        {
            "calibration": read.tokens(tokenizer, dev[:_CALIBRATION_SENTENCES], length=length),
            "judged": read.tokens(tokenizer, test, length=length),
        },
    )
    about = (
        f"calibrated on {_CALIBRATION_SENTENCES} sentences of STS-B dev, judged on the {len(scores):,} pairs of STS-B "
        f"test; {length} tokens, padding included"
    )
    return _subject("minilm", problem, Spearman(pairs, scores), about)


WEIGHTS_OF_DATA = "model.safetensors"
SUBJECTS: dict[str, Callable[[Path], Subject | str]] = {
    "resnet20": resnet20,
    "resnet20-spread": resnet20_spread,
    "mobilenetv2": mobilenetv2,
    "minilm": minilm,
}


def _subject(name: str, problem: Problem, judge: Judge, about: str) -> Subject:
    kept = problem.path / "float-outputs.npy"
    if not kept.exists():
        np.save(kept, problem.outputs(of_onnx(problem.float_file)))
    return Subject(name, problem, judge, np.load(kept), about)


def _problem(name: str, about: dict[str, Any], state: dict[str, Tensor], parts: dict[str, Arrays]) -> Problem:
    """The problem with this content, written unless it is there."""
    place = cache("vision-problems") / f"{name}-{_digest(about, state, parts)}"
    if not (place / ABOUT_FILE).exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, place / WEIGHTS_FILE)
        for part, arrays in parts.items():
            save_arrays(arrays, place / f"{part}.safetensors")
        example = {name: torch.from_numpy(parts["judged"][name][:2]) for name in about["inputs"]}
        float_file.write_float(built(about, state), example, place / FLOAT_FILE)
        (place / ABOUT_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return Problem(place)


def _digest(about: dict[str, Any], state: dict[str, Tensor], parts: dict[str, Arrays]) -> str:
    digest = hashlib.sha256(json.dumps([about, torch.__version__], sort_keys=True).encode())
    for module in (networks, float_file):
        digest.update(Path(str(module.__file__)).read_bytes())
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    for values in (arrays, *(parts[name] for name in sorted(parts))):
        for name in sorted(values):
            digest.update(name.encode() + np.ascontiguousarray(values[name]).tobytes())
    return digest.hexdigest()[:16]
