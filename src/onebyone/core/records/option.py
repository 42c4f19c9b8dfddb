"""The record of what may be done to a site: its steps, what it costs and what it harms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

import msgspec

from onebyone.core.fields import Text
from onebyone.core.records.base import Record
from onebyone.core.records.profile import Cost, not_below_zero
from onebyone.core.records.timing import Ratio

Settings = dict[str, int | str | list[int]]


@dataclass(frozen=True, kw_only=True)
class Step(Record):
    """One rewrite with its settings, such as ranks."""

    rewrite: Text
    settings: Settings

    def __str__(self) -> str:
        return f"{self.rewrite} {format_settings(self.settings)}".strip()


Steps = Annotated[tuple[Step, ...], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Option(Record):
    """What may be done to one site, with its cost and its predicted harm.

    Attributes:
        steps: One rewrite, or several: each is carried out on the module that the one before made.
        after: The site's cost once all steps are carried out.
        occupies: Names of all the modules that the first step replaces.
        error: Relative squared error of the site's outputs on the calibration data.
        harm: Predicted divergence of the network's outputs from the original's, in what the
            plan's task measures it in.
        measured: Whether ``harm`` was measured by running the option, not interpolated.
        gain: Time of the site as it is / time of the option, measured in turns between the same
            neighbors; ``None`` where it was not timed, or only predicted from others.
    """

    site: str
    steps: Steps
    before: Cost
    after: Cost
    occupies: tuple[str, ...] = ()
    error: float | None = None
    harm: float | None = None
    measured: bool = False
    gain: Ratio | None = None

    def check(self) -> None:
        """Check that neither cost is below zero."""
        for name, cost in (("before", self.before), ("after", self.after)):
            not_below_zero(f"{name} of the option for site {self.site!r}", cost)

    @classmethod
    def of(
        cls,
        rewrite: str,
        settings: Settings,
        *,
        site: str,
        before: Cost,
        after: Cost,
        occupies: tuple[str, ...] = (),
        error: float | None = None,
        harm: float | None = None,
        measured: bool = False,
    ) -> Self:
        """Return the option of one step."""
        return cls(
            site=site,
            steps=(Step(rewrite=rewrite, settings=settings),),
            before=before,
            after=after,
            occupies=occupies,
            error=error,
            harm=harm,
            measured=measured,
        )

    @property
    def first(self) -> Step:
        """The step that is carried out on the site itself."""
        return self.steps[0]

    @property
    def rewrites(self) -> tuple[str, ...]:
        """Names of the steps' rewrites."""
        return tuple(step.rewrite for step in self.steps)

    @property
    def label(self) -> str:
        """All steps in words: ``factorize tucker2 8, 12 + int8``."""
        return " + ".join(map(str, self.steps))

    @property
    def saved(self) -> Cost:
        """What the option saves."""
        return self.before - self.after


def format_settings(settings: Settings) -> str:
    """Return settings as short text: ``tucker2 8, 12``."""
    return " ".join(
        ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for value in settings.values()
    )
