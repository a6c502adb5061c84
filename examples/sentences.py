"""Small tasks on real text for the examples: what Python documents about numbers and about files."""

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


def documented_names(num_held_out: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """What functions and classes do, as questions and answers in random order: to learn from, and held out."""
    found = {text: name for module in (*NUMBERS, *FILES) for text, name in sorted(_sentences(module).items())}
    exchanges = [{"question": f"What does {name} do?", "answer": text} for text, name in sorted(found.items())]
    random.Random(0).shuffle(exchanges)
    return exchanges[num_held_out:], exchanges[:num_held_out]


def _sentences(module_name: str) -> dict[str, str]:
    """The first sentences of what a module documents, and what of."""
    module = importlib.import_module(module_name)
    documented = {f"{module_name}.{name}": value for name, value in vars(module).items() if not name.startswith("_")}
    for name, each in list(documented.items()):
        if inspect.isclass(each):
            documented |= {f"{name}.{member}": value for member, value in vars(each).items()}
    sentences = {}
    for name, value in documented.items():
        text = (inspect.getdoc(value) if callable(value) else None) or ""
        sentence = " ".join(re.split(r"(?<=[.])\s|\n\n", text)[0].split())
        if 30 <= len(sentence) <= MAX_CHARS and sentence[0].isupper():
            sentences[sentence] = name
    return sentences
