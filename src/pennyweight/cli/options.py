"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Model directory, Hugging Face Hub id, or GGUF file.")]
Runtime = Annotated[
    str,
    typer.Option("--for", help="What will read the result: transformers, vllm, llama.cpp, onnxruntime or openvino."),
]
Effort = Annotated[
    str, typer.Option(help="fast, normal or best: what the run may cost, and so which of the next steps it takes.")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Text file, .jsonl, directory, built-in, self (the model writes it) or none; for networks also a file of "
        "arrays (.npz, .npy, .safetensors) or FILE.py:NAME.  "
        "[default: built-in, none for a --solver that needs no data]"
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration windows at most; of an encoder as much text.")]
Length = Annotated[int, typer.Option(min=4, help="Tokens a window, at most.")]
Seed = Annotated[int, typer.Option(help="Which windows are drawn.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Jobs = Annotated[
    int | None, typer.Option(min=1, help="Threads; the result does not depend on it.  [default: all cores]")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Size = Annotated[str | None, typer.Option(help="The best that takes no more, all files together: 4GB, 3.5GiB, 700MB.")]
Bpw = Annotated[
    float | None, typer.Option(help="The best that takes no more bits per weight, embeddings and head counted.")
]
MaxKl = Annotated[
    float | None, typer.Option(help="The smallest that loses no more, in nats of KL to the original per token.")
]
MaxLoss = Annotated[
    str | None,
    typer.Option(help="The smallest whose perplexity is no higher than by this: 1%; with --task, points: 0.5."),
]
Task = Annotated[
    str | None, typer.Option(help="Items that judge --max-loss, JSON lines: multiple choice, cloze or sentence pairs.")
]
Keep = Annotated[list[str] | None, typer.Option(help="Glob of weights that stay in float; may be given again.")]
At = Annotated[
    list[str] | None, typer.Option(help="GLOB=SCHEME, '*.down_proj=int6-g32': what these get; may be given again.")
]
