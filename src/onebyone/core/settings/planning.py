"""Settings of `plan`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from onebyone.core.arguments import PLAN_PRECISION
from onebyone.core.settings.common import CheckedSettings, Progress, TaskSettings, TimingSettings

if TYPE_CHECKING:
    from onebyone.core.records import PlanPrecision
    from onebyone.planning import HeadChoice

DEFAULT_BUDGET = "macs=50%"

Effort = Literal["quick", "normal", "thorough"]


@dataclass(frozen=True, kw_only=True)
class ChoiceSettings(CheckedSettings):
    """What a plan may choose.

    Attributes:
        budget: An upper bound, or several that are all met: ``latency=50%``, ``latency=5ms``,
            ``macs=50%``, ``params=20k``, ``size=2MB``, ``memory=8MB``. By default ``macs=50%``.
            Latency is the time of a call in the runtime; size is the bytes of the weights as
            deployed; memory is that of the weights and the activations alive at the same time.
            Latency and memory are for ``batch`` inputs.
        fastest: Choose the fastest network whose harm is at most a tenth above the least within
            the budgets.
        closest: If the budgets cannot be met, choose the plan that comes nearest: each budget, in
            the order given, is raised to the least that can be reached.
        measure_front: For a latency budget, build and measure the networks of other budgets as
            well, as many as a minute allows.
        head: How Flatten + Linear is rewritten: ``exact`` makes convolutions of the same function,
            ``gap`` makes 1×1 convolutions and a global average, ``keep`` changes nothing, and
            ``auto`` has ``gap`` as one option among others.
        leave: Names of modules to skip, with all inside them.
        precision: ``float32``; ``int8``: rewrites are chosen by their times in int8, and the
            network is deployed in it; or ``auto``: the plan chooses the precision of each layer,
            too. Int8 is for ``onnxruntime`` and ``openvino``. Budgets in percent are of the
            original in float32.
        effort: On how many options and examples harm is measured. ``quick`` takes about half of
            the time of ``normal``, and its plans are worse; ``thorough`` takes several times as
            long.
    """

    budget: str | Iterable[str] | None = None
    fastest: bool = False
    closest: bool = False
    measure_front: bool = False
    head: HeadChoice = "auto"
    leave: Sequence[str] = ()
    precision: PlanPrecision = field(default="float32", metadata={"check": PLAN_PRECISION})
    effort: Effort = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            object.__setattr__(self, "budget", _checked(self.budget))

    @property
    def budgets(self) -> tuple[str, ...]:
        """The given budgets, or the default one."""
        return (DEFAULT_BUDGET,) if self.budget is None else tuple(self.budget)


def _checked(budget: str | Iterable[str]) -> tuple[str, ...]:
    """Check budgets and return them as a tuple, since an iterator can be read only once."""
    # Imported late, since the import is slow and `--help` does not need it.
    from onebyone.core.budget import budget_texts, check_budgets  # noqa: PLC0415

    texts = budget_texts(budget)
    check_budgets(texts)
    return tuple(texts)


@dataclass(frozen=True, kw_only=True)
class PlanSettings(TimingSettings, TaskSettings, ChoiceSettings):
    """Settings of a plan.

    Attributes:
        runtime: Runtime that the network will run in, such as ``onnxruntime``. Rewrites that are
            not shown to be faster there are not chosen. By default ``eager`` for a latency budget;
            for others nothing is timed.
        input_shape: Without calibration data, the shape of the input with the batch in front.
        example: Without calibration data, in place of ``input_shape``: a tensor, a tuple of
            positional arguments or a mapping of keyword arguments.
        cache: Folder that keeps times and options for the next plan, so that another budget for
            the same network and data takes seconds; ``False`` keeps none. By default
            ``ONEBYONE_CACHE`` or a folder in the user's cache.
        name: Name of the network. By default that of its class.
        device: Where to run it.
        progress: Called as ``progress(done_steps, total_steps, message)``.
    """

    runtime: str | None = None
    input_shape: tuple[int, ...] | None = None
    example: object = None
    cache: str | Path | Literal[False] | None = None
    name: str | None = None
    device: str = "cpu"
    progress: Progress | None = None
