"""The parts of self-contained HTML pages, and the page around them.

Each part is a function that takes plain values and returns safe markup. Text that is not
:class:`markupsafe.Markup` is always escaped::

    body = section(
        "speed",
        "Speed",
        "1×1 against 3×3, measured here.",
        table(Table(columns=("", ">ms"), rows=[["1×1", "0.42"]])),
        chart(LineChart(title="Loss", x="epoch", y="loss", series=(series,))),
        picture(data_uri(color_map(array)), alt="Map 3 of layer conv1"),
    )
    write_text(path, page("The article, measured", body))

The functions are imported from :mod:`onebyone.report.html`, charts and maps from their own modules.
A page loads nothing from elsewhere; its Content-Security-Policy forbids it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import jinja2
from markupsafe import Markup

import onebyone
from onebyone.core.tables import Table
from onebyone.report.charts import Chart


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One of the large figures at the top of a page.

    Attributes:
        value: The large text: a number with its unit, or a few words.
        label: The name of the quantity.
        detail: Small text: the interval, or the values before and after.
        raw: The number itself, for programs that read the page.
        in_words: Whether ``value`` is words, which are set smaller.
    """

    value: str
    label: str
    detail: str = ""
    raw: float | None = None
    in_words: bool = False


# ---------------------------------------------------------------- the whole page


def page(
    title: str,
    body: str | Markup,
    *,
    subtitle: str = "",
    kicker: str = "",
    description: str = "",
    contents: Sequence[tuple[str, str]] = (),
    footer: str = "",
    style: str = "",
) -> str:
    """Return a whole HTML page that needs no other file.

    Args:
        title: The page's heading and the window's title.
        body: The content of ``<main>``, a sequence of :func:`section`. The charting library is
            included only if the body has a :func:`chart`.
        subtitle: A line under the heading.
        kicker: What kind of page it is, above the heading.
        description: A sentence about the page, for its metadata.
        contents: Anchor and label of each section, for the links under the heading.
        footer: A closing line. The default is the version.
        style: Name of an additional style sheet among the assets.
    """
    return (
        environment()
        .get_template("base.html")
        .render(
            title=title,
            body=body,
            subtitle=subtitle,
            kicker=kicker,
            description=description,
            contents=contents,
            footer=footer or f"Made by onebyone {onebyone.__version__}.",
            version=onebyone.__version__,
            css=Markup("\n").join(_asset(name) for name in ("page.css", style) if name),
            scripts=_scripts(str(body)),
        )
    )


def _scripts(body: str) -> list[Markup]:
    names = ["plot.min.js"] if 'class="chart"' in body else []
    return [_asset(name) for name in [*names, "page.js"]]


# ---------------------------------------------------------------- its parts


def section(anchor: str, heading: str, *parts: str | Markup, heading_shown: bool = True) -> Markup:
    """Return a headed section; a part that is plain text becomes a paragraph.

    Args:
        anchor: Identifier that :func:`page`'s ``contents`` link to.
        heading: Second-level heading.
        *parts: Text, or markup of the other functions here; empty parts are left out.
        heading_shown: Whether the heading is visible; else only screen readers read it.
    """
    markup = [part if isinstance(part, Markup) else paragraph(part) for part in parts if part]
    return _part("section", anchor, heading, markup, heading_shown)


def paragraph(text: str | Markup, *, note: bool = False) -> Markup:
    """Return a paragraph, or with ``note`` a small remark under a table or figure."""
    return Markup('<p class="note">{}</p>' if note else "<p>{}</p>").format(text)  # noqa: S704


def table(content: Table, *, row_headings: bool = True, stack: bool | None = None) -> Markup:
    """Return a table as HTML; on a phone each row may become a block.

    Args:
        content: Columns, rows, title (the caption) and notes. Cells may be ``Markup``.
        row_headings: Whether the first cell of a row is its heading.
        stack: Whether rows become blocks on a phone. By default if there are four columns or more.
    """
    return _part(
        "table",
        [column.removeprefix(">") for column in content.columns],
        content.rows,
        content.title,
        content.notes,
        len(content.columns) > 3 if stack is None else stack,
        [column.startswith(">") for column in content.columns],
        row_headings,
    )


def figures(items: Sequence[Figure]) -> Markup:
    """Return the large figures, side by side."""
    return _part("figures", items)


def chart(content: Chart) -> Markup:
    """Return a chart with its description and a table, which is shown without JavaScript."""
    return _part(
        "chart",
        content.title,
        content.keys,
        json.dumps(content.data(), allow_nan=False, ensure_ascii=False, separators=(",", ":")),
        content.alternative,
        content.caption,
        table(dataclasses.replace(content.table(), title="")),
    )


def quantity(raw: float, text: str, small: str = "") -> Markup:
    """Return a figure that programs can read too: ``<data>`` has the record's value.

    Args:
        raw: The value itself.
        text: The value as text.
        small: Small text below it, such as an interval.
    """
    shown = Markup('<data value="{}">{}</data>').format(raw, text)
    return shown + Markup("<small>{}</small>").format(small) if small else shown


def picture(
    source: str, *, alt: str, caption: str | Markup = "", pixelated: bool = False
) -> Markup:
    """Return a picture.

    Args:
        source: A ``data:`` URL, from :func:`onebyone.report.pictures.data_uri`.
        alt: A description for screen readers.
        caption: A line below the picture.
        pixelated: Whether pixels keep sharp edges when the picture is enlarged.
    """
    return _part("picture", source, alt, caption, pixelated)


def gallery(items: Sequence[Markup]) -> Markup:
    """Return pictures, or other parts, in a grid that fits the page's width."""
    inner = Markup("\n").join(Markup("<li>{}</li>").format(item) for item in items)
    return Markup('<ul class="gallery">{}</ul>').format(inner)


def code(text: str, *, wrap: bool = False, tall: bool = False) -> Markup:
    """Return a block of code; a ``tall`` block gets its own scroll bar."""
    return _part("code", text, wrap, tall)


def disclosure(summary: str, *parts: Markup) -> Markup:
    """Return parts that are hidden until their summary is clicked."""
    return Markup('<details class="more"><summary>{}</summary>\n{}</details>').format(
        summary, Markup("\n").join(parts)
    )


def notice(heading: str, text: str, *, failed: bool = False, preformatted: str = "") -> Markup:
    """Return a prominent notice, for instance that a run did not finish."""
    return _part("notice", heading, text, failed, preformatted)


# ---------------------------------------------------------------- templates and assets


@functools.cache
def environment() -> jinja2.Environment:
    """Return the templates' environment: it escapes all text and refuses undefined names."""
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _read("templates", name)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _part(name: str, *arguments: object) -> Markup:
    macro = getattr(environment().get_template("parts.html").module, name)
    return Markup(macro(*arguments))  # noqa: S704  # an autoescaped macro's output


@functools.cache
def _asset(name: str) -> Markup:
    # The assets are onebyone's own. "</" inside a script would end it.
    text = _read("assets", name).strip()
    return Markup(text.replace("</", "<\\/") if name.endswith(".js") else text)  # noqa: S704


def _read(folder: str, name: str) -> str:
    return files("onebyone.report").joinpath(folder, name).read_text(encoding="utf-8")
