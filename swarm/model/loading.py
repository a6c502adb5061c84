"""Load a part of a checkpoint with the library's own loader: only the tensors that the part has, nothing else.

Names and shapes are those of the part as it stands on the `meta` device, after the library's own renaming and merging
rules (fused experts, old names, ...), so a part needs to know nothing about how a checkpoint was written.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights, no_tie_weights
from transformers.quantizers import HfQuantizer
from transformers.utils import logging as transformers_logging

from swarm.errors import BadCheckpoint, ResourceError
from swarm.model.checkpoint import Checkpoint
from swarm.model.quantization import prepare_for_own

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes to read), from any thread."""


_one_at_a_time = threading.Lock()
"""The library exchanges global state while it loads: the default dtype, weight tying, initialization. Two threads that
load at once restore each other's, for good."""


class LazyTensor:
    """A tensor of a safetensors file, read when the loader indexes it."""

    def __init__(self, part: Any, on_read: Callable[[], None]) -> None:
        self._part = part
        self._on_read = on_read

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._part[index]
        self._on_read()
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def load_part(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    **hf_kwargs: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """Build a class whose constructor drops what is not wanted, and read the tensors of what is left.

    Returns: the model, in eval mode, and the names of the tensors that the checkpoint does not have; these are newly
        initialized.
    Raises:
        BadCheckpoint: a shard is missing or corrupt, or a tensor has another shape than the config says.
        UnsupportedModel: it comes quantized in a way that cannot be loaded.
        ResourceError: the device has no memory for it, or nothing here can run it as it is quantized.
    """
    with ExitStack() as files, _one_at_a_time, quiet_loader():
        with _on_meta():
            skeleton = model_class(config)
            names = names_of(skeleton, checkpoint, prepare_for_own(skeleton, config, device))
        try:
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=_open_tensors(checkpoint, names, files, progress),
                dtype=dtype,
                device_map={"": device},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **hf_kwargs,
            )
        except torch.OutOfMemoryError as exc:
            raise ResourceError(f"{device} has no memory for this part of {checkpoint.name!r}: {exc}") from exc
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise BadCheckpoint(
            f"{checkpoint.name!r} does not fit its own config: {name} has the shape {tuple(found)}, "
            f"the config asks for {tuple(wanted)}"
        )
    return model, set(info["missing_keys"])


def build_empty(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Build a class on `meta`: to look at, without any weights."""
    with _one_at_a_time, _on_meta():
        return model_class(config)


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"), no_init_weights(), no_tie_weights():
        yield


def names_of(model: PreTrainedModel, checkpoint: Checkpoint, quantizer: HfQuantizer | None = None) -> list[str]:
    """The tensors of a checkpoint that a model on `meta` has a place for, after the library's own renaming.

    Args:
        quantizer: that of a checkpoint that comes quantized.
    """
    conversions = get_model_conversion_mapping(model, None, quantizer)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    places = model.state_dict()
    names = []
    for name in sorted(checkpoint.tensor_names):
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, places)
        if target not in places and name in places:
            target, _ = rename_source_key(name, [], [], model.base_model_prefix, places)
        if target in places:
            names.append(name)
    return names


def _open_tensors(
    checkpoint: Checkpoint, names: list[str], files: ExitStack, progress: Progress | None
) -> dict[str, LazyTensor]:
    sizes = checkpoint.sizes_of(names)
    total, done, lock = sum(sizes.values()), 0, threading.Lock()
    opened: dict[Path, Any] = {}

    def on_read(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            if progress is not None:
                progress(done, total)

    tensors = {}
    for name in names:
        path = checkpoint.path_of(name)
        if path not in opened:
            opened[path] = files.enter_context(safe_open(path, framework="pt", device="cpu"))
        part = opened[path].get_slice(name)
        tensors[name] = LazyTensor(part, partial(on_read, sizes[name]))
    return tensors


@contextmanager
def quiet_loader() -> Iterator[None]:
    """Keep the library from reporting the tensors left out on purpose, and from drawing progress bars."""
    report, bars = logging.getLogger("transformers.modeling_utils"), transformers_logging.is_progress_bar_enabled()
    # A filter, not a level: from WARNING on, the library checks its sharding plans instead, and complains about those.
    report.addFilter(_is_error)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        report.removeFilter(_is_error)
        if bars:
            transformers_logging.enable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
