"""GGUF, the file of llama.cpp: metadata, tokenizer and weights in one, or in numbered parts.

A site becomes one tensor of blocks (models/gguf/types.py), an expert a part of the tensor that stacks all experts of
its layer; names, the order of rows and metadata are those of models/gguf/conversion.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pennyweight.containers.base import Container, ImportanceEntry, Kept, ModelFacts
from pennyweight.containers.weight_files import Place, WeightFiles
from pennyweight.core.errors import ContainerError, UsageError
from pennyweight.models.base import Site, TensorInfo
from pennyweight.plan.plan import Plan
from pennyweight.schemes import QuantizedWeight, Scheme, parse_scheme

if TYPE_CHECKING:
    from pennyweight.models.gguf.conversion import Conversion
    from pennyweight.models.gguf.fields import FieldValue
    from pennyweight.models.gguf.stored import Stored
    from pennyweight.models.gguf.types import BlockType

STEM = "model"
# What a download of one file may be asked to be; Hugging Face takes no more than 50 GB.
_FILE_BYTES = 48 * 10**9
# What a budget chooses from: each with the least error of its size.
_ALPHABET = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
_OF_BITS = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0"}
# Where 256 does not divide the inputs: of the size of what llama.cpp's quantizer falls back to.
_STAND_INS = {
    "q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl", "tq2_0": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1",
    "q6_k": "q8_0",
}  # fmt: skip
# An embedding or a head in fewer bits costs more than it saves.
_LEAST_OF_ENDS = "q6_k"
# Mixes of llama.cpp whose names say more than a type.
_MIXES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
_USAGE = """```sh
llama-cli -m model.gguf -p "Once upon a time"
```

Needs `llama.cpp`, or what is built on it. `config.json` and the tokenizer files beside `model.gguf`, which holds all
that it needs, are for tools that read Hugging Face models.
"""


@dataclass(frozen=True)
class Gguf(Container):
    """The container of llama.cpp; `model` says where each tensor goes, None before it is bound to one."""

    model: Conversion | None = None

    @property
    def name(self) -> str:
        return "gguf"

    @property
    def runtimes(self) -> tuple[str, ...]:
        return ("llama.cpp",)

    @property
    def default_scheme(self) -> str:
        return "q4_k"

    def scheme_of_bits(self, bits: int) -> str:
        """Raises UsageError for a width that GGUF does not have."""
        if bits not in _OF_BITS:
            raise UsageError(
                f"--bits {bits}: GGUF has types of {', '.join(map(str, _OF_BITS))} bits: give one of these"
            )
        return _OF_BITS[bits]

    @property
    def alphabet(self) -> Sequence[str]:
        return _ALPHABET

    def stand_ins(self, scheme: Scheme, inputs: int) -> Sequence[Scheme]:
        return [parse_scheme(_STAND_INS[scheme.name])] if scheme.name in _STAND_INS else []

    def equivalents(self, scheme: Scheme) -> Sequence[Scheme]:
        from pennyweight.models.gguf.types import BLOCK_TYPES

        plain = [kind.scheme for kind in BLOCK_TYPES.values() if kind.scheme.scale.parent is None]
        plain.sort(key=lambda one: one.storage_bits((1, 256)))
        return [scheme, *plain] if _block_type(scheme) else plain

    def scheme_of_ends(self, scheme: Scheme) -> Scheme | None:
        least = parse_scheme(_LEAST_OF_ENDS)
        return scheme if scheme.element.bits >= least.element.bits else least

    @property
    def takes_embeddings(self) -> bool:
        return True

    @property
    def presets(self) -> Sequence[str]:
        from pennyweight.models.gguf.presets import PRESETS

        return PRESETS

    def preset(self, name: str, sites: Sequence[Site], *, has_data: bool) -> Mapping[str, Scheme | None]:
        from pennyweight.models.gguf.presets import preset_types
        from pennyweight.models.gguf.types import BLOCK_TYPES

        assert self.model is not None
        types = preset_types(name, self.model, has_data=has_data)
        chosen = {site.name: types.get(self._tensor(site.tensor)) for site in sites}
        return {site: None if kind is None else BLOCK_TYPES[kind].scheme for site, kind in chosen.items()}

    def bound(self, facts: ModelFacts) -> Container:
        from pennyweight.models.gguf.conversion import conversion, same_file

        if facts.gguf is not None:
            return Gguf(same_file(facts.gguf))
        model = conversion(facts.path, facts.config, facts.tensors)
        split = [name for name, parts in model.places.items() if len(parts) > 1]
        if split:
            raise ContainerError(
                f"{split[0]}: the checkpoint holds the gate and up projections of all experts in one tensor, which "
                "GGUF splits: save the model with one tensor an expert (transformers' save_pretrained does)"
            )
        return Gguf(model)

    def why_not(self, scheme: Scheme, site: Site, *, runtime: str) -> str | None:
        kind = _block_type(scheme)
        if kind is None:
            return f"{site.name}: {scheme} given; GGUF has no type for it: use one of {', '.join(_names())}"
        if site.shape[1] % kind.weights:
            return f"{site.name}: blocks of {kind.weights} weights do not divide its {site.shape[1]} inputs"
        place = self._place(site.tensor)
        if (
            site.index is not None
            or site.rows is not None
            or site.transposed
            or place is None
            or place.rows is not None
        ):
            return f"{site.name}: it is not a tensor of its own in the checkpoint, row by row as GGUF stores it"
        return None

    def why_not_plan(self, plan: Plan, sites: Sequence[Site], facts: ModelFacts, *, runtime: str) -> str | None:
        if not plan.schemes:
            return "no site has a scheme: there is nothing to write that llama.cpp's converter would not"
        for names in self.fused(sites, runtime=runtime):
            chosen = {name: plan.schemes.get(name) for name in names}
            if len(set(chosen.values())) > 1:
                one, other = dict(zip(chosen.values(), chosen, strict=True)).items()
                return (
                    f"{one[1]} is {one[0]} and {other[1]} {other[0]}, but GGUF holds all experts of a layer as one type"
                )
        return None

    def fused(self, sites: Sequence[Site], *, runtime: str) -> list[tuple[str, ...]]:
        """Experts that GGUF stacks in one tensor."""
        stacks: dict[str, list[str]] = {}
        for site in sites:
            place = self._place(site.tensor)
            if place is not None and place.expert is not None:
                stacks.setdefault(place.tensor, []).append(site.name)
        return [tuple(names) for names in stacks.values() if len(names) > 1]

    def kept(self, name: str, info: TensorInfo) -> Kept | None:
        place = self._place(name)
        if place is None:
            return None
        assert self.model is not None
        source = self.model.source
        dtype = torch.float32 if place.is_float32 or not info.dtype.is_floating_point else info.dtype
        there = TensorInfo(dtype, place.shape) if source is None else source.stored_info(name)
        return Kept(
            there,
            encode=partial(_stored, place, there.dtype),
            decode=partial(_restored, place, info.dtype),
            by_rows=place.heads is None and place.rows is None,
            stored=None if source is None else partial(source.stored, name),
        )

    @property
    def added(self) -> Mapping[str, Tensor]:
        assert self.model is not None
        return self.model.extra

    def entries(self, site: Site, scheme: Scheme) -> Mapping[str, TensorInfo]:
        """One tensor, by the checkpoint's name: its blocks, row by row."""
        kind = _known(scheme)
        return {site.tensor: TensorInfo(torch.uint8, (site.shape[0], site.shape[1] // kind.weights * kind.size_bytes))}

    def encode(self, site: Site, weight: QuantizedWeight) -> dict[str, Tensor]:
        if weight.shape != site.shape:
            raise ContainerError(f"{site.name}: codes of shape {weight.shape} given, {site.shape} expected")
        order = self._order(site)
        return {site.tensor: _known(weight.scheme).pack(weight if order is None else weight.rows(order))}

    def decode(self, site: Site, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        weight = _known(scheme).unpack(tensors[site.tensor], site.shape[1])
        order = self._order(site)
        return weight if order is None else weight.rows(order.argsort())

    def importance_entry(self, site: Site) -> ImportanceEntry | None:
        place = self._place(site.tensor)
        if place is None:
            return None
        assert self.model is not None
        return ImportanceEntry(place.tensor, self.model.shapes[place.tensor], place.expert or 0)

    def config(self, plan: Plan, sites: Sequence[Site], facts: ModelFacts, *, runtime: str) -> dict[str, Any] | None:
        return None

    def usage(self, *, is_decoder: bool) -> str:
        return _USAGE

    def layout(self, entries: Mapping[str, TensorInfo], plan: Plan) -> WeightFiles:
        """One file, or numbered parts of at most 48 GB."""
        from pennyweight.models.gguf.layout import split_layout

        assert self.model is not None
        members: dict[str, list[str]] = {}
        for name in entries:
            members.setdefault(self._tensor(name), []).append(name)
        tensors = [
            (tensor, shape, self._type_number(names[0], entries, plan), sum(entries[name].size_bytes for name in names))
            for tensor, shape in self.model.shapes.items()
            for names in [members[tensor]]
        ]
        fields = {**self.model.fields, **_said_of(self._mix(plan) or _most(plan, entries))}
        source = self.model.source
        alignment = {} if source is None else {"alignment": source.file.alignment}
        parts = split_layout(STEM, fields, tensors, max_file_bytes=_FILE_BYTES, **alignment)
        return WeightFiles(
            headers={part.file: part.header for part in parts},
            sizes={part.file: part.size_bytes for part in parts},
            places={
                name: Place(
                    part.file, part.positions[tensor] + self._index(name) * entries[name].size_bytes, entries[name]
                )
                for part in parts
                for tensor in part.positions
                for name in members[tensor]
            },
        )

    def _mix(self, plan: Plan) -> str | None:
        """The mix of llama.cpp's quantizer that `plan` is, where it is one."""
        from pennyweight.models.gguf.presets import PRESETS, preset_types

        assert self.model is not None
        types = {self._tensor(f"{site}.weight"): _known(scheme).name for site, scheme in plan.schemes.items()}
        for name in PRESETS:
            for has_data in (True, False):
                try:
                    found = preset_types(name, self.model, has_data=has_data)
                except ContainerError:
                    return None
                if types == {tensor: kind for tensor, kind in found.items() if kind is not None}:
                    return name
        return None

    def _place(self, name: str) -> Stored | None:
        """Where the checkpoint's tensor `name` goes; None where it goes nowhere."""
        assert self.model is not None
        parts = self.model.places.get(name)
        return None if parts is None else parts[0]

    def _tensor(self, name: str) -> str:
        place = self._place(name)
        return name if place is None else place.tensor

    def _index(self, name: str) -> int:
        """Of an expert in its stack."""
        place = self._place(name)
        return 0 if place is None or place.expert is None else place.expert

    def _type_number(self, name: str, entries: Mapping[str, TensorInfo], plan: Plan) -> int:
        """ggml's number of the type of an entry: that of its site's scheme, or the one that it has."""
        from pennyweight.models.gguf.types import FLOAT_TYPES

        assert self.model is not None
        scheme, source = plan.schemes.get(name.removesuffix(".weight")), self.model.source
        if scheme is not None:
            return _known(scheme).number
        if source is not None:
            return source.places[name][1].type_number
        return next(kind.number for kind in FLOAT_TYPES.values() if kind.dtype == entries[name].dtype)

    def _order(self, site: Site) -> Tensor | None:
        place = self._place(site.tensor)
        assert place is not None
        return place.row_order(site.shape[0])


def _block_type(scheme: Scheme) -> BlockType | None:
    from pennyweight.models.gguf.types import block_type_of

    return block_type_of(scheme)


def _known(scheme: Scheme) -> BlockType:
    kind = _block_type(scheme)
    if kind is None:
        raise ContainerError(f"{scheme} given; GGUF has no type for it: use one of {', '.join(_names())}")
    return kind


def _names() -> list[str]:
    from pennyweight.models.gguf.types import BLOCK_TYPES

    return [kind.scheme.name for kind in BLOCK_TYPES.values()]


def _stored(place: Stored, dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return place.apply(tensor).to(dtype)


def _restored(place: Stored, dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return place.invert(tensor).to(dtype)


def _most(plan: Plan, entries: Mapping[str, TensorInfo]) -> str:
    """The mix that is called after the type that takes the most bytes."""
    bytes_of: Counter[str] = Counter()
    for site, scheme in plan.schemes.items():
        bytes_of[_known(scheme).name] += entries[f"{site}.weight"].size_bytes
    [(most, _)] = bytes_of.most_common(1)
    return _MIXES.get(most, most)


def _said_of(mix: str) -> dict[str, FieldValue]:
    """The metadata that depends on the plan."""
    from gguf import GGML_QUANT_VERSION, GGUFValueType, Keys, LlamaFileType

    from pennyweight.models.gguf.fields import FieldValue

    file_type = LlamaFileType[f"MOSTLY_{mix}"]
    return {
        Keys.General.QUANTIZATION_VERSION: FieldValue.of(GGML_QUANT_VERSION, GGUFValueType.UINT32),
        Keys.General.FILE_TYPE: FieldValue.of(int(file_type), GGUFValueType.UINT32),
    }


PROVIDES: tuple[Container, ...] = (Gguf(),)
