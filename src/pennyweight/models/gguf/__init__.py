"""GGUF, llama.cpp's file: its types, its bytes, and what it says of a model."""
