"""The trials of a sweep: from options and a file to command lines of `onebyone shrink`."""

from __future__ import annotations

import argparse
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebyone.cli.option_files import option, read_options, tokens, words
from onebyone.cli.options import flag_of, given, offered
from onebyone.core.errors import OptionError, UnknownNameError
from onebyone.core.settings.runs import ShrinkSettings

if TYPE_CHECKING:
    from onebyone.core.records import SweepTrial


@dataclass(frozen=True)
class Axis:
    """An option that trials differ in.

    Attributes:
        default: Its value where none is given.
        parts: Whether a comma separates two values; in a budget it joins two that are both met.
    """

    metavar: str
    default: str
    help: str
    parts: bool = True


AXES: Mapping[str, Axis] = {
    "budget": Axis(
        "QUANTITY=AMOUNT",
        "macs=50%",
        "upper bound, as of shrink (default: macs=50%%); macs=50%%,params=40%% is one trial that "
        "meets both",
        parts=False,
    ),
    "runtime": Axis("NAME", "eager", "runtime to plan for and to time in (default: eager)"),
    "seed": Axis("N", "0", "random seed (default: 0)"),
    "precision": Axis("NAME", "float32", "float32, int8 or auto (default: float32)"),
    "effort": Axis("NAME", "normal", "quick, normal or thorough (default: normal)"),
}
# Settings of shrink that a sweep has options of its own for, or does not take.
OWN = ("budget", "runtimes", "seed", "precision", "effort", "plan", "log", "resume", "overwrite")
# Options that no result depends on.
_WHERE = frozenset({"address", "json", "node", "out", "overwrite", "resume"})
_MOST_TRIALS = 10_000


@dataclass(frozen=True)
class Network:
    """A network of a sweep, with the options of its own: those of `shrink` by name."""

    model: str
    options: Mapping[str, str | list[str]]

    @property
    def name(self) -> str:
        """A short name: the last part of what it was given as."""
        return re.split(r"[/:\\]", self.model.rstrip("/\\"))[-1] or self.model

    @property
    def arguments(self) -> list[str]:
        """Its part of the command line."""
        named = [option(f"--{name}", each) for name, value in self.options.items()
                 for each in (value if isinstance(value, list) else [value])]  # fmt: skip
        return [self.model, *itertools.chain.from_iterable(named)]

    @property
    def data(self) -> str:
        """The data, as it was given."""
        return str(self.options["data"])


# Options that a network of a file may have for itself.
_OF_NETWORK = ("data", "image-size", "limit", "model", "model-option", "original", "weights")


def merged(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a sweep: those of its file, with those of the command line over them.

    Raises:
        OptionError: If the file cannot be read, or has what is no option.
    """
    asked = {name: value for name, value in vars(args).items() if name != "model"}
    models = list(args.model)
    files = [model for model in models if model.lower().endswith(".toml")]
    if not files:
        return {**asked, "model": models}
    if len(models) > 1:
        raise OptionError("A sweep has one file, or networks: name the networks in the file.")
    content = read_options(Path(files[0]), "a sweep")
    networks = content.pop("network", [])
    models = words(content.pop("model", []), f"`model` of {files[0]}")
    known = {*AXES, *_flags(), "weights", "data", "limit", "image-size", "address", "node"}
    for name in content:
        if name not in known:
            raise UnknownNameError(f"option in {files[0]}", name, known, listed=len(known))
    of_content = [tokens(name, value, files[0]) for name, value in content.items()]
    given_there = list(itertools.chain.from_iterable(of_content))
    try:  # the parser prints what is wrong
        parsed = _parser("sweep").parse_args(["sweep", "-", *given_there])
    except SystemExit:
        raise OptionError(f"{files[0]} must have options of `onebyone sweep`; see above.") from None
    of_file = {name: value for name, value in vars(parsed).items() if name != "command"}
    return {**of_file, **asked, "model": models, "network": networks, "file": files[0]}


def _flags() -> dict[str, str]:
    """Return the settings of shrink that a sweep passes on, by their flag without dashes."""
    names = [name for name in offered(ShrinkSettings) if name not in OWN]
    return {flag_of(ShrinkSettings, name).removeprefix("--"): name for name in names}


def networks_of(asked: Mapping[str, Any]) -> list[Network]:
    """Return the networks of a sweep with their own options.

    Raises:
        OptionError: If there is none, or one without data.
        UnknownNameError: If the file has an unknown option of a network.
    """
    common = {"weights": "weights", "data": "data", "limit": "limit", "image_size": "image-size"}
    shared = {flag: str(asked[name]) for name, flag in common.items() if name in asked}
    found = [Network(model, shared) for model in asked["model"]]
    of_file = asked.get("network", [])
    if not isinstance(of_file, list) or not all(isinstance(each, dict) for each in of_file):
        raise OptionError(f"A network in {asked['file']} must be a table [[network]].")
    for entry in of_file:
        for name in entry:
            if name not in _OF_NETWORK:
                raise UnknownNameError(f"option of a network in {asked['file']}", name, _OF_NETWORK)
        texts = {name: words(value, f"`{name}` of a network") for name, value in entry.items()}
        model = texts.pop("model", [])
        if len(model) != 1:
            raise OptionError(f"Each network in {asked['file']} must have one `model`.")
        own = {
            name: value if name == "model-option" else value[-1] for name, value in texts.items()
        }
        # Weights are those of one network.
        others = {name: value for name, value in shared.items() if name != "weights"}
        found.append(Network(model[0], {**others, **own}))
    if not found:
        raise OptionError("A sweep needs a network: give `model` or a table [[network]].")
    for network in found:
        if "data" not in network.options:
            raise OptionError(f"A sweep needs data for {network.model}: give --data.")
    return found


def values_of(asked: Mapping[str, Any], name: str) -> list[str]:
    """Return the values of an axis, each once.

    Raises:
        OptionError: If one is empty.
    """
    axis = AXES[name]
    texts = asked.get(name, [axis.default])
    values = [
        part.strip() for text in texts for part in (text.split(",") if axis.parts else [text])
    ]
    if not all(values):
        raise OptionError(f"--{name} must not be empty, got {texts}.")
    return list(dict.fromkeys(values))


def trials_of(
    networks: Sequence[Network], asked: Mapping[str, Any], out: Path
) -> tuple[SweepTrial, ...]:
    """Return a trial for each combination.

    All command lines are parsed and checked, so that a slip is told before any work.

    Args:
        networks: What to shrink.
        asked: The options.
        out: Folder of the sweep.

    Raises:
        OptionError: If an option has an invalid value, or there are too many trials.
    """
    axes = {name: values_of(asked, name) for name in AXES}
    if "max_drop" in asked:
        if "budget" in asked:
            raise OptionError("Give either --budget or --max-drop, got both.")
        axes["budget"] = [""]
    fixed = _fixed(asked)
    chosen = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    combined = list(itertools.product(enumerate(networks, 1), chosen))
    if len(combined) > _MOST_TRIALS:
        raise OptionError(f"A sweep has at most {_MOST_TRIALS:,} trials, got {len(combined):,}.")
    varied = [name for name, values in axes.items() if len(values) > 1]
    trials = []
    for number, (numbered, values) in enumerate(combined, 1):
        slug = _slug([numbered[1].name, *(values[name] for name in varied)])
        name = f"{number:0{len(str(len(combined)))}d}-{slug}"
        trials.append(_trial(name, numbered, values, fixed=fixed, out=out))
    return tuple(trials)


def _slug(parts: Sequence[str]) -> str:
    words = (re.sub(r"[^\w.=]+", "-", part.replace("%", "")).strip("-.") for part in parts)
    return "-".join(filter(None, words))[:80]


def _trial(
    name: str,
    numbered: tuple[int, Network],
    chosen: Mapping[str, str],
    *,
    fixed: Sequence[str],
    out: Path,
) -> SweepTrial:
    from onebyone.core.records import SweepTrial
    from onebyone.pipeline.sweep.folder import trial_folder

    place, network = numbered
    axes = [token for axis, value in chosen.items() if value
            for token in option(f"--{axis}", value)]  # fmt: skip
    folder = str(trial_folder(out, name))
    command = ("onebyone", "shrink", *network.arguments, *axes, *fixed, "--out", folder)
    seed = _checked(command)
    return SweepTrial(
        name=name,
        network=network.name,
        data=network.data,
        group=f"{place} {network.model}, seed {seed}, effort {chosen['effort']}",
        budget=chosen["budget"] or " ".join(fixed),
        runtime=chosen["runtime"],
        seed=seed,
        precision=chosen["precision"],
        effort=chosen["effort"],
        command=command,
    )


def _checked(command: Sequence[str]) -> int:
    """Check the settings of a trial that need no network and no library; return its seed."""
    args = parsed(command)
    later = ("device", "metric", "plan", "runtimes", "task")
    asked = {k: value for k, value in given(args, ShrinkSettings).items() if k not in later}
    # What two values of a trial make impossible is the trial's own error, not the sweep's.
    alone = {"precision", "int8_epochs", "max_drop"}
    ShrinkSettings(**{name: value for name, value in asked.items() if name not in alone})
    return int(args.seed)


def parsed(command: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a trial's command line.

    Raises:
        OptionError: If they cannot be read; the parser has printed why.
    """
    try:
        args = _parser("shrink").parse_args(list(command[1:]))
    except SystemExit:
        raise OptionError("The options of a sweep must be those of shrink; see above.") from None
    args.command_line = tuple(command)
    return args


@functools.cache
def _parser(command: str) -> argparse.ArgumentParser:
    from onebyone.cli import make_parser

    return make_parser([command])


def _fixed(asked: Mapping[str, Any]) -> list[str]:
    """Return the options that all trials have in common, as arguments."""
    tokens = []
    for flag, name in _flags().items():
        value = asked.get(name)
        if value is None:
            continue
        if isinstance(value, bool):
            tokens.append(f"--{flag}")
        else:
            for each in value if isinstance(value, list) else [value]:
                tokens += option(f"--{flag}", str(each))
    return tokens


def asked_words(networks: Sequence[Network], asked: Mapping[str, Any]) -> dict[str, str]:
    """Return all that the trials depend on, as text by name."""
    words = {f"network {place}": " ".join(network.arguments)
             for place, network in enumerate(networks, 1)}  # fmt: skip
    words |= {name: " | ".join(values_of(asked, name)) for name in AXES}
    for flag, name in _flags().items():
        value = asked.get(name)
        if value is not None:
            words[flag] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return words
