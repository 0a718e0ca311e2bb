"""Numbers that no model takes: refused with the option's name or the number, before any image is made."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hostile_cases import Case, cases, check_case, given

RUN = ("run", "--prompt", "a red apple", "--out", "made.png")
NO_NUMBERS = {
    "empty": "",
    "a space": " ",
    "a word": "many",
    "hexadecimal": "0x10",
    "an escape": "\x1b[2J",
    "a zero byte": "\0",
    "two numbers": "1,2",
    "not a number": "nan",
    "infinite": "inf",
    "overflowing": "1e999",
    "an option": "--seed",
}
LONG_NUMBER = "9" * 5_000  # Python refuses to read so many digits as an integer
INTEGERS = ("--seed", "--num-images", "--steps", "--width", "--height", "--max-pixels")
SCALES = ("--text-scale", "--source-scale")


def no_numbers() -> list[Case]:
    """Each option with each text that is none."""
    return [
        Case(f"{option} {name}", given(*RUN, option, text), f"'{option}'.*(not a valid|no number|not finite|no range)")
        for option in (*INTEGERS, *SCALES, "--guidance-range")
        for name, text in NO_NUMBERS.items()
    ]


def no_integers() -> list[Case]:
    return [
        Case(f"{option} {text[:8]}", given(*RUN, option, text), f"'{option}'.*not a valid")
        for option in INTEGERS
        for text in ("1.5", "1e3", LONG_NUMBER)
    ]


def no_sizes() -> list[Case]:
    texts = ("", "x", "64x", "x64", "64x64x64", "-64", "64x-64", "64.0", "1e3", "६४", "9" * 30, LONG_NUMBER)
    return [Case(f"--size {text[:8]!r}", given(*RUN, "--size", text), "'--size'.*no size") for text in texts]


OUT_OF_RANGE = [
    Case("--seed -1", given(*RUN, "--seed", "-1"), "'--seed'.*-1"),
    *(
        Case(f"--num-images {number}", given(*RUN, "--num-images", number), "'--num-images'.*1<=x<=64")
        for number in ("-1", "0", "65", "2147483648", "9" * 30)
    ),
    *(
        Case(f"--steps {number}", given(*RUN, "--steps", number), "steps is -?[0-9]+; at least 2 and at most 1000")
        for number in ("-1", "0", "1", "1001", "2147483648", "9" * 30)
    ),
    *(
        Case(f"{option} {number}", given(*RUN, option, number), "the size is .*(multiples of 8|at most 16 times)")
        for option in ("--width", "--height")
        for number in ("-64", "0", "1", "65", "4104", "2147483648", "9" * 30)
    ),
    *(
        Case(
            f"--size {size} of no model", given(*RUN, "--size", size), "the size is .*(multiples of 8|at most 16 times)"
        )
        for size in ("0", "7", "0x64", "64x0", "999999", "8x999992")
    ),
    *(
        Case(f"--max-pixels {number}", given(*RUN, "--max-pixels", number), "'--max-pixels'.*x>=1")
        for number in ("0", "-1")
    ),
    *(
        Case(f"--reuse {number}", given(*RUN, "--reuse", number), "reuse.*(range 0<=x<1|0 .none. to 1|not a valid)")
        for number in ("-0.1", "1", "1e999", "nan", "much")
    ),
    *(
        Case(f"--guidance-range {text}", given(*RUN, "--guidance-range", text), "guidance.range.*as 0.1")
        for text in ("0.5-0.5", "0.8-0.1", "0-1.1", "1-2", "nan-nan", "0-1e999", "0.5", "0-0.5-1")
    ),
    Case(
        "scales that overflow", given(*RUN, "--steps", "2", "--text-scale", "1e300"), "NaN or infinite.*smaller scales"
    ),
    Case("a size twice", given(*RUN, "--size", "64", "--width", "64"), "either --size or --width"),
]


@cases(no_numbers(), no_integers(), no_sizes(), OUT_OF_RANGE)
def test_numbers(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_case(case, tmp_path, monkeypatch)
