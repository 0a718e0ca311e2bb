"""`mige-rt train`: runs of two processes that are killed and go on, steps that are skipped, checkpoints, bad input."""

import json
import pickle
import resource
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from click.testing import CliRunner
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from webdataset.writer import TarWriter

import trainer
from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.cli import main
from mige_rt.config import PRESETS, ModelConfig
from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline
from mige_rt.scheduler import TRAIN_STEPS
from trainer.checkpoints.model_folder import load_model, save_model
from trainer.checkpoints.open_checkpoint import CheckpointLocation
from trainer.data.encode import load_encoders
from trainer.data.mixing import MixedBatches, Source
from trainer.data.prepared import INDEX_FILE
from trainer.loop import LossGuard, make_optimiser
from trainer.model.mige import Mige
from trainer.objective import sample_losses
from trainer.run.average import WeightAverage
from trainer.run.checkpoints import Checkpoints, SavedRun, load_tensors, saved_runs
from trainer.run.config import (
    CheckpointSettings,
    LogSettings,
    RunConfig,
    Start,
    ValidationSettings,
    load_run_config,
)
from trainer.run.estimate import estimate, longest_batch
from trainer.run.module import make_trained_module, share, trained_parameters
from trainer.run.save import save_run
from trainer.run.start import StartWeights, open_start
from trainer.run.train import FREE, RunOptions, check_encoders, make_state, train_run

sys.path.insert(0, str(Path(__file__).parent))
from pretrained_files import small_numbers, states, write_folders, write_pth
from two_processes import alone_refused, launch, run, run_killed_while_saving

CONFIGS = Path(trainer.__file__).parent / "configs"

TINY = PRESETS["tiny"]
TASKS: dict[str, dict[str, Any]] = {
    "subject": {"prompt": "a <imagehere> in the rain", "source": None, "images": [1]},
    "edit": {"prompt": "make the <imagehere> blue", "source": 1, "images": [1]},
}


@cache
def default_encoders() -> str:
    return load_encoders(CheckpointLocation(DEFAULT_MODEL), "cpu").fingerprint()


def make_prepared(folder: Path, task: str, sizes: ModelConfig, samples: int = 6, encoders: str | None = None) -> Source:
    """A prepared set of random features, said to be of the default model's encoders, or of others."""
    folder.mkdir()
    random = np.random.default_rng(len(task))
    side = sizes.dit.trained_grid * sizes.dit.patch
    patches = 1 + (sizes.vision.side // sizes.vision.patch) ** 2
    with (folder / "shard-000000.tar").open("wb") as file, TarWriter(file) as tar:
        for i in range(samples):
            latents = random.standard_normal((2, 2 * sizes.vae.channels, side, side)) * 0.5
            vit = random.standard_normal((1, patches, sizes.vision.width))
            values = {"id": f"{task}-{i}", "task": task, "target": 0, "images_vit": [0], **TASKS[task]}
            arrays = {"latents.npy": latents.astype(np.float16), "vit.npy": vit.astype(np.float16)}
            tar.write({"__key__": f"{i}", "json": values, **arrays})
    index = {
        "schema": 1,
        "config": sizes.to_json(),
        "encoders": encoders or default_encoders(),
        "encoders_float16": encoders,
        "samples": samples,
        "tasks": {task: samples},
        "shards": [{"name": "shard-000000.tar", "samples": samples}],
    }
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return Source(str(folder))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Four steps of the default model, with a checkpoint after two, and a line of the log for each."""
    folder = tmp_path_factory.mktemp("sources")
    return RunConfig(
        model="tiny",
        start=Start(model=str(DEFAULT_MODEL)),
        sources=tuple(make_prepared(folder / task, task, TINY) for task in TASKS),
        trained=("image_encoder", "text_encoder", "conditioner", "denoiser"),
        steps=4,
        batch=8,
        micro_batch=2,
        base_rate=1e-3,
        warmup=2,
        weight_decay=0.03,
        epsilon=1e-10,
        clip=0.01,
        seed=5,
        precision="fp32",
        distributed="ddp",
        reshard=True,
        activation_checkpointing=False,
        checkpoints=CheckpointSettings(every=2),
        log=LogSettings(every=1, tensorboard=False),
        ema=0.9,
        spike=10.0,
    )


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_time(out: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "hours"} for line in lines(out)]


def tensor_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.distcp")}


@pytest.fixture(scope="module")
def free_port() -> Callable[[], int]:
    def find() -> int:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            return server.getsockname()[1]

    return find


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def shared_run(
    request: pytest.FixtureRequest,
    config: RunConfig,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[RunConfig, Path]:
    """An unbroken run of two processes."""
    shared = replace(config, distributed=request.param, activation_checkpointing=request.param == "fsdp2")
    out = tmp_path_factory.mktemp(request.param) / "whole"
    assert launch(run, free_port(), shared, RunOptions(out)) == [0, 0]
    return shared, out


def test_a_killed_run_goes_on_to_the_last_bit(
    shared_run: tuple[RunConfig, Path], free_port: Callable[[], int], tmp_path: Path
) -> None:
    shared, whole = shared_run
    out = tmp_path / "killed"
    codes = launch(run_killed_while_saving, free_port(), shared, RunOptions(out), 4)
    assert codes[0] == -9 and codes[1] != 0
    assert [saved.step for saved in saved_runs(out)] == [2]
    assert launch(run, free_port(), shared, RunOptions(out, "latest")) == [0, 0]
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]
    assert without_time(out) == without_time(whole)
    files = tensor_files(whole / "checkpoint-4")
    assert len(files) == 2  # each process writes its part
    assert tensor_files(out / "checkpoint-4") == files
    assert not list(out.glob("*.partial*"))


def test_shared_and_whole_weights_learn_the_same(shared_run: tuple[RunConfig, Path]) -> None:
    """The mean gradient of all processes' batches, of which each exchange takes a part."""
    shared, whole = shared_run
    losses = [line["loss"] for line in lines(whole)]
    assert losses == pytest.approx(FIRST_LOSSES.setdefault("losses", losses), rel=1e-4)
    assert all(line["norm"] > shared.clip for line in lines(whole))
    rates = [line["rate"] for line in lines(whole)]
    assert rates == pytest.approx([shared.rate / 2, shared.rate, shared.rate, shared.rate])


FIRST_LOSSES: dict[str, list[float]] = {}  # of ddp, which comes first


def test_what_is_for_one_process_says_so_before_it_opens_a_model(free_port: Callable[[], int], tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    assert launch(alone_refused, free_port(), CONFIGS / "tiny.toml", CONFIGS / "study", said) == [0, 0]
    rest = "runs in one process, and 2 were started; start it without accelerate launch"
    for rank in range(2):
        assert said.with_suffix(f".{rank}").read_text() == f"the stage mige {rest}\na study {rest}"


# --- one process ---


@pytest.fixture
def alone(config: RunConfig) -> RunConfig:
    return replace(config, batch=2, micro_batch=2, steps=2)


def test_the_trained_model_is_a_model_folder_that_runs(alone: RunConfig, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    trained = replace(alone, trained=("denoiser",), log=LogSettings(every=1, tensorboard=True))
    train_run(trained, RunOptions(run_folder))
    names = {name for line in lines(run_folder) for name in line}
    assert {"loss", "norm", "rate", "loss/subject", "loss/edit"} <= names
    assert any(name.startswith("loss/t") for name in names)
    assert list((run_folder / "tensorboard").glob("events.out.tfevents.*"))
    pipe = MigePipeline.from_pretrained(save_run(trained, run_folder, None, tmp_path / "model"), engine="pytorch")
    assert pipe("a red apple", num_inference_steps=2).images[0].size == (64, 64)
    start = MigePipeline.from_pretrained(DEFAULT_MODEL, engine="pytorch", precision="fp32").engine.model  # type: ignore[attr-defined]
    model = pipe.engine.model  # type: ignore[attr-defined]
    moved, kept = "final_layer.linear.weight", "y_proj.fc1.weight"
    weights, before = model.denoiser.state_dict()[moved].float(), start.denoiser.state_dict()[moved].float()
    assert not torch.allclose(weights, before, atol=1e-6)
    before = start.conditioner.state_dict()[kept].half().float()
    torch.testing.assert_close(model.conditioner.state_dict()[kept].float(), before)


def test_checkpoints_are_the_same_where_activations_are_computed_again(alone: RunConfig, tmp_path: Path) -> None:
    """The run goes on without, and its model is saved with and without."""
    wrapped = replace(alone, trained=("denoiser",), activation_checkpointing=True)
    plain = replace(wrapped, activation_checkpointing=False)
    train_run(wrapped, RunOptions(tmp_path / "run", max_steps=1))
    models = [save_run(run, tmp_path / "run", None, tmp_path / str(k)) for k, run in enumerate((wrapped, plain))]
    assert load_model(models[0]).config == load_model(models[1]).config
    train_run(plain, RunOptions(tmp_path / "run", "latest"))
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]


def test_validation_measures_shows_and_changes_nothing(alone: RunConfig, tmp_path: Path) -> None:
    """Its losses are those of the averaged weights, at the same noise each time; the run goes on as without it."""
    held_out = make_prepared(tmp_path / "held-out", "subject", TINY, samples=3)
    settings = ValidationSettings(str(held_out.path), every=1, batches=2, images=2, num_inference_steps=2)
    validated = replace(alone, validation=settings, ema=1.0, log=LogSettings(every=10, tensorboard=True))
    train_run(alone, RunOptions(tmp_path / "plain"))
    train_run(validated, RunOptions(tmp_path / "run"))
    first, second = lines(tmp_path / "run")
    assert first["validation/loss"] == second["validation/loss"] > 0  # an average that stays at the start
    assert "validation/loss/subject" in first and "validation/loss/edit" not in first
    plain = {name: value for name, value in lines(tmp_path / "plain")[1].items() if name != "hours"}
    assert {name: second[name] for name in plain} == plain
    assert saved_runs(tmp_path / "run")[-1].loss == second["validation/loss"]
    shown = [Image.open(tmp_path / f"run/images/step-{step:08d}.png") for step in (1, 2)]
    assert np.array_equal(np.asarray(shown[0]), np.asarray(shown[1])) and np.asarray(shown[0]).std() > 10
    other = replace(settings, path=str(tmp_path / "none"))
    with pytest.raises(InputError, match="none is no prepared set"):
        train_run(replace(alone, validation=other), RunOptions(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.long
def test_compiled_layers_learn_the_same(alone: RunConfig, tmp_path: Path) -> None:
    train_run(alone, RunOptions(tmp_path / "plain"))
    train_run(replace(alone, compile="inductor"), RunOptions(tmp_path / "compiled"))
    losses = [[line["loss"] for line in lines(tmp_path / name)] for name in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


class Broken:
    """A loss that is not a number at some steps, without a model."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.step = steps, 0

    def __call__(self, module: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
        self.step += 1
        weight = next(parameter for parameter in module.parameters() if parameter.requires_grad)
        return weight.square().sum() * (float("nan") if self.step in self.steps else 1.0), {}


def test_a_step_that_is_not_finite_is_skipped(
    alone: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = replace(alone, trained=("image_encoder",), checkpoints=CheckpointSettings(every=1))
    monkeypatch.setattr("trainer.run.train.RunLoss", lambda sizes: Broken({2}))
    train_run(only, RunOptions(tmp_path / "run"))
    first, skipped, *_ = lines(tmp_path / "run")
    assert first["loss"] > 0 and skipped["skipped"] and skipped["loss"] == "nan"
    weights = [(tmp_path / f"run/checkpoint-{step}" / "__0_0.distcp").read_bytes() for step in (1, 2)]
    assert weights[0] == weights[1]


def test_ten_steps_in_a_row_stop_the_run(alone: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = replace(alone, trained=("image_encoder",), steps=20, checkpoints=CheckpointSettings(every=2))
    monkeypatch.setattr("trainer.run.train.RunLoss", lambda sizes: Broken(set(range(3, 21))))
    with pytest.raises(InputError, match=r"10 steps in a row .* up to step 12; .*rejected.json"):
        train_run(only, RunOptions(tmp_path / "run"))
    rejected = json.loads((tmp_path / "run" / "rejected.json").read_text())
    assert [step["step"] for step in rejected] == list(range(3, 13))
    assert all(len(step["ids"]) == 2 and step["ids"][0].split("-")[0] in TASKS for step in rejected)
    # With a lower base_rate it goes on from before.
    monkeypatch.setattr("trainer.run.train.RunLoss", lambda sizes: Broken(set()))
    adjusted = replace(only, base_rate=5e-4, clip=0.5, spike=None)
    train_run(adjusted, RunOptions(tmp_path / "run", str(tmp_path / "run" / "checkpoint-2"), max_steps=4))
    changed, third, fourth = lines(tmp_path / "run")[2:]
    assert changed == {"step": 3, "changed": {"base_rate": 5e-4, "clip": 0.5, "spike": None}}
    assert third["rate"] == fourth["rate"] == adjusted.rate
    assert saved_runs(tmp_path / "run")[-1].guard["spike"] is None


def test_a_spike_is_one_after_enough_steps() -> None:
    guard = LossGuard(spike=4.0)
    assert all(guard.accepts(1.0, 1.0) for _ in range(guard.WARM))
    assert not guard.accepts(4.1, 1.0) and guard.accepts(3.9, 1.0)
    assert not guard.accepts(1.0, float("inf")) and not guard.accepts(float("nan"), 1.0)
    assert guard.rejected == 2 and 1.0 < guard.mean < 1.1
    early = LossGuard(spike=4.0)
    assert early.accepts(1.0, 1.0) and early.accepts(100.0, 1.0)


def test_the_moving_average_starts_at_the_weights() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    average = WeightAverage({"a": weight}, 0.75)
    with torch.no_grad():
        weight += 4
    average.update()
    torch.testing.assert_close(average.weights["a"], torch.tensor([2.0, 3.0]))


# --- checkpoints ---


def saved(out: Path, step: int, loss: float = 1.0) -> SavedRun:
    return SavedRun(out / f"checkpoint-{step}", step, 0.0, loss, {}, {"seed": 1})


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Accelerator(), total_limit=2)
    for step, loss in enumerate((3.0, 1.0, 2.0, 2.5, 1.5), 1):
        checkpoints.save(saved(tmp_path, step, loss), {"a": torch.full((3,), float(step))})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    latest = checkpoints.find("latest")
    assert latest is not None and latest.step == 5
    read = {"a": torch.zeros(3)}
    load_tensors(latest, read)
    assert read["a"].tolist() == [5.0, 5.0, 5.0]


def test_an_earlier_checkpoint_is_gone_on_from(alone: RunConfig, tmp_path: Path) -> None:
    """What it led to before is neither the latest one, nor a reason to remove what is written now."""
    config = replace(alone, trained=("image_encoder",), steps=4, checkpoints=CheckpointSettings(1, total_limit=2))
    train_run(replace(config, checkpoints=CheckpointSettings(1)), RunOptions(tmp_path / "run"))
    for number in (1, 2):
        train_run(config, RunOptions(tmp_path / "run", str(tmp_path / "run" / "checkpoint-1"), max_steps=2))
        assert saved_runs(tmp_path / "run")[-1].step == 2
        assert (tmp_path / "run" / f"checkpoint-2.aside-{number}" / "run.json").is_file()
    assert {path.name for path in (tmp_path / "run").glob("*-[34]*")} == {
        "checkpoint-3.aside-1",
        "checkpoint-4.aside-1",
    }


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Accelerator(), total_limit=1)
    checkpoints.save(saved(tmp_path, 1), {"a": torch.ones(100_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(InputError, match=r"checkpoint-2 could not be written .*make room.*checkpoint-1 is whole"):
            checkpoints.save(saved(tmp_path, 2), {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    read = {"a": torch.zeros(100_000)}
    load_tensors(saved_runs(tmp_path)[0], read)
    assert read["a"].min() == 1


def test_half_removed_checkpoints_are_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Accelerator(), total_limit=None)
    checkpoints.save(saved(tmp_path, 1), {"a": torch.ones(3)})
    checkpoints.save(saved(tmp_path, 2), {"a": torch.ones(3)})
    (tmp_path / "checkpoint-2" / "run.json").unlink()
    latest = Checkpoints(tmp_path, Accelerator(), total_limit=None).find("latest")
    assert latest is not None and latest.step == 1 and not (tmp_path / "checkpoint-2").exists()


def test_a_damaged_checkpoint_is_passed_over_beside_whole_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Accelerator(), total_limit=1)
    checkpoints.save(saved(tmp_path, 1), {"a": torch.ones(3)})
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "run.json").touch()  # as a power cut may leave it
    with pytest.warns(UserWarning, match=r"passed over: .*checkpoint-2 is no checkpoint of a run"):
        latest = checkpoints.find("latest")
    assert latest is not None and latest.step == 1
    with pytest.warns(UserWarning, match="passed over"):
        checkpoints.save(saved(tmp_path, 3, 0.5), {"a": torch.ones(3)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    shutil.rmtree(tmp_path / "checkpoint-3")
    with pytest.raises(InputError, match=r"checkpoint-2 is no checkpoint of a run"):
        checkpoints.find("latest")


def test_a_checkpoint_is_data(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Accelerator(), total_limit=None)
    checkpoints.save(saved(tmp_path, 1), {"a": torch.ones(3)})
    (tmp_path / "checkpoint-1" / ".metadata").write_bytes(pickle.dumps(shutil.rmtree))
    with pytest.raises(InputError, match=r"names shutil.rmtree, which no checkpoint of a run does"):
        load_tensors(saved_runs(tmp_path)[0], {"a": torch.zeros(3)})


# --- bad input ---


def test_a_batch_that_does_not_divide_is_refused(config: RunConfig) -> None:
    assert replace(config, batch=960, micro_batch=20).accumulation(48) == 1
    with pytest.raises(
        InputError, match=r"batch is 8, which 3 processes of micro_batch 2 do not .*multiple of 6, such as 6 or 12"
    ):
        config.accumulation(3)


def test_a_run_of_another_config_is_not_gone_on_with(alone: RunConfig, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Accelerator(), total_limit=None)
    values = {name: value for name, value in alone.to_json().items() if name not in FREE}
    fixed = json.loads(json.dumps({**values, "processes": 2, "seed": 6, "sources": []}))
    checkpoints.save(replace(saved(tmp_path, 1), config=fixed), {"a": torch.ones(3)})
    with pytest.raises(InputError, match="holds the checkpoints of a run: go on with --resume-from-checkpoint latest"):
        train_run(alone, RunOptions(tmp_path))
    for resume in ("latest", str(tmp_path / "checkpoint-1")):
        with pytest.raises(InputError) as caught:
            train_run(alone, RunOptions(tmp_path, resume))
        message = str(caught.value)
        assert "seed is 6 in the checkpoint and 5 in the config" in message
        assert "processes is 2 in the checkpoint and 1 in the config" in message
        assert "sources is [] in the checkpoint" in message and "base_rate" not in message


def test_checkpoints_with_an_earlier_versions_names_are_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Accelerator(), total_limit=None)
    checkpoints.save(saved(tmp_path, 1), {"module.blocks.0._checkpoint_wrapped_module.a": torch.ones(3)})
    read = {"module.blocks.0.a": torch.zeros(3)}
    load_tensors(saved_runs(tmp_path)[0], read)
    assert read["module.blocks.0.a"].tolist() == [1, 1, 1]


def test_a_model_is_saved_of_its_own_config_and_whole_files_alone(alone: RunConfig, tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "model"
    config = replace(alone, trained=("image_encoder", "conditioner"), steps=1)
    train_run(config, RunOptions(folder))
    start, tokenizer = load_model(DEFAULT_MODEL), Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.no_grad():
        start.denoiser.final_layer.linear.weight += 1.0
    save_model(start, tokenizer, tmp_path / "start", torch.float16, "made up")
    refused = {
        r"trained\W.*'conditioner'\] in the checkpoint and \['image_encoder'\]": {"trained": ("image_encoder",)},
        "ema is True in the checkpoint and False in the config; give the config that it was": {"ema": None},
        "start_weights.untrained is ": {"start": Start(model=str(tmp_path / "start"))},
    }
    for message, changed in refused.items():
        with pytest.raises(InputError, match=message):
            save_run(replace(config, **changed), folder, None, out)
    elsewhere = replace(config, batch=2, seed=6, ema=0.5, precision="bf16", sources=(Source("moved"),))
    assert load_model(save_run(elsewhere, folder, None, tmp_path / "saved")).config == start.config
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"run.tokenizer.json is not a readable tokenizer.json"):
        save_run(config, folder, None, out)
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    for file in (folder / "checkpoint-1").glob("*.distcp"):
        file.unlink()
    with pytest.raises(InputError, match=r"checkpoint-1 cannot be read .*; give another checkpoint"):
        save_run(config, folder, None, out)
    assert not out.exists()


def test_sizes_that_do_not_fit_are_listed(alone: RunConfig, tmp_path: Path) -> None:
    other = replace(TINY, text=replace(TINY.text, depth=2), max_tokens=64)
    sources = (make_prepared(tmp_path / "other", "edit", other),)
    with pytest.raises(InputError) as caught:
        train_run(replace(alone, sources=sources), RunOptions(tmp_path / "run"))
    message = str(caught.value)
    assert "text.depth is 2 in sources and 3 in model tiny; max_tokens is 64 in sources" in message
    assert not (tmp_path / "run").exists()


def test_a_model_saved_in_float16_has_the_encoders_that_it_was_saved_from() -> None:
    encoders = load_encoders(CheckpointLocation(DEFAULT_MODEL), "cpu")
    for module in (encoders.vae, encoders.image_encoder):
        module.half()
    whole = load_encoders(CheckpointLocation(DEFAULT_MODEL), "cpu")
    next(whole.vae.parameters()).data *= 1 + 1e-5  # which float16 does not hold
    assert whole.fingerprint() != default_encoders()
    assert encoders.fingerprint(rounded=True) == whole.fingerprint(rounded=True)
    next(whole.vae.parameters()).data *= 1.01
    assert encoders.fingerprint(rounded=True) != whole.fingerprint(rounded=True)


def test_features_of_another_models_encoders_are_refused(
    alone: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = (make_prepared(tmp_path / "other", "edit", TINY, encoders="others"),)
    with pytest.raises(
        InputError, match=r"prepared with another VAE or ViT than the start's, .*tiny; prepare them with"
    ):
        train_run(replace(alone, sources=sources), RunOptions(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    mixed, weights = MixedBatches(sources, 1, 0), StartWeights.of(open_start(alone.start, TINY, 0), alone.trained)
    for of_start, of_sources in (("encoders", ("others", "another")), ("encoders_float16", ("another", "others"))):
        mixed.encoders = of_sources  # one of the two is enough
        check_encoders(alone, replace(weights, **{of_start: "others"}), mixed, Accelerator())
    mixed.encoders = "others", None  # an earlier version's, which may be of another precision: that is said
    check_encoders(alone, weights, mixed, Accelerator())
    assert "unless only their precision differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("micro_batch:", "microbatch:", "unknown microbatch, did you mean micro_batch?; missing micro_batch"),
        ("  every: 500", "  evry: 500", "unknown checkpoints.evry, did you mean every?; missing checkpoints.every"),
        ("  - path: prepared/edit", "  - pathh: prepared/edit", "unknown sources[1].pathh, did you mean path?"),
        ("batch: 960", "batch: 0", "batch is 0, expected a number greater than 0"),
        ("clip: 0.01", "clip: much", "clip is 'much', expected a number"),
        ("model: xl", "model: xxl", "model is 'xxl', expected one of xl, reduced, tiny"),
        ("distributed: fsdp2", "distributed: fsdp", "distributed is 'fsdp'"),
        ("  blip2: ", "  # blip2: ", "start lacks blip2"),
        ("start:", "start:\n  model: MIGE", "start has a model and"),
        ("trained: [image_encoder, ", "trained: [vae_encoder, ", "trained[0] is 'vae_encoder'"),
        ("seed: ", "seed: 9999999999", "expected a number less than or equal to 4294967295"),
        ("log:", "log: [", "cannot be read as a YAML file"),
    ],
)
def test_a_config_with_a_mistake_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    content = (CONFIGS / "xl.yaml").read_text()
    assert old in content
    path = tmp_path / "config.yaml"
    path.write_text(content.replace(old, new, 1))
    result = CliRunner().invoke(main, ["train", "--config", str(path), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.stderr
    assert not (tmp_path / "run").exists()


# --- the shipped configs ---


def test_the_published_recipe_is_shipped() -> None:
    recipes = {name: load_run_config(CONFIGS / f"{name}.yaml") for name in ("xl", "xl-8gpu", "xl-1gpu", "tiny")}
    xl = recipes["xl"]
    assert (xl.batch, xl.clip, xl.warmup, xl.weight_decay, xl.epsilon) == (960, 0.01, 1000, 0.03, 1e-10)
    assert xl.rate == pytest.approx(1e-5 * (960 / 256) ** 0.5) and xl.precision == "bf16"
    assert len(xl.trained) == 4
    assert [xl.accumulation(48), recipes["xl-8gpu"].accumulation(8), recipes["xl-1gpu"].accumulation(1)] == [1, 6, 80]
    zero2 = HfDeepSpeedConfig(str(CONFIGS / "deepspeed-zero2.json"))
    assert zero2.is_zero2() and zero2.is_true("bf16.enabled")
    assert zero2.get_value("train_batch_size") == xl.batch
    assert zero2.get_value("train_micro_batch_size_per_gpu") == xl.micro_batch
    assert zero2.get_value("gradient_clipping") == xl.clip


def test_reduced_trains_on_made_up_files_from_end_to_end(
    alone: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reduced = PRESETS["reduced"]
    torch.manual_seed(0)
    write_folders(tmp_path, reduced)
    start = write_pth(tmp_path, states(reduced, small_numbers))
    sources = (make_prepared(tmp_path / "edit", "edit", reduced, samples=2),)
    config = replace(alone, model="reduced", start=start, sources=sources, ema=None, batch=1, micro_batch=1)
    train_run(config, RunOptions(tmp_path / "run"))
    assert "prepared with another VAE or ViT" in capsys.readouterr().err  # said, since none can prepare with the files
    assert [np.isfinite(line["loss"]) for line in lines(tmp_path / "run")] == [True, True]
    assert [one.step for one in saved_runs(tmp_path / "run")] == [2]


# --- the estimate ---


def test_the_estimated_memory_is_what_a_step_holds(config: RunConfig) -> None:
    one = replace(config, batch=2, micro_batch=2, ema=None)
    accelerator = Accelerator()
    part = make_trained_module(Mige(TINY), one)
    module, batch = share(part, accelerator, one), longest_batch(one)
    optimiser = make_optimiser(trained_parameters(part).values(), one.optimisation(1))
    make_state(optimiser)
    tracker = MemTracker()
    tracker.track_external(part, optimiser)
    with tracker:
        losses = sample_losses(TINY, module, batch, torch.randint(TRAIN_STEPS, (2,))).losses
        losses.mean().backward()
        optimiser.step()
    held = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert sum(estimate(one, 1, 1e12).bytes_by_part.values()) == pytest.approx(held, rel=0.2)


def test_a_full_size_step_is_estimated_without_memory() -> None:
    arguments = ["train", "--config", str(CONFIGS / "xl.yaml"), "--estimate", "--gpus", "48"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    assert "xl: 5.49 B parameters in training, 5.49 B of them trained" in result.stdout
    petaflop = float(result.stdout.partition("time: ")[2].split()[0])
    tokens, patches, text, dit = 256, 1024, 4.7e9, 0.6e9  # of a sample, and parameters
    # Two operations for each weight, forwards twice, because of checkpointing, and backwards twice.
    assert petaflop == pytest.approx(960 * 8 * (text * tokens + dit * patches) / 1e15, rel=0.2)
    assert "samples/s" in result.stdout and "days for 30000 steps" in result.stdout
