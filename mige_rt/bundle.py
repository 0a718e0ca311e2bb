"""The folders that `run` opens: a model folder, with config.json, tokenizer/, vae/ and weights."""

import json
from pathlib import Path

from mige_rt.config import ModelConfig
from mige_rt.errors import InputError

DEFAULT_MODEL = Path(__file__).parent / "models" / "tiny"
SCHEMA = 1  # of config.json; a reader refuses newer ones


def read_config(folder: Path) -> ModelConfig:
    """The sizes of a model folder. Raises InputError when it is no model folder, or of a newer schema than ours."""
    path = folder / "config.json"
    expected = "a model folder, as `mige-rt convert` writes from published weights, is expected"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder} is no model folder ({error}): {expected}") from error
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int) or "model" not in content:
        raise InputError(f"{path} is not of a model folder: {expected}")
    if content["schema"] > SCHEMA:
        raise InputError(
            f"{path} has schema {content['schema']}, this version of mige-rt reads {SCHEMA}: upgrade mige-rt"
        )
    try:
        return ModelConfig.from_json(content["model"])
    except InputError as error:
        raise InputError(f"{path}: {error}; convert or download the model again") from error
