"""Rows of parquet files, read by Hugging Face `datasets` one after the other; images stay as the files they are."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Image, IterableDataset, load_dataset

from mige_rt.errors import InputError


def open_parquet(data: Path) -> IterableDataset:
    """The rows of a dataset that was downloaded.

    Args:
        data: A parquet file, or a folder with some at any depth. Where the names of some begin with `train`, as on the
            hub, the others (of other splits) are left out.

    Raises:
        InputError: There is no parquet file, or it cannot be read.
    """
    files = [data] if data.is_file() else sorted(data.rglob("*.parquet"))
    files = [file for file in files if file.name.startswith("train")] or files
    if not files:
        raise InputError(f"{data} has no parquet file; give the folder that the dataset was downloaded to")
    try:
        rows = load_dataset("parquet", data_files=[str(file) for file in files], split="train", streaming=True)
    except Exception as error:  # the library's errors and those of pyarrow have no common class
        raise InputError(f"{data} cannot be read as parquet ({error}); download it again") from error
    assert isinstance(rows, IterableDataset)
    return rows


def read_columns(rows: IterableDataset, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Some columns of all rows; an image is the content of its file, or None where there is none.

    Raises:
        InputError: A file is damaged.
    """
    rows = rows.select_columns(list(dict.fromkeys(names)))
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # as above
            raise InputError(f"a parquet file cannot be read ({error}); download it again") from error
        yield {name: _content(value) for name, value in row.items()}


def image_content(row: Mapping[str, Any], column: str) -> bytes | None:
    """The image file in a row that `read_columns` gave, or None where there is none.

    Raises:
        InputError: The column holds something else.
    """
    value = row[column]
    if value is None or isinstance(value, bytes):
        return value
    raise InputError(f"the column {column!r} holds {type(value).__name__}, no images; name another one by options")


def _content(value: Any) -> Any:
    return value["bytes"] if isinstance(value, dict) and value.keys() == {"bytes", "path"} else value
