"""GGUF, the file format of llama.cpp: its block types and what a file of it holds."""
