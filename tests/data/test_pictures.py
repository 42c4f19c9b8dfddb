"""Picture files: every depth, turned upright, cut from the center."""

import io
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onebyone.core.errors import DataError
from onebyone.data import pictures
from onebyone.data.pictures import (
    FilePictures,
    as_rgb,
    fit_picture,
    open_picture,
    read_pictures,
)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1"])
def test_every_kind_of_picture_becomes_rgb(mode, tmp_path):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new("RGB", (7, 5), (255, 255, 255)).convert(mode).save(tmp_path / f"x.{suffix}")
    picture = open_picture(tmp_path / f"x.{suffix}")
    assert (picture.mode, picture.size) == ("RGB", (7, 5))
    assert min(np.asarray(picture).min(axis=(0, 1))) >= 240


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    values = np.array([[0, 257, 65535], [32896, 128, 60000]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    gray = np.asarray(open_picture(tmp_path / "x.png"))[..., 0]
    np.testing.assert_array_equal(gray, np.round(values / 257))


def test_fractions_of_white_are_scaled(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "x.tif")
    assert np.asarray(open_picture(tmp_path / "x.tif"))[0, :, 0].tolist() == [0, 128, 255]


def test_a_camera_held_upright_gives_an_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "x.jpg", exif=exif)
    assert open_picture(tmp_path / "x.jpg").size == (10, 20)


def test_values_below_black_are_refused(tmp_path):
    Image.fromarray(np.array([[-1.0, 0.5]], dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="not negative"):
        open_picture(tmp_path / "x.tif")


def test_a_picture_of_the_size_asked_for_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3)).astype(np.uint8)
    fitted = fit_picture(Image.fromarray(pixels), (9, 14), crop=1.0)
    np.testing.assert_array_equal(np.asarray(fitted.picture), pixels)
    assert fitted.box == (0, 0, 14, 9)


@pytest.mark.parametrize("size", [(10, 10), (6, 18), (18, 6)])
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.5])
def test_the_center_is_kept_with_its_proportions(size, crop):
    fitted = fit_picture(Image.new("RGB", (120, 80)), size, crop=crop)
    left, top, right, bottom = fitted.box
    assert fitted.picture.size == (size[1], size[0])
    assert (left + right) / 2 == pytest.approx(60, abs=120 / 10)
    assert (top + bottom) / 2 == pytest.approx(40, abs=80 / 10)
    assert (right - left) / (bottom - top) == pytest.approx(size[1] / size[0], rel=0.12)
    tight = min((right - left) / 120, (bottom - top) / 80)
    assert max((right - left) / 120, (bottom - top) / 80) == pytest.approx(crop, rel=0.15)
    assert 0 < tight <= 1


@pytest.mark.parametrize("size", [(97, 61, 3), (60, 90, 3), (31, 200, 3)])
def test_a_picture_is_cut_and_scaled_as_torchvision_does_it(size):
    from torchvision.transforms import functional as F

    pixels = np.random.default_rng(1).integers(0, 256, size).astype(np.uint8)
    picture = Image.fromarray(pixels)
    ours = fit_picture(picture, (28, 28), crop=7 / 8).picture
    theirs = F.center_crop(F.resize(picture, 32, antialias=True), 28)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("size", [(300, 9), (9, 300)])
def test_a_long_picture_is_cut_before_it_is_scaled_to_the_same_pixels(size, monkeypatch):
    noise = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    long = fit_picture(Image.fromarray(noise), (12, 12), crop=7 / 8)
    monkeypatch.setattr(pictures, "LONG", 10**9)
    whole = fit_picture(Image.fromarray(noise), (12, 12), crop=7 / 8)
    assert long.box == whole.box
    difference = np.asarray(long.picture).astype(int) - np.asarray(whole.picture)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (1, 1_000_000)])
def test_no_proportions_cost_more_than_the_pixels(size, tmp_path):
    Image.new("L", size, 77).save(tmp_path / "strip.png")
    read = np.zeros((1, 224, 224, 3), np.uint8)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000, limit[1]))
    try:
        strip = FilePictures([tmp_path / "strip.png"])
        read_pictures(strip, [0], (224, 224), crop=7 / 8, into=read)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert (read == 77).all()


def png_of(width: int, height: int) -> bytes:
    """Return a file that says it has so many pixels, and has none."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def photograph() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(noise).save(content := io.BytesIO(), "JPEG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.png", png_of(60_000, 60_000), r"x\.png is too large: it must have at most 178,956,970"),
        ("x.png", png_of(2**31 - 1, 2**31 - 1), r"x\.png is too large"),
        ("x.png", png_of(30, 30), r"x\.png is damaged: .*again, or remove it"),
        ("x.png", b"", r"x\.png is empty \(0 bytes\)"),
        ("x.png", b"<html>", r"x\.png is not a picture in a supported format \(.*PNG"),
        ("x.jpg", photograph()[:700], r"x\.jpg is damaged: image file is truncated"),
        (
            "x.png",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "is not a picture in a supported",
        ),
        ("a\nb.png", b"", r"a\\nb\.png is empty"),
    ],
)
def test_a_file_that_is_no_whole_picture_is_named_with_what_to_do(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_picture(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [("gone.png", "does not exist. Check"), ("x" * 300, "too long"), (".", "is a folder")],
)
def test_a_path_without_a_picture_is_not_called_damaged(name, message, tmp_path):
    with pytest.raises(DataError, match=message):
        open_picture(tmp_path / name)


def test_a_picture_that_the_memory_does_not_hold_is_refused_before_it_is_decoded(
    tmp_path, monkeypatch
):
    Image.new("1", (5000, 5000)).save(tmp_path / "x.png")
    monkeypatch.setattr(pictures, "free_bytes", lambda: 100_000_000)
    with pytest.raises(DataError, match=r"x\.png needs 300 MB .* 5000×5000 pixels, and 100 MB"):
        open_picture(tmp_path / "x.png")


def test_the_first_frame_of_a_moving_picture_is_taken(tmp_path):
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)


def test_notes_of_a_camera_that_cannot_be_read_do_not_spoil_a_picture(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert open_picture(tmp_path / "x.jpg").size == (20, 10)


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "LAB", "HSV", "YCbCr", "I;16", "F"])
def test_an_opened_picture_of_any_mode_becomes_rgb(mode):
    assert as_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_an_opened_picture_keeps_its_sixteen_bits():
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    assert np.asarray(as_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 255]
