"""The settings that an image file holds, as the page's fields take them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mige_rt.errors import InputError
from mige_rt.image_output import read_settings
from mige_rt.image_size import parse_size
from mige_rt.instruction import Task
from mige_rt.sampling_params import DEFAULT_SCHEDULER

# What the page has no field for, and what it does instead; None: nothing.
_WITHOUT_FIELD = {
    "scheduler": DEFAULT_SCHEDULER,
    "edit_scope": "local",
    **dict.fromkeys(("fit", "guidance_range", "reuse", "paste_back", "lora")),
}


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """How an image was made; None: its file does not say.

    Attributes:
        others: Settings with their values that the page has no field for.
    """

    task: Task
    prompt: str
    seed: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    image_guidance_scale: float | None
    size: tuple[int, int] | None
    others: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """What the page says when its fields have been filled in."""
        but = f", but for {', '.join(self.others)}, which only mige-rt run takes" if self.others else ""
        return f"The settings are in the tab above{but}. Add its images, if they are not there."


def settings_of(path: Path) -> PageSettings:
    """The settings in an image file that the page or `mige-rt run` has written.

    Raises:
        InputError: There are none, or they cannot be used.
    """
    info = read_settings(path)
    task: Any = info.get("task")
    if "prompt" not in info or task not in get_args(Task):
        raise InputError(
            f"{path.name} holds no settings; drop an image as this page or mige-rt run wrote it: other programs lose "
            "the settings when they save it"
        )
    try:
        return PageSettings(
            task=task,
            prompt=info["prompt"],
            seed=int(info["seed"]) if "seed" in info else None,
            num_inference_steps=int(info["num_inference_steps"]) if "num_inference_steps" in info else None,
            guidance_scale=float(info["guidance_scale"]) if "guidance_scale" in info else None,
            image_guidance_scale=float(info["image_guidance_scale"]) if "image_guidance_scale" in info else None,
            size=parse_size(info["size"]) if "size" in info else None,
            others=tuple(
                f"{name} {info[name]}" for name, value in _WITHOUT_FIELD.items() if info.get(name, value) != value
            ),
        )
    except ValueError as error:  # InputError is one, too
        raise InputError(f"the settings in {path.name} cannot be used: {error}") from error
