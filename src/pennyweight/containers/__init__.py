"""Containers: file formats that a runtime reads. A writer copies codes; it never rounds again."""
