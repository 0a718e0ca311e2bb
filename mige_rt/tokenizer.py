"""A model's tokenizer, from its tokenizer.json."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from mige_rt.errors import InputError
from mige_rt.tokenizer_file import read_tokenizer_file

END_OF_SEQUENCE = "</s>"
END_ID = 1

Tokenize = Callable[[str], list[int]]  # one text segment -> its ids, without special tokens


def load_tokenizer(path: str | Path, *, known: bool = False) -> Tokenize:
    """Read a `tokenizer.json`.

    Args:
        path: The file.
        known: It was made here, and need not be checked again for what would harm the library.

    Returns:
        A function that gives a text segment's ids without special tokens.

    Raises:
        InputError: The file is missing, is no tokenizer, or does not end a sequence as T5 does (`</s>` = 1).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"no tokenizer at {path}: a tokenizer.json is expected there; give a whole model folder or bundle"
        )
    content = None if known else read_tokenizer_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(path)) if content is None else Tokenizer.from_str(content)
    except Exception as error:  # the library raises plain Exception
        raise InputError(
            f"{path} is not a readable tokenizer.json: T5's is expected; make or download the model again"
        ) from error
    if (end_id := tokenizer.token_to_id(END_OF_SEQUENCE)) != END_ID:
        raise InputError(
            f"{path} is the tokenizer of another model: its {END_OF_SEQUENCE} has the id {end_id}, "
            f"{END_ID} is expected; use the tokenizer that belongs to the model"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a `tokenizer.json`.

    Raises:
        OSError: It cannot be written; the library's own method raises a plain Exception then.
    """
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8", newline="\n")
