"""The page shows what the record holds, is one file, and escapes what is the user's."""

from html.parser import HTMLParser

import pytest
from article_records import FITTED, duel, layer, layer_times, record

from onebyone.article import render_article, verdicts

HOSTILE = '<script>alert("1")</script>'


class Page(HTMLParser):
    """Collects what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page():
    return Page(render_article(record()))


def test_nothing_is_loaded_from_elsewhere(page):
    for tag in ("img", "script", "link", "iframe"):
        for attributes in page.all(tag):
            address = attributes.get("src") or attributes.get("href") or "data:"
            assert address.startswith("data:")


def test_every_link_of_the_contents_leads_to_a_section(page):
    anchors = {attributes["href"] for attributes in page.all("a") if "href" in attributes}
    ids = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert anchors <= ids
    assert {"#claims", "#reduce", "#weighting", "#non-linearity", "#heads", "#maps"} <= anchors


def test_every_picture_says_what_it_shows(page):
    pictures = page.all("img")
    # Three of the weighting, two of the reduction, two and three of the activations.
    assert len(pictures) == 10
    assert all(attributes["alt"] for attributes in pictures)


def test_the_page_holds_every_claim_with_its_verdict(page):
    for claim in verdicts.claims(record()):
        assert claim.said in page.text
        assert claim.measured in page.text
        assert claim.verdict in page.text


def test_the_paper_is_quoted_beside_the_remedy(page):
    text = page.text.replace("\u00a0", " ")
    assert verdicts.PAPER in text
    assert "10.41 %" in text


def test_names_of_classes_are_text():
    text = render_article(record(classes=(HOSTILE, *"123456789")))
    assert HOSTILE not in text
    assert "&lt;script&gt;" in text


def test_a_single_seed_and_disturbed_times_still_make_a_page():
    single = duel(((1.0,), (0.9,)), ((1.0,), (0.9,)))
    text = render_article(
        record(
            heads=single,
            nonlinearity=single,
            layers=layer(times=(layer_times(disturbed=True),)),
        )
    )
    assert "a single seed does not show" in text


def test_the_same_record_makes_the_same_page():
    assert render_article(record()) == render_article(record())


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_scrolls_sideways(chromium, tmp_path, width, dark):
    path = tmp_path / "article.html"
    path.write_text(render_article(record(heads=duel(FITTED, FITTED))), encoding="utf-8")
    chromium.open(path, width=width, dark=dark)
    assert chromium.run("return document.documentElement.scrollWidth") <= width
    assert chromium.run("return document.querySelectorAll('figure.chart svg').length") == 6
    assert chromium.console() == []


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_axe_finds_nothing_serious(chromium, tmp_path, width, dark):
    path = tmp_path / "article.html"
    path.write_text(render_article(record(heads=duel(FITTED, FITTED))), encoding="utf-8")
    chromium.open(path, width=width, dark=dark)
    chromium.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert chromium.audit() == []
