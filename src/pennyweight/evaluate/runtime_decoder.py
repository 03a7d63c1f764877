"""compressed-tensors' own decoder on the weights of an artefact, one at a time."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from pennyweight.models.checkpoint import open_checkpoint
from pennyweight.models.config_json import read_config_json
from pennyweight.models.streamed import StreamedModel

_SCALE = ".weight_scale"
_PARTS = ("weight", "weight_packed", "weight_scale", "weight_global_scale", "weight_zero_point", "weight_shape")


class RuntimeDecoder:
    """`names` are the quantized weights of the artefact; `read` gives one as the runtime decodes it.

    Which scheme a weight has is asked of the runtime too: it applies the config to the model's modules itself. Experts
    that are one parameter in the model have the config's only scheme, as the runtime gives it to them.
    """

    def __init__(self, model: StreamedModel) -> None:
        quantization: Any = importlib.import_module("compressed_tensors.quantization")
        self._stored = open_checkpoint(model.path)
        self.names = [name.removesuffix(_SCALE) for name in self._stored.tensors if name.endswith(_SCALE)]
        settings = {
            key: value
            for key, value in read_config_json(model.path)["quantization_config"].items()
            if key in quantization.QuantizationConfig.model_fields
        }
        config = quantization.QuantizationConfig.model_validate(settings)
        quantization.apply_quantization_config(model.module, config)
        self._only = next(iter(config.config_groups.values())) if len(config.config_groups) == 1 else None
        self._schemes: dict[str, Any] = {}
        for parameter, source in model.weights.sources.items():
            module = model.module.get_submodule(parameter.rpartition(".")[0])
            scheme = getattr(module, "quantization_scheme", None) or self._only
            self._schemes.update({key.removesuffix(".weight"): scheme for key in source.keys})

    def has_scheme(self, name: str) -> bool:
        return self._schemes.get(name) is not None

    def read(self, name: str) -> Tensor:
        """The decoded weight [out, in] of `name`."""
        compressors: Any = importlib.import_module("compressed_tensors.compressors")
        found = {part: f"{name}.{part}" for part in _PARTS if f"{name}.{part}" in self._stored.tensors}
        state = {part: self._stored.read(full) for part, full in found.items()}
        scheme = self._schemes[name]
        weight = compressors.BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"]
        assert isinstance(weight, Tensor)
        return weight
