"""Networks and batches by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from pennyweight.core.errors import DataError, ModelError, UsageError
from pennyweight.evaluate.network.quantize import captured
from pennyweight.models.network.arrays import array_batches
from pennyweight.models.network.source import NamedNetwork, TextAmount, _mixed, named_batches, named_network
from tests.evaluate.tasks import examples
from tests.pipeline import tiny

_FILE = """
import torch
from torch import nn
from part import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(WIDTH, 2)
    def forward(self, x):
        return self.line(x)

def build():
    return Net()

ready = Net()
data = [torch.ones(3, WIDTH)]
nothing = []
number = 3

def loader():
    return iter(data)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "named_net.py").write_text(_FILE)
    (tmp_path / "part.py").write_text("WIDTH = 4\n")
    monkeypatch.delitem(__import__("sys").modules, "named_net", raising=False)
    return tmp_path / "named_net.py"


@pytest.mark.parametrize("name", ["build", "Net", "ready"])
@pytest.mark.parametrize("data", ["loader", "data"])
def test_a_file_names_a_network_and_its_batches(place: Path, name: str, data: str) -> None:
    found = named_network(f"{place}:{name}", f"{place}:{data}")
    assert found.batches is not None
    assert found.net(found.batches[0]).shape == (3, 2)
    assert torch.equal(found.batches[0], torch.ones(3, 4))


def test_a_file_is_run_once(place: Path) -> None:
    assert named_network(f"{place}:ready", f"{place}:data").net is named_network(f"{place}:ready", f"{place}:data").net


@pytest.mark.parametrize(
    ("source", "data", "error", "said"),
    [
        ("{}:missing", "{}:data", UsageError, "has no missing; it has .*build"),
        ("{}:number", "{}:data", ModelError, "gives a int"),
        ("{}:build", "{}:number", DataError, "is a int"),
        ("{}:build", "{}:nothing", DataError, "yields no batch"),
        ("{}:build", None, UsageError, "example_input_array"),
        ("{}", "{}:data", UsageError, "neither a directory nor a file"),
        ("nowhere.py:build", None, UsageError, "does not exist"),
        ("no_such_package:build", None, UsageError, "cannot be imported"),
        ("nowhere.pt2", None, ModelError, "does not exist"),
    ],
)
def test_what_cannot_be_found_is_named(
    place: Path, source: str, data: str | None, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        named_network(source.format(place), None if data is None else data.format(place))


def test_an_exported_program_is_a_network(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    torch.export.save(torch.export.export(net, (torch.randn(2, 4),)), tmp_path / "net.pt2")
    np.save(tmp_path / "x.npy", np.ones((2, 4), np.float32))
    found = named_network(str(tmp_path / "net.pt2"), str(tmp_path / "x.npy"))
    assert found.batches is not None
    assert torch.equal(found.net(found.batches[0]), net(torch.ones(2, 4)))


def test_arrays_are_cut_into_batches_with_their_labels(tmp_path: Path) -> None:
    x, y = np.arange(10, dtype=np.float32).reshape(5, 2), np.arange(5)
    np.savez(tmp_path / "both.npz", images=x, labels=y)
    batches = list(array_batches(tmp_path / "both.npz", rows=2))
    assert [len(labels) for _, labels in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([images for images, _ in batches]), torch.from_numpy(x))
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 2, 3, 4]


def test_several_arrays_are_arguments_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, 2), "b": torch.zeros(3)}, tmp_path / "two.safetensors")
    (batch,) = named_batches(str(tmp_path / "two.safetensors"))
    assert set(batch) == {"a", "b"}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"a": np.ones((2, 1)), "b": np.ones((3, 1))}, "same number of rows"),
        ({"a": np.ones((0, 1))}, "1 or more"),
        ({"a": np.float32(1)}, "1 or more"),
        ({"labels": np.ones(2)}, "labels alone"),
        ({"a": np.array([{}])}, "cannot be read"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=said):
        list(array_batches(tmp_path / "bad.npz"))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "cut.npz", a=np.ones((20, 20)))
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.npz"):
        list(array_batches(tmp_path / "cut.npz"))


def test_a_decoder_is_sent_to_its_own_runtimes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UsageError, match=r"--for llama\.cpp"):
        named_network(str(tmp_path), None)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return examples.bert(tmp_path_factory.mktemp("encoder") / "model")


def _ids(found: NamedNetwork) -> list[Tensor]:
    assert found.batches is not None
    return [batch["input_ids"] for batch in found.batches]


def test_an_encoder_gets_text_by_text(encoder: Path, tmp_path: Path) -> None:
    lines = ["One.", "Two by two.", "One!", "Here are a few more words than before.", "Four by two"]
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    found = named_network(str(encoder), str(tmp_path / "lines.txt"), text=TextAmount(samples=4, length=60))
    ids = _ids(found)
    expected = [tiny.byte_tokenizer()(line)["input_ids"] for line in lines]
    # Each by itself with its special tokens, those of one length together, nothing padded.
    assert sorted(row.tolist() for batch in ids for row in batch) == sorted(expected)
    assert sorted(map(len, ids)) == [1, 2, 2]
    assert all(bool(batch["attention_mask"].all()) for batch in found.batches or ())
    # The first is what the network is captured with: its axes must differ.
    assert 1 < ids[0].shape[0] != ids[0].shape[1]
    assert found.net(**(found.batches or [])[0]).last_hidden_state.shape == (*ids[0].shape, 32)


def test_an_encoder_gets_as_much_text_as_was_asked_for(encoder: Path) -> None:
    def rows(amount: TextAmount) -> list[list[int]]:
        ids = _ids(named_network(str(encoder), "built-in", text=amount))
        return sorted(row.tolist() for batch in ids for row in batch)

    ten = rows(TextAmount(samples=10, length=32))
    assert 320 - 32 < sum(map(len, ten)) <= 320
    assert max(map(len, ten)) == 32
    assert ten == rows(TextAmount(samples=10, length=32)) != rows(TextAmount(samples=10, length=32, seed=1))
    # One sample is a text or two, whatever the length of the first.
    for seed in range(6):
        assert 0 < sum(map(len, rows(TextAmount(samples=1, length=90, seed=seed)))) <= 90


def test_batches_of_several_lengths_come_mixed() -> None:
    # Of many batches the first are read: from short to long, those would be the short texts alone.
    sorted_by_length = [torch.zeros((3, length), dtype=torch.int64) for length in range(4, 60)]
    lengths = [batch.shape[1] for batch in _mixed(sorted_by_length, seed=0)]
    assert sorted(lengths) == list(range(4, 60))
    assert max(lengths[:10]) > 30
    square, single, told_apart = (torch.zeros(shape, dtype=torch.int64) for shape in ((4, 4), (1, 9), (2, 5)))
    for seed in range(6):
        assert _mixed([square, single, told_apart], seed)[0] is told_apart
    assert len(_mixed([square, single], seed=0)) == 2


def test_an_encoder_without_data_still_has_inputs_to_run_on(encoder: Path) -> None:
    blind = named_network(str(encoder), "none", text=TextAmount(samples=1, length=90))
    assert blind.batches is None
    assert {"input_ids", "attention_mask"} <= set(blind.example)


def test_a_network_gets_no_input_that_it_has_no_argument_for(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(
        vocab_size=tiny.VOCABULARY, dim=32, hidden_dim=64, n_layers=1, n_heads=4, max_position_embeddings=96
    )
    path = tiny.save(transformers.DistilBertModel, config, tmp_path / "distilled")
    settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    found = named_network(str(path), "built-in", text=TextAmount(samples=10, length=32))
    assert all(set(batch) == {"input_ids", "attention_mask"} for batch in found.batches or ())
    # Such an input fixed both axes, and batches of several lengths were refused.
    network, inputs = captured(found.net, found.batches, None)
    assert network.batch_varies
    assert len(inputs) == len(found.batches or ()) > 1


def test_an_encoder_takes_batches_of_ones_own(encoder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "tokens.npz", input_ids=np.full((5, 7), 100), attention_mask=np.ones((5, 7), dtype=np.int64))
    found = named_network(str(encoder), str(tmp_path / "tokens.npz"))
    assert [batch.tolist() for batch in _ids(found)] == [[[100] * 7] * 5]
    program = tmp_path / "own_tokens.py"
    program.write_text("import torch\nbatches = [{'input_ids': torch.full((2, 3), 7)}]\n", encoding="utf-8")
    assert [batch.tolist() for batch in _ids(named_network(str(encoder), f"{program}:batches"))] == [[[7] * 3] * 2]
    with pytest.raises(UsageError, match=r"own_tokens\.py is a program: name what gives the batches in it"):
        named_network(str(encoder), str(program))


def test_what_names_neither_text_nor_batches_is_refused(encoder: Path, tmp_path: Path) -> None:
    for name in ("nowhere.txt", "notes: first.txt"):
        with pytest.raises(DataError, match=f"{name} does not exist: give a text file"):
            named_network(str(encoder), name)
    (tmp_path / "short.txt").write_text("One.\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"the text has \d tokens, fewer than one window of 90"):
        named_network(str(encoder), str(tmp_path / "short.txt"), text=TextAmount(length=90))


def test_tokens_that_a_network_does_not_take_are_named_as_the_cause(encoder: Path) -> None:
    net = named_network(str(encoder), "none").net
    with pytest.raises(ModelError, match=r"BertModel does not run on the first batch \(index out of range.*vocabulary"):
        captured(net, [{"input_ids": torch.full((2, 5), 10**6)}], None)
