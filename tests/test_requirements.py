"""The locked requirements are those of pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required(extra: str) -> list[Requirement]:
    """What an extra asks for, with the extras of ours that it names."""
    requirements: list[Requirement] = []
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        ours = requirement.name == PROJECT["name"]
        requirements += [each for name in requirement.extras for each in required(name)] if ours else [requirement]
    return requirements


@pytest.mark.parametrize(("file", "extras"), [("locked.txt", ["sign"]), ("locked-tests.txt", ["test", "docs"])])
def test_what_is_locked_is_what_is_required(file: str, extras: list[str]) -> None:
    text = (ROOT / "requirements" / file).read_text()
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))
    for requirement in [*map(Requirement, PROJECT["dependencies"]), *(r for name in extras for r in required(name))]:
        assert requirement.specifier.contains(locked[requirement.name]), requirement


@pytest.mark.parametrize("file", ["locked.txt", "locked-tests.txt"])
def test_every_locked_package_has_hashes_and_no_host(file: str) -> None:
    text = (ROOT / "requirements" / file).read_text()
    packages = [part for part in re.split(r"^(?=\w)", text, flags=re.MULTILINE) if not part.startswith("#")]
    assert len(packages) > 20 and all("--hash=sha256:" in package for package in packages)
    assert "://" not in text and "--index" not in text
