"""llm-compressor by itself, as the speed table compares with it."""

from __future__ import annotations

from benchmarks.peer_tools import LLM_COMPRESSOR

run, versions, why_not = LLM_COMPRESSOR.run, LLM_COMPRESSOR.versions, LLM_COMPRESSOR.why_not
