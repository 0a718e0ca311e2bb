"""`mige-rt convert`, `export`, `build` and `info`: the way from a checkpoint to a bundle with plans."""

from pathlib import Path
from typing import Any, get_args

import click

from engines.plans import PLAN_ENGINES, PlanEngine
from mige_rt.cli.shared import PATH, LoraType, build_plans, progress
from mige_rt.config import Precision
from mige_rt.errors import InputError, requires
from mige_rt.terminal import console, echo, echo_json


@click.command()
@click.option("--ckpt", type=PATH, required=True, help="the published model.pth, or a folder that holds it")
@click.option("--out", type=PATH, required=True, help="the model folder to make")
@click.option("--vae", type=PATH, help="the folder sd-vae-ft-ema  [default: beside the checkpoint]")
@click.option("--tokenizer", type=PATH, help="the folder t5-v1_1-xxl  [default: beside the checkpoint]")
def convert(ckpt: Path, out: Path, vae: Path | None, tokenizer: Path | None) -> None:
    """Turn published weights into a model folder that `mige-rt run --model` opens."""
    with requires("torch", "converting"):
        from trainer.checkpoints.convert_published import convert as convert_checkpoint
    with progress("convert") as advance:
        convert_checkpoint(ckpt, out, vae=vae, tokenizer=tokenizer, on_progress=advance)
    echo(out)


_CAPABILITIES = click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    help="of the GPUs to build for, as 8.9; may be repeated; tensorrt-rtx only  [default: this machine's GPU's; where "
    "there is none, 8.0, 8.6, 8.9 and 12.0]",
)

_REFITTABLE = click.option(
    "--refittable",
    is_flag=True,
    help="plans whose weights TensorRT's Refitter can replace, as by another LoRA's; built on a GPU alone",
)


class _Sizes(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    name = "A-B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        parts = str(value).split("-")
        if len(parts) > 2 or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
            self.fail(
                f"{value!r} are no sizes; give the smallest and the largest side in pixels as 256-1024", param, ctx
            )
        return int(parts[0]), int(parts[-1])


@click.command()
@click.option(
    "--ckpt",
    default="tiny",
    show_default=True,
    help="the published model.pth or a folder with it, a model folder, a bundle, a repository on the Hugging Face hub, "
    "or tiny, the model that comes with mige-rt",
)
@click.option("--precision", default="fp32", show_default=True, help=", ".join(get_args(Precision)))
@click.option("--out", type=PATH, required=True, help="the bundle to make")
@click.option(
    "--engine",
    type=click.Choice(["onnxruntime", *PLAN_ENGINES]),
    default="onnxruntime",
    show_default=True,
    help="what to build for; every bundle runs on ONNX Runtime, the others get plans of their own besides",
)
@_CAPABILITIES
@_REFITTABLE
@click.option("--max-batch", type=click.IntRange(1, 63), default=4, show_default=True, help="images made at once")
@click.option(
    "--max-references",
    type=click.IntRange(1, 63),
    default=4,
    show_default=True,
    help="images that prompts refer to, for each of these",
)
@click.option("--size", type=click.IntRange(1), help="side of the images in pixels  [default: the trained size]")
@click.option("--sizes", type=_Sizes(), help="smallest and largest side instead, as 256-1024: flexible, slower plans")
@click.option("--vae", type=PATH, help="the folder sd-vae-ft-ema  [default: beside the checkpoint]")
@click.option("--tokenizer", type=PATH, help="the folder t5-v1_1-xxl  [default: beside the checkpoint]")
@click.option(
    "--bf16-text-encoder",
    is_flag=True,
    help="with fp16: T5 in bfloat16, for plans of half the memory; ONNX Runtime's CPU does not run it",
)
@click.option(
    "--lora",
    "loras",
    type=LoraType(),
    multiple=True,
    help="merge a LoRA of mige-rt train-lora into the weights first; may be repeated",
)
@click.option("--validate/--no-validate", default=True, show_default=True, help="compare every graph with PyTorch")
def export(ckpt: str, out: Path, precision: str, **options: Any) -> None:
    """Turn a checkpoint into a bundle of validated graphs that runs without PyTorch.

    \b
      mige-rt export --precision fp16 --out bundle
      mige-rt run --model bundle --prompt "make the background blue" --source docs/scene.png
    """
    with requires("torch", "exporting"):
        from export.exporter import ExportLimits, ExportOptions, export_bundle
        from export.table import exported_table
    if options["size"] is not None and options["sizes"] is not None:
        raise InputError("give either --size or --sizes")
    sizes = options["sizes"] or (None if options["size"] is None else (options["size"], options["size"]))
    limits = ExportLimits(options["max_batch"], options["max_references"], sizes)
    export_options = ExportOptions(
        **{name: options[name] for name in ("vae", "tokenizer", "validate", "bf16_text_encoder", "loras")}
    )
    engine, capabilities = options["engine"], options["capabilities"]
    if capabilities and engine != "tensorrt-rtx":
        raise InputError(f"--compute-capability is for --engine tensorrt-rtx, and {engine} was given")
    if options["refittable"] and engine not in PLAN_ENGINES:
        raise InputError(f"--refittable is for plans, of --engine {' or '.join(PLAN_ENGINES)}; {engine} was given")
    if engine in PLAN_ENGINES:
        from export.build_plans import check_request

        # now, since an export takes long
        check_request(engine, precision, capabilities or None, refittable=options["refittable"])
    with progress("export") as advance:
        try:
            result = export_bundle(ckpt, out, precision, limits, options=export_options, on_progress=advance)
        except RuntimeError as error:
            raise click.ClickException(str(error)) from error
    console(stderr=True).print(exported_table(result))
    echo(out)
    if engine in PLAN_ENGINES:
        build_plans(out, engine, capabilities or None, "auto", refittable=options["refittable"])


@click.command()
@click.option("--bundle", type=PATH, required=True, help="as `mige-rt export` writes; the plans are added to it")
@click.option("--engine", type=click.Choice(PLAN_ENGINES), required=True)
@_CAPABILITIES
@_REFITTABLE
@click.option("--device", default="auto", show_default=True, help="cuda, cuda:1: the GPU to build for")
def build(bundle: Path, engine: PlanEngine, capabilities: tuple[str, ...], refittable: bool, device: str) -> None:
    """Build, or build anew, a bundle's plans for TensorRT or TensorRT for RTX.

    \b
      mige-rt build --bundle bundle --engine tensorrt-rtx
      mige-rt run --model bundle --engine tensorrt-rtx --prompt "make the background blue" --source docs/scene.png

    TensorRT builds for this machine's GPU and measures on it, which takes minutes. TensorRT for RTX builds in seconds,
    without a GPU too, and compiles the rest when the plans are first run.
    """
    echo(build_plans(bundle, engine, capabilities or None, device, refittable=refittable))


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="for programs")
@click.option("--verify", is_flag=True, help="hash every file again")
def info(bundle: Path, as_json: bool, verify: bool) -> None:
    """Show what is inside a bundle."""
    from engines.plans import check_plans, read_plans
    from engines.trt_runtime import describe_plans
    from mige_rt.bundle import check_files, describe, read_manifest

    manifest = read_manifest(bundle)
    check_files(bundle, manifest, everything=verify)
    content = describe(bundle, manifest) | {"plans": describe_plans(bundle, manifest)}
    if verify:
        for plans in read_plans(bundle):
            check_plans(bundle, plans, everything=True)
        content["verified"] = True
    if as_json:
        echo_json(content)
        return
    from mige_rt.cli.bundle_tables import bundle_tables

    stdout = console()
    for part in bundle_tables(content):
        stdout.print(part)
