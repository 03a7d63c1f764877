"""Train the small language model that Pennyweight ships, and export it.

    python train.py train  --prose DIR --work DIR [--steps N]    train, or continue the run in DIR; export at its end
    python train.py export --prose DIR --work DIR                export the last checkpoint of the run in DIR

A Llama of 13.1 M weights: 4 blocks of width 512, 8 heads of 64 over 4 key-value heads, intermediate 1280,
vocabulary 4096, context 512, embeddings tied. Every linear layer's input width is a multiple of 256.

Data, licences and what is held out: see `corpus.py` beside this file.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) moves the hidden matrices, AdamW the
embedding and the norms. The learning rate warms up, stays, and falls linearly to 0 over the last 30 % of the
steps (warm-up, stable, decay). Weights and optimizer states are float32, products bfloat16 (autocast).

A run that was stopped continues from its last checkpoint. A smaller `--steps` given then makes the decay begin
earlier, without loss of what has been learnt. The batches depend on `--seed` and the step alone, and a batch is
cut into chunks whose gradients are added in order, so that the number of threads changes the time alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from corpus import BEGIN, BEGIN_ID, DOMAINS, END, END_ID, VOCABULARY, Corpus, load_corpus
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
MODEL_FOLDER = HERE.parents[1] / "src" / "pennyweight" / "demo_model"
LOG = HERE / "training-log.jsonl"

CONTEXT = 512
BATCH = 8
CHUNK = 2
WARMUP_STEPS = 40
DECAY_SHARE = 0.3
MUON_RATE = 0.02
ADAM_RATE = 3e-3
MOMENTUM = 0.95
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
STEPS_PER_LOG = 20
STEPS_PER_CHECKPOINT = 100


@dataclass(frozen=True)
class LogRow:
    """One line of the training log. Losses are nats a token; the time is that of training."""

    step: int
    tokens: int
    train_loss: float
    rate: float
    seconds: float
    held_out_perplexity: float | None = None


@dataclass
class Run:
    """All that a checkpoint holds, and the folder it lives in."""

    model: LlamaForCausalLM
    muons: Sequence[torch.optim.Muon]
    adam: torch.optim.AdamW
    step: int
    log: list[LogRow]
    checkpoint: Path

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Every optimizer, in the order of a checkpoint."""
        return [*self.muons, self.adam]

    def save(self) -> None:
        """Replace the checkpoint, atomically."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "log": [asdict(row) for row in self.log],
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def restore(self) -> None:
        """Take the state of the checkpoint."""
        state = torch.load(self.checkpoint)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        self.log = [LogRow(**row) for row in state["log"]]


def new_model(seed: int) -> LlamaForCausalLM:
    """The untrained model, float32; each block begins as the identity."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1280,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
    )
    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    return model


def new_run(work: Path, seed: int) -> Run:
    """A run at step 0, or where the checkpoint in `work` left it."""
    model = new_model(seed)
    matrices = [[p for p in block.parameters() if p.ndim == 2] for block in model.model.layers]
    muons = [torch.optim.Muon(m, lr=MUON_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY) for m in matrices]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed_tokens" in name]
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    run = Run(model, muons, adam, 0, [], work / "checkpoint.pt")
    if run.checkpoint.exists():
        run.restore()
    return run


def rate_at(step: int, steps: int) -> float:
    """The share of the full learning rate at `step` of `steps`: warm-up, stable, linear decay to 0.

    >>> [rate_at(step, 1000) for step in (0, 39, 500, 700, 850, 1000)]
    [0.025, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = (step + 1) / WARMUP_STEPS
    decay = (steps - step) / round(DECAY_SHARE * steps)
    return max(0.0, min(1.0, warmup, decay))


def batch_at(step: int, corpus: Corpus, seed: int) -> Tensor:
    """Token ids [BATCH, CONTEXT + 1] of `step`: half prose, half Python, each epoch in an order of its own."""
    count = BATCH // len(DOMAINS)
    rows = [
        window(corpus.tokens[domain], step * count + index, seed + offset)
        for offset, domain in enumerate(DOMAINS)
        for index in range(count)
    ]
    return torch.stack(rows)


def window(tokens: Tensor, index: int, seed: int) -> Tensor:
    """The `index`-th window [CONTEXT + 1] of `tokens` [tokens]; every epoch shifts and shuffles them anew."""
    windows = len(tokens) // CONTEXT - 1
    epoch, place = divmod(index, windows)
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    shift = int(torch.randint(CONTEXT, (1,), generator=generator))
    start = shift + CONTEXT * int(torch.randperm(windows, generator=generator)[place])
    return tokens[start : start + CONTEXT + 1]


def loss_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the tokens of `batch` [rows, tokens], each given those before it; float32."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def gradients(model: LlamaForCausalLM, batch: Tensor) -> tuple[float, Sequence[Tensor]]:
    """The loss on `batch` [rows, tokens] and its gradient with respect to each parameter; products in bfloat16."""
    # The cast weights are used once and must not be shared with the thread that works on the next chunk.
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        loss = loss_of(model, batch)
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def train_step(run: Run, batch: Tensor, rate: float, pool: ThreadPoolExecutor) -> float:
    """Move the weights once; returns the loss before the move.

    Each thread of `pool` runs torch on one core. Chunks keep the cores busy where other processes take a part of
    one, which threads inside each product would not: they would wait for each other at its end.
    """
    chunks = list(pool.map(lambda chunk: gradients(run.model, chunk), torch.split(batch, CHUNK)))
    for parameter, parts in zip(run.model.parameters(), zip(*(chunk[1] for chunk in chunks), strict=True), strict=True):
        parameter.grad = sum(parts[1:], start=parts[0]) / len(parts)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP_NORM)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * (ADAM_RATE if optimizer is run.adam else MUON_RATE)
    list(pool.map(lambda optimizer: optimizer.step(), run.optimizers))
    run.step += 1
    return sum(loss for loss, _ in chunks) / len(chunks)


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """exp of the mean loss over `tokens` [tokens], in windows of CONTEXT with stride CONTEXT, each begun with BEGIN."""
    total = 0.0
    for piece in torch.split(tokens, CONTEXT - 1):
        row = torch.cat([torch.tensor([BEGIN_ID]), piece])[None]
        total += loss_of(model, row).item() * len(piece)
    return math.exp(total / len(tokens))


def held_out_tokens(corpus: Corpus) -> Tensor:
    """Token ids [tokens] of the held-out text, without BEGIN."""
    return torch.tensor(corpus.tokenizer.encode(corpus.held_out, add_special_tokens=False).ids)


def train(corpus: Corpus, run: Run, *, steps: int, seed: int, threads: int) -> None:
    """Train up to `steps`; writes a row of the log now and then and a checkpoint more rarely."""
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    began = time.monotonic() - (run.log[-1].seconds if run.log else 0.0)
    recent: list[float] = []
    while run.step < steps:
        rate = rate_at(run.step, steps)
        recent.append(train_step(run, batch_at(run.step, corpus, seed), rate, pool))
        is_checkpoint = run.step % STEPS_PER_CHECKPOINT == 0 or run.step == steps
        if run.step % STEPS_PER_LOG == 0 or is_checkpoint:
            quality = evaluated(run.model, corpus) if is_checkpoint else None
            mean_loss = round(sum(recent) / len(recent), 4)
            seconds = round(time.monotonic() - began, 1)
            run.log.append(LogRow(run.step, run.step * BATCH * CONTEXT, mean_loss, round(rate, 4), seconds, quality))
            print(json.dumps(asdict(run.log[-1])), flush=True)
            recent.clear()
        if is_checkpoint:
            run.save()


def evaluated(model: LlamaForCausalLM, corpus: Corpus) -> float:
    """Held-out perplexity of the model as it stands, products in bfloat16, three decimals."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return round(perplexity(model, held_out_tokens(corpus)), 3)


def export(corpus: Corpus, run: Run, out: Path) -> None:
    """Write model, tokenizer and held-out text to `out`, and the log with the exported weights' perplexity."""
    out.mkdir(parents=True, exist_ok=True)
    run.model.to(torch.bfloat16)  # type: ignore[arg-type]
    ids = {"bos_token_id": BEGIN_ID, "eos_token_id": END_ID, "pad_token_id": END_ID}
    run.model.generation_config = GenerationConfig(**ids)  # type: ignore[no-untyped-call]
    run.model.save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=corpus.tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(out)
    # The name that transformers 4 and 5 both know; 5 writes one of its own.
    settings = out / "tokenizer_config.json"
    known = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(known, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)
    (out / "held-out.txt").write_text(corpus.held_out, encoding="utf-8")
    decoded = run.model.float()  # type: ignore[no-untyped-call]
    write_log(run, perplexity(decoded, held_out_tokens(corpus)), corpus)


def write_log(run: Run, exported_perplexity: float, corpus: Corpus) -> None:
    """Write LOG: one row per logged step, then one of the exported weights (bfloat16, evaluated in float32)."""
    summary = {
        "exported_step": run.step,
        "tokens": run.step * BATCH * CONTEXT,
        "training_tokens": {domain: len(corpus.tokens[domain]) for domain in DOMAINS},
        "held_out_tokens": len(held_out_tokens(corpus)),
        "held_out_perplexity": round(exported_perplexity, 4),
    }
    rows = [*map(asdict, run.log), summary]
    LOG.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(json.dumps(summary), flush=True)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "export"))
    parser.add_argument("--prose", type=Path, required=True, help="folder of the four books")
    parser.add_argument("--work", type=Path, required=True, help="folder for the tokens and the checkpoint")
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="folder of the exported model (%(default)s)")
    parser.add_argument("--steps", type=int, default=1600, help="steps of the whole run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    return parser.parse_args(given)


def main() -> None:
    """Train or export, as the command line says."""
    options = arguments()
    # A sum that torch splits among threads depends on their number; only whole chunks go to several threads.
    torch.set_num_threads(1)
    corpus = load_corpus(options.prose, options.work)
    run = new_run(options.work, options.seed)
    if options.command == "train":
        train(corpus, run, steps=options.steps, seed=options.seed, threads=options.threads)
    export(corpus, run, options.out)


if __name__ == "__main__":
    main()
