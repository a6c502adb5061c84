"""No code of strangers is run: what ruff's rules in pyproject.toml cannot see, found in the syntax of all our files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("swarm", "client", "server", "cli", "examples", "benchmarks", "scripts")
FORBIDDEN = {"trust_remote_code": True, "weights_only": False, "allow_pickle": True}
"""Arguments of calls that let files bring code along, and the value that does."""


def dangers(source: str) -> Iterator[str]:
    """What runs, or may run, a stranger's code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg in FORBIDDEN:
            # A variable could be anything.
            if not isinstance(node.value, ast.Constant) or node.value.value is FORBIDDEN[node.arg]:
                yield f"line {node.value.lineno}: {node.arg}"
        elif isinstance(node, ast.Constant) and node.value in FORBIDDEN and node.value != "weights_only":
            yield f"line {node.lineno}: {node.value}, in a dictionary of arguments perhaps"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_lets_strangers_run_code(folder: str) -> None:
    found = {
        str(path.relative_to(ROOT)): reasons
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (reasons := list(dangers(path.read_text())))
    }
    assert found == {}


@pytest.mark.parametrize("bad", ["f(trust_remote_code=True)", "f(weights_only=no)", "g(**{'allow_pickle': True})"])
def test_a_file_that_would_is_found(bad: str) -> None:
    assert list(dangers(bad)) and not list(dangers("f(trust_remote_code=False, weights_only=True)"))
