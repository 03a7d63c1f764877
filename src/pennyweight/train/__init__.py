"""What is learnt by gradients: quantization-aware training, and recovery by distillation with codes frozen.

Importing it costs nothing: torch is imported by the first attribute that needs it.
"""

from __future__ import annotations
