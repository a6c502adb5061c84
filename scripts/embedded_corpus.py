"""The text that the embedded model is trained on: the prose that ships with Python.

Language reference topics, docstrings, comments, README and licence texts of the running interpreter's own standard
library. Nothing is downloaded; the same interpreter gives the same documents.
"""

from __future__ import annotations

import ast
import hashlib
import html
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def clean_markup(text: str) -> str:
    """Turn inline reStructuredText into the words a reader would see."""
    text = re.sub(r":(?:\w+:)?\w+:`~?!?([^`<]+)(?:\s*<[^>]*>)?`", r"\1", text)
    text = re.sub(r"``?([^`]+)``?_{0,2}", r"\1", text)
    text = re.sub(r"\*\*(\w[^*\n]*\w)\*\*", r"\1", text)
    text = re.sub(r"(?<![\w*])\*(\w[^*\n]*\w|\w)\*(?![\w*])", r"\1", text)
    return text


STOPWORDS = """
a an the this that these those it its is are was were be been being am do does did has have had will would can could
should may might must shall not no of in on at by for with from to into as if when while where which who what how than
then else and or but so because since before after until we you i they he she there here all any some each other only
also just more most used using use see return returns set called given same one two
"""


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English rather than as code, a table or a grammar."""
    words = re.findall(r"[A-Za-z']+", paragraph)
    if len(words) < 4 or "::=" in paragraph or ">>>" in paragraph or len(paragraph) > 6000:
        return False
    if re.match(r"(\.\. |:\w+:|[-=+|*~#]{4})", paragraph) or re.search(r"[-=_+|*~#.]{5}|https?://\S{60}", paragraph):
        return False
    plain = sum(c.isalpha() or c in " ,.'\"" for c in paragraph) / len(paragraph)
    stopwords = frozenset(STOPWORDS.split())
    common = sum(w.lower() in stopwords for w in words) / len(words)
    return plain >= 0.85 and common >= 0.2


def paragraphs_of(text: str) -> Iterator[str]:
    """Yield the prose paragraphs of a wrapped text, each joined into one line."""
    text = clean_markup(text.expandtabs().replace("\r", ""))
    block: list[str] = []
    for line in [*text.split("\n"), ""]:
        starts_item = re.match(r"\s*([-*+o]|\d{1,2}[.)]|\(\w\))\s+\S", line)
        if (not line.strip() or starts_item) and block:
            paragraph = re.sub(r"\s+", " ", " ".join(block)).strip()
            paragraph = re.sub(r"::$", ":", paragraph)
            if is_prose(paragraph):
                yield paragraph
            block = []
        if line.strip():
            block.append(re.sub(r"^\s*([-*+o])\s+", "", line) if starts_item else line)


def texts_of_source(source: str) -> Iterator[str]:
    """Yield a module's docstrings and comments, in the order of the file where that is known."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                found.append((node.body[0].lineno, text))
    block: list[str] = []
    for number, line in enumerate([*source.split("\n"), ""]):
        comment = re.match(r"\s*#+[!?:]? ?(.*)$", line)
        if comment:
            block.append(comment.group(1))
        elif block:
            found.append((number, "\n".join(block)))
            block = []
    yield from (text for _, text in sorted(found))


def builtin_docstrings() -> Iterator[tuple[str, str]]:
    """Yield the docstrings of the modules compiled into the interpreter, module by module."""
    for name in sorted(sys.builtin_module_names):
        module = __import__(name)
        texts = [inspect.getdoc(module) or ""]
        for _, value in sorted(vars(module).items()):
            if callable(value):
                texts.append(inspect.getdoc(value) or "")
                if inspect.isclass(value):
                    texts += [inspect.getdoc(v) or "" for _, v in sorted(vars(value).items()) if callable(v)]
        yield f"builtin:{name}", "\n\n".join(texts)


def raw_documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) for everything the interpreter ships that may hold prose."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"topic:{name}", text
    yield from builtin_docstrings()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.rglob("*")):
        name = path.relative_to(stdlib).as_posix()
        if "site-packages" in name or "__pycache__" in name or not path.is_file():
            continue
        is_text = path.suffix in {".txt", ".md", ".html"} or path.name.startswith("README")
        if path.suffix != ".py" and not is_text:
            continue
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".py":
                text = "\n\n".join(texts_of_source(text))
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # deliberately broken inputs of Python's own tests
        if path.suffix == ".html":
            text = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", "", text)))
        yield name, text
    include = Path(sysconfig.get_paths()["include"])
    for path in sorted(include.rglob("*.h")):
        blocks = re.findall(r"(?s)/\*(.*?)\*/", path.read_text(encoding="utf-8", errors="replace"))
        text = "\n\n".join(re.sub(r"(?m)^\s*\*+ ?", "", block) for block in blocks)
        yield f"include:{path.relative_to(include).as_posix()}", text


def is_held_out(name: str) -> bool:
    """Whether a document belongs to the validation split; depends on its name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < 3


def load_corpus() -> tuple[list[str], list[str]]:
    """Return the training and the validation documents; no paragraph occurs twice, in either or both."""
    documents = sorted(raw_documents(), key=lambda item: (not is_held_out(item[0]), item[0]))
    seen: set[str] = set()
    train: list[str] = []
    held_out: list[str] = []
    for name, text in documents:
        kept = []
        for paragraph in paragraphs_of(text):
            key = re.sub(r"\W+", "", paragraph.lower())[:200]
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        if kept:
            (held_out if is_held_out(name) else train).append("\n\n".join(kept))
    return train, held_out
