"""Learned rounding: solvers of a whole block at once."""
