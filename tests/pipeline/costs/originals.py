"""What transformers itself says about a tiny model: outputs, and each linear map's inputs and slopes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pennyweight.models.streamed import StreamedModel


def whole(directory: Path) -> Any:
    """The model in float64, experts as plain loops."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, experts_implementation="eager"
    ).eval()


def unlikeliest(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """What stands in for the draw: another implementation can find the same tokens."""
    return logits.argmin(-1)


@dataclass
class Calls(TorchFunctionMode):
    """Every call of a linear map, by where its weight begins: its input and what it gave."""

    found: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        weight = {nn.functional.linear: 1, torch.addmm: 2}.get(func)
        if weight is not None:
            out.retain_grad()
            x = args[0 if weight == 1 else 1]
            self.found.setdefault(args[weight].data_ptr(), []).append((x.detach(), out))
        return out


def calls_of(directory: Path, batch: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Site -> its calls: rows x [rows, in] and dl/dz [rows, out], l the cross entropy with the unlikeliest tokens."""
    streamed, model = StreamedModel(directory), whole(directory)
    with torch.enable_grad(), Calls() as calls:
        logits = model(batch).logits.flatten(0, 1)
        nn.functional.cross_entropy(logits, unlikeliest(logits), reduction="sum").backward()
    found = {}
    for site in streamed.sites:
        place = streamed.places[site.name]
        parameter = model.get_parameter(place.parameter)
        start = (parameter if place.index is None else parameter[place.index]).data_ptr()
        columns = slice(None) if place.rows is None else slice(*place.rows)
        found[site.name] = [
            (x.reshape(-1, x.shape[-1]), out.grad.reshape(-1, out.shape[-1])[:, columns])
            for x, out in calls.found.get(start, [])
            if out.grad is not None
        ]
    return found


def weights_of(model: StreamedModel) -> dict[str, Tensor]:
    """Site -> its matrix [out, in]."""
    found = {}
    for index in sorted({site.block for site in model.sites}):
        with model.opened(index):
            found.update({site.name: model.matrix(site).clone() for site in model.sites_of(index)})
    return found
