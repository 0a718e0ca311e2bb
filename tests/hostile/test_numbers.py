"""Numbers that no model takes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hostile_cases import Case, cases, check_case, given

RUN = ("run", "--prompt", "a red apple", "--out", "made.png")

OPTIONS = [
    Case("seed below 0", given(*RUN, "--seed", "-1"), "'--seed'.*-1"),
]


@cases(OPTIONS)
def test_numbers(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_case(case, tmp_path, monkeypatch)
