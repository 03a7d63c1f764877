"""How fast models write and what memory they take, each in a process of its own; see docs/inference.md."""
