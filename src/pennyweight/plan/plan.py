"""The scheme chosen for each site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pennyweight.plan.choices import KEEP
from pennyweight.schemes import Scheme
from pennyweight.schemes.activation import ActivationScheme


@dataclass(frozen=True)
class Plan:
    """schemes: site name -> scheme. kept: name of a site that stays in float -> why. changed: site name -> why its
    scheme is not the one asked for. edges: name of a value of a network's graph -> how its numbers are rounded. Every
    site of the blocks is in `schemes` or in `kept`; the head, which nobody expects to be quantized, may be in neither
    and then stays in float. Scale types are resolved."""

    schemes: Mapping[str, Scheme]
    kept: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, str] = field(default_factory=dict)
    edges: Mapping[str, ActivationScheme] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """Site name -> the name of its scheme, or "keep"."""
        return {site: scheme.name for site, scheme in self.schemes.items()} | dict.fromkeys(self.kept, KEEP)
