"""The folders that `run` opens: a model folder, with config.json, tokenizer/, vae/ and weights."""

import json
from pathlib import Path

from mige_rt.config import ModelConfig
from mige_rt.errors import InputError

DEFAULT_MODEL = Path(__file__).parent / "models" / "tiny"
SCHEMA = 1  # of config.json


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder.

    Raises InputError when the folder is none, was made by a newer mige-rt, or its configuration is not one of MIGE.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder} is not a model folder: it has no config.json; make one from published weights with: "
            "mige-rt convert --ckpt model.pth --out FOLDER"
        )
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}; copy or convert the model again") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema!r}, this mige-rt reads {SCHEMA}; update mige-rt or convert again")
    return ModelConfig.from_json(data.get("model"))
