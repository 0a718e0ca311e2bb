import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import check
import made_up

from trainer.checkpoints.published_names import optional_shapes, published_shapes

PUBLISHED = Path(__file__).parents[1] / "data" / "reference"
ENCODING = ["ln_vision", "qformer", "ffm", "proj", "length", "mixed", "t5"]
STAGES = [*ENCODING, "t_block", "block0", "block1", "dit", "sample4", "sample20"]

SIZES = {
    "dit_depth": 1,
    "hidden": 64,
    "heads": 4,
    "vit_depth": 1,
    "qformer_layers": 1,
    "t5": {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2},
    "max_len": 60,
}
CASES = {
    "none": {"prompt": "a red ball", "n": 0, "source": False, "state": "subject", "y": 3.0, "s": 1.0},
    "both": {
        "prompt": "put <imagehere> on <imagehere>",  # more tokens than max_len
        "n": 2,
        "source": True,
        "state": "edit",
        "y": 0.5,
        "s": 2.0,
    },
}


@pytest.mark.parametrize("cases", [("compose",), pytest.param(("subject", "edit", "compose"), marks=pytest.mark.long)])
def test_every_stage_of_every_published_case_agrees(cases: tuple[str, ...]) -> None:
    """The others have nothing that a composition has not."""
    lines = list(check.run_check(PUBLISHED, cases=cases))
    expected = [("", "pos_embed"), *((case, stage) for case in cases for stage in STAGES)]
    assert [(line.case, line.stage) for line in lines] == expected
    assert not [line for line in lines if not line.agrees]


def write(folder: Path, arrays: dict[str, Any], cases: dict[str, Any], salt: str) -> None:
    sizes = check.read_config(SIZES)
    shapes = published_shapes(sizes) | optional_shapes(sizes)
    (folder / "golden.json").write_text(json.dumps({"config": SIZES, "cases": cases, "salt": salt}))
    (folder / "keys_reduced.json").write_text(json.dumps(shapes))
    np.savez(folder / "golden.npz", **arrays)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The arrays of another golden set, of a small model, which our own model made with the salt `pepper`."""
    folder = tmp_path_factory.mktemp("empty")
    write(folder, {}, CASES, "pepper")
    golden = check.read_golden(folder)
    model = check.made_up_model(golden, "pepper")
    arrays: dict[str, Any] = {}
    for name, case in golden.cases.items():
        for stage, values in check.PyTorchStages(model, name, case).run(["dit", "sample3"]).items():
            if values.size > 100_000:
                arrays |= {f"{name}.{stage}.strided": values.ravel()[::7], f"{name}.{stage}.step": 7}
            else:
                arrays[f"{name}.{stage}"] = values
            arrays |= {f"{name}.{stage}.shape": np.array(values.shape), f"{name}.{stage}.stats": np.zeros(3)}
    return arrays


def test_another_golden_set_is_taken_and_its_salt_counts(
    recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, recorded, CASES, "salt of other weights")
    assert check.main([str(tmp_path), "--salt", "pepper"]) == 0
    printed = capsys.readouterr().out
    assert "sample3" in printed and "block0" in printed and "none" in printed and "DIFFERS" not in printed
    assert check.main([str(tmp_path)]) == 1
    assert "DIFFERS" in capsys.readouterr().out
    assert recorded["none.length"] == len("a red ball") + 1
    assert recorded["both.length"] == 60
    assert recorded["none.dit"].shape[0] == 2 and recorded["both.dit"].shape[0] == 3


def test_exported_graphs_agree_at_their_borders(recorded, tmp_path: Path) -> None:
    # The prediction's variance channels are no part of the graph; one stage is recorded wrongly.
    channels = np.arange(8)[:, None, None]
    changed = {
        "both.dit": np.where(channels < 4, recorded["both.dit"], np.float32(7)),
        "none.t5": recorded["none.t5"] * np.float32(1 + 2e-4),
    }
    write(tmp_path, recorded | changed, CASES, "pepper")
    lines = list(check.run_check(tmp_path, backend="onnxruntime"))
    verdicts = {f"{line.case}.{line.stage}": line for line in lines}
    assert len(verdicts) == len(lines) and [name for name, line in verdicts.items() if not line.agrees] == ["none.t5"]
    compared = {name for name, line in verdicts.items() if line.error is not None}
    assert compared == {f"{c}.{s}" for c in CASES for s in ("proj", "length", "t5", "dit", "sample3")}
    assert verdicts["both.dit"].shape == (3, 4, 64, 64)
    assert "inside a graph" in printed(check.report(lines))


def printed(table: Table) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_first_channels_of_what_was_recorded() -> None:
    values = made_up.normal("dit", (3, 8, 4, 5))
    recorded = check.Recorded("case", "dit", values.ravel()[::7], 7, values.shape).first_channels(4)
    assert recorded.compare(values[:, :4]).error == 0 and recorded.values.size == pytest.approx(3 * 4 * 20 / 7, abs=3)
    assert not recorded.compare(values[:, 4:]).agrees
    assert not recorded.compare(values).agrees


@pytest.mark.parametrize(("stage", "limit"), [("proj", 1e-5), ("dit", 1e-5), ("sample4", 1e-4)])
def test_differences_up_to_the_limit_agree(stage: str, limit: float) -> None:
    values = made_up.normal(stage, (2, 32, 8))
    recorded = check.Recorded("case", stage, values.ravel()[::7], 7, values.shape)
    within, beyond = (recorded.compare(values.astype(np.float64) * (1 + limit * share)) for share in (0.9, 1.1))
    assert within.error == pytest.approx(0.9 * limit, rel=1e-3) and within.agrees
    assert beyond.error == pytest.approx(1.1 * limit, rel=1e-3) and not beyond.agrees


def test_what_is_not_a_number_or_of_another_shape_or_length_differs() -> None:
    values = np.ones((2, 3), dtype=np.float32)
    recorded = check.Recorded("case", "t5", values, 1, (2, 3))
    assert recorded.compare(values).agrees
    for other in (values * np.nan, values.T, np.ones((2, 4)), np.ones(0)):
        assert not recorded.compare(other).agrees
    length = check.Recorded("case", "length", np.array(1_000_000), 1, ())
    assert length.compare(np.array(1_000_000)).agrees
    assert not length.compare(np.array(1_000_001)).agrees


def test_a_case_without_pictures_has_empty_stages_of_them() -> None:
    recorded = check.Recorded("none", "proj", np.zeros((0, 32, 64)), 1, (0, 32, 64))
    assert recorded.compare(np.zeros((0, 32, 64))).agrees


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: (folder / "golden.npz").unlink(), "golden.npz"),
        (lambda folder: (folder / "golden.npz").write_bytes(b"PK\3\4 cut off"), "golden"),
        (lambda folder: (folder / "golden.json").write_text("{"), "golden"),
        (lambda folder: (folder / "golden.json").write_text('{"salt": ""}'), "cases"),
        (lambda folder: (folder / "keys_reduced.json").write_text('{"t_block.1.bias": [5]}'), "missing"),
        (lambda folder: write(folder, {"none.block7": np.zeros(1)}, CASES, ""), "block7"),
        (lambda folder: write(folder, {"none.nonsense": np.zeros(1)}, CASES, ""), "nonsense"),
        (lambda folder: write(folder, {"none.sample1": np.zeros(1)}, CASES, ""), "steps"),
        (lambda folder: write(folder, {"none.t5": np.zeros(1)}, CASES | {"none": CASES["none"] | {"n": 3}}, ""), "3"),
        (lambda folder: (folder / "keys_reduced.json").write_text("[]"), "keys_reduced.json"),
    ],
)
def test_what_is_no_golden_set_is_refused(break_it, said: str, tmp_path: Path, capsys) -> None:
    write(tmp_path, {"none.t5": np.zeros(1)}, CASES, "")
    break_it(tmp_path)
    assert check.main([str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_the_rule_tells_weights_apart_but_not_the_two_names_of_t5s_embedding() -> None:
    first, second = "t5_model.shared.weight", "t5_model.encoder.embed_tokens.weight"
    np.testing.assert_array_equal(made_up.weight(first, [5, 4]), made_up.weight(second, [5, 4]))
    assert not np.array_equal(made_up.weight(first, [5, 4]), made_up.weight(first, [5, 4], "pepper"))
