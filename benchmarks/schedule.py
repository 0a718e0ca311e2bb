"""Which calls of which graphs an image takes, in three variants; `benchmarks.baseline` has the first two as code.

- **published**, the authors' schedule (the forward of their MIGE_model.py): at every step the image encoder on four
  images a prompt, if any prompt has one, and the text encoder on max_tokens tokens; the conditioner and the denoiser
  for every branch. The padding, which passes their caption projection, too (0.1 % of the whole), is left out here.
- **encode_once**: what ours does, but with every branch.
- **ours**: each encoder once, on the images and tokens that there are, and the branches whose weight is not zero. At
  the trained size the source's latents are those of the reference that it also is.
"""

from dataclasses import dataclass
from functools import cache

from benchmarks.baseline import IMAGE_SLOTS, all_branches
from benchmarks.case import Variant
from benchmarks.meter import Call, call
from export.inputs import sample_requests
from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE
from mige_rt.config import ModelConfig, Precision
from mige_rt.errors import InputError
from mige_rt.guidance import branches
from mige_rt.instruction import Task, compose_prompt
from mige_rt.prompt_tokens import tokenize_prompt
from mige_rt.sampling_params import SamplingParams
from mige_rt.scheduler import make_schedule
from mige_rt.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """What is counted: `batch` images of one task, made at once. None is the model's default."""

    task: Task = "edit"
    references: int = 1  # images of each prompt; in an edit all are the source, in other tasks all differ
    tokens: int | None = None  # of each prompt, with the image tokens and the end; None: of a sample prompt
    num_inference_steps: int | None = None
    batch: int = 1
    size: tuple[int, int] | None = None  # (width, height) in pixels
    precision: Precision = "fp16"
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None


def schedule(config: ModelConfig, variant: Variant, options: WorkOptions) -> list[Call]:
    """The variant's calls. Raises InputError when the options do not fit the model or the variant."""
    task, references, batch = options.task, options.references, options.batch
    width, height = options.size or (config.size, config.size)
    if references < (task != "subject") or (variant == "published" and references > IMAGE_SLOTS):
        expected = f"{task} takes at least {int(task != 'subject')}, and the published variant at most {IMAGE_SLOTS}"
        raise InputError(f"the number of references is {references}; {expected}")
    names = ("num_inference_steps", "guidance_scale", "image_guidance_scale")
    params = SamplingParams(**{name: getattr(options, name) for name in names}).with_defaults(config, task)
    evaluations = len(make_schedule(params.scheduler, params.num_inference_steps, config.prediction))
    length = prompt_tokens(config, task, references) if options.tokens is None else options.tokens
    guidance = all_branches(task)
    if variant == "ours":
        guidance = branches(params.guidance_scale, None if task == "subject" else params.image_guidance_scale)

    images = batch * (min(references, 1) if task == "edit" else references)
    encodings, slots, encoded_length = 1, images, length
    if variant == "published":
        encodings, slots, encoded_length = evaluations, batch * IMAGE_SLOTS if references else 0, config.max_tokens
    rows = batch * len(guidance)
    trained = config.size // config.vae.factor
    h, w = height // config.vae.factor, width // config.vae.factor
    shared = batch if variant != "published" and task != "subject" and (h, w) == (trained, trained) else 0

    calls = []
    if images > shared:
        calls.append(call("vae_encoder", M=images - shared, eh=trained, ew=trained))
    if references:
        calls.append(call("image_encoder", encodings, N=slots))
    calls.append(call("text_encoder", encodings, B=batch, N=max(slots, 1), L=encoded_length))
    calls.append(call("conditioner", encodings, R=rows, L=length))
    if task != "subject":
        calls.append(call("vae_encoder", M=batch, eh=h, ew=w))
    calls.append(call("denoiser", evaluations, R=rows, L=length, h=h, w=w))
    calls.append(call("vae_decoder", B=batch, h=h, w=w))
    return calls


def prompt_tokens(config: ModelConfig, task: Task, references: int) -> int:
    """The length of a sample prompt with so many images, cut as the model cuts it, by the default model's tokenizer."""
    return min(_text_tokens(task) + references * config.qformer.queries, config.max_tokens)


@cache
def _text_tokens(task: Task) -> int:
    sample = next(request for request in sample_requests() if request.task == task)
    tokenize = load_tokenizer(DEFAULT_MODEL / TOKENIZER_FILE)
    text = compose_prompt(task, sample.prompt)
    return len(tokenize_prompt(text, range(len(sample.images)), tokenize, query_tokens=0).token_ids)
