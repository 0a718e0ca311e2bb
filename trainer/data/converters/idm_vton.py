"""Virtual try-on: what IDM-VTON was given and made, as replacements of a garment (MIGE, appendix C.3).

The layout is that of VITON-HD, which IDM-VTON reads: `train_pairs.txt` or `test_pairs.txt`, whose lines name a person's
image and a garment's, beside `train` or `test` with the folders `image` and `cloth`. What IDM-VTON made lies in a
folder `result` beside those two, under the name of the person's image; its own `--output_dir` may be linked there.
"""

from collections.abc import Iterator
from pathlib import Path

from mige_rt.errors import InputError
from mige_rt.instruction import PLACEHOLDER
from mige_rt.requests import read_lines
from trainer.data.converters.layout import ConvertedSample, ConvertOptions, Rejection

SPLITS = ("train", "test")
PROMPT = f"replace the upper garment of the person in {PLACEHOLDER} with {PLACEHOLDER}"  # VITON-HD has no others


def convert_idm_vton(data: Path, options: ConvertOptions) -> Iterator[ConvertedSample | Rejection]:
    """See `layout.Converter`. `image_column` and `source_column` name other folders than result and image."""
    lists = {split: data / f"{split}_pairs.txt" for split in SPLITS}
    results = options.image_column or "result"
    splits = [split for split in SPLITS if lists[split].is_file() and (data / split / results).is_dir()]
    if not splits:
        raise InputError(
            f"{data} has no train_pairs.txt or test_pairs.txt beside train/{results} or test/{results}; give the "
            "folder of VITON-HD, with IDM-VTON's output in it"
        )
    for split in splits:
        folder = data / split
        for number, text in read_lines(lists[split], limited=False):
            names = text.split()
            if len(names) != 2:
                raise InputError(
                    f"{lists[split]} line {number} has {len(names)} names; a person's and a garment's are expected"
                )
            person, garment = folder / (options.source_column or "image") / names[0], folder / "cloth" / names[1]
            result = folder / results / names[0]
            if not result.is_file():
                yield Rejection("no image that IDM-VTON made")
                continue
            yield ConvertedSample("compose", PROMPT, (person, garment), person, result)
