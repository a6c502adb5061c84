"""Small files of a user's: where they are, and how they are written: whole or not at all, mode 0600."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from swarm.errors import BadRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def default_config_dir() -> Path:
    """Where this user's configuration is: $XDG_CONFIG_HOME/swarm, or ~/.config/swarm."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    return Path(home if os.path.isabs(home) else Path.home() / ".config") / "swarm"


def is_name(text: str) -> bool:
    """Whether a swarm or a member could be called so."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str) -> None:
    """Raises: BadRequest: nothing can be called so."""
    if not is_name(text):
        raise BadRequest(f"{text!r} cannot be a name: use up to 64 letters, digits and . _ -, a letter or digit first")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees what was there before, or all of this. Raises: OSError."""
    with _written_beside(path, data) as temporary:
        os.replace(temporary, path)


def create_atomically(path: Path, data: bytes) -> bool:
    """The same, but never in place of a file that is there; return whether it was written. Raises: OSError."""
    with _written_beside(path, data) as temporary:
        try:
            os.link(temporary, path)  # unlike rename, never replaces what is already there
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
        return True


@contextlib.contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp: mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
