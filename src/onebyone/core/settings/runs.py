"""Settings of runs: `shrink`, and a training that is kept as a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from onebyone.core.errors import OptionError
from onebyone.core.settings.common import DrawSettings, ScoreSettings, TimingSettings
from onebyone.core.settings.planning import ChoiceSettings
from onebyone.core.settings.training import FitSettings, TeacherSettings, check_epochs

if TYPE_CHECKING:
    from onebyone.core.records import Plan
    from onebyone.pipeline.loading import Original

# Settings that the result does not depend on, or that the network's identity covers. All others
# must be the same when a run is resumed.
_NOT_DECIDING = frozenset(
    {
        "command", "log", "model_options", "original", "out", "overwrite", "progress", "resume",
        "uses", "weights",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunSettings(DrawSettings, TimingSettings, ScoreSettings):
    """Settings that every run takes.

    Attributes:
        out: Folder for the record, the weights and the report. By default nothing is written.
        runtimes: Runtimes in which latency is measured, interleaved: ``eager``, ``channels-last``,
            ``packed``, ``compile``, ``onnxruntime``, ``openvino``, ``executorch``, ``cuda-graph``,
            ``tensorrt``; some with ``:bf16`` after the name or, on a GPU, ``:tf32``.
        device: Where to run: ``cpu`` or ``cuda``. By default ``cuda`` where there is one.
        log: Where each epoch is reported, besides ``log.csv`` in the run's folder:
            ``tensorboard``, ``mlflow``, ``wandb``, each with its own library.
        resume: Resume the unfinished run in ``out``, which must have been started with the same
            network, data and settings.
        overwrite: Replace the run in ``out``.
        command: The command line, for the record.
        uses: Files and folders that the run reads; ``out`` must be apart from them.
    """

    work: ClassVar[str]  # a word for what the run does

    out: str | Path | None = None
    runtimes: Sequence[str] = ("eager",)
    device: str | None = None
    log: Sequence[str] = ()
    resume: bool = False
    overwrite: bool = False
    command: Sequence[str] = ()
    uses: Sequence[str | Path] = ()

    @property
    def deciding(self) -> dict[str, object]:
        """Every setting that the result depends on, by name."""
        names = (each.name for each in fields(self) if each.name not in _NOT_DECIDING)
        return {"work": self.work} | {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.overwrite:
            raise OptionError(
                "Give only one of `resume`, which resumes the run in the folder, and `overwrite`, "
                "which replaces it."
            )
        if self.resume and self.out is None:
            raise OptionError("`resume` needs the folder of the run to resume: give `out`.")


@dataclass(frozen=True, kw_only=True)
class ShrinkSettings(RunSettings, TeacherSettings, ChoiceSettings):
    """How a network is shrunk.

    Attributes:
        max_drop: Instead of a budget: choose the fastest network, in the first of ``runtimes``,
            that loses no more than this on the validation data before fine-tuning. In points for
            accuracy (without labels: for agreement with the original), else in the metric's unit.
        only_faster: Choose only rewrites that are shown to be faster in the first of ``runtimes``.
            A latency budget always does so.
        plan: A plan to carry out instead of making one.
        reconstruct: Steps that bring all weights nearer to the original's outputs on training
            inputs, without labels, before any fine-tuning. A few hundred take a minute or a few.
        epochs: Epochs of distilling from the original; 0 stops before fine-tuning.
        int8_epochs: Epochs of distilling the network in int8, after it was quantized; for
            ``precision`` int8 and auto. Needs no labels; the best epoch is kept, or none if none
            is nearer to the teacher. The teacher is the original; where labels have a weight, the
            network before it was quantized.
        learning_rate: The highest learning rate of the distillation. By default several are tried
            and the best is used. The distillation in int8 always tries rates of its own.
        calibration_examples: Number of training inputs, without labels, that weights are fitted
            on. By default 1,024, or more for a cheap network with a wide linear layer.
    """

    work: ClassVar[str] = "shrink"

    max_drop: float | None = None
    only_faster: bool = False
    plan: Plan | None = None
    reconstruct: int = 0
    epochs: int = 5
    int8_epochs: int = 0
    learning_rate: float | None = None
    calibration_examples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("budget", "max_drop", "plan")
        given = [f"`{name}`" for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(
                f"Give one of `budget`, `max_drop` and `plan`, got {' and '.join(given)}."
            )
        if self.max_drop is not None and self.precision != "float32":
            raise OptionError(
                f"`max_drop` must go with `precision` float32, got {self.precision!r}: networks "
                "are tried before they are quantized. Give a `budget`."
            )
        deployed = self.precision if self.plan is None else self.plan.precision
        if self.int8_epochs and deployed == "float32":
            raise OptionError(
                f"`int8_epochs` must be 0 with `precision` float32, got {self.int8_epochs}. Give "
                "`precision` int8 or auto."
            )
        if self.fastest and self.budget is None:
            raise OptionError("`fastest` needs a `budget`, such as `params=50%`.")


@dataclass(frozen=True, kw_only=True)
class ShrinkArguments(ShrinkSettings):
    """The keywords of `shrink`: settings of the run, and of loading a network by name.

    Attributes:
        weights: If ``model`` is a name: a file, or ``pretrained``.
        model_options: If ``model`` is a name: options of its factory.
        original: If ``model`` is a run's folder: as for :func:`onebyone.load_model`.
    """

    weights: str | Path | None = None
    model_options: Mapping[str, Any] | None = None
    original: Original | None = None


@dataclass(frozen=True, kw_only=True)
class TrainRunSettings(RunSettings, FitSettings):
    """How a network is trained as a run.

    Attributes:
        epochs: Passes over the training data.
    """

    work: ClassVar[str] = "train"

    epochs: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_epochs(self.epochs)
