"""Which calls of which graphs a picture is, in three programs.

- **published**, the authors' schedule (the forward of their MIGE_model.py): at every step the image encoder on four
  pictures a prompt, if any prompt has one, and the text encoder on max_tokens tokens, once for all guidance branches;
  the text's projections and the denoiser for every branch, three where there is a source and two where there is none.
  Its cross-attention sees the L real tokens alone; its caption projection passes the padding, too, which is left out
  here (0.1 % of the whole). The VAE runs once on the references, the source and the result.
- **encode_once**: what ours does, but with every branch.
- **ours**, as `mige_rt.pipeline` does: each encoder once, on the pictures and tokens that there are, and the branches
  whose weight is not zero.

`benchmarks.baseline` has the first two as programs that run.
"""

from functools import cache
from typing import Literal, get_args

from benchmarks.baseline import PICTURE_SLOTS, all_branches
from benchmarks.meter import Call, call
from export.inputs import sample_requests
from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE
from mige_rt.config import ModelConfig, TaskDefaults
from mige_rt.errors import InputError
from mige_rt.guidance import branches
from mige_rt.instruction import Task, compose_prompt
from mige_rt.prompt_tokens import tokenize_prompt
from mige_rt.scheduler import make_schedule
from mige_rt.tokenizer import load_tokenizer

Program = Literal["published", "encode_once", "ours"]


def schedule(
    config: ModelConfig,
    program: Program,
    task: Task,
    references: int,
    tokens: int | None,
    steps: int | None,
    batch: int,
    size: tuple[int, int] | None,
    guidance_scale: float | None,
    image_guidance_scale: float | None,
) -> list[Call]:
    """The program's calls; arguments as in `benchmarks.work.count`, which raises the same."""
    width, height = size or (config.size, config.size)
    _check(config, program, task, references, tokens, batch, width, height)
    defaults: TaskDefaults = getattr(config.defaults, task)
    steps = len(make_schedule("dpm_solver_pp_2m", defaults.steps if steps is None else steps, config.prediction))
    length = prompt_tokens(config, task, references) if tokens is None else tokens
    rows = all_branches(task)
    if program == "ours":
        s_y = defaults.guidance_scale if guidance_scale is None else guidance_scale
        s_s = defaults.image_guidance_scale if image_guidance_scale is None else image_guidance_scale
        rows = branches(s_y, None if task == "subject" else s_s)

    pictures = batch * (min(references, 1) if task == "edit" else references)
    encodings, slots, read = 1, pictures, length
    if program == "published":
        encodings, slots, read = steps, batch * PICTURE_SLOTS if references else 0, config.max_tokens
    trained = config.size // config.vae.factor
    h, w = height // config.vae.factor, width // config.vae.factor

    calls = []
    if references:
        calls.append(call("vae_encoder", M=pictures, eh=trained, ew=trained))
        calls.append(call("image_encoder", encodings, N=slots))
    calls.append(call("text_encoder", encodings, B=batch, N=max(slots, 1), L=read))
    calls.append(call("conditioner", encodings, R=batch * len(rows), L=length))
    if task != "subject":
        calls.append(call("vae_encoder", M=batch, eh=h, ew=w))
    calls.append(call("denoiser", steps, R=batch * len(rows), L=length, h=h, w=w))
    calls.append(call("vae_decoder", B=batch, h=h, w=w))
    return calls


def prompt_tokens(config: ModelConfig, task: Task, references: int) -> int:
    """The length of a prompt with so many pictures: the words of the project's first sample of the task, as the default
    model's tokenizer has them, and the pictures' tokens; at most the model's max_tokens."""
    return min(_word_tokens(task) + references * config.qformer.queries, config.max_tokens)


@cache
def _word_tokens(task: Task) -> int:
    sample = next(request for request in sample_requests() if request.task == task)
    tokenize = load_tokenizer(DEFAULT_MODEL / TOKENIZER_FILE)
    text = compose_prompt(task, sample.prompt)
    return len(tokenize_prompt(text, range(len(sample.images)), tokenize, query_tokens=0).token_ids)


def _check(
    config: ModelConfig,
    program: Program,
    task: Task,
    references: int,
    tokens: int | None,
    batch: int,
    width: int,
    height: int,
) -> None:
    """Raises InputError when the numbers do not fit the model or the program."""
    if program not in get_args(Program) or task not in get_args(Task):
        raise InputError(
            f"the program is {program!r} and the task {task!r}; programs are {', '.join(get_args(Program))}, tasks "
            f"{', '.join(get_args(Task))}"
        )
    least = 0 if task == "subject" else 1
    most = PICTURE_SLOTS if program == "published" else None
    if references < least or (most is not None and references > most):
        raise InputError(
            f"the number of references is {references}; {task} takes at least {least}, and the published program at "
            f"most {PICTURE_SLOTS}"
        )
    if tokens is not None and not 1 <= tokens <= config.max_tokens:
        raise InputError(f"the number of tokens is {tokens}; this model takes 1 to {config.max_tokens}")
    if batch < 1:
        raise InputError(f"the number of pictures at once is {batch}; 1 or more are expected")
    if min(width, height) < config.multiple or width % config.multiple or height % config.multiple:
        raise InputError(f"the size is {width}x{height}; both sides must be multiples of {config.multiple}")
