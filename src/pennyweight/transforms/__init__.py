"""Transforms: rewrites of a block that keep its function, found from what the block computes."""
