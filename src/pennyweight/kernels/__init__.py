"""The arithmetic that must be fast: matrix products, bit packing, and the native library's loader."""
