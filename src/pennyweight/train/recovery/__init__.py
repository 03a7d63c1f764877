"""Recovery: what quantization lost is learnt back by distillation from the original, with codes frozen."""
