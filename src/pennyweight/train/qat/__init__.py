"""Quantization-aware training: a network is trained with its weights and edges rounded, their scales learnt."""
