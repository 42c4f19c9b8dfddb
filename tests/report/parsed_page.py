"""Reads a page as a browser would: its text, its elements, and what it would load."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input", "source", "wbr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    parent: Element | None = None
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def whole_text(self) -> str:
        return self.text


class Page(HTMLParser):
    """A parsed page; fails on tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(html)
        self.close()
        assert not self._open, f"left open: {[element.tag for element in self._open]}"

    def handle_starttag(self, tag, attrs):
        parent = self._open[-1] if self._open else None
        element = Element(tag, dict(attrs), parent)
        self.elements.append(element)
        if parent:
            parent.children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data):
        for element in self._open:
            element.text += data

    def find(self, tag: str, **attributes: str) -> list[Element]:
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [
            element
            for element in self.elements
            if element.tag == tag
            and all(
                value in (element.attributes.get(name) or "").split()
                for name, value in wanted.items()
            )
        ]

    def text(self) -> str:
        """Return what is read: the text outside scripts and styles."""
        body = next(element for element in self.elements if element.tag == "body")
        hidden = "".join(script.text for script in self.find("script"))
        shown = body.text.replace(hidden, " ") if hidden else body.text
        return " ".join(shown.replace("\u00a0", " ").split())

    def data_values(self) -> list[str]:
        return [element.attributes["value"] or "" for element in self.find("data")]
