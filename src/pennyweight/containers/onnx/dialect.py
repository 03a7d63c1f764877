"""For whom a file is written, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pennyweight.core.errors import UsageError

Runtime = Literal["onnxruntime", "openvino"]
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
# MatMulNBits rounds what it multiplies: not at all, or to 8 bits a block.
_LEVELS = (0, 1, 4)
# IR version that came with an opset; torch's exporter writes no opset below 18.
IR_VERSIONS = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}
# The first opset with integers of so many bits.
OPSETS = {8: 18, 4: 21, 2: 25}


@dataclass(frozen=True)
class Dialect:
    """runtime         the one that reads the file
    is_portable     operations of the ONNX standard alone, none of ONNX Runtime's own
    accuracy_level  of MatMulNBits: 4 rounds its input to 8 bits a block, which alone is fast at 2 and 8 bits; 0 and 1
                    compute in float32
    """

    runtime: Runtime = "onnxruntime"
    is_portable: bool = False
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise UsageError(f"no ONNX file is written for {self.runtime!r}: use {' or '.join(RUNTIMES)}")
        if self.accuracy_level not in _LEVELS:
            raise UsageError(
                f"accuracy level {self.accuracy_level} does not exist: use 4 (input in 8 bits, fast) or 0 (exact)"
            )

    @property
    def has_int2(self) -> bool:
        """OpenVINO reads no tensors of INT2. ONNX Runtime casts them rightly, but transposes them wrongly and makes
        products of them that it cannot run: nothing else is done with them."""
        return self.decodes_by_arithmetic

    @property
    def folds(self) -> bool:
        """OpenVINO wants what MatMulNBits reads as it lies in the file, ONNX Runtime computes it from what is there."""
        return self.runtime == "onnxruntime"

    @property
    def decodes_by_arithmetic(self) -> bool:
        """Cast, Sub and Mul instead of DequantizeLinear, where weights enter an operation in float: ONNX Runtime
        computes them when a session is made, but runs DequantizeLinear each time."""
        return self.runtime == "onnxruntime" and not self.is_portable

    def has_blocks(self, bits: int) -> bool:
        """MatMulNBits and GatherBlockQuantized for weights of `bits` bits. OpenVINO has what is as fast in the
        standard, except for 2 bits, which it reads nowhere else."""
        return not self.is_portable and (self.runtime == "onnxruntime" or bits == 2)
