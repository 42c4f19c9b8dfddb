"""Settings that several functions take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onebyone.core.arguments import check_settings

if TYPE_CHECKING:
    from onebyone.calibration.meaning import Meaning, TaskLike
    from onebyone.core.metrics import AnyMetric

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class CheckedSettings:
    """Settings whose values are checked by name when they are created."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class TaskSettings(CheckedSettings):
    """What the outputs mean.

    Attributes:
        task: What the outputs mean: ``classification``, ``multilabel``, ``regression``,
            ``segmentation``, ``sequence``, ``restoration``, ``embedding``, or a
            :class:`onebyone.Task`. By default what the data or the network makes certain.
    """

    task: TaskLike | Meaning | None = None


@dataclass(frozen=True, kw_only=True)
class TimingSettings(CheckedSettings):
    """How a call is timed.

    Attributes:
        batch: Batch size while timing.
        num_threads: Threads while timing. By default as many as torch is set to.
    """

    batch: int = 1
    num_threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(TaskSettings):
    """How networks are scored.

    Attributes:
        ignore_index: A label that is left out of every count and loss, such as 255 or -1.
        metric: ``accuracy``, ``pixel accuracy``, ``mIoU``, ``F1``, ``negative squared error``,
            ``PSNR``, or a function ``(outputs, targets) -> scores (n,)``, where higher is better;
            or a :class:`onebyone.MeanAveragePrecision`. By default the task's.
    """

    ignore_index: int | None = None
    metric: str | AnyMetric | None = None


@dataclass(frozen=True, kw_only=True)
class DrawSettings(CheckedSettings):
    """Settings of random draws, CUDA graphs and progress.

    Attributes:
        seed: Random seed.
        capture: Capture training steps as CUDA graphs on a GPU. Turn it off for a network whose
            Python code behaves differently from call to call.
        progress: Called as ``progress(done_steps, total_steps, message)``.
    """

    seed: int = 0
    capture: bool = True
    progress: Progress | None = None
