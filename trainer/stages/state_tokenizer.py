"""The tokenizer of a training: of the model that it goes on from, or made of the synthetic instructions."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from mige_rt.atomic import atomic_file
from mige_rt.bundle import TOKENIZER_FILE
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.instruction import PLACEHOLDER, compose_prompt
from mige_rt.tokenizer import save_tokenizer
from mige_rt.tokenizer_file import read_tokenizer_file
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import make_sample
from trainer.tokenizer import train_tokenizer

TOKENIZER_SEED, TOKENIZER_SAMPLES = 4, 4000


def synthetic_tokenizer(concepts: Sequence[Concept], vocabulary: int) -> Tokenizer:
    """A tokenizer for the words of the synthetic instructions, and of every printable character."""

    def texts() -> Iterator[str]:
        for concept in concepts:
            yield concept.name
        for index in range(TOKENIZER_SAMPLES):
            sample = make_sample(TOKENIZER_SEED, index, concepts, 16)
            yield from compose_prompt(sample.task, sample.prompt).split(PLACEHOLDER)

    return train_tokenizer(texts(), vocabulary)


def state_tokenizer(config: ModelConfig, concepts: Sequence[Concept], state: Path, start: Path | None) -> Path:
    """The path of a state folder's tokenizer, which is made or copied where it is missing.

    Args:
        config: Its vocabulary's size.
        concepts: Whose names it is made for.
        state: The state folder.
        start: The model folder or bundle whose tokenizer is taken, if there is one.

    Raises:
        InputError: The state folder has another tokenizer than `start`.
    """
    path = state / "tokenizer.json"
    given = None if start is None else Tokenizer.from_str(read_tokenizer_file(start / TOKENIZER_FILE))
    if not path.is_file():
        known = [concept for concept in concepts if not concept.held_out]
        with atomic_file(path) as temporary:
            save_tokenizer(given or synthetic_tokenizer(known, config.text.vocabulary), temporary)
    elif given is not None and Tokenizer.from_str(read_tokenizer_file(path)).to_str() != given.to_str():
        raise InputError(f"{path} is not the tokenizer of {start}: give the start as before, or another state folder")
    return path
