"""A training config that cannot be used is refused, with the table, the key, and what was expected."""

from pathlib import Path

import pytest

import trainer
from mige_rt.errors import InputError
from trainer.settings import load_settings

SHIPPED = Path(trainer.__file__).parent / "configs" / "tiny.toml"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[mige]", "[miges]", "unknown miges, did you mean mige?"),
        ('model = "tiny"', 'model = "tinny"', "model is 'tinny', expected one of xl, reduced, tiny"),
        ("warmup =", "warm_up =", "[vae]: unknown warm_up, did you mean warmup?; missing warmup"),
        ("batch = 16", "batch = 0", "[vae]: batch is 0, expected a number greater than 0"),
        ("ema = 0.995", "ema = 1.5", "[vae]: ema is 1.5, expected a number less than or equal to 1"),
        ("seed = 1", "seed = 99999999999", "[vae]: seed is 99999999999, expected a number less than or equal to 429"),
        ("clip = 1.0", "clip = nan", "[vae]: clip is nan, expected a number greater than 0"),
        ("shards = 8", 'shards = "8"', "[ladder]: shards is '8', expected an integer"),
        (
            "[mige]",
            "[ladder.edits]\nresise = 1\n[mige]",
            "[ladder.edits]: there is no edit resise; expected are recolour,",
        ),
        ("steps = 6000", "steps = 6000.5", "[vae]: steps is 6000.5, expected an integer"),
    ],
)
def test_a_wrong_key_or_value_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    config = tmp_path / "config.toml"
    content = SHIPPED.read_text()
    assert old in content
    config.write_text(content.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        load_settings(config)
    assert str(error.value).startswith(str(config)) and message in str(error.value)


def test_an_integer_is_a_number_too(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(SHIPPED.read_text().replace("clip = 1.0", "clip = 2", 1))
    assert isinstance(load_settings(config).stage("vae").clip, float)
