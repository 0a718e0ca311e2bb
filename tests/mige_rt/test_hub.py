"""Bundles on the Hugging Face hub, through the real `huggingface_hub`, against a stand-in for the hub's HTTP API."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from hub_server import Hub, hub_server
from huggingface_hub import constants

from mige_rt.bundle import DEFAULT_MODEL, MANIFEST, check_files, read_manifest
from mige_rt.cli import main
from mige_rt.model_card import model_card

REPOSITORY = "someone/mige-tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[Hub, None, None]:
    """The stand-in, which the library takes for the hub."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.fixture
def pushed(hub: Hub) -> Hub:
    """The stand-in with the default model in a repository."""
    assert run("push", DEFAULT_MODEL, REPOSITORY).exit_code == 0
    return hub


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_what_is_pushed_can_be_pulled(hub: Hub, tmp_path: Path) -> None:
    result = run("push", DEFAULT_MODEL, REPOSITORY, "--license", "apache-2.0", "--private")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{hub.url}/{REPOSITORY}/commit/{hub.sha(REPOSITORY)}\n"
    assert len(hub.commits[REPOSITORY]) == 2 and hub.private == {REPOSITORY}, "one commit after the empty one"
    assert len(hub.lfs) == 6, "the weights go to LFS"
    out = tmp_path / "bundle"
    pulled = run("pull", REPOSITORY, "--out", out)
    assert pulled.exit_code == 0 and pulled.stdout == f"{out}\n", pulled.output
    assert f"commit {hub.sha(REPOSITORY)}" in pulled.stderr
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    original = {
        str(path.relative_to(DEFAULT_MODEL)): path.read_bytes() for path in DEFAULT_MODEL.rglob("*") if path.is_file()
    }
    assert files == original | {"README.md": hub.commits[REPOSITORY][-1]["README.md"]}


def test_the_model_card_is_made_from_the_manifest(hub: Hub) -> None:
    assert run("push", DEFAULT_MODEL, REPOSITORY, "--license", "apache-2.0").exit_code == 0
    card = hub.commits[REPOSITORY][-1]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "mige-rt"
    assert front["pipeline_tag"] == "image-to-image"
    manifest = read_manifest(DEFAULT_MODEL)
    parameters = sum(graph.parameters for graph in manifest.graphs.values())
    assert f"| Parameters | {parameters:,} |" in card and "| Precision | fp32 |" in card
    assert "| Trained size | 64x64 pixels" in card and f'from_pretrained("{REPOSITORY}")' in card
    assert "## Metrics" in card and "| `denoiser` |" in card
    unlicensed = model_card(DEFAULT_MODEL, manifest, REPOSITORY)
    assert "license:" not in unlicensed and "| License of the weights | not stated |" in unlicensed


def test_a_second_push_is_another_commit_and_the_first_can_be_pulled(pushed: Hub, tmp_path: Path) -> None:
    first = pushed.sha(REPOSITORY)
    changed = Path(shutil.copytree(DEFAULT_MODEL, tmp_path / "changed"))
    content = json.loads((changed / MANIFEST).read_text())
    (changed / MANIFEST).write_text(json.dumps(content | {"source": "another source"}))
    assert run("push", changed, REPOSITORY, "--message", "again").exit_code == 0
    assert run("pull", REPOSITORY, "--out", tmp_path / "new").exit_code == 0
    assert run("pull", REPOSITORY, "--out", tmp_path / "old", "--revision", first).exit_code == 0
    assert read_manifest(tmp_path / "new").source == "another source"
    assert read_manifest(tmp_path / "old").source == read_manifest(DEFAULT_MODEL).source


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "no manifest", "another path"])
def test_a_pull_is_whole_or_nothing(pushed: Hub, damage: str, tmp_path: Path) -> None:
    files = pushed.commits[REPOSITORY][-1]
    weights = files["onnx/denoiser.safetensors"]
    match damage:
        case "changed":
            files["onnx/denoiser.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
        case "cut":
            files["onnx/denoiser.safetensors"] = weights[:-100]
        case "missing":
            del files["onnx/denoiser.safetensors"]
        case "no manifest":
            del files[MANIFEST]
        case _:
            files[MANIFEST] = files[MANIFEST].replace(b"onnx/denoiser.onnx", b"../../denoiser.onnx")
    result = run("pull", REPOSITORY, "--out", tmp_path / "bundle")
    says = {"no manifest": "holds no bundle", "another path": "outside the bundle", "missing": "is missing"}
    assert result.exit_code == 2 and says.get(damage, "was changed") in result.stderr, result.output
    assert not any(path.name.startswith("bundle") for path in tmp_path.iterdir())


def test_a_damaged_bundle_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(DEFAULT_MODEL, tmp_path / "damaged"))
    weights = bundle / "onnx/denoiser.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    result = run("push", bundle, REPOSITORY)
    assert result.exit_code == 2 and "was changed" in result.stderr
    assert not hub.commits, "nothing is made on the hub"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("push", DEFAULT_MODEL, "tiny"), "owner/name is expected"),
        (("push", DEFAULT_MODEL, REPOSITORY, "--license", "all: mine"), "an identifier of the hub"),
        (("push", "nowhere", REPOSITORY), "is no bundle"),
        (("pull", "some/where/else", "--out", "out"), "owner/name is expected"),
        (("pull", "no/such", "--out", "out"), "no/such could not be pulled"),
        (("pull", REPOSITORY, "--out", "."), "exists already"),
    ],
)
def test_bad_input_to_push_and_pull(hub: Hub, arguments: tuple[str | Path, ...], says: str, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    result = run(*(tmp_path / word if word in ("out", ".") else word for word in arguments))
    assert result.exit_code == 2 and says in result.stderr, result.output
    assert set(tmp_path.iterdir()) == before and not hub.commits


def test_a_push_without_a_right_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    result = run("push", DEFAULT_MODEL, REPOSITORY)
    assert result.exit_code == 2 and "HF_TOKEN gives you access" in result.stderr and not hub.commits


def test_the_librarys_environment_variables_hold(pushed: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT leads both `pull` and a model's name to another hub, in a process that has just started."""
    environment = {**os.environ, "HF_ENDPOINT": pushed.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    out = tmp_path / "out.png"
    command = ["run", "--model", REPOSITORY, "--prompt", "a red apple", "--steps", "2", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "mige_rt.cli", *command], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0 and out.is_file(), done.stderr
    (snapshot,) = (tmp_path / "hf/hub").glob("models--someone--mige-tiny/snapshots/*")
    check_files(snapshot, read_manifest(snapshot), everything=True)
