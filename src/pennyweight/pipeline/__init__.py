"""The run: stream the blocks, collect statistics, solve, write, hand on."""
