"""What is installed is what is in the repository, and importing it costs nothing."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.machinery
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import swarm

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {Path(folder): package for package, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items()}


def packages_on_disk() -> dict[str, Path]:
    found = {}
    for top, package in FOLDERS.items():
        for marker in (ROOT / top).rglob("__init__.py"):
            parts = marker.parent.relative_to(ROOT / top).parts
            found[".".join((package, *parts))] = marker.parent
    return found


def test_the_package_list_equals_the_folders_on_disk() -> None:
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(packages_on_disk())


def test_every_python_file_belongs_to_a_package() -> None:
    packages = set(packages_on_disk().values())
    assert [path for top in FOLDERS for path in (ROOT / top).rglob("*.py") if path.parent not in packages] == []


def test_package_data_covers_every_other_file() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    left_out = [
        str(path.relative_to(ROOT))
        for package, folder in packages_on_disk().items()
        for path in folder.iterdir()
        if path.is_file() and path.suffix not in (".py", ".pyi")
        if not path.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))  # built when it is installed
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns.get(package, []))
    ]
    assert left_out == []


def test_the_wheel_carries_the_type_stubs_of_the_wire_contract() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"].get("swarm.v1", [])
    assert any(fnmatch.fnmatch("blocks_pb2.pyi", pattern) for pattern in patterns)


def test_importing_swarm_is_quick_and_loads_no_torch() -> None:
    program = """
import json, sys, time
started = time.perf_counter()
import swarm
print(json.dumps({"seconds": time.perf_counter() - started, "heavy": [n for n in ("torch", "transformers", "grpc",
    "hivemind", "fastapi", "uvicorn") if n in sys.modules]}))
"""
    result = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert result["heavy"] == []
    assert result["seconds"] < 1


@pytest.mark.parametrize("module_name", ["swarm", "swarm.server", "swarm.client"])
def test_every_public_name_resolves(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert [name for name in module.__all__ if getattr(module, name, None) is None] == []
    with pytest.raises((AttributeError, ImportError)):
        module.no_such_name  # noqa: B018


def test_the_version_is_said_once() -> None:
    assert PYPROJECT["project"]["version"] == swarm.__version__


def test_the_console_script_exists() -> None:
    module, _, function = PYPROJECT["project"]["scripts"]["swarm"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_every_direct_dependency_has_a_tested_version_within_its_range() -> None:
    tested = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if match := re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line):
            tested[canonicalize_name(match[1])] = match[2]
    project = PYPROJECT["project"]
    requirements = [*project["dependencies"], *(r for rs in project["optional-dependencies"].values() for r in rs)]
    for text in requirements:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name != canonicalize_name(project["name"]):
            assert name in tested, f"{name} has no line in constraints.txt"
            assert requirement.specifier.contains(tested[name]), f"{name} {tested[name]} is outside {text}"
