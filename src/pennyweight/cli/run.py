"""`pennyweight run`: text from a model."""

from __future__ import annotations

import typer

from pennyweight.cli.console import put_json


def run(
    artefact: str = typer.Argument(help="Model directory."),
    prompt: str = typer.Option(..., help="Text to continue."),
    max_tokens: int = typer.Option(100, min=1, help="New tokens at most."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 takes the most likely token each time."),
    seed: int = typer.Option(0, help="Of the sampling."),
    device: str = typer.Option("auto", help="auto, cpu or cuda; llama.cpp takes the processor."),
    activations: str = typer.Option(
        "int8", help="What packed weights are multiplied with: int8, rounded to 8 bits, or exact."
    ),
    runtime: str = typer.Option("auto", help="auto, or transformers, which decodes packed weights."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code", help="Run code that the model brings along."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Continue a prompt.

    GGUF is run by llama.cpp, on the processor; compressed-tensors, GPTQ and AWQ there by Pennyweight, which multiplies
    with the packed weights and keeps them in a file beside the model; all else by transformers. The text is streamed.
    """
    from pennyweight.cli.console import device_of, say
    from pennyweight.evaluate.generate import check_runtime, generate
    from pennyweight.inference.operator import check_activations

    text, tokens, seconds = generate(
        artefact,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        device=device_of(device),
        runtime=check_runtime(runtime),
        activations=check_activations(activations),
        trust_remote_code=trust_remote_code,
        is_streamed=not as_json,
        tell=say,
    )
    if as_json:
        put_json({"prompt": prompt, "text": text, "tokens": tokens, "seconds": seconds})
