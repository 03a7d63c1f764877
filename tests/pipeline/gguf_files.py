"""GGUF files as sources: made by the gguf package's own writer, with every kind of metadata; and tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import transformers

from pennyweight.evaluate.verify_gguf import write_decoded
from pennyweight.models.gguf.file import read_gguf
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.run import quantize
from tests.pipeline import tiny

F16, F32 = np.float16, np.float32
_TYPES = gguf.GGUFValueType


def odd_fields(writer: gguf.GGUFWriter, architecture: str) -> None:
    """Types and shapes of metadata that no converter would put together."""
    writer.add_uint64("zz.first", 2**63 + 5)
    writer.add_int64(f"{architecture}.most.negative", -(2**63))
    writer.add_uint8("a.u8", 255)
    writer.add_int8("a.i8", -128)
    writer.add_uint16("a.u16", 65535)
    writer.add_int16("a.i16", -32768)
    writer.add_float64("a.pi", 3.141592653589793)
    writer.add_float32(f"{architecture}.nan", float("nan"))
    writer.add_bool("a.no", False)
    writer.add_string("a.nested.name.with.dots", "ä\n{% if x %}\0")
    writer.add_key_value("a.flags", [True, False, True], _TYPES.ARRAY, _TYPES.BOOL)
    writer.add_key_value("a.longs", [2**63, 1], _TYPES.ARRAY, _TYPES.UINT64)
    writer.add_key_value("a.words", ["", "b", "é"], _TYPES.ARRAY, _TYPES.STRING)
    writer.add_uint32("general.quantization_version", 1)
    writer.add_uint32("general.file_type", 1)
    writer.add_string("a.last", "after file_type")


def odd_model(path: Path, architecture: str = "llama", *, alignment: int = 64, seed: int = 0) -> Path:
    """Tensors of every kind that a quantizer must leave alone, and some that it must not."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    odd_fields(writer, architecture)
    writer.add_custom_alignment(alignment)
    for name, shape, dtype in (
        ("blk.0.ffn_down_exps.weight", (3, 8, 256), F16),
        ("blk.0.attn_norm.weight", (7,), F32),
        ("blk.0.attn_q.weight", (6, 256), F32),
        ("token_embd.weight", (10, 256), F16),
        ("blk.0.attn_q.bias", (6,), F32),
        ("blk.0.ffn_gate_inp.weight", (3, 256), F32),
        ("blk.0.ssm_conv1d.weight", (12, 4), F32),
        ("blk.1.attn_output.weight", (5, 96), F16),
        ("position_embd.weight", (4, 256), F16),
        ("rope_freqs.weight", (5,), F32),
        ("blk.1.odd_width.weight", (3, 33), F16),
        ("output.weight", (10, 256), F32),
    ):
        writer.add_tensor(name, random.normal(size=shape).astype(dtype))
    writer.add_tensor("blk.1.ids", np.arange(6, dtype=np.int32).reshape(2, 3))
    packed = gguf.quants.quantize(random.normal(size=(4, 64)).astype(F32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.1.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    # A type that nothing here decodes.
    writer.add_tensor("blk.1.ffn_gate.weight", np.full((2, 66), 7, np.uint8),
                      raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)  # fmt: skip
    brain = gguf.quants.quantize(random.normal(size=(4, 256)).astype(F32), gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("blk.1.ffn_down.weight", brain, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


BLIND = Options(scheme="q4_k", runtime="llama.cpp", calibration="none")


def tokenizer() -> Any:
    """Bytes and one merge: transformers reads no vocabulary without any from GGUF."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {"<s>": 256, "th": 257}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("t", "h")]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>")


def tiny_model(directory: Path, *, hidden_size: int = 64) -> Path:
    """A Llama for transformers whose GGUF transformers reads too."""
    model = tiny.llama(directory, vocab_size=258, hidden_size=hidden_size, intermediate_size=96)
    tokenizer().save_pretrained(model)
    return model


def tiny_file(directory: Path, model: Path | None = None) -> Path:
    """A float32 GGUF file that our own container made, and was then decoded."""
    model = tiny_model(directory / "model") if model is None else model
    quantize(str(model), directory / "q", Options(scheme="q8_0", runtime="llama.cpp", calibration="none"))
    write_decoded(read_gguf(directory / "q" / "model.gguf"), directory / "tiny-f32.gguf")
    return directory / "tiny-f32.gguf"
