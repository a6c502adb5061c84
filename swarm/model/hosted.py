"""Adapters that a server hosts: PEFT's files, read as changes of the whole model's blocks.

They are read by PEFT, into a client half without weights, and then as a client's are (peft_layers.py): what a hosted
adapter changes is what the same adapter of a client would. Only safetensors files are opened, never pickles.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from swarm.announcement import ADAPTER_DIGEST_BYTES, AdapterListing, AdapterName
from swarm.errors import BadCheckpoint, BadRequest, UserError
from swarm.model.adapters import BlockAdapter, ModelAdapter
from swarm.model.checkpoint import Checkpoint, CheckpointSource
from swarm.model.client_half import empty_client_half
from swarm.model.peft_layers import read_adapters
from swarm.model.shadows import RemoteLayers

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

_check_name = TypeAdapter(AdapterName).validate_python


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Where an adapter comes from, and what it is called in the swarm."""

    name: str
    files: CheckpointSource

    @classmethod
    def parse(cls, text: str, *, token: str | bool | None = None, cache_dir: str | None = None) -> AdapterSource:
        """Read `REPO_OR_PATH` or `NAME=REPO_OR_PATH`; without a name, it is the last part of the path.

        Raises: BadRequest: the name cannot be announced.
        """
        name, _, place = text.rpartition("=")
        name = name or Path(place).expanduser().resolve().name
        try:
            return cls(_check_name(name), CheckpointSource(place, None, token, cache_dir))
        except ValidationError as exc:
            raise BadRequest(
                f"{name[:80]!r} cannot be the name of an adapter: give it one of at most 64 letters, digits, '.', '_' "
                "and '-', as in --adapters NAME=REPO_OR_PATH"
            ) from exc


@dataclass(frozen=True, eq=False)
class HostedAdapter:
    """An adapter for all blocks of a model, in memory, without gradients and dropout."""

    name: str
    adapters: ModelAdapter
    digests: Sequence[bytes]
    """Of each block's, as a client's file would have; empty where nothing is changed."""

    @cached_property
    def listing(self) -> AdapterListing:
        """What is announced. The digest is that of what is changed, whatever file that was read from."""
        parts = [digest or bytes(hashlib.sha256().digest_size) for digest in self.digests]
        digest = hashlib.sha256(b"".join(parts)).digest()[:ADAPTER_DIGEST_BYTES]
        return AdapterListing(name=self.name, digest=digest.hex())

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return sum(adapter.num_bytes for adapter in self.adapters if adapter is not None)


def read_hosted(source: AdapterSource, checkpoint: Checkpoint) -> HostedAdapter:
    """Read a PEFT adapter for all blocks of a model.

    Raises:
        BadCheckpoint: it is not there, is pickled, or cannot be read.
        BadRequest: it is not for this model, or is more than servers can apply.
    """
    try:
        adapters = _read(source, checkpoint)
    except UserError as exc:
        raise type(exc)(f"the adapter {source.name!r} cannot be hosted: {exc}") from exc
    digests = [b"" if adapter is None else adapter.digest for adapter in adapters]
    # With the files that these were made of, they would take their memory twice.
    adapters = [each and each.with_tensors(list(each.tensors().values())) for each in adapters]
    found = HostedAdapter(source.name, adapters, digests)
    logger.info("adapter %s, %.1f MiB", found.listing, found.num_bytes / 2**20)
    return found


def _read(source: AdapterSource, checkpoint: Checkpoint) -> ModelAdapter:
    place = source.files.name_or_path
    config_path, weights_path = source.files.fetch(CONFIG_FILE), source.files.fetch(WEIGHTS_FILE)
    if config_path is None:
        raise BadCheckpoint(f"{place!r} has no {CONFIG_FILE}: give the directory or repository of a PEFT adapter")
    if weights_path is None and source.files.fetch(PICKLE_FILE) is not None:
        raise BadCheckpoint(
            f"{place!r} has only pickled weights ({PICKLE_FILE}), which can run code when loaded and are never read "
            "here: if you trust it, load it with PEFT and save it again, which writes safetensors"
        )
    if weights_path is None:
        raise BadCheckpoint(f"{place!r} has no {WEIGHTS_FILE}")
    model = _load(place, config_path, weights_path, empty_client_half(checkpoint))
    adapters = read_adapters(model, _layers_of(model))
    if adapters is None:
        raise BadRequest("it changes nothing in the blocks of this model")
    return [each and _detached(each) for each in adapters]


def _load(place: str, config_path: Path, weights_path: Path, model: nn.Module) -> Any:
    """The model with PEFT's layers in it, filled from the file."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    try:
        config = PeftConfig.from_pretrained(str(config_path.parent))
        if config.is_prompt_learning:
            raise BadRequest(
                f"{config.peft_type.value} adds virtual tokens, and those are put in by clients: load it there"
            )
        for name in ("layer_replication", "megatron_config"):  # which would repeat blocks, and import what a file names
            if getattr(config, name, None):
                raise BadRequest(f"its {name} is for a model that is built otherwise: train one without")
        config.inference_mode = True
        adapted = PeftModel(model, config).eval()
        _refuse_outside(adapted)
        result = set_peft_model_state_dict(adapted, load_file(weights_path))
    except (
        SafetensorError,
        OSError,
        ImportError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as exc:
        if isinstance(exc, UserError):
            raise
        raise BadCheckpoint(f"PEFT cannot load {place!r} into this model: {_first_line(exc)}") from exc
    missing = [name for name in result.missing_keys if adapted.base_model.prefix in name]
    if missing or result.unexpected_keys:
        name = [*missing, *result.unexpected_keys][0]
        raise BadCheckpoint(
            f"{place!r} {'lacks' if missing else 'has'} the tensor {name}, which {'it' if missing else 'nothing in it'}"
            f" should have: it is for another model, or another class than a causal language model"
        )
    return adapted


def _layers_of(model: nn.Module) -> RemoteLayers:
    return next(module for module in model.modules() if isinstance(module, RemoteLayers))


def _refuse_outside(model: nn.Module) -> None:
    """Raise BadRequest if the adapter changes what clients run: embeddings, norms, heads."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside = {id(module) for module in _layers_of(model).modules()}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and id(module) not in inside:
            raise BadRequest(
                f"it changes {name.removeprefix('base_model.model.')} as well, which clients run themselves, and "
                "servers cannot: load it on the client with PEFT, or train one inside the blocks alone"
            )


def _detached(adapter: BlockAdapter) -> BlockAdapter:
    """The same, out of PEFT's graph. What cannot be in a client's file cannot be here either, as NaN."""
    detached = [tensor.detach().clone() for tensor in adapter.tensors().values()]
    return BlockAdapter.from_bytes(adapter.with_tensors(detached).undropped().to_bytes())


def _first_line(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2])[:300] if lines else type(exc).__name__
