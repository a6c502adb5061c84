"""The Auto classes: a distributed model by name, as one line of code."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from swarm.codec import torch_dtype
from swarm.errors import BadLink, BadRequest
from swarm.model.anatomy import Anatomy, anatomy_of
from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.model.client_half import load_client_half
from swarm.model.peft_layers import adapter_reader
from swarm.profiles import resolve_join
from swarm.ranges import BlockRange

from .config import ClientConfig
from .connection import Connection
from .model import DistributedMixin, make_call
from .prompts import Prompts, TuningMode
from .routing import Needs


class AutoDistributedConfig:
    """`from_pretrained` returns a model's ordinary Hugging Face config; no swarm is contacted."""

    def __init__(self) -> None:
        raise TypeError("use AutoDistributedConfig.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
    ) -> PretrainedConfig:
        """Raises: BadCheckpoint: there is no such model. UnsupportedModel: it cannot be cut into blocks."""
        config = Checkpoint.open(CheckpointSource(str(name_or_path), revision, token, cache_dir)).config
        anatomy_of(config)
        return config


class _AutoDistributed:
    auto_class: ClassVar[Any]

    def __init__(self) -> None:
        raise TypeError(f"use {type(self).__name__}.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        join: str | None = None,
        initial_peers: Sequence[str] = (),
        client_config: ClientConfig | None = None,
        allowed_servers: Collection[str] | None = None,
        blocked_servers: Collection[str] = (),
        trusted_servers: Collection[str] | None = None,
        trusted_blocks: int | None = None,
        tuning_mode: TuningMode | None = None,
        pre_seq_len: int = 0,
        prompts: str | Path | None = None,
        active_adapter: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        quantization: str = "none",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        **hf_kwargs: Any,
    ) -> Any:
        """Load the client's part of a model and join the swarm that serves the rest.

        Args:
            name_or_path: hub repository or local directory, the same model and revision as the servers'.
            join: a join link, swarm://…, or the name that `swarm join LINK --as NAME` has given to one.
            initial_peers: instead of a link: libp2p multiaddrs of peers to join through.
            client_config: timeouts and limits; its `initial_peers` count where neither of the above is given.
            allowed_servers: peer ids of the only servers to use; None: all. Names prove nothing.
            blocked_servers: peer ids of servers that are not used.
            trusted_servers: peer ids of the only servers to run the first and the last blocks; None: all may. Without
                one of them at each end calls fail.
            trusted_blocks: how many blocks at each end only they run; None: all that they hold there.
            tuning_mode: "ptune" or "deep_ptune": freeze everything but `pre_seq_len` trainable virtual tokens.
            prompts: instead: a directory that `model.swarm_prompts.save_pretrained` wrote, to begin with those.
            active_adapter: name of an adapter that servers host, as `swarm status` shows it; see `use_adapter`.
            dtype: of the client's weights; None or "auto": that of the checkpoint.
            device: where the client's part lies.
            quantization: "int8" or "int4": keep the head, often the largest part, in so many bits, frozen. That takes a
                half or a quarter of the memory, and of the time that a CPU needs to read it for each token.
            hf_kwargs: config entries such as num_labels, and what Hugging Face's from_pretrained takes.
        Returns: an instance of the model's Hugging Face class.
        Raises: BadLink, BadRequest, BadCheckpoint, UnsupportedModel, PeerUnavailable: each says what to do.
        """
        config = _client_config(join, initial_peers, client_config)
        permitted: dict[str, Any] = {
            "allowed_servers": allowed_servers,
            "blocked_servers": blocked_servers or None,
            "trusted_servers": trusted_servers,
            "trusted_blocks": trusted_blocks,
        }
        config = replace(config, **{name: value for name, value in permitted.items() if value is not None})
        checkpoint = Checkpoint.open(CheckpointSource(str(name_or_path), revision, token, cache_dir))
        anatomy = anatomy_of(checkpoint.config)
        needs = Needs(BlockRange(0, anatomy.num_blocks), checkpoint.fingerprint, checkpoint.commit)
        connection = Connection(config)
        try:
            connection.loop.run(connection.network.check_model(needs, checkpoint.name))
            call = make_call(connection, needs, num_blocks=anatomy.num_blocks, hidden_size=anatomy.hidden_size)
            model = load_client_half(
                cls.auto_class,
                checkpoint,
                call,
                dtype=_dtype(dtype),
                device=device,
                quantization=quantization,
                **hf_kwargs,
            )
            model.__class__ = _distributed_class(type(model))
            model.__dict__["_swarm"] = call  # not a submodule: it holds no weights
            call.adapters = adapter_reader(model)
            if (tuned := _prompts(tuning_mode, pre_seq_len, prompts, anatomy)) is not None:
                model.requires_grad_(False)
                model.swarm_prompts = call.prompts = tuned.to(device)
            model.use_adapter(active_adapter)
        except BaseException:
            connection.close()
            raise
        weakref.finalize(model, connection.close)
        return model


class AutoDistributedModel(_AutoDistributed):
    """The base model: token ids in, hidden states out."""

    auto_class = AutoModel


class AutoDistributedModelForCausalLM(_AutoDistributed):
    """A language model: logits, loss and `generate`."""

    auto_class = AutoModelForCausalLM


class AutoDistributedModelForSequenceClassification(_AutoDistributed):
    """A classifier with a trainable head; pass num_labels."""

    auto_class = AutoModelForSequenceClassification


def _client_config(join: str | None, initial_peers: Sequence[str], config: ClientConfig | None) -> ClientConfig:
    if join is not None and initial_peers:
        raise BadLink("pass either join or initial_peers, not both")
    if join is not None:
        link = resolve_join(join)
        peers, invitation = link.initial_peers, link.invitation
    else:
        peers, invitation = tuple(initial_peers), config.invitation if config is not None else None
    if config is None:
        return ClientConfig(initial_peers=peers, invitation=invitation)
    return replace(config, initial_peers=peers, invitation=invitation) if peers else config


def _prompts(
    mode: TuningMode | None, pre_seq_len: int, directory: str | Path | None, anatomy: Anatomy
) -> Prompts | None:
    """New prompts, or saved ones, or none. Raises: BadRequest: the arguments contradict one another."""
    if directory is not None:
        if mode is not None or pre_seq_len:
            raise BadRequest("prompts= has a tuning_mode and a pre_seq_len of its own: leave these out")
        return Prompts.from_pretrained(directory, anatomy.num_blocks, anatomy.hidden_size)
    if mode is not None:
        return Prompts(mode, pre_seq_len, anatomy.num_blocks, anatomy.hidden_size, torch.float32)
    if pre_seq_len:
        raise BadRequest("pre_seq_len needs a tuning_mode: pass tuning_mode='ptune' or 'deep_ptune'")
    return None


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return None if dtype == "auto" else dtype  # type: ignore[return-value]
    return torch_dtype(dtype)


def _distributed_class(model_class: Any) -> type:
    """The Hugging Face class with what a distributed model adds, under the Hugging Face name."""

    @functools.wraps(model_class.forward)  # generate, Trainer and PEFT look at its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return DistributedMixin.forward(self, *args, **kwargs)

    attributes = {"__module__": model_class.__module__, "forward": forward}
    return type(model_class.__name__, (DistributedMixin, model_class), attributes)
