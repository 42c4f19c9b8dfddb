"""A gallery of test examples: pictures side by side, and what the networks give for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from onebyone.report.components import environment

MOST_CHARACTERS = 1_800_000  # the most for all pictures, so that a page stays below 3 MB
LEFT_OUT = " Some pictures are left out, to keep this page small."


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A picture of an example.

    Attributes:
        what: What it shows, for screen readers and as its title.
        source: A ``data:`` address; empty for a blank ground.
        over: Address of a picture that lies over it.
        drawn: A drawing that lies over it.
        caption: A visible line below it.
    """

    what: str
    source: str
    over: str = ""
    drawn: Markup | None = None
    caption: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to see."""
        return not (self.source or self.over or self.drawn)

    def checked(self) -> Panel:
        """Return the same without addresses that would load a file: records come from anywhere."""
        source, over = (
            each if each.startswith("data:image/") else "" for each in (self.source, self.over)
        )
        return replace(self, source=source, over=over)


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A line below the pictures.

    Attributes:
        right: Whether a prediction is right; ``None`` for all else.
    """

    name: str
    text: str
    right: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """A test example.

    Attributes:
        index: Position in the test data.
        panels: Its pictures; empty ones are left out.
    """

    index: int
    panels: Sequence[Panel]
    facts: Sequence[Fact]


def example_gallery(
    examples: Sequence[Example], *, wide: bool = False, most: int = MOST_CHARACTERS
) -> tuple[Markup, bool]:
    """Return the examples in a grid, and whether pictures were left out to keep the page small.

    Args:
        examples: In order; of too many, the last ones lose their pictures.
        wide: Whether each example takes the page's whole width.
        most: The most characters for all pictures.
    """
    room, items = most, []
    for example in examples:
        panels = [panel.checked() for panel in example.panels]
        room -= sum(len(panel.source) + len(panel.over) for panel in panels)
        shown = [panel for panel in panels if not panel.is_empty] if room >= 0 else []
        items.append(replace(example, panels=shown))
    template = environment().get_template("example_gallery.html")
    markup = template.render(items=items, wide=wide)
    return Markup(markup), room < 0  # noqa: S704  # an autoescaped template's output


def class_name(classes: Sequence[str], index: int) -> str:
    """Return a class's name, or its number if it has none."""
    return classes[index] if 0 <= index < len(classes) else f"class {index}"
