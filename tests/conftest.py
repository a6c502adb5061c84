"""What all tests share: quiet libraries, one torch thread (tiny models are slower with more), the same random numbers
in each run, tiny models on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_configure() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.pop("SWARM_JOIN", None)
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="swarm-tests-")  # no test changes what the user's home has


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Let what a test draws without a generator of its own, as new prompts are, be the same in each run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("llama", seed=1)`: the directory of a tiny random model, made once per run."""
    from tiny import save_tiny

    made: dict[tuple[object, ...], Path] = {}

    def make(model_type: str = "llama", *, seed: int = 0, **changes: object) -> Path:
        key = (model_type, seed, repr(sorted(changes.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp(f"tiny-{model_type}")
            made[key] = save_tiny(directory, model_type, seed=seed, **changes)
        return made[key]

    return make
