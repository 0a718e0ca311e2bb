"""What deploy/ has is what the project has: stages, files, extras, and options of the server."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from mige_rt.cli.serve import serve

DEPLOY = Path(__file__).parents[1] / "deploy"
ROOT = DEPLOY.parent


def dockerfile() -> list[list[str]]:
    """Its instructions, each with its argument."""
    text = re.sub(r"^#.*$", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [line.split(" ", 1) for line in text.splitlines() if line.strip()]


def test_the_dockerfile_names_what_there_is() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (kept,) = [[line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")]]
    stages: list[str] = []
    copied: list[str] = []
    commands: list[list[str]] = []
    for instruction, argument in dockerfile():
        if instruction == "FROM":
            stages.append(argument.split()[-1])
        elif instruction == "COPY" and argument.startswith("--from="):
            assert argument.split()[0].removeprefix("--from=") in stages
        elif instruction == "COPY":
            copied += argument.split()[:-1]
        elif instruction == "CMD":
            commands.append(json.loads(argument))
        elif instruction == "RUN" and argument.startswith("pip"):
            extra = re.search(r" install \"\.\[(.*)\]\"$", argument)
            assert extra is not None and set(extra[1].split(",")) <= extras.keys()
    assert sorted(copied) == sorted(kept) and all((ROOT / name).exists() for name in copied)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages <= set(copied)  # all that the installed command imports
    assert len(commands) == 2
    for arguments in commands:
        serve.make_context("serve", arguments).close()


def test_compose_builds_the_stages_of_the_dockerfile() -> None:
    users: dict[str, str] = {}  # of each stage
    stage = ""
    for instruction, argument in dockerfile():
        if instruction == "FROM":
            stage = argument.split()[-1]
        elif instruction == "USER":
            users[stage] = argument
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert [service["build"]["target"] for service in services.values()] == ["cpu", "cuda"]
    assert users == {"cpu": "mige", "cuda": "mige"}
    timeout = serve.make_context("serve", []).params["request_timeout"]
    for service in services.values():
        build = service["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
        assert service["environment"]["MIGE_RT_API_KEY"].startswith("${MIGE_RT_API_KEY:?")  # none starts without one
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert int(service["stop_grace_period"].removesuffix("s")) > timeout  # accepted requests end before


def test_the_unit_starts_the_server(tmp_path: Path) -> None:
    text = (DEPLOY / "mige-rt.service").read_text()
    command = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert command is not None
    program, name, *arguments = shlex.split(command[1])
    assert (Path(program).name, name) == ("mige-rt", "serve")
    context = serve.make_context("serve", arguments)
    stop = re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert stop is not None and int(stop[1]) > context.params["request_timeout"]  # accepted requests end before
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not here")
    unit = tmp_path / "mige-rt.service"
    unit.write_text(text.replace(program, "/bin/true"))
    check = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert check.returncode == 0 and not check.stderr, check.stderr
