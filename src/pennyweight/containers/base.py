"""What a container is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from pennyweight.containers.weight_files import WeightFiles
from pennyweight.core.errors import UsageError
from pennyweight.models.base import Site, TensorInfo
from pennyweight.plan.candidates import INTEGERS
from pennyweight.plan.plan import Plan
from pennyweight.plan.uniform import finer
from pennyweight.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    from pennyweight.models.gguf.checkpoint import GgufCheckpoint


@dataclass(frozen=True)
class ModelFacts:
    """What a container must know of the whole model.

    model_type    of the config, "llama"
    linear_names  every module of type Linear that is no site of the blocks (routers, the head, vision towers), by its
                  checkpoint name: what a target of "Linear" would also match and so must be listed as ignored where the
                  plan has no scheme for it
    tied_head     the output head shares the embedding's weight
    dtype         torch dtype name of the checkpoint, "bfloat16"
    path          the model's directory
    config        its config.json
    tensors       those of its checkpoint
    gguf          the GGUF file that they come from, if one; all that it says goes along into another
    """

    model_type: str
    linear_names: tuple[str, ...]
    tied_head: bool
    dtype: str
    path: Path = Path()
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    gguf: GgufCheckpoint | None = None


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Kept:
    """A tensor that stays in float, as it stands in the output.

    info            type and shape there
    encode, decode  between the checkpoint's tensor and that one
    by_rows         some rows of it can be encoded by themselves
    stored          rows of it (None: all) where they lie in the source as they shall stand, byte for byte
    """

    info: TensorInfo
    encode: Callable[[Tensor], Tensor] = _same
    decode: Callable[[Tensor], Tensor] = _same
    by_rows: bool = True
    stored: Callable[[slice | None], Tensor] | None = None


@dataclass(frozen=True)
class ImportanceEntry:
    """A row of an importance matrix: that number `index` of the weight `name`, which has `shape`."""

    name: str
    shape: tuple[int, ...]
    index: int


class Container(Protocol):
    """A container takes codes and gives named tensors; the bytes of the weight files are written elsewhere.

    What has a body here is what a directory of safetensors does.
    """

    @property
    def name(self) -> str: ...
    @property
    def runtimes(self) -> tuple[str, ...]:
        """What may follow --for: ("transformers", "vllm")."""

    @property
    def default_scheme(self) -> str:
        """What is taken where the user names no scheme and no budget."""
        return "int4-g128"

    def scheme_of_bits(self, bits: int) -> str:
        """The same for a number of bits, 2 to 8."""
        return f"int{bits}-g128"

    @property
    def alphabet(self) -> Sequence[str]:
        """Names of the schemes that a budget chooses from."""
        return INTEGERS

    def stand_ins(self, scheme: Scheme, inputs: int) -> Sequence[Scheme]:
        """What to try for a site with so many inputs that `scheme` does not fit, the best first."""
        return finer(scheme, inputs)

    def scheme_of_ends(self, scheme: Scheme) -> Scheme | None:
        """What an embedding or a head gets where all sites are given `scheme`; None: it stays in float."""
        return None

    def equivalents(self, scheme: Scheme) -> Sequence[Scheme]:
        """Schemes of the container that may hold the same numbers as a weight of `scheme`, the smallest first; their
        scales are of the model's type where that is left open."""
        return []

    def load_types(self, facts: ModelFacts, *, runtime: str) -> Sequence[str]:
        """Types in which `runtime` may be told to load the model, the best first: whatever is in float, and what it
        decodes, is rounded to them. None: every tensor keeps its own."""
        return ()

    @property
    def takes_embeddings(self) -> bool:
        """Whether an embedding can be quantized, and a head that shares its weight with it."""
        return False

    @property
    def presets(self) -> Sequence[str]:
        """Names of plans that users of the runtime know."""
        return ()

    def preset(self, name: str, sites: Sequence[Site], *, has_data: bool) -> Mapping[str, Scheme | None]:
        """The plan `name` of `presets` for `sites` (None: kept in float), with calibration data or without."""
        raise UsageError(f"{name}: {self.name} knows no plan by name")

    def bound(self, facts: ModelFacts) -> Container:
        """The container for one model; raises ContainerError where it cannot hold such a model."""
        return self

    def kept(self, name: str, info: TensorInfo) -> Kept | None:
        """How the tensor `name` of the checkpoint is stored where it stays in float; None: it is left out."""
        return Kept(info)

    @property
    def added(self) -> Mapping[str, Tensor]:
        """Tensors that are written although no checkpoint has them."""
        return {}

    def layout(self, entries: Mapping[str, TensorInfo], plan: Plan) -> WeightFiles:
        """The files that hold `entries`: those of the sites of `plan`, what is kept and what is added."""
        return WeightFiles.plan(entries)

    def why_not(self, scheme: Scheme, site: Site, *, runtime: str) -> str | None:
        """None if the container holds `scheme` for `site` and `runtime` reads it, else why not, in a sentence."""

    def why_not_plan(self, plan: Plan, sites: Sequence[Site], facts: ModelFacts, *, runtime: str) -> str | None:
        """The same for the plan as a whole: what `runtime` refuses or would load wrongly although each site is fine."""

    def fused(self, sites: Sequence[Site], *, runtime: str) -> list[tuple[str, ...]]:
        """Names of sites that must share a scheme because `runtime` makes one matrix of them; each at most once."""

    def entries(self, site: Site, scheme: Scheme) -> Mapping[str, TensorInfo]:
        """The tensors that will be written for `site`, exactly."""

    def encode(self, site: Site, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of `site`: names, types and shapes as in `entries`."""

    def decode(self, site: Site, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The inverse of `encode`."""

    def importance_entry(self, site: Site) -> ImportanceEntry | None:
        """Where an importance matrix of the runtime has the inputs of `site`; None where there is no such file."""
        return None

    def config(self, plan: Plan, sites: Sequence[Site], facts: ModelFacts, *, runtime: str) -> dict[str, Any] | None:
        """What goes into config.json as `quantization_config`; None: the runtime reads no config.json."""

    def usage(self, *, is_decoder: bool) -> str:
        """How the result is loaded, in Markdown, for its model card."""
