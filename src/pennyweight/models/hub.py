"""From what the user typed to a directory: a local path as it is, a Hub id through huggingface_hub and its cache."""

from __future__ import annotations

import re
from pathlib import Path

from pennyweight.core.errors import ModelError

# Weights, and what an artefact carries along.
_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken",
          "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README*")  # fmt: skip
# Second copies of the weights, in other layouts, that no transformers model is built from.
_SECOND_COPIES = ("*/*.safetensors", "consolidated*.safetensors")
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve(model: str, *, trust_remote_code: bool = False) -> Path:
    """The directory of `model`: an existing local path, else a Hub id ("org/name"), downloaded into the Hub's cache.

    A local path never touches the network. Python files are fetched only with `trust_remote_code`.
    Raises ModelError where there is neither, and where the Hub cannot be reached and the cache does not have it.
    """
    path = Path(model).expanduser() if model.startswith("~") else Path(model)
    if model and path.exists():
        return path
    if not model or model.startswith((".", "/", "~", "\\")) or model.count("/") > 1 or not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model!r}: there is no such path. Give an existing directory, or a Hub id such as org/name.")
    return _download(model, trust_remote_code=trust_remote_code)


def _download(repo: str, *, trust_remote_code: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    files = [*_FILES, "*.py"] if trust_remote_code else list(_FILES)
    try:
        found = huggingface_hub.snapshot_download(repo, allow_patterns=files, ignore_patterns=list(_SECOND_COPIES))
    except GatedRepoError as error:
        raise ModelError(
            f"{repo}: the Hub gives this model only to those who accepted its terms. "
            f"Accept them at https://huggingface.co/{repo} and run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{repo}: there is no such path here and no such model on the Hub (or it is private). "
            "Check the name, give an existing directory, or run `hf auth login` for a private model."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{repo}: there is no such path here, the Hub cannot be reached (offline?), and its cache does not have "
            "the model. Connect, or give the path of a directory that holds the model."
        ) from error
    except Exception as error:
        # Whatever the network, the proxy or the disk raises must reach the user as one sentence.
        raise ModelError(
            f"{repo}: the download from the Hub failed: {error}. Try again, or give the path of a local directory."
        ) from error
    return Path(found)
