"""Every option of every site, with its cost, its error in closed form, and its measured harm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from onebyone.calibration.infer_task import meaning_of
from onebyone.calibration.inputs import CalibrationData
from onebyone.calibration.meaning import Meaning
from onebyone.core.errors import ModelError, OptionError
from onebyone.core.precision import float32_in
from onebyone.core.processes import on_main
from onebyone.core.randomness import seeded
from onebyone.core.records import Cost, LayerCost, LeftAlone, Option
from onebyone.core.settings.planning import Effort
from onebyone.core.tensor_trees import Inputs, device_of, first_examples
from onebyone.networks.channel_groups import ChannelGroup
from onebyone.networks.held import forget_made, held
from onebyone.networks.surgery import evaluation_copy, floating_type
from onebyone.networks.weight_bytes import weight_bytes
from onebyone.planning.applicability import HEAD, reasons
from onebyone.planning.groups import group_sites
from onebyone.planning.head_options import (
    HeadChoice,
    exact_option,
    fit_heads,
    gap_options,
    head_site,
    with_exact_head,
)
from onebyone.planning.kept_surveys import Keeper, KeptOptions, keeper_for
from onebyone.planning.layer_options import Progress, Surveyor
from onebyone.planning.links import Links
from onebyone.profiling.trace import LayerCosts, trace_layers
from onebyone.rewrites.head import rewrite as head
from onebyone.runtimes.files import FileNetwork


@dataclass(frozen=True)
class Survey:
    """What could be done to a network, and what it would cost and harm.

    Attributes:
        network: A copy in evaluation mode whose names the sites are; it differs from the original
            only if its head was rewritten ``exact``.
        exact: That rewrite of the head, which costs and harms nothing but makes its layers sites
            that can be factorized.
        exact_asked: Whether it is wanted for its own sake.
        options: Of all sites, in order of execution.
        left_alone: Sites without options, and why.
        before: The original's cost.
        meaning: What the original's outputs mean; ``None`` without data.
        forced: Sites at which an option must be chosen.
        layers: The network's, in order of execution.
        head: The head as it was, if it can be rewritten.
        unchanged: What the network costs without any option, where that is not ``before``: in
            int8, while ``before`` is of float32.
        groups: Of layers that share channels, at sites of options.
        links: Makes the options that say what two of these save twice; ``None`` for none.
    """

    network: nn.Module
    exact: Option | None
    exact_asked: bool
    options: tuple[Option, ...]
    left_alone: tuple[LeftAlone, ...]
    before: Cost
    forced: tuple[str, ...]
    layers: tuple[LayerCost, ...]
    head: head.HeadSite | None = None
    meaning: Meaning | None = None
    unchanged: Cost | None = None
    groups: tuple[ChannelGroup, ...] = ()
    links: Links | None = None

    @property
    def base(self) -> Cost:
        """What the network costs without any option, as it is deployed."""
        return self.before if self.unchanged is None else self.unchanged

    @property
    def start(self) -> Cost:
        """What the network costs before any option, with the exact head where that is asked for."""
        if self.exact is None or not self.exact_asked:
            return self.base
        return self.base - self.exact.saved

    def in_floats_of(self, size: int | None) -> Survey:
        """Return the same with the bytes of weights that are deployed in another precision.

        Args:
            size: Bytes of a floating-point value; ``None`` for that of the network itself.
        """
        if size is None:
            return self
        own = floating_type(self.network).itemsize

        def deployed(option: Option) -> Option:
            before, after = (
                replace(cost, bytes=cost.bytes * size // own)
                for cost in (option.before, option.after)
            )
            return replace(option, before=before, after=after)

        return replace(
            self,
            before=replace(self.before, bytes=weight_bytes(self.network, float_bytes=size)),
            options=tuple(map(deployed, self.options)),
            exact=None if self.exact is None else deployed(self.exact),
            links=None if self.links is None else self.links.in_floats_of(size),
        )


@float32_in("float32")
def survey(
    model: nn.Module,
    data: CalibrationData | Inputs,
    *,
    head_choice: HeadChoice = "auto",
    leave: Sequence[str] = (),
    every_form: bool = False,
    with_groups: bool = True,
    meaning: Meaning | None = None,
    check: Callable[[Survey], None] | None = None,
    effort: Effort = "normal",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Survey:
    """List the options of every site and measure their harm on calibration data.

    Args:
        model: Not modified.
        data: The calibration data; or an input, where there is none: an option's harm is then the
            relative error of its layer's kernel, and the head stays or becomes ``exact``.
        head_choice: ``auto``: a GAP head is one option among others; ``keep``: none; ``exact`` or
            ``gap``: the head is rewritten so.
        leave: Names of modules to leave alone, with all inside them.
        every_form: Keep an option that one of another form beats in all that is counted: it may
            still be the faster one.
        with_groups: Whether groups of layers have options too.
        meaning: What the outputs mean, which harm follows; found on the data where not given.
        check: Called before anything is measured, with the options as far as they can be counted:
            without errors and harms, of all that cost least. What it raises ends the survey.
        effort: On how many examples and options harm is measured.
        folder: Where options are kept for the next survey of the same network and data.
        progress: Told of the steps done.

    Raises:
        ModelError: If the network has no convolution or linear layer that runs, or cannot be run.
        OptionError: If a ``gap`` head is wanted without data.
    """
    known = data if isinstance(data, CalibrationData) else None
    example = first_examples(data, 1) if known is None else known.example()
    if known is None and head_choice == "gap":
        raise OptionError("A head as 'gap' is fitted to data: give calibration data.")
    original = trace_layers(model, example)
    before = original.cost
    _check_has_layers(model, original)
    base = evaluation_copy(model, device=device_of(example))
    notes: list[LeftAlone] = []
    site = head_site(base, example, head_choice, notes)
    exact = None
    network = base
    if site is not None and head_choice != "gap":
        changed = with_exact_head(base, example, site, head_choice, notes)
        if changed is None:
            site = None
        else:
            network, exact = changed, exact_option(site)
    with held(base, example), held(network, example):
        costs = original if network is base else trace_layers(network, example)
        why = reasons(network, example, costs, leave)
        if known is not None and meaning is None:
            meaning = meaning_of(base, known, device=known.device)
        surveyor = Surveyor(
            network, known, meaning, costs.layers, progress, every_form=every_form, effort=effort
        )
        gap = site if known is not None and head_choice in ("auto", "gap") else None
        inside: tuple[str, ...] = ()
        if gap is not None:
            inside = tuple(layer.name for layer in costs.layers if _is_inside(layer.name, gap))
        # With an averaging head in any case, the old one's layers are no sites.
        forced, gone = (
            ((gap.name,), inside) if gap is not None and head_choice == "gap" else ((), ())
        )
        out = {*why, *gone}
        names = [layer.name for layer in costs.layers if layer.macs and layer.name not in out]
        surveyor.steps = len(names) + (gap is not None)
        if known is not None and with_groups:
            surveyor.groups = group_sites(
                network, example, surveyor.layers, free=names, leave=leave
            )
        forget_made(network)  # a copy in float64

        groups = tuple(site.group for site in surveyor.groups)
        links = Links(groups, network, costs.layers)

        def found(of_layers: Sequence[Option], of_head: Iterable[Option]) -> Survey:
            return Survey(
                network=network,
                exact=exact,
                exact_asked=head_choice == "exact",
                options=(*of_layers, *links.between(of_layers), *of_head),
                left_alone=(*notes, *(LeftAlone(site=n, reason=r) for n, r in why.items())),
                before=before,
                forced=forced,
                layers=costs.layers,
                head=site,
                meaning=meaning,
                groups=groups,
                links=links,
            )

        heads = [] if gap is None else gap_options(gap, inside)
        if check is not None:
            counted = [option for name in names for option in surveyor.counted_options(name)]
            counted += [option for group in surveyor.groups for option in group.options]
            check(found(counted, heads))
        settings = {"effort": effort, "every form": every_form, "layers": names}
        keeper = None if folder is None else _keeper(folder, surveyor, known, settings)
        of_layers = _of_layers(surveyor, names, why, keeper)
        if gap is not None:
            heads, more = on_main(
                partial(_fitted_heads, surveyor, heads, gap, base, example, choice=head_choice)
            )
            notes += more
        return found(of_layers, heads)


def _keeper(
    folder: Path, surveyor: Surveyor, data: CalibrationData | None, settings: Mapping[str, object]
) -> Keeper | None:
    """Return where options are kept; nowhere without data, which takes little time."""
    if data is None:
        return None
    groups = [(each.rewrite, each.group.members) for each in surveyor.groups]
    settings = {**settings, "groups": groups}
    folder = folder / "surveys"
    return keeper_for(folder, surveyor.network, data, surveyor.meaning, settings)


def _of_layers(
    surveyor: Surveyor, names: list[str], reasons: dict[str, str], keeper: Keeper | None
) -> list[Option]:
    """Return the options of layers, those that were kept where there are any."""
    if keeper is None:
        return surveyor.layer_options(names, reasons)
    kept = on_main(lambda: keeper.get(names))
    if kept is None:
        before, start = set(reasons), time.perf_counter()
        found = surveyor.layer_options(names, reasons)
        new = {name: reason for name, reason in reasons.items() if name not in before}
        seconds = time.perf_counter() - start
        on_main(lambda: keeper.put(KeptOptions(tuple(found), new), seconds=seconds))
        return found
    surveyor.skip(len(names))
    reasons |= kept.reasons
    return list(kept.options)


def _fitted_heads(
    surveyor: Surveyor,
    heads: Sequence[Option],
    site: head.HeadSite,
    base: nn.Module,
    example: Inputs,
    *,
    choice: HeadChoice,
) -> tuple[list[Option], list[LeftAlone]]:
    """Return the averaging heads that can be fitted, or why none can."""
    try:
        with seeded(0, device_of(example)):  # the same whether layers' options were kept or not
            found = fit_heads(
                heads, site, base, example, data=surveyor.data, meaning=surveyor.meaning
            )
    except ModelError as error:
        if choice == "gap":
            raise
        reason = f"no averaging head can be fitted: {error}"
        return [], [LeftAlone(site=HEAD, reason=reason)]
    surveyor.advance("options of the head")
    return found, []


def _is_inside(name: str, site: head.HeadSite) -> bool:
    return name in site.occupies or name.startswith(f"{site.name}.")


def _check_has_layers(model: nn.Module, costs: LayerCosts) -> None:
    if any(layer.macs for layer in costs.layers):
        return
    advice = ""
    if isinstance(model, FileNetwork):
        advice = " A file runs as it is: read its layers by `onebyone.import_onnx`."
    raise ModelError(
        f"The network must have a convolution or a linear layer to rewrite, but "
        f"{type(model).__name__} multiplies nowhere on this input.{advice}"
    )
