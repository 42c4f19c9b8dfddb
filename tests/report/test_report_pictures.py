from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from onebyone.core.errors import OptionError
from onebyone.report.pictures import (
    color_map,
    data_uri,
    encode_png,
    enlarge_pixels,
    image_pixels,
    map_grid,
    overlay,
)


def decoded(address: str) -> np.ndarray:
    head, body = address.split(",", 1)
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_png_gives_the_pixels_back(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.testing.assert_array_equal(decoded(data_uri(pixels)), pixels)
    assert data_uri(encode_png(pixels)) == data_uri(pixels)


def test_pixels_of_another_shape_are_refused():
    with pytest.raises(OptionError, match=r"`pixels` must have shape .* got \(2, 3, 4\)"):
        encode_png(np.zeros((2, 3, 4)))


def test_viridis_has_its_known_ends_and_middle():
    colors = color_map(np.array([0.0, 0.5, 1.0]))
    assert colors.tolist() == [[68, 1, 84], [33, 145, 140], [253, 231, 37]]


def test_viridis_brightens_all_the_way():
    colors = color_map(np.linspace(0, 1, 256)).astype(float)
    assert (np.diff(colors @ [0.2126, 0.7152, 0.0722]) > -1).all()


def test_gray_is_linear():
    assert color_map(np.array([0, 1, 2]), colors="gray").tolist() == [[0] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("value", [3.0, np.nan, np.inf])
def test_map_without_contrast_is_dark(value):
    assert (color_map(np.full((2, 2), value)) == (68, 1, 84)).all()


def test_values_that_are_not_finite_do_not_move_the_scale():
    colors = color_map(np.array([0.0, np.nan, 1.0, np.inf]))
    assert colors[2].tolist() == [253, 231, 37]
    assert colors[1].tolist() == [68, 1, 84]


def test_image_of_one_channel_is_gray():
    pixels = image_pixels(np.array([[[0.0, 1.0]]]))
    assert pixels.tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_overlay_leaves_the_image_where_nothing_is_active():
    image = np.random.default_rng(0).random((1, 8, 8))
    np.testing.assert_array_equal(overlay(image, np.zeros((2, 2))), image_pixels(image))


def test_overlay_is_strongest_where_the_map_is():
    covered = overlay(np.zeros((3, 16, 16)), np.array([[0.0, 0.0], [0.0, 1.0]])).astype(int)
    assert covered[15, 15].sum() > 200
    assert covered[0, 0].sum() == 0
    assert overlay(np.zeros((3, 16, 16)), -np.ones((2, 2))).sum() == 0


def test_grid_places_each_map():
    maps = np.zeros((5, 2, 2))
    maps[4, 0, 0] = 1
    grid = map_grid(maps, columns=3, gap=1)
    assert grid.shape == (5, 8, 3)
    assert grid[3, 3].tolist() == [253, 231, 37]
    assert grid[2, 0].tolist() == [128, 128, 128]


def test_grid_of_nothing_is_refused():
    with pytest.raises(OptionError, match="with at least 1 map"):
        map_grid(np.zeros((0, 2, 2)))


def test_pixels_are_enlarged_as_squares():
    assert enlarge_pixels(np.ones((2, 3, 3), np.uint8), 4).shape == (8, 12, 3)
