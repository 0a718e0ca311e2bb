"""Models by their name on the Hugging Face hub."""

import os
import re
from pathlib import Path

from mige_rt.errors import InputError

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
