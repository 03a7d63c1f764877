"""The fresh process of `verify` for GGUF files: prints one JSON object as the last line of standard output."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFValueType, Keys, LlamaFileType
from gguf.quants import dequantize
from torch import Tensor

from pennyweight.core.errors import ModelError
from pennyweight.core.memory import available_memory_bytes, peak_memory_bytes
from pennyweight.core.parallel import chunks
from pennyweight.evaluate import llama_cpp
from pennyweight.evaluate.compare import score_logits
from pennyweight.models import text
from pennyweight.models.gguf.checkpoint import decoded_rows, is_decoded, open_gguf
from pennyweight.models.gguf.fields import FieldValue
from pennyweight.models.gguf.file import GgufFile, GgufTensor, read_gguf
from pennyweight.models.gguf.header import padded
from pennyweight.models.gguf.layout import header_bytes
from pennyweight.models.gguf.types import FLOAT_TYPES
from pennyweight.models.gguf_files import first_file
from pennyweight.models.streamed import StreamedModel

_WINDOWS, _TOKENS, _CONTINUED = 2, 48, 8
# Of the decoded file run by llama.cpp to our own evaluation of it: what float32 sums in another order make.
_ALLOWED_KL = 1e-5
# Weights that are decoded at once.
_CHUNK = 1 << 22
# Characters whose token ids are compared.
_TEXT = 4000


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    warnings.simplefilter("ignore")
    path, extent = Path(arguments[0]), arguments[1]
    has_config = (path / "config.json").is_file()
    file = open_gguf(path).file if has_config else read_gguf(first_file(path))
    reason = _why_not_whole(file, extent)
    if reason is not None:
        found = _by_weight(file, reason)
    elif has_config:
        found = _whole(path, file)
    else:
        found = _alone(file)
    found |= {"seconds": round(time.perf_counter() - started, 3), "peak_memory_bytes": peak_memory_bytes()}
    print(json.dumps(found))


def _why_not_whole(file: GgufFile, extent: str) -> str | None:
    if extent != "full":
        return "asked for"
    if not llama_cpp.is_installed():
        return f"llama-cpp-python is not installed ({llama_cpp.INSTALL})"
    weights = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    # Decoded on the disk and mapped, and once more in our own evaluation.
    return None if 2.5 * 4 * weights < available_memory_bytes() else "the decoded model does not fit in memory"


def _whole(path: Path, file: GgufFile) -> dict[str, Any]:
    """The decoded file in llama.cpp against our own evaluation, the file itself against that, and every weight."""
    ours = StreamedModel(path)
    tokens = min(_TOKENS, text.context_length(ours.config) or _TOKENS)
    vocabulary = int(ours.config.get_text_config().vocab_size)
    ids = _random_ids(vocabulary, tokens)
    logits, theirs = _logits(ours, ids), _decoded_logits(file, ids)
    packed, problems = _packed_logits(file, ids, tokenizer=path)
    # A few wrong weights change no logit by as much as another order of sums does.
    problems += _wrong_weights(file)[:5]
    kl = _kl(logits, theirs)
    if not kl <= _ALLOWED_KL:
        problems.append(
            f"llama.cpp's logits of the decoded weights are {kl:.3g} nats of KL from ours (allowed {_ALLOWED_KL:g}): "
            "it computes with other weights, or another function of them"
        )
    return {
        "verified": "full",
        "runtime": _runtime(),
        "kl_decoded": kl,
        "allowed_kl_decoded": _ALLOWED_KL,
        "kl_of_runtime": _kl(theirs, packed),
        "weights_compared": len(file.tensors),
        "problems": problems,
    }


def _alone(file: GgufFile) -> dict[str, Any]:
    """A file that transformers is told nothing of: every weight as the gguf package decodes it, and the file in
    llama.cpp against the decoded one there."""
    found = _by_weight(file, "there is no config.json, so there is no evaluation of ours to compare with")
    vocabulary = file.fields.get("tokenizer.ggml.tokens")
    count = None if vocabulary is None else vocabulary.count
    if not count:
        return found
    ids = _random_ids(count, _TOKENS)
    theirs = _decoded_logits(file, ids)
    packed, problems = _packed_logits(file, ids, tokenizer=None)
    found["problems"] += problems
    return found | {"runtime": _runtime(), "kl_of_runtime": _kl(theirs, packed)}


def _random_ids(vocabulary: int, tokens: int) -> Tensor:
    return torch.randint(0, vocabulary, (_WINDOWS, tokens), generator=torch.Generator().manual_seed(0))


def _runtime() -> str:
    return f"llama.cpp of llama-cpp-python {version('llama-cpp-python')}"


def _decoded_logits(file: GgufFile, ids: Tensor) -> Tensor:
    """Those of llama.cpp for the decoded file."""
    with tempfile.TemporaryDirectory(prefix="pennyweight-verify-") as directory:
        decoded = Path(directory) / "decoded.gguf"
        write_decoded(file, decoded)
        with llama_cpp.opened(decoded, context=ids.shape[1]) as runtime:
            return runtime.logits(ids)


def _packed_logits(file: GgufFile, ids: Tensor, *, tokenizer: Path | None) -> tuple[Tensor, list[str]]:
    """Those of llama.cpp for the file as it is, and what is wrong with it there: its token ids are compared with those
    of the `tokenizer`, where there is one."""
    tokens = ids.shape[1]
    with llama_cpp.opened(file.files[0], context=tokens + _CONTINUED) as runtime:
        logits = runtime.logits(ids)
        problems = [] if tokenizer is None else _wrong_tokens(tokenizer, runtime)
        made = runtime.continued(ids[0, : tokens // 2].tolist(), _CONTINUED)
    if not logits.isfinite().all() or len(made) != _CONTINUED:
        problems.append("llama.cpp computes NaN or infinity, or does not continue a text")
    return logits, problems


def _logits(model: StreamedModel, ids: Tensor) -> Tensor:
    """Our own, float32 [windows, tokens, vocabulary]."""
    stream = model.run([ids])
    with torch.no_grad(), model.finishing(stream) as finish:
        return finish(0).float()


def _kl(reference: Tensor, other: Tensor) -> float:
    """Mean over tokens of KL(reference || other) in nats."""
    width = min(reference.shape[-1], other.shape[-1])
    ids = torch.zeros(reference.shape[1] + 1, dtype=torch.int64)
    pairs = zip(other[..., :width], reference[..., :width], strict=True)
    scores = [score_logits(this, that, ids) for this, that in pairs]
    return sum(score.kl for score in scores) / sum(score.tokens for score in scores)


def _wrong_tokens(path: Path, runtime: llama_cpp.Llama) -> list[str]:
    """Whether llama.cpp cuts text into other tokens than the model's own tokenizer."""
    try:
        tokenizer = text.load_tokenizer(path)
    except ModelError:
        return []
    sample = " ".join(text.documents(text.BUILT_IN, tokenizer))[:_TEXT]
    if tokenizer(sample, add_special_tokens=False)["input_ids"] == runtime.tokens(sample):
        return []
    return ["llama.cpp cuts text into other tokens than the model's tokenizer"]


def write_decoded(file: GgufFile, out: Path) -> None:
    """The same model with every tensor that we decode as float32, in one file."""
    kind = FLOAT_TYPES["F32"].number
    said = {Keys.General.FILE_TYPE: FieldValue.of(int(LlamaFileType.ALL_F32), GGUFValueType.UINT32)}
    entries = [
        (name, tensor.shape, kind, 4 * math.prod(tensor.shape))
        if is_decoded(tensor)
        else (name, tensor.shape, tensor.type_number, tensor.size_bytes)
        for name, tensor in file.tensors.items()
    ]
    header, positions = header_bytes({**file.fields, **said}, entries, alignment=file.alignment)
    with out.open("xb") as stream:
        stream.write(header)
        for name, tensor in file.tensors.items():
            stream.seek(positions[name])
            for part in _float32_parts(tensor):
                stream.write(part.numpy().tobytes())
        stream.truncate(max(padded(stream.tell(), file.alignment), len(header)))


def _float32_parts(tensor: GgufTensor) -> Iterator[Tensor]:
    """The tensor's numbers as float32, a part at a time; its bytes where we do not decode it."""
    if not is_decoded(tensor):
        yield tensor.read()
        return
    for rows in _row_parts(tensor):
        yield decoded_rows(tensor, rows).float().contiguous()


def _row_parts(tensor: GgufTensor) -> list[slice]:
    """Rows that are decoded at once."""
    return chunks(tensor.rows, max(1, _CHUNK // max(1, tensor.width)))


def _by_weight(file: GgufFile, reason: str) -> dict[str, Any]:
    compared = sum(is_decoded(tensor) for tensor in file.tensors.values())
    return {"verified": "partial", "reason": reason, "weights_compared": compared, "problems": _wrong_weights(file)[:5]}


def _wrong_weights(file: GgufFile) -> list[str]:
    """Every tensor that we decode through the decoder of the gguf package, llama.cpp's own in Python."""

    def is_wrong(tensor: GgufTensor, rows: slice) -> bool:
        kind = GGMLQuantizationType(tensor.type_number)
        theirs = torch.tensor(dequantize(tensor.read_rows(rows).numpy(), kind))
        return not torch.equal(decoded_rows(tensor, rows).float(), theirs.float())

    return [
        f"{tensor.name}: the gguf package decodes other weights than we do"
        for tensor in file.tensors.values()
        if is_decoded(tensor) and any(is_wrong(tensor, rows) for rows in _row_parts(tensor))
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
