"""Which tensors of a GGUF file llama.cpp's quantizer takes, whatever the architecture.

Those of two or three axes (experts; axes of length 1 at the outside don't count) that are called `*weight`, but for

- norms: `*_norm.weight`
- what chooses or mixes experts, streams or layers: ffn_gate_inp, ffn_gate_tid2eid, altup, laurel, per_layer_model_proj
- positions and kinds of tokens: position_embd, token_types, relative position biases
- short convolutions and the small matrices of recurrent layers: ssm_conv1d, shortconv.conv, time_mix_*
- small projections of sparse attention: indexer.k_proj, indexer.q_proj, and more of GLM-5
- patches and positions of images, codebooks of audio

Source: tensor_allows_quantization in llama.cpp's src/llama-quant.cpp. Factors of rope (rope_freqs, rope_factors_*) have
one axis.
"""

from __future__ import annotations

from collections.abc import Sequence

_ANYWHERE = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight",
    "time_mix_first.weight", "time_mix_lerp_fused.weight",
    *(f"time_mix_{part}.weight" for part in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
    "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_WHOLE = {"position_embd.weight", "token_types.weight"}
_OF_ARCHITECTURE = {
    "glm5-next": (
        "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate",
        "indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight",
        "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight",
    ),
}  # fmt: skip


def is_quantizable(name: str, shape: Sequence[int], architecture: str) -> bool:
    """Whether the tensor `name`, of `shape` outermost axis first, may be quantized.

    >>> is_quantizable("blk.0.ffn_down.weight", (64, 256), "llama")
    True
    >>> is_quantizable("blk.0.ffn_gate_inp.weight", (8, 256), "llama")
    False
    """
    if not name.endswith("weight") or not 2 <= axes(shape) <= 3 or name in _WHOLE:
        return False
    return not any(part in name for part in (*_ANYWHERE, *_OF_ARCHITECTURE.get(architecture, ())))


def axes(shape: Sequence[int]) -> int:
    """As ggml counts them: without those of length 1 at the outside."""
    count = len(shape)
    while count > 1 and shape[len(shape) - count] == 1:
        count -= 1
    return count
