"""Adapters that servers host: chosen by name, they give what the same PEFT adapter gives in the whole model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from changing import changed
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_client_adapters import make_adapters
from tiny import load_local, random_ids
from torch import Tensor

from swarm import AutoDistributedModelForCausalLM
from swarm.errors import BadRequest, NoRoute, UserError
from swarm.link import JoinLink
from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.model.hosted import AdapterSource, read_hosted
from swarm.server import LocalSwarm
from swarm.server.config import ServerConfig

TOLERANCE = 1e-4

METHODS: dict[str, PeftConfig] = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_rslora=True, lora_dropout=0.1),
    "ia3": IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "other": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], layers_to_transform=[0, 4]),
}


def save_adapter(path: Path, directory: Path, config: PeftConfig, seed: int) -> Path:
    """A PEFT adapter of the model at `path`, none of its values zero."""
    model = get_peft_model(load_local(path), config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=draw) * 0.1
                parameter.copy_(values + 1.0 if "ia3" in name else values)
    model.save_pretrained(directory)
    return directory


def sources(directory: Path, *names: str) -> tuple[AdapterSource, ...]:
    return tuple(AdapterSource(name, CheckpointSource(str(directory / name))) for name in names)


def serving(path: Path, ranges: list[tuple[int, int]], adapters: tuple[AdapterSource, ...], **how: Any) -> LocalSwarm:
    settings = {"adapters": adapters}
    return LocalSwarm(str(path), ranges=ranges, dtype="float32", in_process=True, settings=settings, **how)


@dataclass(frozen=True)
class Hosting:
    """Three servers that host all adapters, the model and the directory of these."""

    swarm: LocalSwarm
    path: Path
    directory: Path

    def local(self, name: str) -> Any:
        return PeftModel.from_pretrained(load_local(self.path), self.directory / name).eval()


@pytest.fixture(scope="module")
def hosting(tiny_model: Any, tmp_path_factory: Any) -> Iterator[Hosting]:
    path, directory = tiny_model("llama"), tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(METHODS.items()):
        save_adapter(path, directory / name, config, seed)
    with serving(path, [(0, 2), (2, 4), (4, 6)], sources(directory, *METHODS)) as swarm:
        yield Hosting(swarm, path, directory)


def status(*arguments: str) -> str:
    command = [sys.executable, "-m", "swarm.cli.app", "status", *arguments[:-1], "--join", arguments[-1]]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def generated(model: Any, ids: Tensor, **how: Any) -> Tensor:
    with torch.no_grad():
        mask = torch.ones_like(ids)
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False, **how)


def test_a_hosted_adapter_gives_what_peft_gives_locally(hosting: Hosting, swarms: Any) -> None:
    remote, ids = swarms.join(hosting.swarm, hosting.path, active_adapter="lora"), random_ids(2, 9)
    assert remote.hosted_adapter.name == "lora"
    texts = []
    for name in ("lora", "ia3", "other", None):
        local = load_local(hosting.path) if name is None else hosting.local(name)
        remote.use_adapter(name)
        torch.testing.assert_close(logits(remote, ids), logits(local, ids), atol=TOLERANCE, rtol=0)
        texts.append(generated(remote, ids))
        assert torch.equal(texts[-1], generated(local, ids))
    assert len({tuple(text.flatten().tolist()) for text in texts}) == 4
    x_BLD = torch.randn(1, 5, 64)
    whole = remote.remote_blocks(x_BLD, active_adapter="ia3")
    parts = remote.remote_blocks[3:](remote.remote_blocks[:3](x_BLD, active_adapter="ia3"), active_adapter="ia3")
    torch.testing.assert_close(parts, whole, atol=TOLERANCE, rtol=0)
    assert (whole - remote.remote_blocks(x_BLD)).abs().max() > 10 * TOLERANCE


def test_gradients_flow_through_a_hosted_adapter(hosting: Hosting, swarms: Any) -> None:
    remote, local, ids = swarms.join(hosting.swarm, hosting.path), hosting.local("lora"), random_ids(2, 9)
    remote.use_adapter("lora")
    weights = [remote.get_input_embeddings().weight, local.get_input_embeddings().weight.requires_grad_()]
    losses = [model(ids, labels=ids, use_cache=False).loss for model in (remote, local)]
    grads = [torch.autograd.grad(loss, weight)[0] for loss, weight in zip(losses, weights, strict=True)]
    torch.testing.assert_close(grads[0], grads[1], atol=TOLERANCE, rtol=0)


def test_sessions_with_different_adapters_decode_at_the_same_time(hosting: Hosting, swarms: Any) -> None:
    remote, ids = swarms.join(hosting.swarm, hosting.path), random_ids(1, 8)
    own = swarms.join(hosting.swarm, hosting.path)
    adapters = make_adapters(hosting.swarm, seed=3)
    own._swarm.adapters = lambda: adapters
    local = load_local(hosting.path)
    with changed(local.model.layers, adapters):
        wanted = [generated(local, ids)]
    wanted += [generated(hosting.local(name), ids) for name in ("lora", "ia3")] + [generated(local, ids)]

    def chosen(name: str) -> Tensor:
        with remote.inference_session(max_length=32, active_adapter=name) as session:
            first = generated(remote, ids, session=session)
        return first

    with ThreadPoolExecutor() as pool:
        uploaded = pool.submit(generated, own, ids)
        found = list(pool.map(chosen, ("lora", "ia3", "")))
    assert all(torch.equal(*pair) for pair in zip([uploaded.result(), *found], wanted, strict=True))
    assert len({tuple(text.flatten().tolist()) for text in wanted}) == 4


def test_one_call_has_one_kind_of_adapters(hosting: Hosting, swarms: Any) -> None:
    remote = swarms.join(hosting.swarm, hosting.path, active_adapter="lora")
    adapters = make_adapters(hosting.swarm)
    with pytest.raises(BadRequest, match="adapters of its own and the hosted adapter lora@"):
        remote.remote_blocks(torch.randn(1, 3, 64), adapters=adapters, active_adapter="lora")
    tuned = get_peft_model(remote, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with pytest.raises(BadRequest, match="adapters of its own"):
        generated(tuned, random_ids(1, 4))
    remote.use_adapter(None)
    assert generated(tuned, random_ids(1, 4)).shape == (1, 14)


def test_a_name_that_nobody_hosts(hosting: Hosting, swarms: Any) -> None:
    with pytest.raises(BadRequest, match=r"hosts an adapter 'poet': they host ia3@\w+, lora@\w+, other@\w+$"):
        swarms.join(hosting.swarm, hosting.path, active_adapter="poet")


def test_a_server_that_moves_hosts_them_for_its_new_blocks(hosting: Hosting, swarms: Any) -> None:
    with serving(hosting.path, [(0, 3), (3, 6)], sources(hosting.directory, "lora")) as swarm:
        swarm.add((0, 3))
        swarm.servers[0].move((3, 6))
        swarm.servers[1].stop()
        remote, ids = swarms.join(swarm, hosting.path, active_adapter="lora"), random_ids(1, 6)
        torch.testing.assert_close(logits(remote, ids), logits(hosting.local("lora"), ids), atol=TOLERANCE, rtol=0)


def test_contents_of_one_name_are_never_mixed(hosting: Hosting, swarms: Any, tmp_path: Path) -> None:
    config, ids = METHODS["lora"], random_ids(1, 6)
    save_adapter(hosting.path, tmp_path / "lora", config, seed=9)
    with (
        serving(hosting.path, [(0, 3), (3, 6)], sources(hosting.directory, "lora")) as swarm,
        serving(hosting.path, [(3, 6)], sources(tmp_path, "lora"), join=swarm.link) as others,
    ):
        settings = {"route_timeout_s": 0.5, "refresh_period_s": 0.1}
        remote = swarms.join(swarm, hosting.path, config=settings, active_adapter="lora")
        theirs = others.servers[0].running.mover.tenure.service._model.hosted[0].listing
        assert theirs.name == "lora" and theirs != remote.hosted_adapter
        wanted = logits(hosting.local("lora"), ids)
        torch.testing.assert_close(logits(remote, ids), wanted, atol=TOLERANCE, rtol=0)
        remote.use_adapter(f"lora@{theirs.digest[:12]}")
        assert remote.hosted_adapter == theirs
        with pytest.raises(NoRoute) as caught:
            logits(remote, ids)
        sentence = str(caught.value)
        assert f"the adapter {theirs} is not served for blocks 0-2 of 0:6" in sentence
        assert "with another adapter 'lora'" in sentence and "servers that have it: 3:6 at" in sentence
        assert "\n" not in sentence


def test_a_session_goes_to_another_server_that_has_the_adapter(hosting: Hosting) -> None:
    arguments = ("--announce-period", "3", "--cache-mib", "64", "--threads", "1", "--drain-timeout", "0.5")
    hosted = ("--adapters", str(hosting.directory / "lora"), "--adapters", f"second={hosting.directory / 'ia3'}")
    with LocalSwarm(str(hosting.path), ranges=[(0, 6)], dtype="float32", arguments=arguments) as swarm:
        for _ in range(2):
            swarm.add((0, 6), arguments=hosted)
        remote = AutoDistributedModelForCausalLM.from_pretrained(
            str(hosting.path), join=swarm.link, active_adapter="second"
        ).eval()
        try:
            ids = random_ids(1, 6)
            with remote.inference_session(max_length=40) as session, torch.no_grad():
                first = remote.generate(ids, max_new_tokens=4, do_sample=False)
                (hop,) = session.route
                assert len(hop.server.adapters) == 2
                next(each for each in swarm.servers if hop.peer_id in JoinLink.parse(each.link).initial_peers[0]).kill()
                rest = remote.generate(max_new_tokens=6, do_sample=False)
                assert session.route[0].peer_id != hop.peer_id and len(session.route[0].server.adapters) == 2
            assert torch.equal(torch.cat([first, rest], dim=1), generated(hosting.local("ia3"), ids))
            (model,) = json.loads(status("--json", swarm.link))
            found = [(each["name"], each["missing_blocks"]) for each in model["adapters"]]
            assert found == [("lora", []), ("second", [])]
            assert f"adapter second@{model['adapters'][1]['digest'][:8]}: complete" in status(swarm.link)
        finally:
            remote.close()


@pytest.mark.parametrize(
    "config, sentence",
    [
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "changes lm_head as well, which clients"),
        (LoraConfig(target_modules=["q_proj", "embed_tokens"]), "changes model.embed_tokens as well, which clients"),
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "(DoRA)"),
    ],
)
def test_what_servers_cannot_apply_is_refused_at_start(
    hosting: Hosting, tmp_path: Path, config: PeftConfig, sentence: str
) -> None:
    save_adapter(hosting.path, tmp_path / "bad", config, 0)
    with pytest.raises(BadRequest) as caught, serving(hosting.path, [(0, 6)], sources(tmp_path, "bad")):
        pass
    assert "the adapter 'bad' cannot be hosted: " in str(caught.value) and sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def broken(directory: Path, kind: str) -> None:
    """Spoil a good adapter."""
    config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    changes = {
        "replicated": {"layer_replication": [[0, 4], [2, 6]]},
        "foreign targets": {"target_modules": ["c_attn"]},
        "virtual tokens": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
        "unknown": {"peft_type": "MAGIC"},
        "rank": {"r": 3},
    }
    if kind in changes:
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes[kind]}))
    elif kind == "pickled":
        weights.rename(directory / "adapter_model.bin")
    elif kind == "cut short":
        weights.write_bytes(weights.read_bytes()[:-8])
    else:
        tensors = load_file(weights)
        name = sorted(tensors)[0]
        if kind == "not finite":
            tensors[name][0, 0] = float("nan")
        elif kind == "a tensor less":
            del tensors[name]
        else:
            tensors[name.replace("layers.0", "layers.6")] = tensors[name].clone()
        save_file(tensors, weights)


@pytest.mark.parametrize(
    "kind, sentence",
    [
        ("replicated", "its layer_replication is for a model that is built otherwise"),
        ("foreign targets", "PEFT cannot load"),
        ("virtual tokens", "PROMPT_TUNING adds virtual tokens"),
        ("unknown", "PEFT cannot load"),
        ("rank", "PEFT cannot load"),
        ("pickled", "only pickled weights (adapter_model.bin)"),
        ("cut short", "PEFT cannot load"),
        ("not finite", "values that are not finite"),
        ("a tensor less", "lacks the tensor base_model"),
        ("a tensor more", "has the tensor base_model"),
    ],
)
def test_files_that_are_no_adapter_of_this_model(hosting: Hosting, tmp_path: Path, kind: str, sentence: str) -> None:
    shutil.copytree(hosting.directory / "lora", tmp_path / "bad")
    broken(tmp_path / "bad", kind)
    checkpoint = Checkpoint.open(CheckpointSource(str(hosting.path)))
    with pytest.raises(UserError) as caught:
        read_hosted(*sources(tmp_path, "bad"), checkpoint)
    assert "the adapter 'bad' cannot be hosted: " in str(caught.value) and sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_adapters_come_from_their_paths() -> None:
    assert AdapterSource.parse("someone/fox-adapter").name == "fox-adapter"
    assert AdapterSource.parse("poet=/some/where").name == "poet"
    with pytest.raises(BadRequest, match="give it one of at most 64 letters"):
        AdapterSource.parse("two words=/some/where")
    with pytest.raises(BadRequest, match="each with a name of its own"):
        ServerConfig(
            source=CheckpointSource("model"), adapters=(AdapterSource.parse("a/x"), AdapterSource.parse("b/x"))
        )
