"""Turns pydantic's validation errors into the text of an InputError: which field, what was given, what was expected."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

from mige_rt.errors import InputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import ErrorDetails

LONGEST_VALUE = 80  # characters of a given value that a message shows
SIMILARITY = 0.7  # of two names, from 0 to 1, from which on one is taken for a misspelling of the other

# What pydantic calls a valid type, in words that fit JSON, TOML and the command line alike.
_EXPECTED = {
    "bool_type": "true or false",
    "dataclass_exact_type": "an object",
    "dataclass_type": "an object",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "a list",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_type": "a string",
    "tuple_type": "a list",
}
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")


T = TypeVar("T")
Location = tuple[int | str, ...]  # of a field: the names and indices that lead to it


def differing_fields(first: Any, second: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields in which plain data differs, as `params.edit.reuse`, each with both values; None: it is not there."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        one, other = cast("Mapping[str, Any]", first), cast("Mapping[str, Any]", second)
        for name in dict.fromkeys((*one, *other)):
            yield from differing_fields(one.get(name), other.get(name), f"{field}.{name}" if field else name)
    elif first != second:
        yield field, first, second


def validate(model: type[T], data: object, where: str) -> T:
    """Check plain data, as read from JSON or TOML, against a dataclass: nothing coerced, unknown or left out.

    Args:
        model: A dataclass; its annotations say what is allowed. Fields must be there even if they have a default, but
            for those that may be None.
        data: What was read.
        where: The file or record it was read from; begins the error's message.

    Returns:
        The dataclass, with nested ones made as well. A list becomes a tuple where the annotation says so.

    Raises:
        InputError: Names every field that is unknown, missing, or of a wrong type or value.
    """
    from pydantic import ValidationError

    unknown, missing = _differences(model, data)
    try:
        # As JSON, whose lists may become tuples although nothing else is coerced.
        value = _adapter(model).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise InputError(validation_message(error, where, model, unknown, missing)) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: {error}") from error
    if unknown or missing:
        raise InputError(f"{where}: {'; '.join(_unknown_and_missing(unknown, missing, model))}")
    return value


def _differences(model: type[Any], data: object) -> tuple[list[Location], list[Location]]:
    """The fields of `data` that `model` does not have, and those of `model` that `data` does not have.

    Pydantic would ignore the former in a dataclass, and take the default for the latter.
    """
    unknown: list[Location] = []
    missing: list[Location] = []
    if not isinstance(data, dict) or not dataclasses.is_dataclass(model):
        return unknown, missing
    values = cast("dict[str, object]", data)
    fields = _fields(model)
    unknown += [(name,) for name in values if name not in fields]
    missing += [
        (str(name),) for name, kind in fields.items() if name not in values and type(None) not in get_args(kind)
    ]
    for name in values.keys() & fields.keys():
        inner_unknown, inner_missing = _differences(fields[name], values[name])
        unknown += [(name, *location) for location in inner_unknown]
        missing += [(name, *location) for location in inner_missing]
    return unknown, missing


@cache
def _adapter(model: type[Any]) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(model)


def validation_message(
    error: "ValidationError",
    where: str,
    model: type[Any] | None = None,
    unknown: Sequence[Location] = (),
    missing: Sequence[Location] = (),
) -> str:
    """All that is wrong with a file or request, in one line: unknown fields, then missing ones, then wrong values.

    For example: tiny.toml [mige]: unknown stepz, did you mean steps?; missing steps; clip is 'much', expected a number

    Args:
        error: What pydantic raised.
        where: The file, table or request that was validated; begins the message.
        model: The pydantic model or dataclass that was validated against. Given, an unknown field is answered with the
            known one whose name is nearest, or with all known ones where none is near.
        unknown: Unknown fields besides those that pydantic found.
        missing: Missing fields, the same way.

    Returns:
        The text for an InputError.
    """
    details = error.errors(include_url=False)
    unknown = [*unknown, *(detail["loc"] for detail in details if detail["type"] in _UNKNOWN)]
    missing = [*missing, *(detail["loc"] for detail in details if detail["type"] in _MISSING)]
    wrong = [_wrong(detail) for detail in details if detail["type"] not in (*_UNKNOWN, *_MISSING)]
    return f"{where}: {'; '.join([*_unknown_and_missing(unknown, missing, model), *wrong])}"


def _unknown_and_missing(
    unknown: Sequence[Location], missing: Sequence[Location], model: type[Any] | None
) -> Iterator[str]:
    for location in dict.fromkeys(unknown):
        yield _unknown(location, model)
    for location in dict.fromkeys(missing):
        yield f"missing {_name(location)}"


def _name(location: Location) -> str:
    """('images', 0, 'box') -> 'images[0].box'."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name


def _unknown(location: Location, model: type[Any] | None) -> str:
    known = _field_names(model, location[:-1])
    nearest = get_close_matches(str(location[-1]), known, n=1, cutoff=SIMILARITY)
    if nearest:
        return f"unknown {_name(location)}, did you mean {nearest[0]}?"
    return f"unknown {_name(location)}" + (f", known are {', '.join(known)}" if known else "")


def _wrong(detail: "ErrorDetails") -> str:
    if detail["type"] in ("value_error", "assertion_error"):  # raised by a validator, whose text says what it expects
        text = str(detail.get("ctx", {}).get("error", detail["msg"]))
    elif detail["type"] in _EXPECTED:
        text = f"expected {_EXPECTED[detail['type']]}"
    elif detail["msg"].startswith("Input should be "):
        expected = detail["msg"].removeprefix("Input should be ").removeprefix("an instance of ")
        text = f"expected {'a number ' if expected.startswith(('greater', 'less')) else ''}{expected}"
    else:
        text = detail["msg"]
    if not detail["loc"]:  # of the whole, which would be too long to repeat
        return text
    return f"{_name(detail['loc'])} is {_shortened(detail['input'])}, {text}"


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def _field_names(model: type[Any] | None, location: Location) -> list[str]:
    """The fields of the models that may stand at a location inside `model`; empty where that is not known."""
    types = [model] if model is not None else []
    for part in location:
        # What is not a field is an index, a key or the tag of a union: the models inside those are in `types` already.
        types = [
            inner for outer in types if part in _fields(outer) for inner in _without_containers(_fields(outer)[part])
        ] or types
    return [str(name) for outer in types for name in _fields(outer)]


def _fields(model: object) -> dict[str | int, Any]:
    """The types of a model's fields by the names that its input uses; empty for what is not a model."""
    if dataclasses.is_dataclass(model):
        return {field.name: field.type for field in dataclasses.fields(model)}
    fields = cast("Mapping[str, Any]", getattr(model, "model_fields", {}))
    return {field.alias or name: field.annotation for name, field in fields.items()}


def _without_containers(annotation: object) -> list[Any]:
    """`dict[str, Stage | None]` -> str, Stage, None."""
    arguments = get_args(annotation)
    return [inner for argument in arguments for inner in _without_containers(argument)] if arguments else [annotation]
