"""What a checkpoint is made of: its config and the names of its tensors. No weight is read here.

A checkpoint is a local directory or a repository of the Hugging Face hub. Of a hub repository only `config.json`
and the index are fetched (or the header of a single safetensors file); shards follow when `files_of` asks for them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, parse_safetensors_file_metadata
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
    StrictDataclassError,
)
from transformers import AutoConfig, PretrainedConfig

from swarm.errors import BadCheckpoint, UnsupportedModel
from swarm.model.shards import TensorEntry, read_header

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_FILES = ("pytorch_model.bin.index.json", "pytorch_model.bin", "consolidated.00.pth", "model.pt")
VOLATILE_KEYS = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash", "auto_map",
     "use_cache", "attn_implementation", "_attn_implementation"}
)  # fmt: skip
"""Config entries that say how a checkpoint was saved or is to be run, not what it is."""


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """Where a checkpoint comes from; the fields are those of `from_pretrained`."""

    name_or_path: str
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None

    @property
    def directory(self) -> Path | None:
        """The local directory that is meant, or None for a hub repository."""
        path = Path(self.name_or_path).expanduser()
        looks_local = path.is_absolute() or self.name_or_path.startswith((".", "~")) or self.name_or_path.count("/") > 1
        return path if path.is_dir() or looks_local else None

    def fetch(self, filename: str) -> Path | None:
        """Find one file, downloading it from the hub if need be; None when the checkpoint has no such file."""
        directory = self.directory
        if directory is not None:
            path = directory / filename
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.name_or_path, filename, revision=self.revision, token=self.token,
                                        cache_dir=self.cache_dir))  # fmt: skip
        except LocalEntryNotFoundError as exc:
            raise BadCheckpoint(
                f"{filename} of {self.name_or_path!r} is not in the local cache and the hub cannot be reached: "
                "check the network, or give the path of a local directory"
            ) from exc
        except EntryNotFoundError:
            return None
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError, HfHubHTTPError, OSError) as exc:
            raise self.refusal(exc) from exc

    def refusal(self, exc: Exception) -> BadCheckpoint:
        """Say what a failure of the hub means for the caller."""
        if isinstance(exc, GatedRepoError):
            return BadCheckpoint(
                f"{self.name_or_path!r} is gated: accept its terms on the hub, then pass a token or run `hf auth login`"
            )
        if isinstance(exc, RevisionNotFoundError):
            return BadCheckpoint(f"{self.name_or_path!r} has no revision {self.revision!r}")
        if isinstance(exc, RepositoryNotFoundError | HFValidationError):
            return BadCheckpoint(
                f"{self.name_or_path!r} is neither a local directory nor a repository of the hub that you may read: "
                "check the spelling, or pass a token if it is private"
            )
        return BadCheckpoint(f"cannot fetch {self.name_or_path!r} from the hub: {exc}")


class Checkpoint:
    """The config and the tensor inventory of one checkpoint."""

    def __init__(
        self,
        source: CheckpointSource,
        config: PretrainedConfig,
        raw_config: dict[str, Any],
        weight_map: dict[str, str],
        commit: str | None,
    ) -> None:
        self.source = source
        self.name = source.name_or_path
        self.config = config
        self.commit = commit
        self.tensor_names = frozenset(weight_map)
        self.fingerprint = _fingerprint(raw_config, self.tensor_names)
        self._weight_map = weight_map
        self._headers: dict[str, tuple[Path, dict[str, TensorEntry]]] = {}

    @classmethod
    def open(cls, source: CheckpointSource) -> Checkpoint:
        """Read the metadata of a checkpoint.

        Raises:
            BadCheckpoint: it does not exist, is pickled, or its metadata cannot be read.
            UnsupportedModel: the installed transformers does not know its architecture.
        """
        directory = source.directory
        if directory is not None and not directory.is_dir():
            raise BadCheckpoint(f"{source.name_or_path!r} does not exist: give a directory with a config.json")
        config_path = source.fetch(CONFIG_FILE)
        if config_path is None:
            raise BadCheckpoint(f"{source.name_or_path!r} has no {CONFIG_FILE}: it is not a transformers checkpoint")
        raw_config = _read_json(config_path)
        commit = _snapshot_commit(config_path)
        return cls(source, _parse_config(source, config_path), raw_config, _inventory(source), commit)

    def path_of(self, name: str) -> Path:
        """The local path of the shard that holds a tensor, downloaded if need be."""
        return self._shard(self._weight_map[name], [name])[0]

    def files_of(self, names: frozenset[str] | set[str] | list[str]) -> list[Path]:
        """Give the local paths of the shards that hold these tensors; only these are downloaded.

        Raises:
            BadCheckpoint: a shard is missing, cut short or corrupt, or does not hold what the index says.
        """
        wanted: dict[str, list[str]] = {}
        for name in sorted(names):
            wanted.setdefault(self._weight_map[name], []).append(name)
        return [self._shard(filename, held)[0] for filename, held in sorted(wanted.items())]

    def sizes_of(self, names: frozenset[str] | set[str] | list[str]) -> dict[str, int]:
        """The size in bytes of each of these tensors as stored; their shards are downloaded if need be."""
        self.files_of(names)
        return {name: self._headers[self._weight_map[name]][1][name].num_bytes for name in names}

    def _shard(self, filename: str, names: list[str]) -> tuple[Path, dict[str, TensorEntry]]:
        if filename not in self._headers:
            path = self.source.fetch(filename)
            if path is None:
                raise BadCheckpoint(
                    f"{self.name!r} lacks the shard {filename}, which holds {names[0]} and {len(names) - 1} more "
                    "tensors that are needed: fetch it again"
                )
            self._headers[filename] = (path, read_header(path))
        path, header = self._headers[filename]
        absent = [name for name in names if name not in header]
        if absent:
            raise BadCheckpoint(f"{path} lacks {absent[0]}, which the index of {self.name!r} places there")
        return path, header


def _inventory(source: CheckpointSource) -> dict[str, str]:
    """Map each tensor name to the shard file that holds it."""
    index_path = source.fetch(INDEX_FILE)
    if index_path is not None:
        weight_map = _read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadCheckpoint(f"{index_path} has no weight_map: fetch it again")
        for filename in set(weight_map.values()):
            if not isinstance(filename, str) or os.path.isabs(filename) or ".." in Path(filename).parts:
                raise BadCheckpoint(f"{index_path} names the shard {filename!r}, which is outside the checkpoint")
        return weight_map
    if source.directory is None:
        try:
            metadata = parse_safetensors_file_metadata(
                source.name_or_path, SINGLE_FILE, revision=source.revision, token=source.token or None
            )
            return dict.fromkeys(metadata.tensors, SINGLE_FILE)
        except (EntryNotFoundError, NotASafetensorsRepoError):
            pass
        except (SafetensorsParsingError, HfHubHTTPError, OSError) as exc:
            raise source.refusal(exc) from exc
    elif (path := source.fetch(SINGLE_FILE)) is not None:
        return dict.fromkeys(read_header(path), SINGLE_FILE)
    raise _no_weights(source)


def _no_weights(source: CheckpointSource) -> BadCheckpoint:
    pickled = next((name for name in PICKLE_FILES if source.fetch(name) is not None), None)
    if pickled is None:
        return BadCheckpoint(f"{source.name_or_path!r} has neither {INDEX_FILE} nor {SINGLE_FILE}")
    command = (
        f"from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({source.name_or_path!r}, dtype='auto').save_pretrained('converted')"
    )
    return BadCheckpoint(
        f"{source.name_or_path!r} has only pickled weights ({pickled}), which can run code when loaded and are never "
        f'read here. If you trust it, convert it once with\n  python -c "{command}"\nand use the directory `converted`'
    )


def _parse_config(source: CheckpointSource, path: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except (ValueError, KeyError) as exc:
        model_type = _read_json(path).get("model_type")
        raise UnsupportedModel(
            f"{source.name_or_path!r} is of the type {model_type!r}, which the installed transformers cannot read "
            f"(a newer one may; code that ships with a checkpoint is never run): {exc}"
        ) from exc
    except (AttributeError, TypeError, StrictDataclassError) as exc:  # what transformers raises about values
        raise BadCheckpoint(f"{path} does not describe a model: {exc}") from exc
    except OSError as exc:
        raise BadCheckpoint(f"cannot read {path}: {exc}") from exc


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise BadCheckpoint(f"cannot read {path}: {exc}") from exc
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} is not a JSON object")
    return value


def _snapshot_commit(config_path: Path) -> str | None:
    """The hub keeps files under snapshots/<commit>/, and so do directories that were copied from its cache."""
    found = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", str(config_path))
    return found.group(1) if found else None


def _fingerprint(raw_config: dict[str, Any], tensor_names: frozenset[str]) -> str:
    """Name the model by what every holder of a part of it can see: its config and the names of its tensors."""
    config = {key: value for key, value in raw_config.items() if key not in VOLATILE_KEYS}
    canonical = json.dumps([config, sorted(tensor_names)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]
