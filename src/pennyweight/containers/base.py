"""What a container is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from pennyweight.models.base import Site, TensorInfo
from pennyweight.plan.plan import Plan
from pennyweight.schemes import QuantizedWeight, Scheme


@dataclass(frozen=True)
class ModelFacts:
    """What a container must know of the whole model.

    model_type    of the config, "llama"
    linear_names  every module of type Linear that is no site of the blocks (routers, the head, vision towers), by its
                  checkpoint name: what a target of "Linear" would also match and so must be listed as ignored where the
                  plan has no scheme for it
    tied_head     the output head shares the embedding's weight
    dtype         torch dtype name of the checkpoint, "bfloat16"
    """

    model_type: str
    linear_names: tuple[str, ...]
    tied_head: bool
    dtype: str


class Container(Protocol):
    """A container takes codes and gives named tensors; the bytes of the weight files are written elsewhere."""

    @property
    def name(self) -> str: ...
    @property
    def runtimes(self) -> tuple[str, ...]:
        """What may follow --for: ("transformers", "vllm")."""

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

    def config(self, plan: Plan, sites: Sequence[Site], facts: ModelFacts, *, runtime: str) -> dict[str, Any]:
        """What goes into config.json as `quantization_config`."""
