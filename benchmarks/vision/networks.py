"""The networks of the vision benchmark as plain modules with random weights. Imports torch alone: peers read it too.

All of them can be captured by `torch.export` with any batch; images have the size that `EXAMPLES` shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Tokens of a sentence, padding included; the longest sentence of STS-B test has 46.
SENTENCE_TOKENS = 48


class _Basic(nn.Module):
    """Two 3x3 convolutions; where the size halves the shortcut takes every second pixel and pads channels with zeros
    on both sides (He et al., 2016, section 4.2, option A)."""

    def __init__(self, taken: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(taken, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.added = stride, channels - taken

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.added:
            half = self.added // 2
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return torch.relu(y + x)


class ResNet20(nn.Module):
    """images [n, 3, 32, 32], normalised -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(_Basic(16, 16, 1), _Basic(16, 16, 1), _Basic(16, 16, 1))
        self.layer2 = nn.Sequential(_Basic(16, 32, 2), _Basic(32, 32, 1), _Basic(32, 32, 1))
        self.layer3 = nn.Sequential(_Basic(32, 64, 2), _Basic(64, 64, 1), _Basic(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        pooled: Tensor = functional.adaptive_avg_pool2d(x, 1)
        return self.linear(pooled.flatten(1))


def spread_ranges_(net: ResNet20, *, largest: float = 100.0, seed: int = 0) -> None:
    """Multiply each channel between the two convolutions of a block by a factor and divide its reader by the same.

    ReLU(s x) = s ReLU(x), so the function stays what it is. Factors are log-uniform in [1, largest].
    """
    generator = torch.Generator().manual_seed(seed)
    for block in (module for module in net.modules() if isinstance(module, _Basic)):
        factors = largest ** torch.rand(block.bn1.num_features, generator=generator)
        with torch.no_grad():
            block.bn1.weight *= factors
            block.bn1.bias *= factors
            block.conv2.weight /= factors[:, None, None]


class _Unit(nn.Module):
    """A convolution with TensorFlow's SAME padding, which at stride 2 and even sizes pads only the far sides, and
    ReLU6 unless `is_linear`."""

    def __init__(self, taken: int, channels: int, kernel: int = 1, *, stride: int = 1, groups: int = 1,
                 is_linear: bool = False) -> None:  # fmt: skip
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(taken, channels, kernel, stride, padding, groups=groups)
        self.is_padded, self.is_linear = stride == 2, is_linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(functional.pad(x, (0, 1, 0, 1)) if self.is_padded else x)
        return x if self.is_linear else functional.relu6(x)


class _Inverted(nn.Module):
    """Expand, filter each channel, project; with a shortcut where the shape stays."""

    def __init__(self, taken: int, channels: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        inner = taken * expansion
        expand = [_Unit(taken, inner)] if expansion > 1 else []
        filtering = _Unit(inner, inner, 3, stride=stride, groups=inner)
        self.layers = nn.Sequential(*expand, filtering, _Unit(inner, channels, is_linear=True))
        self.has_shortcut = stride == 1 and taken == channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.has_shortcut else y


# MobileNetV2 (Sandler et al., 2018, table 2): expansion, channels, blocks, stride of the first.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class MobileNetV2(nn.Module):
    """images [n, 3, 224, 224] in [-1, 1] -> logits [n, 1000]; BatchNorm is folded already."""

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [_Unit(3, 32, 3, stride=2)]
        taken = 32
        for expansion, channels, blocks, stride in _STAGES:
            for index in range(blocks):
                strides = stride if index == 0 else 1
                features.append(_Inverted(taken, channels, stride=strides, expansion=expansion))
                taken = channels
        self.features = nn.Sequential(*features, _Unit(taken, 1280))
        self.classifier = nn.Conv2d(1280, 1000, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = functional.adaptive_avg_pool2d(self.features(x), 1)
        logits: Tensor = self.classifier(pooled)
        return logits.flatten(1)


class SentenceEncoder(nn.Module):
    """input_ids, attention_mask int64 [n, SENTENCE_TOKENS] -> unit vectors [n, width]: the mean of the last hidden
    states over the tokens that the mask keeps, divided by its length."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask[:, :, None].to(hidden.dtype)
        return functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=1)


def sentence_encoder(config: dict[str, Any]) -> SentenceEncoder:
    """With the body that a Hugging Face `config` describes, without its pooler."""
    from transformers import AutoConfig, AutoModel

    words = dict(config)
    body = AutoModel.from_config(
        AutoConfig.for_model(words.pop("model_type"), **words),
        dtype=torch.float32,
        attn_implementation="eager",
        add_pooling_layer=False,
    )
    return SentenceEncoder(body)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": ResNet20,
    "mobilenetv2": MobileNetV2,
    "sentence-encoder": sentence_encoder,
}
