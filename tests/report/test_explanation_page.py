"""The page of an explanation in a browser: whole, silent, and with hostile names as text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parsed_page import Page
from PIL import Image
from test_chromium import CONTRAST
from torch import nn

from onebyone.explaining import explain
from onebyone.networks.layers import GlobalAverageHead

HOSTILE = '<script>alert("x")</script> & <b>網絡</b>'
LONG = "a_very_long_name_without_any_place_to_break_it_" * 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explained")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    paths = []
    for name in ("a.png", "<img src=x onerror=alert(1)>.png", f"{LONG}.png"):
        paths.append(folder / name)
        Image.fromarray(pixels).save(paths[-1])
    classes = [HOSTILE, LONG, *(f"class {number}" for number in range(10))]
    exact = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), GlobalAverageHead(8, 12))
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(12))
    options = {"mean": [0.5], "std": [0.5], "size": (20, 30), "classes": classes, "layer": "0"}
    plain(torch.zeros(1, 3, 20, 30))
    return {
        name: (
            explain(network, paths, out=folder / name, **options).record,
            folder / name / "explain.html",
        )
        for name, network in (("exact", exact), ("grad-cam", plain))
    }


@pytest.mark.parametrize("kind", ["exact", "grad-cam"])
def test_its_figures_are_the_records(made, kind):
    record, path = made[kind]
    assert record.method == kind
    shown = {float(value) for value in Page(path.read_text(encoding="utf-8")).data_values()}
    for image in record.images:
        for each in image.classes:
            assert {each.score, each.probability} <= shown


def test_hostile_names_are_text(made):
    page = Page(made["exact"][1].read_text(encoding="utf-8"))
    assert HOSTILE in page.text()
    assert "<img src=x onerror=alert(1)>.png" in page.text()
    assert all("onerror" not in image.attributes for image in page.find("img"))
    assert all("alert(" not in script.text for script in page.find("script"))


def test_every_picture_has_words_for_those_who_do_not_see_it(made):
    page = Page(made["exact"][1].read_text(encoding="utf-8"))
    pictures = page.find("img")
    assert len(pictures) >= 3 * (1 + 3 + 12 + 1)
    assert all(picture.attributes["alt"] for picture in pictures)
    assert all(picture.attributes["src"].startswith("data:image/") for picture in pictures)


@pytest.mark.parametrize("kind", ["exact", "grad-cam"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_works_in_a_browser(browser, made, kind, width, dark):
    path = made[kind][1]
    browser.console()
    browser.requests()
    browser.open(path, width=width, dark=dark)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return [...document.images].every((i) => i.naturalWidth > 0)")
    assert browser.console() == []
    assert browser.requests() == [path.as_uri()]
    assert browser.run(CONTRAST) == []


@pytest.mark.parametrize(
    ("kind", "width", "dark"), [("exact", 1280, False), ("grad-cam", 360, True)]
)
def test_axe_finds_nothing_serious(browser, made, kind, width, dark):
    browser.open(made[kind][1], width=width, dark=dark)
    assert browser.audit() == []
