"""A pydantic error as one line that says which field, what was given and what was expected."""

import json
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from mige_rt.validation import validation_message

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


class Stage(BaseModel):
    model_config = STRICT
    steps: Annotated[int, Field(gt=0)]
    rate: float = 1.0

    @model_validator(mode="after")
    def _rate_falls(self) -> "Stage":
        if self.rate > 5:
            raise ValueError("rate times steps is too large")
        return self


class Config(BaseModel):
    model_config = STRICT
    model: str
    stages: dict[str, Stage] = {}
    boxes: list[Stage | None] = []


@dataclass(config=STRICT)
class Sizes:
    width: int
    depth: int = 1


def _message(kind: type[Any], data: object) -> str:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_json(json.dumps(data))
    return validation_message(caught.value, "a.toml", kind)


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (Stage, {"stepz": 3}, "a.toml: unknown stepz, did you mean steps?; missing steps"),
        (Stage, {"steps": 3, "colour": 1}, "a.toml: unknown colour, known are steps, rate"),
        (Stage, {"steps": "3"}, "a.toml: steps is '3', expected an integer"),
        (Stage, {"steps": True}, "a.toml: steps is True, expected an integer"),
        (Stage, {"steps": 0}, "a.toml: steps is 0, expected a number greater than 0"),
        (Stage, {"steps": 1, "rate": 9.0}, "a.toml: rate times steps is too large"),
        (Stage, [1], "a.toml: expected an object"),
        (Config, {"model": 1, "modle": 2}, "a.toml: unknown modle, did you mean model?; model is 1, expected a string"),
        (
            Config,
            {"model": "m", "stages": {"a": {"steps": 1, "ratr": 1.0}}},
            "a.toml: unknown stages.a.ratr, did you mean rate?",
        ),
        (
            Config,
            {"model": "m", "boxes": [{"steps": 1, "stepss": 1}, {}]},
            "a.toml: unknown boxes[0].stepss, did you mean steps?; missing boxes[1].steps",
        ),
        (Sizes, {"widht": 1}, "a.toml: unknown widht, did you mean width?; missing width"),
    ],
)
def test_a_message_names_field_given_and_expected(kind: type[Any], data: object, message: str) -> None:
    assert _message(kind, data) == message


def test_a_long_value_is_cut() -> None:
    assert len(_message(Stage, {"steps": "9" * 1000})) < 150
