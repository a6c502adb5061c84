"""Checkpoints are read in part, and bad ones are refused with a sentence that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exact import SpanChain, save_tiny, whole_model
from safetensors import safe_open
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM, PretrainedConfig

from swarm.errors import BadCheckpoint, BadRequest, UnsupportedModel
from swarm.model import loading
from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.model.client_half import load_client_half
from swarm.model.span import load_span
from swarm.ranges import BlockRange

NUM_BLOCKS = 12


def wide_config() -> PretrainedConfig:
    config = tiny_config("llama")
    config.num_hidden_layers = NUM_BLOCKS
    return config


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of 12 blocks in many shards."""
    return save_tiny(tmp_path, wide_config(), max_shard_size="100KB")


def opened(path: Path) -> Checkpoint:
    return Checkpoint.open(CheckpointSource(str(path)))


def span_of(path: Path, blocks: str) -> torch.nn.Module:
    return load_span(opened(path), BlockRange.parse(blocks), dtype=torch.float32, device="cpu")


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def record(path: Path, **kwargs: object) -> object:
        names.append(Path(path).name)
        return safe_open(path, **kwargs)

    monkeypatch.setattr(loading, "safe_open", record)
    return names


def shards_of(path: Path, part: str) -> set[str]:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    return {file for name, file in index["weight_map"].items() if part in name}


def test_server_reads_only_the_shards_of_its_blocks(sharded: Path, files_read: list[str]) -> None:
    read: list[tuple[int, int]] = []
    load_span(
        opened(sharded), BlockRange(5, 6), dtype=torch.float32, device="cpu", progress=lambda *now: read.append(now)
    )
    assert set(files_read) == shards_of(sharded, "layers.5.")
    whole = sum(parameter.nbytes for parameter in whole_model(sharded).model.layers[5].parameters())
    assert read[-1] == (whole, whole)


def test_client_reads_no_tensor_of_any_block(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    real = Checkpoint.path_of
    monkeypatch.setattr(Checkpoint, "path_of", lambda self, name: (names.append(name), real(self, name))[1])
    load_client_half(AutoModelForCausalLM, opened(sharded), SpanChain([]))
    assert names and not [name for name in names if "layers." in name]


def test_part_of_a_checkpoint_suffices_for_a_server_that_needs_no_more(sharded: Path) -> None:
    complete = opened(sharded)
    for file in set(shards_of(sharded, "")) - shards_of(sharded, "layers.5."):
        (sharded / file).unlink()
    assert opened(sharded).fingerprint == complete.fingerprint
    span_of(sharded, "5:6")
    with pytest.raises(BadCheckpoint, match=r"lacks the shard model-.*safetensors"):
        span_of(sharded, "0:12")


def test_fingerprint_tells_models_apart_but_not_how_they_are_kept(tmp_path: Path) -> None:
    one = save_tiny(tmp_path / "one", tiny_config("llama"))
    same = save_tiny(tmp_path / "same", tiny_config("llama"), max_shard_size="50KB")
    other = save_tiny(tmp_path / "other", tiny_config("mistral"))
    assert opened(one).fingerprint == opened(same).fingerprint != opened(other).fingerprint
    assert len(opened(one).fingerprint) == 32


def test_commit_is_read_off_a_hub_snapshot_directory(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    path = save_tiny(tmp_path / "models--a--b" / "snapshots" / commit, tiny_config("llama"))
    assert opened(path).commit == commit


def test_unknown_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="does not exist"):
        opened(tmp_path / "nowhere")


def test_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"has no config\.json"):
        opened(tmp_path)


def test_unknown_architecture_is_refused_without_running_its_code(tmp_path: Path) -> None:
    config = {"model_type": "surprise", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UnsupportedModel, match="surprise"):
        opened(tmp_path)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match="save_pretrained"):
        opened(tmp_path)


def test_index_cannot_point_outside_its_directory(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    index = {"weight_map": {"model.norm.weight": "../secrets.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match="outside"):
        opened(tmp_path)


@pytest.mark.parametrize("damage", ["cut short", "header too long", "header not JSON", "empty"])
def test_corrupt_shard_is_refused_before_it_is_read(tmp_path: Path, damage: str) -> None:
    path = save_tiny(tmp_path, tiny_config("llama")) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut short": content[:-100],
            "header too long": (1 << 40).to_bytes(8, "little") + content[8:],
            "header not JSON": content[:8] + b"\xff" + content[9:],
            "empty": b"",
        }[damage]
    )
    with pytest.raises(BadCheckpoint, match="not a whole safetensors file"):
        opened(tmp_path)


def test_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(BadCheckpoint, match="does not fit its own config"):
        span_of(tmp_path, "0:1")


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    with pytest.raises(BadCheckpoint, match=r"lacks 4 tensors of the blocks 0:1, .*bias"):
        span_of(tmp_path, "0:1")


def test_blocks_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    with pytest.raises(BadRequest, match="4 blocks"):
        span_of(tmp_path, "2:5")
