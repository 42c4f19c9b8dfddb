"""Picture files: every depth, turned upright, cut from the center."""

import numpy as np
import pytest
from PIL import Image

from onebyone.data.pictures import fit_picture, open_picture
from onebyone.errors import DataError


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
