"""Tasks whose metric judges a model: one kind a file."""
