"""Models by their name on the Hugging Face hub: opened, pushed, pulled.

Everything goes through `huggingface_hub`: its settings (`HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME`, proxies) hold here, too.
"""

import os
import re
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from mige_rt.atomic import atomic_folder
from mige_rt.bundle import MANIFEST, REPORT, SIGNATURE, check_files, read_manifest
from mige_rt.errors import InputError

CARD = "README.md"

_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+", re.ASCII)


def local_folder(name_or_path: str | Path, *, local_files_only: bool = False) -> Path:
    """The folder of a model: the path that was given, or a repository's snapshot, downloaded if need be.

    Args:
        name_or_path: What exists as a path is one; else `owner/name` is a repository, and anything else a path.
        local_files_only: Take only what was downloaded before.

    Raises:
        InputError: The repository could not be downloaded, or is not there locally.
    """
    path = Path(name_or_path)
    if os.path.exists(path) or not _REPOSITORY.fullmatch(str(name_or_path)):
        return path
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]  # comes with tokenizers

    try:
        return Path(snapshot_download(str(name_or_path), local_files_only=local_files_only))
    except Exception as error:  # the library's errors and those of the network have no common class
        raise InputError(
            f"{name_or_path} is no path here, and could not be downloaded from the Hugging Face hub ({error}); give "
            "a path, or the name of a repository"
        ) from error


def push_bundle(bundle: Path, repository: str, card: str, *, private: bool = False, message: str = "") -> str:
    """Upload a bundle in one commit, after its files were compared with its manifest. Plans stay here.

    Args:
        bundle: The bundle.
        repository: `owner/name`; made if it is not there.
        card: The repository's README.md.
        private: Make a new repository private.
        message: Of the commit.

    Returns:
        The commit's address.

    Raises:
        InputError: The bundle is damaged, or the hub refused it.
    """
    _check_name(repository)
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, everything=True)
    from huggingface_hub import CommitOperationAdd, HfApi

    paths = [file.path for file in manifest.files]
    paths += [name for name in (MANIFEST, REPORT, SIGNATURE) if (bundle / name).is_file()]
    operations = [CommitOperationAdd(path, bundle / path) for path in paths]
    operations.append(CommitOperationAdd(CARD, card.encode()))
    with _hub_errors(f"{bundle} could not be pushed to {repository}"):
        api = HfApi()
        api.create_repo(repository, private=private or None, exist_ok=True)
        commit = api.create_commit(
            repository, operations, commit_message=message or f"{manifest.model.name} in {manifest.precision}"
        )
    return str(commit.commit_url)


def pull_bundle(repository: str, out: Path, *, revision: str | None = None) -> str:
    """Download a bundle into a folder, and compare every file with the manifest: all of it or nothing.

    Args:
        repository: `owner/name`.
        out: The folder to make.
        revision: A branch, a tag or a commit; None: the main branch.

    Returns:
        The commit that was downloaded.

    Raises:
        InputError: The hub does not have it, it holds no bundle, or a file is not what the manifest says; or `out`
            exists, or cannot be written.
    """
    _check_name(repository)
    from huggingface_hub import HfApi, snapshot_download  # pyright: ignore[reportUnknownVariableType]

    with atomic_folder(out) as folder:
        with _hub_errors(f"{repository} could not be pulled"):
            commit = str(HfApi().model_info(repository, revision=revision).sha)
            snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=[MANIFEST])
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{repository} holds no bundle: it has no {MANIFEST}; name a repository that has one")
        manifest = read_manifest(folder)
        wanted = [file.path for file in manifest.files] + [MANIFEST, REPORT, SIGNATURE, CARD]
        with _hub_errors(f"{repository} could not be pulled"):
            snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=wanted)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the library's notes on what it downloaded
        check_files(folder, manifest, everything=True)
    return commit


def _check_name(repository: str) -> None:
    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"{repository!r} names no repository of the Hugging Face hub; owner/name is expected")


@contextmanager
def _hub_errors(problem: str) -> Generator[None, None, None]:
    """Turns what `huggingface_hub` raises into an InputError; its progress bars are for terminals alone."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except Exception as error:  # the library's errors and those of the network have no common class
        raise InputError(
            f"{problem} ({' '.join(str(error).split())}); check the name, the network, and that `hf auth login` or "
            "HF_TOKEN gives you access"
        ) from error
    finally:
        if not were_disabled:
            enable_progress_bars()
