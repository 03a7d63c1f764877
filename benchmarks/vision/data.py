"""The pictures and sentences of the vision benchmark, as the networks take them; `data` is the directory of --data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from benchmarks.judges import numbered, read_pairs
from benchmarks.vision.problem import Arrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
_DEVIATION = np.array([0.229, 0.224, 0.225], dtype=np.float32)
_CROP = 224
# Every fifth picture calibrates, the others judge.
_CALIBRATING = 5


def small_pictures(data: Path, part: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """CIFAR-10 `part` (test, calibration, train): images [n, 3, 32, 32], normalised, and labels [n]."""
    with np.load(data / "images" / f"cifar10-{part}.npz") as arrays:
        images = (arrays["images"].astype(np.float32) / 255 - _MEAN) / _DEVIATION
        labels = arrays["labels"].astype(np.int64)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels


def large_pictures(data: Path, *, is_calibration: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """ImageNet pictures of one part: images [n, 3, 224, 224] in [-1, 1], the middle of each, and classes [n]."""
    from PIL import Image

    files = sorted((data / "images" / "imagenet-256").glob("*.jpg"))
    chosen = [file for i, file in enumerate(files) if (i % _CALIBRATING == 0) == is_calibration]
    images = np.empty((len(chosen), 3, _CROP, _CROP), dtype=np.float32)
    for place, file in zip(images, chosen, strict=True):
        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
        edge = (pixels.shape[0] - _CROP) // 2
        place[:] = (pixels[edge : edge + _CROP, edge : edge + _CROP] / 127.5 - 1).transpose(2, 0, 1)
    return images, np.array([int(file.stem) for file in chosen], dtype=np.int64)


def sentence_pairs(path: Path) -> tuple[list[str], NDArray[np.int64], NDArray[np.float64]]:
    """Distinct sentences, the places [pairs, 2] in them of each pair, and the human scores [pairs]."""
    rows = read_pairs(path)
    sentences, places = numbered(rows)
    return sentences, np.array(places, dtype=np.int64), np.array([score for _, _, score in rows])


def tokens(tokenizer: PreTrainedTokenizerBase, sentences: list[str], *, length: int) -> Arrays:
    """input_ids and attention_mask int64 [n, length], padded at the end and cut there."""
    made = tokenizer(sentences, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    return {name: np.asarray(made[name], dtype=np.int64) for name in ("input_ids", "attention_mask")}
