"""Errors, plug-in discovery, sizes, parallel chunks, atomic files and JSON: what every other folder stands on."""
