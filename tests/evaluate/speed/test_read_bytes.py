"""Bytes that a token reads, against sums over the shapes of the models."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

import pennyweight as pw
from pennyweight.evaluate.speed.read_bytes import bytes_per_token, gguf_bytes_per_token
from tests.containers import artefacts
from tests.models.gguf import raw

HEADER, BF16, FLOAT = 64, 2, 4
DEMO = Path(pw.__file__).parent / "demo_model"


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_packed_weights_are_read_whole_and_one_row_of_the_table(
    kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENNYWEIGHT_KERNELS", kernels)
    pw.quantize(DEMO, tmp_path / "out", scheme="int4-g32", solver="nearest", fit="minmax", verification="none")
    model = pw.load(tmp_path / "out", cache=False)
    hidden, inner, keys, layers, vocabulary = 512, 1280, 256, 4, 4096
    shapes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden), (inner, hidden), (inner, hidden),
              (hidden, inner)]  # fmt: skip
    packed = layers * sum(rows * cols // 2 + rows * cols // 32 * BF16 + HEADER for rows, cols in shapes)
    assert model.load_report.packed_bytes == packed
    # The head is the table; two norms a layer and one at the end; 32 frequencies.
    floats = vocabulary * hidden * BF16 + hidden * BF16 + (2 * layers + 1) * hidden * BF16 + 32 * FLOAT
    assert bytes_per_token(model) == packed + floats


def test_a_float_model_is_read_whole_but_for_its_table() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype="auto")
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert bytes_per_token(model) == whole + 512 * BF16 + 32 * FLOAT


def test_of_experts_those_are_read_that_are_asked(tmp_path: Path) -> None:
    """Two of four, packed or as one parameter of floats that transformers multiplies in another way."""
    src = artefacts.mixtral(tmp_path / "model")
    original = src.auto.from_pretrained(src.directory)
    before = original.config._experts_implementation
    config = original.config
    expert = 3 * config.hidden_size * config.intermediate_size
    idle = config.num_hidden_layers * (config.num_local_experts - config.num_experts_per_tok) * expert
    floats = sum(parameter.nbytes for parameter in original.parameters())
    frequencies = sum(buffer.nbytes for name, buffer in original.named_buffers() if name.endswith(".inv_freq"))
    # The table and the head are two: of one a row.
    rest = frequencies - (config.vocab_size - 1) * config.hidden_size * FLOAT
    assert bytes_per_token(original) == floats + rest - idle * FLOAT
    assert original.config._experts_implementation == before
    written = artefacts.write(src, src.plan({"experts": "int8-g32", "": None}), tmp_path / "out")
    model = pw.load(written.directory, cache=False)
    all_experts = config.num_hidden_layers * config.num_local_experts * expert
    used = model.load_report.packed_bytes * config.num_experts_per_tok // config.num_local_experts
    assert bytes_per_token(model) == floats + rest - all_experts * FLOAT + used


def _gguf(path: Path, names: list[bytes]) -> Path:
    """Tensors of 4 x 8 floats; those of experts are four such."""
    fields = [raw.field(b"general.architecture", raw.STRING, raw.text(b"llama")),
              raw.field(b"llama.expert_count", raw.UINT32, raw.u32(4)),
              raw.field(b"llama.expert_used_count", raw.UINT32, raw.u32(1))]  # fmt: skip
    tensors, offset = [], 0
    for name in names:
        dims = (8, 4, 4) if b"_exps" in name else (8, 4)
        tensors.append(raw.tensor(name, dims, raw.F32, offset))
        offset += 4 * 8 * 4 * (4 if b"_exps" in name else 1)
    path.write_bytes(raw.gguf(fields, tensors, bytes(offset)))
    return path


def test_a_gguf_file_says_what_a_token_reads(tmp_path: Path) -> None:
    matrix, names = 4 * 8 * 4, [b"token_embd.weight", b"blk.0.attn_q.weight", b"blk.0.ffn_up_exps.weight"]
    # Without a head of its own the table is the head; one expert of four.
    assert gguf_bytes_per_token(_gguf(tmp_path / "tied.gguf", names)) == 3 * matrix
    assert gguf_bytes_per_token(_gguf(tmp_path / "m.gguf", [*names, b"output.weight"])) == 3 * matrix + 8 * 4
