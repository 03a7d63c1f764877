"""config.json as plain JSON, before transformers interprets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pennyweight.core.errors import ModelError


def read_config_json(path: Path) -> dict[str, Any]:
    """The object in `path`/config.json; raises ModelError."""
    file = path / "config.json"
    if not path.exists():
        raise ModelError(f"{path} does not exist: give a model directory or a Hugging Face Hub id")
    if not file.is_file():
        raise ModelError(f"{path} has no config.json: give a Hugging Face model directory (config.json, *.safetensors)")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not valid JSON ({error}): download the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds {type(config).__name__}, not an object: download the model again")
    return config
