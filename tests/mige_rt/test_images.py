import json
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mige_rt.errors import InputError
from mige_rt.image_output import check_output, save_image
from mige_rt.image_size import aspect_size, cropped_share
from mige_rt.images import normalize_image, open_image
from mige_rt.postprocessing import to_image
from mige_rt.preprocessing import vae_pixels, vit_pixels

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def halves(left, right, size: int = 16) -> Image.Image:
    image = Image.new("RGB", (size, size), left)
    image.paste(right, (size // 2, 0, size, size))
    return image


def near(pixel, expected, tolerance: int = 3) -> bool:
    return all(abs(value - wanted) <= tolerance for value, wanted in zip(pixel, expected, strict=True))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bytes(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """An RGB PNG; for a gigantic size the rows may be too few, only its header is read."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


# What can be opened


def test_cmyk_is_converted(tmp_path: Path) -> None:
    halves(RED, BLUE).convert("CMYK").save(tmp_path / "print.jpg", quality=100, subsampling=0)
    image = open_image(tmp_path / "print.jpg")
    assert image.mode == "RGB"
    assert near(image.getpixel((2, 8)), RED) and near(image.getpixel((13, 8)), BLUE)


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    Image.fromarray(ramp).save(tmp_path / "scan.png")
    assert np.asarray(open_image(tmp_path / "scan.png"))[0].tolist() == [[0] * 3, [1] * 3, [100] * 3, [255] * 3]


def test_16_bit_colour_is_scaled(tmp_path: Path) -> None:
    (tmp_path / "deep.png").write_bytes(png_bytes(2, 1, 16, struct.pack(">B6H", 0, 65535, 25700, 0, 257, 32896, 65535)))
    assert np.asarray(open_image(tmp_path / "deep.png")).tolist() == [[[255, 100, 0], [1, 128, 255]]]


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_tiff_is_scaled_in_either_byte_order(tmp_path: Path, order: str) -> None:
    values = np.array([[0, 25700, 65535]], dtype=order)
    Image.frombytes("I;16" if order == "<u2" else "I;16B", (3, 1), values.tobytes()).save(tmp_path / "scan.tif")
    assert np.asarray(open_image(tmp_path / "scan.tif"))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 25700, 65535]], dtype=np.int32), [0, 100, 255]),
        (np.array([[-400_000, 0, 600_000]], dtype=np.int32), [0, 102, 255]),
        (np.array([[70_000, 70_000]], dtype=np.int32), [0, 0]),
        (np.array([[0.0, 0.2, 1.0]], dtype=np.float32), [0, 51, 255]),
        (np.array([[0.0, 100.0, 200.0]], dtype=np.float32), [0, 100, 200]),
        (np.array([[-1.0, -0.2, 1.0]], dtype=np.float32), [0, 102, 255]),
    ],
)
def test_wide_values_are_scaled_by_their_range(values, expected: list[int]) -> None:
    assert np.asarray(normalize_image(Image.fromarray(values)))[0, :, 0].tolist() == expected


def test_values_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        normalize_image(Image.fromarray(np.array([[0.0, math.nan]], dtype=np.float32)))


@pytest.mark.filterwarnings("error")
def test_transparent_palette_is_composed_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([*GREEN, *RED])
    image.paste(1, (4, 0, 8, 8))
    image.save(tmp_path / "icon.png", transparency=0)
    opened = open_image(tmp_path / "icon.png")
    assert opened.getpixel((1, 1)) == WHITE and opened.getpixel((6, 1)) == RED


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("RGBA", (255, 0, 0, 0), WHITE), ("RGBA", (0, 0, 0, 128), (127, 127, 127)), ("LA", (0, 0), WHITE)],
)
def test_alpha_is_composed_on_white(mode: str, colour, expected) -> None:
    assert near(normalize_image(Image.new(mode, (4, 4), colour)).getpixel((0, 0)), expected, 1)


def test_grey_and_black_and_white_become_rgb() -> None:
    assert normalize_image(Image.new("L", (4, 4), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert normalize_image(Image.new("1", (4, 4), 1)).getpixel((0, 0)) == WHITE


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((4, 4)) == RED


def test_exif_rotation_is_honoured(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn a quarter clockwise to see it upright
    halves(RED, BLUE).resize((32, 16)).save(tmp_path / "phone.jpg", exif=exif, quality=100, subsampling=0)
    image = open_image(tmp_path / "phone.jpg")
    assert image.size == (16, 32)
    assert near(image.getpixel((8, 3)), RED) and near(image.getpixel((8, 28)), BLUE)
    assert normalize_image(image).size == (16, 32), "a image once upright must not be turned again"


def test_the_callers_image_is_left_as_it_is() -> None:
    given = Image.new("RGB", (4, 4), RED)
    normalize_image(given).putpixel((0, 0), BLUE)
    assert given.getpixel((0, 0)) == RED


# What is refused


def test_no_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            open_image(path)


@pytest.mark.parametrize(
    "content", [b"", b"these are words\n", png_bytes(0, 4, 8, b"")], ids=["empty", "text", "no pixels"]
)
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wrong.png").write_bytes(content)
    with pytest.raises(InputError, match=r"wrong\.png"):
        open_image(tmp_path / "wrong.png")


def test_a_format_that_starts_other_programs_is_refused(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "drawing.eps")
    with pytest.raises(InputError, match="one of these formats"):
        open_image(tmp_path / "drawing.eps")


def test_a_image_without_pixels_is_refused() -> None:
    with pytest.raises(InputError, match="0x4"):
        normalize_image(Image.new("RGB", (0, 4)))


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.webp", "cut.gif"])
def test_a_truncated_image_is_refused_and_never_shown_half_grey(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=name):
        open_image(path)


@pytest.mark.parametrize(
    ("width", "height"), [(9_000, 9_000), (10_000, 9_500), (50_000, 50_000), (2**31 - 1, 2**31 - 1)]
)
def test_a_gigantic_image_is_refused_by_its_header(
    tmp_path: Path, monkeypatch, recwarn, width: int, height: int
) -> None:
    (tmp_path / "bomb.png").write_bytes(png_bytes(width, height, 8, b"\0" * 1000))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("the bomb was decoded"))
    with pytest.raises(InputError, match=r"bomb.png.* too large.*80,000,000"):
        open_image(tmp_path / "bomb.png")
    assert not recwarn.list, "the error says it all"


def test_a_gigantic_image_of_an_api_caller_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("mige_rt.images.MAX_PIXELS", 99)
    with pytest.raises(InputError, match="10x10"):
        normalize_image(Image.new("RGB", (10, 10)))


# Pixels for the model


def test_vit_pixels_show_the_whole_image_normalised() -> None:
    pixels = vit_pixels(halves(WHITE, (0, 0, 0), 64), 8)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.float32
    white = [(1 - 0.48145466) / 0.26862954, (1 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711]
    black = [-0.48145466 / 0.26862954, -0.4578275 / 0.26130258, -0.40821073 / 0.27577711]
    np.testing.assert_allclose(pixels[:, 4, 0], white, atol=1e-5)
    np.testing.assert_allclose(pixels[:, 4, 7], black, atol=1e-5)
    image = noise(50, 31)
    resized = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC)) / 255.0
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    restored = vit_pixels(image, 8) * deviation + np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    np.testing.assert_allclose(restored, resized.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (90, 64), (64, 91), (333, 127), (40, 57), (7, 200)])
def test_crop_to_a_square_is_the_published_shorter_side_and_centre_crop(size: tuple[int, int]) -> None:
    image = noise(*size)
    scaled = tuple(int(64 * side / min(size)) for side in size)
    left, top = (round((side - 64) / 2.0) for side in scaled)
    whole = image.resize((scaled[0], scaled[1]), Image.Resampling.BILINEAR)
    expected = np.asarray(whole.crop((left, top, left + 64, top + 64)), dtype=np.float32)
    levels = (vae_pixels(image, 64, 64, "crop").transpose(1, 2, 0) + 1) * 127.5
    assert np.abs(levels - expected).max() <= 1.01  # rounding: the crop here is part of the resizing


def test_crop_and_aspect_cover_other_shapes_from_the_middle() -> None:
    image = Image.new("RGB", (300, 100), RED)
    image.paste(BLUE, (40, 0, 260, 100))  # the middle two thirds show; the filter blurs a few pixels across
    for fit in ("crop", "aspect"):
        pixels = vae_pixels(image, 64, 32, fit)
        assert pixels.shape == (3, 32, 64) and pixels.dtype == np.float32
        assert (pixels == np.array([-1, -1, 1], dtype=np.float32)[:, None, None]).all()


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (333, 127)])
def test_pad_fits_the_whole_image_on_black_as_published(size: tuple[int, int]) -> None:
    image = noise(*size)
    scaled = tuple(int(64 * side / max(size)) for side in size)
    expected = Image.new("RGB", (64, 64))
    resized = image.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
    expected.paste(resized, ((64 - scaled[0]) // 2, (64 - scaled[1]) // 2))
    levels = (vae_pixels(image, 64, 64, "pad").transpose(1, 2, 0) + 1) * 127.5
    np.testing.assert_allclose(levels, np.asarray(expected), atol=1e-3)


@pytest.mark.parametrize("fit", ["crop", "pad", "aspect"])
@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (1, 1)])
def test_the_thinnest_images_fit_in_memory(size: tuple[int, int], fit) -> None:
    assert vae_pixels(Image.new("RGB", size, RED), 512, 512, fit).shape == (3, 512, 512)


def test_cropped_share_is_the_area_cut_away() -> None:
    assert cropped_share((640, 640), 512, 512) == 0
    assert cropped_share((200, 100), 64, 64) == pytest.approx(0.5)
    assert cropped_share((100, 400), 64, 64) == pytest.approx(0.75)
    assert cropped_share((200, 100), 128, 64) == 0


@pytest.mark.parametrize("size", [(640, 640), (1920, 1080), (1080, 1920), (3000, 1000), (37, 91)])
def test_aspect_size_keeps_shape_and_area(size: tuple[int, int]) -> None:
    width, height = aspect_size(size, 512 * 512, 16)
    assert width % 16 == 0 and height % 16 == 0
    assert width / height == pytest.approx(size[0] / size[1], rel=0.06)
    assert width * height == pytest.approx(512 * 512, rel=0.06)


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
def test_aspect_size_of_the_thinnest_image_stays_within_the_area(size: tuple[int, int]) -> None:
    width, height = aspect_size(size, 64 * 64, 8)
    assert min(width, height) == 8 and width * height == 64 * 64
    assert (width > height) == (size[0] > size[1])


# Pictures out


def test_pixels_and_images_go_there_and_back() -> None:
    image = noise(32, 24)
    assert np.array_equal(np.asarray(to_image(vae_pixels(image, 32, 24, "crop"))), np.asarray(image))


def test_values_outside_are_clipped_and_rounded() -> None:
    pixels = np.array([-3.0, -1.0, 0.0, 0.0041, 1.0, 3.0], dtype=np.float32).reshape(1, 1, 6).repeat(3, axis=0)
    assert np.asarray(to_image(pixels))[0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]
    assert to_image(pixels).size == (6, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_failed_model_is_said_and_not_painted(bad: float) -> None:
    pixels = np.zeros((3, 4, 4), dtype=np.float32)
    pixels[1, 2, 3] = bad
    with pytest.raises(InputError, match="1 of the image's 48 values are NaN"):
        to_image(pixels)


@pytest.mark.parametrize(
    ("name", "expected"), [("o.png", "PNG"), ("o.jpg", "JPEG"), ("o.JPEG", "JPEG"), ("o.webp", "WEBP")]
)
def test_the_extension_names_the_format_and_the_settings_are_inside(tmp_path: Path, name: str, expected: str) -> None:
    info = {"prompt": "a naïve 🐱 \udcff", "seed": "3"}  # the last character cannot be encoded
    save_image(Image.new("RGB", (8, 8), RED), tmp_path / name, info)
    with Image.open(tmp_path / name) as image:
        assert image.format == expected
        assert near(image.convert("RGB").getpixel((4, 4)), RED)
        stored = image.info if expected == "PNG" else json.loads(image.getexif()[0x010E])
        assert stored["prompt"] == "a naïve 🐱 ?" and stored["seed"] == "3"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["o.png", "o.jpg", "o.webp"])
def test_a_very_long_prompt_does_not_stop_the_writing(tmp_path: Path, name: str) -> None:
    save_image(noise(8, 8), tmp_path / name, {"prompt": "x" * 200_000})
    assert open_image(tmp_path / name).size == (8, 8)


def test_a_finished_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "opt").touch()
    save_image(noise(8, 8), tmp_path / "o.png", {})
    assert (tmp_path / "o.png").stat().st_mode == (tmp_path / "opt").stat().st_mode


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("failure", "raised"), [(OSError("no space left"), InputError), (Killed(), Killed)])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch, failure, raised) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"the old one")

    def half_written(image, file, **options) -> None:
        file.write(b"half a image")
        raise failure

    monkeypatch.setattr(Image.Image, "save", half_written)
    with pytest.raises(raised):
        save_image(Image.new("RGB", (8, 8)), path, {}, overwrite=True)
    assert path.read_bytes() == b"the old one"
    assert os.listdir(tmp_path) == ["out.png"]


def test_an_output_that_can_be_written_is_accepted_without_a_trace(tmp_path: Path) -> None:
    check_output(tmp_path / "new.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("out.tiff", "extension"),
        ("out", "extension"),
        ("folder.png", "is a folder"),
        ("missing/out.png", "does not exist"),
        ("x" * 300 + ".png", "cannot write"),
        ("zero\0byte.png", "cannot write"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, name: str, word: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=word):
        check_output(tmp_path / name)
    assert os.listdir(tmp_path) == ["folder.png"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that not even root can write to")
def test_a_folder_that_takes_no_files_is_refused() -> None:
    with pytest.raises(InputError, match="cannot write"):
        check_output(Path("/proc/out.png"))
