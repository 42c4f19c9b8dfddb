"""A run's folder: its record, plan, weights and report; and networks loaded back from one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from onebyone.errors import OptionError, OutputError, RecordError, WeightsError
from onebyone.models import Loaded, load, load_weights, save_weights
from onebyone.records import ModelSource, RunRecord
from onebyone.report.html import write_report
from onebyone.rewrites import restructure
from onebyone.sites import as_network, evaluation_copy

RECORD = "run.json"
PLAN = "plan.json"
WEIGHTS = "model.safetensors"
ONE_SHOT = "one-shot.safetensors"
REPORT = "report.html"
CHECKPOINT = "checkpoint.pt"


class RunFolder:
    """Where a run keeps what it made. Each file is written whole or not at all.

    Args:
        path: Made if it does not exist. A folder with other content than a run is refused.
        resume: Go on with the unfinished run in it.
        overwrite: Replace the run in it.

    Raises:
        OutputError: If the folder cannot be used; says why and what to do. It is then untouched.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.earlier: RunRecord | None = None
        self._open(resume=resume, overwrite=overwrite)

    def _open(self, *, resume: bool, overwrite: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"The output must be a folder, but {self.path} is a file.")
        content = list(self.path.iterdir()) if self.path.exists() else []
        if content and not (self.path / RECORD).exists():
            raise OutputError(
                f"The output folder must be new, empty, or a run's, but {self.path} has other "
                f"files, such as {content[0].name!r}. Choose another folder."
            )
        if content:
            self._take_over(resume=resume, overwrite=overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"Cannot make the folder {self.path}: {error.strerror}.") from error

    def _take_over(self, *, resume: bool, overwrite: bool) -> None:
        earlier = RunRecord.load(self.path / RECORD)
        if overwrite:
            for name in (RECORD, PLAN, WEIGHTS, ONE_SHOT, REPORT, CHECKPOINT):
                (self.path / name).unlink(missing_ok=True)
        elif not resume:
            how = "has finished" if earlier.status.state == "finished" else "did not finish"
            more = "" if earlier.status.state == "finished" else "Go on with it by --resume, "
            raise OutputError(
                f"{self.path} has a run already, which {how}. {more}"
                f"{'or r' if more else 'R'}eplace it by --overwrite, or choose another folder."
            )
        else:
            self.earlier = earlier

    def file(self, name: str) -> Path:
        """Return the path of one of the run's files."""
        return self.path / name

    def save(self, record: RunRecord) -> None:
        """Write the record, its plan, and the report made from it."""
        if record.plan is not None:
            record.plan.save(self.file(PLAN))
        record.save(self.file(RECORD))
        write_report(record, self.file(REPORT))

    def save_network(self, network: nn.Module, name: str = WEIGHTS) -> None:
        """Write a network's weights."""
        save_weights(network, self.file(name))


def is_run(path: str | Path) -> bool:
    """Whether there is a run's folder at that path."""
    return (Path(path) / RECORD).is_file()


def load_model(
    spec: str | Path,
    *,
    weights: str | Path | None = None,
    original: Callable[[], nn.Module] | nn.Module | None = None,
    **options: Any,
) -> nn.Module:
    """Return a network by name, from a file's factory, or from a run's folder.

    Args:
        spec: ``onebyone:NAME``, ``torchvision:NAME``, ``timm:NAME``, ``path/net.py:factory``, or
            the folder of a run, which gives the rewritten network with its weights.
        weights: A ``.safetensors`` or state-dict file, ``"pretrained"``, or ``None`` for new
            weights (for a run: the run's).
        original: For a run made from a module in memory: that network, or a function that makes
            it. Not modified.
        options: Passed on to the factory.

    Returns:
        The network, on the CPU, in evaluation mode.

    Raises:
        UnknownNameError: If there is no such network.
        WeightsError: If weights are missing, unreadable, or those of another network.
        RecordError: If the folder has no readable run.
    """
    return load_source(spec, weights=weights, original=original, **options).model


def load_source(
    spec: str | Path,
    *,
    weights: str | Path | None = None,
    original: Callable[[], nn.Module] | nn.Module | None = None,
    **options: Any,
) -> Loaded:
    """Return a network as :func:`load_model` does, with where it came from and what it takes."""
    if is_run(spec):
        return _load_run(Path(spec), weights, original)
    if Path(spec).is_dir():
        raise RecordError(
            f"The folder {spec} must be a run's, with a {RECORD}, but it has none. "
            f"Give the folder that `onebyone shrink --out` or `onebyone train --out` wrote."
        )
    loaded = load(str(spec), weights=weights, **options)
    return replace(loaded, model=as_network(loaded.model))


def load_original(
    folder: str | Path,
    *,
    weights: str | Path | None = None,
    original: Callable[[], nn.Module] | nn.Module | None = None,
) -> nn.Module:
    """Return the network that a run was made from, with its weights.

    Args:
        folder: The run's.
        weights: The original's, where they came from a file: the record keeps the file's name only.
        original: For a run made from a module in memory: that network, or a function that makes it.

    Returns:
        The network, in evaluation mode.

    Raises:
        OptionError: If the run was made from a module in memory, and none is given.
        WeightsError: If the weights are not known.
        RecordError: If the folder has no readable run.
    """
    source = RunRecord.load(Path(folder) / RECORD).source
    if original is None and source.spec is not None:
        spec = _located(source.spec, Path(folder))
        known = is_run(spec) or spec.rpartition(":")[0].endswith(".py")
        pretrained = "pretrained" if source.weights == "pretrained" else None
        if weights is None and not known and pretrained is None:
            raise WeightsError(
                f"The weights of the original, {source.weights or 'random ones'}, are not in the "
                f"run {folder}: give their file."
            )
        chosen = weights if weights is not None else pretrained
        options: dict[str, Any] = dict(source.options)
        return load_source(spec, weights=chosen, **options).model
    return _base_network(source, original, Path(folder))


def _load_run(
    folder: Path,
    weights: str | Path | None,
    original: Callable[[], nn.Module] | nn.Module | None,
) -> Loaded:
    record = RunRecord.load(folder / RECORD)
    base = _base_network(record.source, original, folder)
    network = base if record.plan is None else restructure(base, record.plan)
    file = Path(weights) if weights is not None else folder / WEIGHTS
    if weights is None and not file.exists():
        raise WeightsError(
            f"The run in {folder} has no {WEIGHTS}: it {record.status.state} at "
            f"{record.status.stage!r}. Finish it by --resume."
        )
    load_weights(network, file, network=str(folder))
    shape = _input_shape(record)
    # What was loaded is the run itself: rebuilding it needs the folder.
    source = ModelSource(name=folder.name, spec=str(folder), weights=file.name)
    return Loaded(model=network.eval(), source=source, input_shape=shape)


def _base_network(
    source: ModelSource, original: Callable[[], nn.Module] | nn.Module | None, folder: Path
) -> nn.Module:
    if isinstance(original, nn.Module):
        # A copy: the run's weights must not get into the caller's.
        return evaluation_copy(as_network(original))
    if original is not None:
        return as_network(original())
    if source.spec is None:
        raise OptionError(
            f"The run in {folder} was made from a module in memory, a {source.name}: give it, or a "
            f"function that makes it, as `original=`."
        )
    options: dict[str, Any] = dict(source.options)
    return load_source(_located(source.spec, folder), **options).model


def _located(spec: str, folder: Path) -> str:
    """Return a network's name with its path as it is found from here.

    A run keeps the path that it was given, from the folder that it was started in: most often
    one that the run's own folder lies in.
    """
    path, colon, name = spec.rpartition(":") if ".py:" in spec else (spec, "", "")
    if Path(path).exists():
        return spec
    there = (parent / path for parent in folder.resolve().parents)
    found = next((each for each in there if each.exists()), None)
    return spec if found is None else f"{found}{colon}{name}"


def _input_shape(record: RunRecord) -> tuple[int, ...] | None:
    if record.data is not None:
        return record.data.input_shape
    return None if record.plan is None else record.plan.input_shape[1:]
