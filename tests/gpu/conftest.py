from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from export.exporter import ExportLimits, ExportOptions, export_bundle
from export.made_up import make_model
from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.config import PRESETS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A preset's model: the default one, or made-up weights. Heads of 72 and 1,024 tokens, as published: `reduced`."""

    @cache
    def model(preset: str) -> Path:
        if preset == "tiny":
            return DEFAULT_MODEL
        out = tmp_path_factory.mktemp("models") / preset
        make_model(PRESETS[preset], out, DEVICE)
        return out

    return model


@pytest.fixture(scope="session")
def preset_bundles(
    models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Bundles by preset and precision, of the trained size, for two images at once; validated elsewhere."""

    @cache
    def bundle(preset: str, precision: str) -> Path:
        out, options = tmp_path_factory.mktemp("bundles") / precision, ExportOptions(validate=False)
        export_bundle(str(models(preset)), out, precision, ExportLimits(2, 2), options=options)
        return out

    return bundle
