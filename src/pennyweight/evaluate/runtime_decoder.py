"""compressed-tensors' own decoder on the weights of an artefact, one at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pennyweight.models.checkpoint import open_checkpoint
from pennyweight.models.config_json import read_config_json
from pennyweight.models.streamed import StreamedModel

_PACKED = ".weight_packed"
_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


class RuntimeDecoder:
    """`names` are the quantized weights of the artefact; `read` gives one as the runtime decodes it.

    Which scheme a weight has is asked of the runtime too: it applies the config to the model's modules itself. Experts
    that are one parameter in the model have the config's only scheme, as the runtime gives it to them.
    """

    def __init__(self, model: StreamedModel) -> None:
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

        self._stored = open_checkpoint(model.path)
        self.names = [name.removesuffix(_PACKED) for name in self._stored.tensors if name.endswith(_PACKED)]
        settings = {
            key: value
            for key, value in read_config_json(model.path)["quantization_config"].items()
            if key in QuantizationConfig.model_fields
        }
        config = QuantizationConfig.model_validate(settings)
        apply_quantization_config(model.module, config)
        self._only = list(config.config_groups.values())[0] if len(config.config_groups) == 1 else None
        self._schemes: dict[str, Any] = {}
        for parameter, source in model.weights.sources.items():
            module = model.module.get_submodule(parameter.rpartition(".")[0])
            scheme = getattr(module, "quantization_scheme", None) or self._only
            self._schemes.update({key.removesuffix(".weight"): scheme for key in source.keys})

    def read(self, name: str) -> Tensor:
        """The decoded weight [out, in] of `name`."""
        from compressed_tensors.compressors import PackedQuantizationCompressor

        found = {part: f"{name}.{part}" for part in _PARTS if f"{name}.{part}" in self._stored.tensors}
        state = {part: self._stored.read(full) for part, full in found.items()}
        weight = PackedQuantizationCompressor.decompress(state, self._schemes[name])["weight"]
        assert isinstance(weight, Tensor)
        return weight
