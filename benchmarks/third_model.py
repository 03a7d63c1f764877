"""Make the third decoder of the benchmarks: a small Qwen3 that has learnt to read, in minutes and on any machine.

    python -m benchmarks.third_model OUT --data DIR [--steps N]

4 blocks of width 256, 8 heads of 32 over 4 key-value heads, intermediate 640, an output head of its own, vocabulary and
tokenizer of the shipped model: 4.9 M weights, bfloat16. It learns from the first half of the books of DIR/text, each
window once; the second half is for those who measure. AdamW in float32, the rate warms up and falls linearly to 0.
The same bytes for the same seed, number of threads and version of torch.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.results_file import note
from benchmarks.subjects import DEMO

BOOKS = ("bronte.txt", "darwin.txt", "dubois.txt")
LENGTH = 256
_BATCH = 8
_RATE = 4e-3
_WARM_UP = 50
STEPS = 500
_CONFIG = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def learnt_text(data: Path) -> str:
    """The first halves of the books."""
    return "\n".join(text[: len(text) // 2] for text in _books(data))


def unseen_text(data: Path, *, characters: int) -> str:
    """So many characters from the middle of each book on: the model has not learnt from them."""
    return "\n".join(text[len(text) // 2 :][:characters] for text in _books(data))


def _books(data: Path) -> list[str]:
    return [(data / "text" / name).read_text(encoding="utf-8") for name in BOOKS]


def make(out: Path, data: Path, *, steps: int) -> None:
    """Train and save; says the perplexity on the half that was not learnt from."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    learnt = _windows(tokenizer, learnt_text(data))
    unseen = _windows(tokenizer, unseen_text(data, characters=100_000))
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**_CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARM_UP, (steps - step) / (steps - _WARM_UP))
    )
    order = torch.randperm(len(learnt), generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        batch = learnt[order[torch.arange(step * _BATCH, (step + 1) * _BATCH) % len(order)]]
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % 50 == 0 or step == steps - 1:
            note(f"  step {step} of {steps}: {loss.item():.3f} nats a token")
    model = model.to(torch.bfloat16)
    unseen = unseen[:256]
    with torch.no_grad():
        nats = sum(_loss(model, batch).item() * len(batch) for batch in unseen.split(_BATCH)) / len(unseen)
    note(f"  perplexity {math.exp(nats):.1f} on {unseen.numel():,} tokens it never saw")
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, out / name)


def _windows(tokenizer: object, text: str) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[operator]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)


def _loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())


def main() -> None:
    """Make it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.third_model", description="Train a small Qwen3.")
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    parser.add_argument("--data", type=Path, required=True, help="the directory with text/bronte.txt and others")
    parser.add_argument("--steps", type=int, default=STEPS, help="of 2,048 tokens (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    make(arguments.out, arguments.data, steps=arguments.steps)


if __name__ == "__main__":
    main()
