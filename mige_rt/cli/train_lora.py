"""`mige-rt train-lora`."""

from pathlib import Path
from typing import Any

import click

from mige_rt.cli.shared import PATH, progress
from mige_rt.errors import InputError, requires
from mige_rt.terminal import echo, report

MEAN_OVER = 50  # steps, of the losses that are printed


@click.command("train-lora")
@click.option(
    "--instance-images",
    "--instance-data-dir",
    "images",
    type=PATH,
    help="folder with images of one new thing, each perhaps with its prompt in a .txt file of the same name",
)
@click.option(
    "--instance-prompt",
    "prompt",
    help="of the images without such a file; an <imagehere> stands for the thing, as another image shows it",
)
@click.option("--data", type=PATH, help="a manifest instead, as mige-rt data prepare reads it: JSON lines")
@click.option("--out", "--output-dir", "out", type=PATH, required=True, help="the folder for lora_weights.safetensors")
@click.option(
    "--model",
    default="tiny",
    show_default=True,
    help="a model folder, a bundle, the published model.pth or a folder with it, a repository on the Hugging Face hub, "
    "or tiny, the model that comes with mige-rt",
)
@click.option("--rank", "--lora-rank", "rank", type=int, default=16, show_default=True, help="of each layer's change")
@click.option("--lora-alpha", "alpha", type=float, help="the change is multiplied by alpha / rank  [default: the rank]")
@click.option(
    "--lora-targets",
    "targets",
    help="the layers to adapt, as names or parts of names between commas  [default: attn,cross_attn,kv_linears, the "
    "attention of the DiT]",
)
@click.option("--max-train-steps", type=int, default=500, show_default=True)
@click.option("--train-batch-size", type=int, default=4, show_default=True)
@click.option("--gradient-accumulation-steps", type=int, default=1, show_default=True, help="batches in a step")
@click.option("--learning-rate", type=float, default=1e-4, show_default=True)
@click.option("--lr-scheduler", default="constant", show_default=True, help="one of diffusers', as cosine")
@click.option(
    "--lr-warmup-steps",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="steps over which the rate rises, with a scheduler such as constant_with_warmup",
)
@click.option("--max-grad-norm", type=float, default=1.0, show_default=True)
@click.option("--mixed-precision", type=click.Choice(["no", "bf16"]), default="no", show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="of every random draw")
def train_lora(model: str, out: Path, **values: Any) -> None:
    """Fine-tune a model by LoRA, on a few images of one new thing or on a small manifest.

    \b
      mige-rt train-lora --instance-images frog --instance-prompt "a <imagehere>" --out my-frog
      mige-rt run --lora my-frog --prompt "a <imagehere> on the left" --image frog/1.png
      mige-rt export --lora my-frog --out bundle
    """
    images, data = values.pop("images"), values.pop("data")
    prompt, targets = values.pop("prompt"), values.pop("targets")
    if (images is None) == (data is None):
        raise InputError("give either --instance-images or --data")
    if data is not None and prompt is not None:
        raise InputError("the prompts stand in the lines of the --data file; leave --instance-prompt out")
    with requires("train", "fine-tuning"):
        from export.exporter import locate_checkpoint
        from trainer.data.instance_images import instance_samples
        from trainer.data.manifest import open_manifest
        from trainer.lora import DEFAULT_TARGETS, LoraOptions
        from trainer.train_lora import FineTuningOptions
        from trainer.train_lora import train_lora as fine_tune

    chosen = DEFAULT_TARGETS if targets is None else tuple(name.strip() for name in targets.split(",") if name.strip())
    lora = LoraOptions(values.pop("rank"), values.pop("alpha"), chosen)
    samples = open_manifest(data) if data is not None else instance_samples(images, prompt)
    with progress("train") as advance:
        tuned = fine_tune(
            locate_checkpoint(model), samples, out, lora, FineTuningOptions(**values), on_progress=advance
        )
    first, last = tuned.losses[:MEAN_OVER], tuned.losses[-MEAN_OVER:]
    report(
        f"{len(samples)} samples, {tuned.layers} layers, {tuned.parameters:,} numbers; the loss went from "
        f"{sum(first) / len(first):.3f} to {sum(last) / len(last):.3f}"
    )
    echo(tuned.path)
