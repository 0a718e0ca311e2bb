"""Image files: damaged, incomplete, too large, or strange and good."""

import io
import os
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from hostile_cases import Case, cases, check_case, same_image

from mige_rt.errors import InputError
from mige_rt.images import MAX_PIXELS, normalize_image, open_image

FORMATS = ("png", "jpg", "webp", "gif", "bmp", "tif", "avif", "ppm")
NUMBERS = np.random.default_rng(0)
NOISE = Image.fromarray(NUMBERS.integers(0, 256, (48, 64, 3), dtype=np.uint8))


def encoded(extension: str, image: Image.Image = NOISE, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=Image.registered_extensions()[f".{extension}"], **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, bits: int = 8, colour: int = 2, rows: bytes | None = None) -> bytes:
    """A PNG whose header says what it likes."""
    pixels = b"\0" * 1000 if rows is None else rows
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    image = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + image + chunk(b"IEND", b"")


def source(content: bytes, *arguments: str) -> Callable[[Path], Sequence[str]]:
    """A run of a source with this content."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "source.png").write_bytes(content)
        return "run", "--prompt", "make it blue", "--source", "source.png", "--out", "made.png", *arguments

    return make


def header_of(extension: str, width: int, height: int) -> bytes:
    """The beginning of an image that says to be of this size."""
    match extension:
        case "png":
            return png(width, height)
        case "gif":
            return b"GIF89a" + struct.pack("<HH", width, height) + encoded("gif")[10:]
        case "bmp":
            content = bytearray(encoded("bmp"))
            content[18:26] = struct.pack("<ii", width, height)
            return bytes(content)
        case "ppm":
            return f"P6 {width} {height} 255\n".encode() + b"x" * 100
        case _:
            content = bytearray(encoded("jpg"))
            start = content.index(b"\xff\xc0")
            content[start + 5 : start + 9] = struct.pack(">HH", height, width)
            return bytes(content)


NO_IMAGE, DAMAGED, LARGE = (
    "is not an image that can be read",
    "damaged|ends too early|not an image",
    "is too large: images of at most",
)
TEXT_BOMB = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 10**8))
PROFILE_BOMB = chunk(b"iCCP", b"x\0\0" + zlib.compress(b"x" * 10**8))
REFUSED = [
    *(
        Case(name, source(content), rf"source.png \({len(content)} bytes\) {NO_IMAGE}")
        for name, content in {
            "empty": b"",
            "one byte": b"\x89",
            "zeros": b"\0" * 10_000,
            "words": b"these are words\n",
            "a signature of PNG alone": b"\x89PNG\r\n\x1a\n",
            "a signature of JPEG alone": b"\xff\xd8\xff",
            "a signature of GIF alone": b"GIF89a",
            "a PNG with line ends changed": encoded("png").replace(b"\r\n", b"\n"),
            "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
            "HTML": b"<!doctype html><title>404</title>",
            "a ZIP": b"PK\x03\x04" + b"\0" * 100,
            "PDF": b"%PDF-1.7\n",
            "PostScript, which starts a program": encoded("eps"),
            "an icon": encoded("ico"),
            "no width": png(0, 4),
            "no height": png(4, 0),
            "an unknown colour type": png(4, 4, colour=5),
            "7 bits": png(4, 4, bits=7),
            "a text of 100 MB": png(4, 4, TEXT_BOMB),
            "a colour profile of 100 MB": png(4, 4, PROFILE_BOMB),
        }.items()
    ),
    *(
        Case(
            f"{extension} of {width}x{height}",
            source(header_of(extension, width, height)),
            f"{width}x{height}. {LARGE}",
        )
        for extension, sizes in {
            "png": (
                (1, 80_000_000),
                (80_000_000, 1),
                (9_000, 9_000),
                (50_000, 50_000),
                (2**31 - 1, 2**31 - 1),
                (1, 71_553),
            ),
            "jpg": ((65_500, 65_500), (9_000, 9_000)),
            "gif": ((65_535, 65_535), (30_000, 3_000)),
            "bmp": ((30_000, 30_000), (1, 2**30)),
            "ppm": ((10**9, 10**9), (1, 10**8)),
        }.items()
        for width, height in sizes
    ),
    Case(
        "more than --max-pixels",
        source(encoded("png"), "--max-pixels", "3000"),
        "64x48. is too large: images of at most 3,000 pixels.*raise --max-pixels",
    ),
    Case(
        "a side beyond --max-pixels",
        source(encoded("png", NOISE.resize((200, 1))), "--max-pixels", "400"),
        "200x1. is too large: .*sides of at most 160",
    ),
    *(
        Case(f"half a {extension}", source(encoded(extension)[: len(encoded(extension)) // 2]), DAMAGED)
        for extension in FORMATS
    ),
    *(
        Case(f"a PNG without its last {lost}", source(encoded("png")[:-lost]), "ends too early|cannot be decoded")
        for lost in (1, 2, 4, 5, 8, 11, 12, 13, 16, 20, 100)
    ),
    *(
        Case(f"a PNG with a changed byte at {place}", source(flipped(place)), DAMAGED)
        for flipped in (
            lambda place: encoded("png")[:place] + bytes([encoded("png")[place] ^ 1]) + encoded("png")[place + 1 :],
        )
        for place in (0, 10, 18, 25, 30, 60, 2_000, -13, -14)
    ),
    Case("too few rows", source(png(64, 64, rows=b"\0" * 100)), DAMAGED),
    Case("rows that are no zlib", source(encoded("png").replace(b"IDATx", b"IDATy")), DAMAGED),
    Case(
        "a PNG without pixels",
        source(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")
        ),
        DAMAGED,
    ),
]


@cases(REFUSED)
def test_image_files(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_case(case, tmp_path, monkeypatch)


def exif(content: bytes) -> bytes:
    return b"Exif\0\0" + content


JUNK_EXIF = {
    "no TIFF": exif(b"junk" * 50),
    "empty": exif(b""),
    "a header alone": exif(b"II*\0"),
    "an offset far outside": exif(b"II*\0\xff\xff\xff\x7f"),
    "a table that ends early": exif(b"MM\0*\0\0\0\x08\xff\xff"),
    "a table within itself": exif(b"MM\0*\0\0\0\x08\0\1\x87\x69\0\4\0\0\0\1\0\0\0\x08\0\0\0\x08"),
    "an orientation of 999": exif(b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\3\xe7\0\0\0\0\0\0"),
    "an orientation in words": exif(b"MM\0*\0\0\0\x08\0\1\1\x12\0\2\0\0\0\4abc\0\0\0\0\0"),
    "2^32 orientations": exif(b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\xff\xff\xff\xff\0\6\0\0\0\0\0\0"),
    "60,000 zeros": exif(b"\0" * 60_000),
    "random bytes": exif(np.random.default_rng(1).bytes(5_000)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("name", JUNK_EXIF)
def test_junk_in_the_exif_leaves_a_good_image_good(tmp_path: Path, name: str, extension: str) -> None:
    (tmp_path / f"plain.{extension}").write_bytes(encoded(extension))
    (tmp_path / f"junk.{extension}").write_bytes(encoded(extension, exif=JUNK_EXIF[name]))
    plain, junk = (open_image(tmp_path / f"{name}.{extension}") for name in ("plain", "junk"))
    assert same_image(plain, junk)


STRANGE = {  # and good
    "bytes behind the end": encoded("png") + b"\0junk" * 100,
    "a JPEG with bytes behind": encoded("jpg") + b"\0junk" * 100,
    "an unknown chunk": png(1, 1, chunk(b"abCd", b"x" * 1000), rows=b"\0\1\2\3"),
    "a colour profile of junk": png(1, 1, chunk(b"iCCP", b"x\0\0" + zlib.compress(b"junk")), rows=b"\0\1\2\3"),
    "one pixel": png(1, 1, rows=b"\0\1\2\3"),
    "a pixel for a row": png(1, 60_000, rows=b"\0\1\2\3" * 60_000),
    "a row of pixels": png(60_000, 1, rows=b"\0" + b"\1\2\3" * 60_000),
    "a palette without colours": png(4, 4, colour=3, rows=b"\0" * 20),
    "1 bit": encoded("png", NOISE.convert("1")),
    "a name that lies": encoded("gif"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", STRANGE)
def test_strange_files_that_are_good_are_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "image.png").write_bytes(STRANGE[name])
    assert open_image(tmp_path / "image.png").mode == "RGB"


@pytest.mark.parametrize("extension", FORMATS)
def test_a_cut_file_is_refused_or_gives_all_pixels(tmp_path: Path, extension: str) -> None:
    """Never a part of an image, nor one with grey below: cut anywhere, finely near its end."""
    content, path = encoded(extension), tmp_path / f"cut.{extension}"
    path.write_bytes(content)
    whole = open_image(path)
    near_the_end = range(len(content) - 40, len(content))
    for size in sorted({*range(1, len(content), max(1, len(content) // 60)), *near_the_end}):
        path.write_bytes(content[:size])
        try:
            opened = open_image(path)
        except InputError:
            continue
        assert same_image(opened, whole), f"{size} of {len(content)} bytes"


def test_max_pixels_opens_larger_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mige_rt.images.MAX_PIXELS", 1_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    NOISE.save(tmp_path / "image.png")
    with pytest.raises(InputError, match=r"\(64x48\) is too large: images of at most 1,000 pixels"):
        open_image(tmp_path / "image.png")
    assert open_image(tmp_path / "image.png", max_pixels=4_000).size == (64, 48)
    assert Image.MAX_IMAGE_PIXELS == 1_000, "Pillow's own limit is the user's"


def test_what_is_too_large_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "tall.png").write_bytes(png(1, MAX_PIXELS))
    tracemalloc.start()
    with pytest.raises(InputError, match="too large"):
        open_image(tmp_path / "tall.png")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_closed_image_of_an_api_caller_is_refused(tmp_path: Path) -> None:
    NOISE.save(tmp_path / "image.png")
    image = Image.open(tmp_path / "image.png")
    image.close()
    with pytest.raises(InputError, match="cannot be decoded"):
        normalize_image(image)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_that_no_one_writes_to_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="no regular file"):
        open_image(tmp_path / "pipe.png")
