"""A small task on real text for the examples: is a sentence about numbers or about files? Python brings the text."""

from __future__ import annotations

import importlib
import inspect
import random
import re
from dataclasses import dataclass

NUMBERS = ("math", "cmath", "statistics", "decimal", "fractions", "random", "numbers", "operator", "colorsys")
FILES = ("os", "shutil", "pathlib", "tempfile", "zipfile", "tarfile", "subprocess", "fileinput", "mmap", "glob")
LABELS = ("numbers", "files")
MAX_CHARS = 160


@dataclass(frozen=True, slots=True)
class Example:
    """A first sentence of Python's documentation, and which of LABELS it belongs to."""

    text: str
    label: int


def numbers_or_files(num_training: int, num_held_out: int, seed: int) -> tuple[list[Example], list[Example]]:
    """As many examples of either label, in random order; none is in both lists.

    Raises: SystemExit: this Python documents less than that.
    """
    chosen = random.Random(seed)
    parts: tuple[list[Example], list[Example]] = ([], [])
    for label, modules in enumerate((NUMBERS, FILES)):
        found = [Example(text, label) for text in sorted({each for name in modules for each in _sentences(name)})]
        if len(found) < (num_training + num_held_out) // 2:
            raise SystemExit(f"only {len(found)} sentences about {LABELS[label]}: ask for fewer examples")
        chosen.shuffle(found)
        parts[0].extend(found[: num_training // 2])
        parts[1].extend(found[num_training // 2 : (num_training + num_held_out) // 2])
    for part in parts:
        chosen.shuffle(part)
    return parts


def _sentences(module_name: str) -> set[str]:
    """The first sentences of what a module documents."""
    module = importlib.import_module(module_name)
    documented = [value for name, value in vars(module).items() if not name.startswith("_")]
    documented += [value for each in documented if inspect.isclass(each) for value in vars(each).values()]
    texts = (inspect.getdoc(each) for each in documented if callable(each) and not isinstance(each, type(Exception)))
    sentences = (re.split(r"(?<=[.])\s|\n\n", text)[0] for text in texts if text)
    return {" ".join(each.split()) for each in sentences if 30 <= len(each) <= MAX_CHARS and each[0].isupper()}
