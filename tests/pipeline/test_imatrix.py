"""Our statistics as an importance matrix: those of transformers' own run of the model."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from pennyweight.core.errors import ModelError, UsageError
from pennyweight.models import text
from pennyweight.models.gguf.imatrix import read_imatrix
from pennyweight.pipeline.imatrix import imatrix
from tests.pipeline import tiny
from tests.pipeline.gguf_files import odd_model, tiny_file, tiny_model

SAMPLES, LENGTH = 6, 24
# Sums of float32 squares in another order.
TOLERANCE = 1e-4
KINDS = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def _windows(model: Path) -> torch.Tensor:
    return text.windows([tiny.words()], text.load_tokenizer(model), length=LENGTH, count=SAMPLES, seed=0)


def _observed(model: Path) -> dict[str, torch.Tensor]:
    """Mean squares of the inputs of every linear map, seen by hooks in transformers, by llama.cpp's names."""
    made: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def see(module: Any, given: tuple[torch.Tensor, ...]) -> None:
            found[name] = given[0].double().square().flatten(0, 1).mean(0)

        return see

    for path, module in made.named_modules():
        if isinstance(module, torch.nn.Linear):
            parts = path.split(".")
            name = "output" if path == "lm_head" else f"blk.{parts[2]}.{KINDS[parts[-1]]}"
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    with torch.no_grad():
        made(_windows(model))
    return found


def _written(model: Path, out: Path, **changes: Any) -> Any:
    return imatrix(model, out, calibration=(tiny.words(),), samples=SAMPLES, length=LENGTH, **changes)


@pytest.mark.parametrize("legacy", [False, True], ids=["gguf", "dat"])
def test_means_are_those_that_transformers_sees(tmp_path: Path, legacy: bool) -> None:
    model = tiny_model(tmp_path / "model")
    report = _written(model, tmp_path / "m", legacy=legacy)
    found, expected = read_imatrix(tmp_path / "m"), _observed(model)
    assert found.keys() == expected.keys()
    assert report.entries == len(expected)
    for name, one in found.items():
        torch.testing.assert_close(one.values[0].double(), expected[name], rtol=TOLERANCE, atol=1e-9)
        assert legacy or one.counts.tolist() == [SAMPLES * LENGTH]


def test_the_gguf_package_reads_what_was_written_of_a_gguf_file(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    file = tiny_file(tmp_path, model)
    _written(file, tmp_path / "from-file")
    _written(model, tmp_path / "from-model")
    reader = gguf.GGUFReader(tmp_path / "from-file")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_size"].contents() == LENGTH
    one, other = read_imatrix(tmp_path / "from-file"), read_imatrix(tmp_path / "from-model")
    assert one.keys() == other.keys()
    for name in one:
        # The file was rounded to eight bits.
        assert np.corrcoef(one[name].values.flatten(), other[name].values.flatten())[0, 1] > 0.999


def test_each_expert_has_a_row_of_the_tokens_that_it_saw(tmp_path: Path) -> None:
    model = tiny.mixtral(tmp_path / "model")
    _written(model, tmp_path / "m")
    found = read_imatrix(tmp_path / "m")
    for kind in ("gate", "up", "down"):
        one = found[f"blk.1.ffn_{kind}_exps.weight"]
        assert one.values.shape[0] == 4
        # Two of four experts for each token.
        assert int(one.counts.sum()) == 2 * SAMPLES * LENGTH
    gate, up = found["blk.1.ffn_gate_exps.weight"], found["blk.1.ffn_up_exps.weight"]
    assert torch.equal(gate.values, up.values)
    # All experts of a layer together see what the router sees.
    pooled = (gate.values * gate.counts[:, None]).sum(0) / gate.counts.sum()
    assert 0.5 < float(pooled.mean()) / float(found["blk.1.attn_q.weight"].values.mean()) < 2


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    with pytest.raises(ModelError, match="transformers cannot run the model.*use llama-imatrix"):
        imatrix(odd_model(tmp_path / "odd.gguf"), tmp_path / "m")
    with pytest.raises(UsageError, match="is made of text"):
        imatrix(model, tmp_path / "m", calibration="none")
    (tmp_path / "m").touch()
    with pytest.raises(UsageError, match="exists"):
        imatrix(model, tmp_path / "m")


@pytest.mark.skipif(shutil.which("llama-quantize") is None, reason="llama-quantize is not on the path")
def test_llama_quantize_takes_it(tmp_path: Path) -> None:
    file = tiny_file(tmp_path)
    _written(file, tmp_path / "m.gguf")
    done = subprocess.run(
        ["llama-quantize", "--imatrix", tmp_path / "m.gguf", file, tmp_path / "out.gguf", "Q4_0", "1"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "have 22 importance matrix entries" in done.stdout + done.stderr
