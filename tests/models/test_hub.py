from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from pennyweight.core.errors import ModelError
from pennyweight.models.hub import resolve


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    """What was asked of the Hub; each answer is a directory."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(repo: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_a_local_path_never_asks_the_hub(downloads: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    # Not even imported: an entry of None makes the import fail.
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("org/name") == Path("org/name")
    assert resolve("org") == Path("org")
    assert downloads == []


def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "model",
    [
        "./model",
        "../model",
        "/model/x",
        "~/model",
        "a/b/c",
        ".",
        "",
        "a b",
        "a//b",
        "C:\\model",
        "org/",
        "x" + "/y" * 9,
    ],
)
def test_what_looks_like_a_path_never_asks_the_hub(
    model: str, downloads: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.setenv("HOME", str(empty))
    if model == ".":
        assert resolve(model) == Path()
    else:
        with pytest.raises(ModelError, match="there is no such path"):
            resolve(model)
    assert downloads == []


@pytest.mark.parametrize("model", ["gpt2-of-nobody", "org-of-nobody/Name-1.5_x"])
def test_a_hub_id_is_downloaded_without_its_code(model: str, downloads: list[Any], tmp_path: Path) -> None:
    assert resolve(model) == tmp_path / "cache"
    [(repo, options)] = downloads
    assert repo == model
    carried = {"*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README*"}
    assert {"*.safetensors", "*.json", *carried} == set(options["allow_patterns"])


def test_code_is_downloaded_only_when_trusted(downloads: list[Any]) -> None:
    resolve("org-of-nobody/name", trust_remote_code=True)
    assert "*.py" in downloads[0][1]["allow_patterns"]


def http_error(kind: type[Exception]) -> Exception:
    """An error of the Hub without the response that it would hold."""
    return kind.__new__(kind, "404")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(RepositoryNotFoundError), "no such path here and no such model on the Hub"),
        (http_error(GatedRepoError), "accepted its terms"),
        (LocalEntryNotFoundError("offline"), r"cannot be reached \(offline\?\)"),
        (OSError("disk quota exceeded"), "download from the Hub failed: disk quota exceeded"),
    ],
)
def test_what_the_hub_cannot_give_is_one_sentence(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    with pytest.raises(ModelError, match=message) as raised:
        resolve("org-of-nobody/name")
    assert "org-of-nobody/name" in str(raised.value)


def test_a_machine_that_is_offline_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real snapshot_download, told to stay offline, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="cannot be reached"):
        resolve("org-of-nobody/name")
