"""Writes the well-formed inputs that malformed ones are made of; those found later keep their own names.

PYTHONPATH=tests python tests/fuzz/make_corpus.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from targets import CORPUS, good_inputs
from tiny import save_tiny

from swarm.identity import Identity


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = (save_tiny(Path(folder) / "model", "llama") / "config.json").read_bytes()
        identity = Identity.load_or_create(Path(folder) / "identity.key")
        for name, inputs in good_inputs(identity, config).items():
            for number, data in enumerate(inputs):
                path = CORPUS / name / f"good-{number}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)


if __name__ == "__main__":
    main()
