"""Which tensors of a checkpoint a rotation of the residual stream changes, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pennyweight.core.errors import ModelError
from pennyweight.models.rotated import RotatedCheckpoint, Step
from pennyweight.models.sites import kind_of_merge
from pennyweight.models.streamed import StreamedModel
from pennyweight.transforms.base import Fold, Part, Style
from pennyweight.transforms.hadamard import Rotation, tiled_rotation
from pennyweight.transforms.probe import LinearMap


@dataclass(frozen=True)
class BlockRoles:
    """A kind of block: the norms of its stream with what reads them, what writes to the stream, and its heads."""

    norms: list[Fold]
    writers: list[LinearMap]
    heads: list[tuple[Fold, int]]
    subtracts_mean: bool


@dataclass(frozen=True)
class RotationPlan:
    """What becomes of each tensor of the checkpoint."""

    original: StreamedModel
    rotation: Rotation
    steps: dict[str, tuple[Step, ...]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    config_changes: dict[str, bool] = field(default_factory=dict)

    def model(self, stored: torch.dtype | None) -> StreamedModel:
        """The rotated model, its changed tensors stored as `stored`."""
        of = self.original
        checkpoint = RotatedCheckpoint.of(
            of.checkpoint,
            steps=self.steps,
            replaced=self.replaced,
            added=self.added,
            config_changes=self.config_changes,
            stored=stored,
        )
        return StreamedModel(
            of.path, trust_remote_code=of.trust_remote_code, device=str(of.device), checkpoint=checkpoint
        )

    def add_block(self, name: str, seen: BlockRoles) -> None:
        for fold in seen.norms:
            gain = self._neutral_norm(name, fold.producer)
            for reader in fold.readers:
                self._turn(f"{name}.{reader.parameter}", reader.axis, scale=gain)
        for writer in seen.writers:
            self._turn(f"{name}.{writer.parameter}", writer.out_axis)
            # Stacked experts add their biases by themselves.
            for bias in (writer.bias, f"{writer.parameter}_bias"):
                if f"{name}.{bias}" in self.original.weights.sources:
                    self._turn(f"{name}.{bias}", -1)
        for fold, size in seen.heads:
            for part in fold.producer:
                step = Step(part.axis, tiled_rotation(fold.size, size), rows=part.rows)
                self._add(f"{name}.{part.parameter}", step)
            [reader] = fold.readers
            columns = tiled_rotation(len(reader.source), size)
            self._add(f"{name}.{reader.parameter}", Step(reader.axis, columns))

    def _neutral_norm(self, owner: str, producer: Sequence[Part]) -> Tensor:
        """The norm's weight becomes one that does nothing, its bias is divided by it and turned; returns the weight."""
        names = {part.parameter.rpartition(".")[2]: f"{owner}.{part.parameter}" for part in producer}
        is_one_plus = producer[0].style == "one-plus"
        weight = self._stored(names["weight"])
        gain = weight + 1 if is_one_plus else weight
        self.replaced[self._key(names["weight"])] = torch.zeros_like(gain) if is_one_plus else torch.ones_like(gain)
        if "bias" in names:
            if not bool(gain.all()):
                raise self._refusal(f"{names['weight']} has a zero, through which the norm's bias cannot be carried")
            self.replaced[self._key(names["bias"])] = self.rotation.apply(self._stored(names["bias"]) / gain)
        return gain

    def add_outside(self, style: Style) -> None:
        """Embeddings, projections beside them, the last norm (its weight in `style`) and the head."""
        model = self.original
        outside = self._outside()
        head = model.module.get_output_embeddings()  # type: ignore[operator]
        norms = [name for name, module in outside.items() if _is_norm(module)]
        if head is None or len(norms) != 1:
            raise self._refusal(
                "it must have a head behind one last normalization of the residual stream; outside its blocks are "
                + (", ".join(norms) or "no normalizations")
            )
        gain = self._last_norm(norms[0], style)
        for name, module in outside.items():
            if isinstance(module, nn.Embedding):
                self._turn_all(self._same_as(module.weight) if gain is None else [f"{name}.weight"], -1)
            elif module is head:
                self._turn_all([f"{name}.weight"] if gain is not None else [], -1, scale=gain)
            elif isinstance(module, nn.Linear) and module.in_features != module.out_features:
                self._turn_projection(name, module, gain)
            elif name not in norms:
                raise self._refusal(f"what {name} does with the residual stream is not known")

    def _outside(self) -> dict[str, nn.Module]:
        """Modules outside the blocks with parameters as wide as the stream, by name."""
        inside = tuple(f"{block}." for block in self.original.blocks)
        return {
            name: module
            for name, module in self.original.module.named_modules()
            if not name.startswith(inside)
            and any(self.rotation.size in p.shape for p in module.parameters(recurse=False))
        }

    def _last_norm(self, name: str, style: Style) -> Tensor | None:
        """The last norm made neutral and what its weight was; None where a tied head can stay tied."""
        module = self.original.module.get_submodule(name)
        parts = tuple(
            Part(key, -1, torch.arange(self.rotation.size), style) for key, _ in module.named_parameters(recurse=False)
        )
        weight = self._stored(f"{name}.weight") + (1 if style == "one-plus" else 0)
        if not self.original.tied_head or not bool((weight == weight[0]).all()):
            if self.original.tied_head:
                self._untie()
            return self._neutral_norm(name, parts)
        if any(part.parameter == "bias" for part in parts):
            self.replaced[self._key(f"{name}.bias")] = self.rotation.apply(self._stored(f"{name}.bias"))
        return None

    def _untie(self) -> None:
        """The embedding and the head become tensors of their own."""
        names = self._same_as(self.original.module.get_output_embeddings().weight)  # type: ignore[operator]
        origin = next(name for name in names if name in self.original.weights.sources)
        self.added.update({name: self._key(origin) for name in names if name not in self.original.weights.sources})
        self.config_changes["tie_word_embeddings"] = False

    def _same_as(self, parameter: Tensor) -> list[str]:
        """Every name that the parameter has in the model."""
        every = self.original.module.named_parameters(remove_duplicate=False)
        return [name for name, other in every if other is parameter]

    def _turn_projection(self, name: str, module: nn.Linear, gain: Tensor | None) -> None:
        """A linear map between the stream and something narrower, as embedding and head."""
        if module.in_features == self.rotation.size:
            self._turn(f"{name}.weight", -1, scale=gain)
            return
        self._turn(f"{name}.weight", -2)
        if module.bias is not None:
            self._turn(f"{name}.bias", -1)

    def _turn_all(self, names: Sequence[str], axis: int, *, scale: Tensor | None = None) -> None:
        for name in names:
            if name in self.original.weights.sources or name in self.added:
                self._turn(name, axis, scale=scale)

    def _turn(self, name: str, axis: int, *, scale: Tensor | None = None) -> None:
        self._add(name, Step(axis, self.rotation, scale))

    def _add(self, name: str, step: Step) -> None:
        """Put the step on every tensor that the parameter `name` is made of."""
        if name in self.added:
            self.steps[name] = (*self.steps.get(name, ()), step)
            return
        source = self.original.weights.sources.get(name)
        merge = None if source is None else kind_of_merge(source)
        is_concatenated = source is not None and len(set(source.patterns)) > 1
        if source is None or merge is None or (is_concatenated and step.axis != -1):
            raise self._refusal(f"{name} is made of other tensors in a way that a rotation cannot be carried through")
        for key in source.keys:
            self.steps[key] = (*self.steps.get(key, ()), step)

    def _key(self, name: str) -> str:
        """The one tensor that the parameter is, as it is."""
        source = self.original.weights.sources.get(name)
        if source is None or source.converter is not None:
            raise self._refusal(f"{name} is not a tensor of its own")
        return source.keys[-1]

    def _stored(self, name: str) -> Tensor:
        """The parameter as it is stored, float64."""
        return self.original.checkpoint.read(self._key(name)).double()

    def _refusal(self, why: str) -> ModelError:
        return ModelError(f"{type(self.original.module).__name__} cannot be rotated: {why}")


def _is_norm(module: nn.Module) -> bool:
    """A module that has vectors and nothing else."""
    return all(parameter.ndim == 1 for parameter in module.parameters(recurse=False))
