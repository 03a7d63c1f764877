"""llama.cpp's file format: what is in a GGUF file, and where."""
