"""DreamBench, the benchmark of DreamBooth (Ruiz et al., 2023): 30 subjects, 25 prompts each, four images a prompt.

The layout is that of the folder `dataset` in github.com/google/dreambooth: `prompts_and_classes.txt`, and a folder of
photos for each subject. The file has a table of subjects and their classes, and two lists of prompts in Python's
words, `'a {0} {1} in the jungle'.format(unique_token, class_token)`: for objects, and for live subjects.

The subject's first photo is the one that the prompt refers to: one image a subject, as KOSMOS-G does. The image that
is made is compared with all photos of the subject.
"""

import re
from pathlib import Path

from benchmarks.evaluation.sample import Benchmark, BenchmarkSample, ImageFile
from mige_rt.errors import InputError
from mige_rt.instruction import PLACEHOLDER

FILE = "prompts_and_classes.txt"
LIVE = ("cat", "dog")  # classes with prompts of their own
SEEDS = (0, 1, 2, 3)
ROW = "all prompts"
_PROMPT = re.compile(r"^'(.*\{0\} \{1\}.*)'\.format\(", re.MULTILINE)
_SUBJECT = re.compile(r"^(\w+),([\w ]+)$", re.MULTILINE)
_PHOTOS = (".jpg", ".jpeg", ".png", ".webp")


def open_dreambench(folder: Path) -> Benchmark:
    """Read DreamBench. Raises InputError when the folder is not in its layout; subjects without photos are listed."""
    file = folder / FILE
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder} has no {FILE} that can be read; give the folder `dataset` of DreamBooth") from error
    table, _, prompts = text.partition("Prompts")
    objects, _, live = prompts.partition("Live Subject Prompts")
    subjects = [match for match in _SUBJECT.findall(table) if match != ("subject_name", "class")]
    templates = {False: _PROMPT.findall(objects), True: _PROMPT.findall(live)}
    if not subjects or not all(templates.values()):
        raise InputError(
            f"{file} lacks the subjects, the object prompts or the live subject prompts; download it again"
        )
    photos = {subject: _photos(folder / subject) for subject, _ in subjects}
    missing = [subject for subject, files in photos.items() if not files]
    if missing:
        raise InputError(f"{folder} lacks the photos of {', '.join(missing)}; download it again")
    samples = tuple(
        BenchmarkSample(
            id=f"{subject}-{number:02d}",
            rows=(ROW,),
            group=subject,
            prompt=template.replace("{0} {1}", PLACEHOLDER),
            images=photos[subject][:1],
            similar_to=photos[subject],
            caption=template.replace("{0} {1}", name),
        )
        for subject, name in subjects
        for number, template in enumerate(templates[name in LIVE])
    )
    return Benchmark(
        layout="dreambench",
        title="DreamBench",
        compared="all photos of the subject",
        samples=samples,
        rows=(ROW,),
        seeds=SEEDS,
    )


def _photos(folder: Path) -> tuple[ImageFile, ...]:
    if not folder.is_dir():
        return ()
    return tuple(ImageFile(path) for path in sorted(folder.iterdir()) if path.suffix.lower() in _PHOTOS)
