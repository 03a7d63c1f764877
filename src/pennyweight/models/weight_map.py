"""Which checkpoint tensors a parameter of the model is made of.

transformers renames and merges tensors while it loads (experts into one 3-D parameter, old names into new ones).
The same rules are used here, one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.core.errors import CheckpointError
from pennyweight.models.base import Checkpoint


@dataclass
class Source:
    """The checkpoint tensors of one parameter, in the order in which transformers merges them."""

    converter: Any = None
    keys: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)


class WeightMap:
    """Parameter (or buffer) name -> Source; `unused` are checkpoint tensors that the model has no place for.

    Raises CheckpointError that names the parameters for which the checkpoint has nothing, or a tensor of another shape.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

        rules = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        self._model = model
        self._checkpoint = checkpoint
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        self._state = model.state_dict()
        self.sources: dict[str, Source] = {}
        self.unused: list[str] = []
        for key in sorted(checkpoint.tensors, key=dot_natural_key):
            self._place(key)
        self.tied = {name: str(origin) for name, origin in getattr(model, "all_tied_weights_keys", {}).items()}
        self._check_complete()
        self._check_shapes()

    def _place(self, key: str) -> None:
        from transformers.core_model_loading import rename_source_key

        prefix = getattr(self._model, "base_model_prefix", None)
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._state)
        if name not in self._state and key in self._state:
            name, pattern = key, None
        if name not in self._state:
            self.unused.append(key)
            return
        converter = self._by_pattern[pattern] if pattern is not None else None
        for target in self._targets(name, converter):
            source = self.sources.setdefault(target, Source(converter))
            source.keys.append(key)
            source.patterns.append(pattern or key)

    def _targets(self, name: str, converter: Any) -> Iterable[str]:
        """All parameters that a conversion makes: one that splits a tensor names only its first target."""
        if converter is None or len(converter.target_patterns) == 1:
            return [name]
        first = converter.target_patterns[0]
        return [name.replace(first, target) for target in converter.target_patterns]

    def _check_complete(self) -> None:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        missing = [name for name in parameters if name not in self.sources and not self._tied_source(name)]
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise CheckpointError(
                f"{self._checkpoint.path}: the weight files have no tensor for {shown}; "
                f"they do not belong to this config ({type(self._model).__name__}), or a shard is missing"
            )

    def _check_shapes(self) -> None:
        """Make every parameter from tensors without memory, which has all of reading it but the reading."""
        for name in self.sources:
            self._made(name, [self._without_memory(key) for key in self.sources[name].keys])

    def _without_memory(self, key: str) -> Tensor:
        info = self._checkpoint.tensors[key]
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    def untied(self) -> list[str]:
        """Parameters that the config ties to another one although the checkpoint has different values for them.

        As in transformers, such parameters are not tied; they are no longer in `tied`.
        """
        both = [(name, origin) for name, origin in self.tied.items() if {name, origin} <= self.sources.keys()]
        different = [name for name, origin in both if not torch.equal(self.read(name), self.read(origin))]
        for name in different:
            del self.tied[name]
        return different

    @property
    def stored_twice(self) -> set[str]:
        """Checkpoint tensors of parameters that are tied to others, which the checkpoint has too."""
        twice, once = (
            {key for name in names if name in self.sources for key in self.sources[name].keys}
            for names in (self.tied.keys(), self.tied.values())
        )
        return twice - once if once else set()

    def _tied_source(self, name: str) -> str | None:
        for left, right in self.tied.items():
            for this, other in ((left, right), (right, left)):
                if this == name and other in self.sources:
                    return other
        return None

    def read(self, name: str) -> Tensor:
        """The parameter `name` as the model holds it, float32 (other kinds of numbers keep their type)."""
        source = self.sources.get(name)
        if source is None:
            origin = self._tied_source(name)
            assert origin is not None, name
            return self.read(origin)
        return self._made(name, [_as_float32(self._checkpoint.read(key)) for key in source.keys])

    def made(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter `name`, which the checkpoint has, from what `read` gives for its tensors, in their types."""
        return self._made(name, [read(key) for key in self.sources[name].keys])

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Rows [n] of the parameter `name`, in their order, float32; no others are read where it is stored as it is."""
        origin = name if name in self.sources else self._tied_source(name)
        assert origin is not None, name
        source = self.sources[origin]
        if source.converter is not None or 4 * len(rows) > len(self._state[origin]):
            return self.read(origin)[rows]
        numbers = rows.tolist()
        return _as_float32(torch.cat([self._checkpoint.read(source.keys[-1], slice(n, n + 1)) for n in numbers]))

    def _made(self, name: str, tensors: list[Tensor]) -> Tensor:
        """The parameter `name` from the checkpoint's `tensors`; raises CheckpointError where its shape is wrong."""
        source = self.sources[name]
        expected = tuple(self._state[name].shape)
        found = self._convert(name, source, tensors) if source.converter is not None else tensors[-1]
        if found is None or tuple(found.shape) != expected:
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors[:2])
            more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
            raise CheckpointError(
                f"{source.keys[0]}{more}: shape {shapes}, but the config asks for {expected} ({name}): "
                "config.json and the weight files do not belong together"
            )
        return found

    def _convert(self, name: str, source: Source, tensors: list[Tensor]) -> Tensor | None:
        converter = deepcopy(source.converter)
        for key, pattern, tensor in zip(source.keys, source.patterns, tensors, strict=True):
            converter.add_tensor(name, key, pattern, tensor)
        try:
            made = converter.convert(name, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError):
            return None
        value: Tensor | list[Tensor] | None = made.get(name)
        return value[0] if isinstance(value, list) else value


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16, torch.float64) else tensor
