"""llama.cpp's convert_hf_to_gguf.py on a model whose tokenizer it does not know.

    python convert.py CONVERTER MODEL OUT

It tells pre-tokenizers apart by a hash of what they make of a sentence; the synthetic model's is none of its own.
Weights and time do not depend on it, so that it is told one.
"""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    converter, model, out = sys.argv[1:]
    sys.path[:0] = [f"{converter}/gguf-py", converter]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", model, "--outtype", "bf16", "--outfile", out]
    runpy.run_path(f"{converter}/convert_hf_to_gguf.py", run_name="__main__")


if __name__ == "__main__":
    main()
