"""Roles that a language model fills: the questions, which stand in trainer/pipelines/prompts, and their answers."""

import re
from pathlib import Path
from string import Template
from typing import Annotated

from annotated_types import MaxLen, MinLen
from PIL import Image
from pydantic import BaseModel, ConfigDict

from mige_rt.errors import InputError
from mige_rt.instruction import PLACEHOLDER, count_placeholders
from trainer.masks import Box, clip_box
from trainer.pipelines.chat import ChatModel, Question, ask_json
from trainer.pipelines.records import DroppedError
from trainer.vision_models import Detection

PROMPTS = Path(__file__).with_name("prompts")
INSTRUCTION_START = f"Add {PLACEHOLDER} to the"  # the paper's
MAX_NAME_WORDS = 8
LONG_ANSWER = 400  # tokens of JSON

Words = Annotated[str, MinLen(1), MaxLen(200)]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Entities(_Answer):
    """Of a caption."""

    entities: Annotated[list[Words], MaxLen(50)]


class NewSubject(_Answer):
    """Of a replacement; None: it is none."""

    subject: Words | None


class Instruction(_Answer):
    """A multimodal instruction."""

    instruction: Annotated[str, MinLen(1), MaxLen(2000)]


class Boxes(_Answer):
    """In pixels: left, top, right, bottom."""

    boxes: Annotated[list[tuple[float, float, float, float]], MaxLen(100)]


class Prompts:
    """The texts of the questions."""

    def __init__(self, folder: str | None) -> None:
        """Texts in `folder` replace those of the same names in `PROMPTS`. Raises InputError where it is no folder."""
        self._texts: dict[str, str] = {}
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None and not self._folder.is_dir():
            raise InputError(f"prompts is {folder!r}, which is no folder; give one with texts such as name.txt")

    def text(self, name: str) -> str:
        """A text as its file has it, without the line break at its end."""
        if name not in self._texts:
            own = None if self._folder is None else self._folder / f"{name}.txt"
            self._texts[name] = _read(own if own is not None and own.is_file() else PROMPTS / f"{name}.txt")
        return self._texts[name]

    def fill(self, prompt: str, /, **values: object) -> str:
        """A text with values in the places of $words.

        Raises:
            InputError: The text has a place for something else.
        """
        try:
            return Template(self.text(prompt)).substitute({key: str(value) for key, value in values.items()})
        except (KeyError, ValueError) as error:
            raise InputError(
                f"the prompt {prompt}.txt has a place that nothing fills ({error}); known are "
                f"{', '.join(f'${key}' for key in values)}, and $$ for a dollar sign"
            ) from error

    def all(self) -> dict[str, str]:
        """Every text by its name."""
        return {path.stem: self.text(path.stem) for path in sorted(PROMPTS.glob("*.txt"))}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); a text in UTF-8 is expected") from error


class LanguageTagger:
    """See `roles.Tagger`. The questions are those of the paper's tables 8 and 9, in our words."""

    def __init__(self, chat: ChatModel, prompts: Prompts) -> None:
        self._chat, self._prompts = chat, prompts

    def entities(self, caption: str) -> list[str]:
        """See `roles.Tagger`."""
        question = Question(text=self._prompts.fill("entities", caption=caption), max_tokens=LONG_ANSWER)
        return ask_json(self._chat, question, Entities).entities

    def new_subject(self, instruction: str) -> str | None:
        """See `roles.Tagger`."""
        question = Question(text=self._prompts.fill("new_subject", instruction=instruction))
        return ask_json(self._chat, question, NewSubject).subject

    def rewrite(self, instruction: str, subject: str) -> str:
        """See `roles.Tagger`."""
        text = self._prompts.fill("rewrite", instruction=instruction, subject=subject)
        answer = ask_json(self._chat, Question(text=text, max_tokens=LONG_ANSWER), Instruction).instruction
        if count_placeholders(answer) != 2:
            raise DroppedError(f"a rewritten instruction without two {PLACEHOLDER}", repr(answer[:200]))
        return answer


class LanguageDescriber:
    """See `roles.Describer`. The questions are those of the paper's tables 6 and 7, in our words."""

    def __init__(self, chat: ChatModel, prompts: Prompts) -> None:
        self._chat, self._prompts = chat, prompts

    def is_complete(self, cut_out: Image.Image) -> bool:
        """See `roles.Describer`."""
        answer = self._chat.ask(Question(text=self._prompts.text("complete"), image=cut_out))
        word = answer.strip().strip(".!'\"").lower()
        if word not in ("true", "false"):
            raise DroppedError(
                "an answer that is not as asked", f"True or False was asked, not {answer[:200]!r}", bad=True
            )
        return word == "true"

    def name(self, cut_out: Image.Image) -> str:
        """See `roles.Describer`."""
        answer = self._chat.ask(Question(text=self._prompts.text("name"), image=cut_out))
        words = re.sub(r"^(an?|the)\s+", "", answer.strip().strip(".!'\""), flags=re.IGNORECASE)
        if not 1 <= len(words.split()) <= MAX_NAME_WORDS or "\n" in words:
            raise DroppedError("an answer that is not as asked", f"a name was asked, not {answer[:200]!r}", bad=True)
        return words

    def instruction(self, image: Image.Image, words: str, box: Box) -> str:
        """See `roles.Describer`. It begins as the paper's do."""
        left, top, right, bottom = (round(x) for x in box)
        text = self._prompts.fill(
            "place",
            name=words,
            width=image.width,
            height=image.height,
            left=left,
            top=top,
            box_width=right - left,
            box_height=bottom - top,
        )
        answer = self._chat.ask(Question(text=text, system=self._prompts.text("place_system"), image=image)).strip()
        if not answer.startswith(INSTRUCTION_START):
            raise DroppedError(f"an instruction that does not begin {INSTRUCTION_START!r}", repr(answer[:200]))
        if count_placeholders(answer) != 2:
            raise DroppedError(f"an instruction without two {PLACEHOLDER}", repr(answer[:200]))
        return answer


class LanguageDetector:
    """See `roles.Detector`: a vision-language model that answers with boxes, such as Qwen2.5-VL."""

    def __init__(self, chat: ChatModel, prompts: Prompts) -> None:
        self._chat, self._prompts = chat, prompts

    def detect(self, image: Image.Image, words: str) -> list[Detection]:
        """See `roles.Detector`. The model does not say how sure it is: each score is 1."""
        text = self._prompts.fill("boxes", words=words, width=image.width, height=image.height)
        question = Question(text=text, image=image, max_tokens=LONG_ANSWER)
        boxes = (clip_box(box, image.size) for box in ask_json(self._chat, question, Boxes).boxes)
        return [Detection(box, 1.0) for box in boxes if box is not None]
