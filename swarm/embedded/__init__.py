"""The small language model that ships with Swarm, for demos, tests and first steps; see MODEL.md."""

from pathlib import Path

EMBEDDED_MODEL = str(Path(__file__).parent)
"""Directory of the embedded model: an ordinary Hugging Face checkpoint with its tokenizer."""
