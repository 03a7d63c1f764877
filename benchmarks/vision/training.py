"""The training pictures in batches, shifted and mirrored at random, as every tool that trains gets them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.vision.problem import Problem

TRAINING_BATCH = 100
# A picture is moved by so many pixels at most; zeros, the mean colour, come in from the side.
_SHIFT = 4


@dataclass
class Pictures:
    """A loader: each pass gives all pictures [batch, 3, 32, 32] and labels [batch] in another order, shifted and
    mirrored otherwise. A pass depends on the seed and on how many came before it."""

    images: Tensor
    labels: Tensor
    seed: int = 0
    passes: int = 0

    @classmethod
    def of(cls, problem: Problem) -> Pictures:
        arrays = problem.arrays("train")
        return cls(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]))

    def __len__(self) -> int:
        return -(-len(self.labels) // TRAINING_BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.passes)
        self.passes += 1
        order = torch.randperm(len(self.labels), generator=generator)
        for chosen in order.split(TRAINING_BATCH):
            yield _varied(self.images[chosen], generator), self.labels[chosen]


def _varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each of `images` [n, channels, size, size] shifted and, every second on average, mirrored."""
    count, _, size, _ = images.shape
    wide = functional.pad(images, (_SHIFT, _SHIFT, _SHIFT, _SHIFT))
    starts = torch.randint(0, 2 * _SHIFT + 1, (count, 2), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    windows = [wide[i, :, y : y + size, x : x + size] for i, (y, x) in enumerate(starts.tolist())]
    return torch.stack([one.flip(-1) if flip else one for one, flip in zip(windows, mirrored.tolist(), strict=True)])
