"""The default model goes on learning as it is, from samples that several processes made before."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer

from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE, read_config
from mige_rt.errors import InputError
from mige_rt.tokenizer import save_tokenizer
from trainer.__main__ import CONFIGS, main
from trainer.checkpoints.model_folder import load_model, save_model
from trainer.settings import LadderSettings, StageSettings
from trainer.stages.features import KIND_NAMES
from trainer.stages.ladder import LADDER as LADDER_OF_TASKS
from trainer.stages.make_samples import make_samples
from trainer.stages.practice import open_practice
from trainer.stages.train_mige import train_mige
from trainer.stages.trained_part import TrainedPart
from trainer.synthetic.concepts import Concept
from trainer.tokenizer import train_tokenizer

QUICK = StageSettings(
    steps=3, batch=12, rate=1e-9, warmup=1, decay=1, weight_decay=0.0, epsilon=1e-8, clip=1.0, ema=0.5, seed=1
)
LADDER = LadderSettings(
    shards=4, shard_samples=4, uses=1, varied=0.5, noisy=0.5, asked=2.0, looking=0.1, draws=1, seed=3, climbed=True
)


def test_a_model_that_has_been_up_the_ladder_goes_on_from_samples_that_were_made_before(
    concepts: list[Concept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.stages.practice.HELD_OUT", 2)
    config = read_config(DEFAULT_MODEL)
    made = make_samples(config, QUICK, LADDER, concepts, tmp_path, DEFAULT_MODEL, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("features/*/shard-*")}
    assert len(before) == made > 12  # more than the first two of each rung

    train_mige(config, QUICK, LADDER, concepts, tmp_path, DEFAULT_MODEL)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("features/*/shard-*")}.items() <= before.items()

    # At a rate of next to nothing all weights are still those of the start: nothing started anew.
    trained = torch.load(tmp_path / "mige" / "state.pt", weights_only=True)["module"]
    given = TrainedPart(load_model(DEFAULT_MODEL)).state_dict()
    assert trained.keys() == given.keys()
    for name, weight in given.items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-6, msg=name)
    assert not (tmp_path / "mige" / "start.json").exists()

    # Samples, state and tokenizer are this start's and these settings'.
    again = partial(train_mige, config, concepts=concepts, state=tmp_path)
    with pytest.raises(InputError, match=r"features was begun with another ladder.varied;"):
        again(QUICK, replace(LADDER, varied=0.0), start=DEFAULT_MODEL)
    with pytest.raises(InputError, match=r"mige was begun with another seed, ladder.draws;"):
        again(replace(QUICK, seed=9, rate=1.0), replace(LADDER, draws=2, uses=2, noisy=0.0), start=DEFAULT_MODEL)
    other = shutil.copytree(DEFAULT_MODEL, tmp_path / "moved")
    again(QUICK, LADDER, start=other)  # the same weights
    model, tokenizer = load_model(other), Tokenizer.from_file(str(other / TOKENIZER_FILE))
    with torch.no_grad():
        model.denoiser.final_layer.linear.weight += 1.0
    save_model(model, tokenizer, tmp_path / "other", torch.float16, "made up")
    with pytest.raises(InputError, match=r"mige was begun with another start;"):
        again(QUICK, LADDER, start=tmp_path / "other")
    save_tokenizer(train_tokenizer(["other words"], config.text.vocabulary), tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer.json is not the tokenizer of .*moved"):
        again(QUICK, LADDER, start=other)


def test_the_edits_that_are_practised_can_be_chosen(concepts: list[Concept], tmp_path: Path) -> None:
    ladder = replace(LADDER, edits={"resize": 1.0})
    _, samples = open_practice(read_config(DEFAULT_MODEL), ladder, concepts, tmp_path, DEFAULT_MODEL)
    drawn = {KIND_NAMES[kind] for kind in next(samples.batches(replace(QUICK, batch=60), 0, 0, 1)).kinds}
    assert drawn & LADDER_OF_TASKS[-1].shares.keys() == {"resize"}
    assert drawn >= {"again", "another_ground", "generate_one", "generate_several", "add"}


def test_going_on_needs_a_model_of_the_same_sizes(concepts: list[Concept], tmp_path: Path) -> None:
    config = read_config(DEFAULT_MODEL)
    with pytest.raises(InputError, match="--start"):
        train_mige(config, QUICK, LADDER, concepts, tmp_path)
    fewer = replace(config, qformer=replace(config.qformer, queries=8))
    with pytest.raises(InputError, match="other sizes"):
        train_mige(fewer, QUICK, LADDER, concepts, tmp_path, DEFAULT_MODEL)


@pytest.mark.long
def test_the_shipped_config_goes_on_from_the_default_model(tmp_path: Path) -> None:
    """As the docs say, with less of everything."""
    text = (
        (CONFIGS / "going-on.toml")
        .read_text()
        .replace("shard_samples = 512", "shard_samples = 2")
        .replace("steps = 8000", "steps = 1")
    )
    (tmp_path / "c.toml").write_text(text.replace("batch = 512", "batch = 20"))
    assets = Path(__file__).parents[1] / "data" / "synthetic"
    options = ["--config", tmp_path / "c.toml", "--assets", assets, "--state", tmp_path / "s", "--start", DEFAULT_MODEL]
    result = CliRunner().invoke(main, ["samples", *map(str, options), "--processes", "1"])
    assert result.exit_code == 0, result.output
    assert "12 shards of 2 samples" in result.output
