"""Every option of every site, with its cost, its error in closed form, and its measured harm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from onebyone.calibration import TO_COMPARE, CalibrationData, collect, curvature_of
from onebyone.errors import ModelError, OptionError
from onebyone.layers import GlobalAverageHead
from onebyone.outputs import Outputs, mean_divergence
from onebyone.planning.applies import HEAD, reasons
from onebyone.planning.pooling import SiteHarms, pooled_harms
from onebyone.precision import float32_in
from onebyone.profiling.trace import LayerCosts, trace_layers
from onebyone.records import Cost, LayerCost, LeftAlone, Option
from onebyone.resuming import ResumedPasses
from onebyone.rewrites import head
from onebyone.rewrites.apply import head_data
from onebyone.rewrites.layerwise import LAYER_REWRITES, cost_before, cost_of, layer_rewrite
from onebyone.rewrites.regression import Problem, problems_of
from onebyone.sites import evaluation_copy, module_at

Progress = Callable[[int, int, str], None]
HeadChoice = Literal["auto", "keep", "exact", "gap"]

# What an option must save of its site's MACs and parameters: the layers that it adds cost time of
# their own in every runtime, which counts do not show.
LEAST_GAIN = 0.15
# Options of a site that go to the solver, at most.
FRONT = 60
# Of each form, at least, where forms are not weighed against each other yet.
FEWEST_OF_A_FORM = 16
# Options of a site whose harm is measured, at most and at least; that of the others is interpolated
# between them.
PROBES = 5
FEWEST_PROBES = 3
PROBE_EXAMPLES = 512
# All probes together may cost this many MACs: a minute or two on two cores. A rule in MACs, not in
# seconds, so that a plan does not depend on how busy the machine was. There are fewer probes before
# there are fewer examples than enough.
PROBE_MACS = 5e12
ENOUGH_PROBE_EXAMPLES = 32
FEWEST_PROBE_EXAMPLES = 16
# Share of the calibration data that an averaging head is judged by, not fitted to.
HELD_OUT = 0.25
# Widths of such a head, from which a trend of its harm is drawn.
FEWEST_FOR_TREND = 3


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
        forced: Sites at which an option must be chosen.
        layers: The network's, in order of execution.
        head: The head as it was, if it can be rewritten.
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

    @property
    def start(self) -> Cost:
        """What the network costs before any option, with the exact head where that is asked for."""
        if self.exact is None or not self.exact_asked:
            return self.before
        return self.before - self.exact.saved


@float32_in("float32")
def survey(
    model: nn.Module,
    data: CalibrationData | Tensor,
    *,
    head_choice: HeadChoice = "auto",
    leave: Sequence[str] = (),
    every_form: bool = False,
    check: Callable[[Survey], None] | None = None,
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
        check: Called before anything is measured, with the options as far as they can be counted:
            without errors and harms, of all that cost least. What it raises ends the survey.
        progress: Told of the steps done.

    Raises:
        ModelError: If the network has no convolution or linear layer that runs, or cannot be run.
        OptionError: If a ``gap`` head is wanted without data.
    """
    example = data[:1] if isinstance(data, Tensor) else data.example()
    known = None if isinstance(data, Tensor) else data
    if known is None and head_choice == "gap":
        raise OptionError("A head as 'gap' is fitted to data: give calibration data.")
    original = trace_layers(model, example)
    before = Cost(params=original.params, macs=original.macs)
    _check_has_layers(model, original)
    base = evaluation_copy(model, device=example.device)
    notes: list[LeftAlone] = []
    site = _head_site(base, example, head_choice, notes)
    exact = None
    network = base
    if site is not None and head_choice != "gap":
        exact = _exact_option(site)
        if site.note:
            notes.append(LeftAlone(site=HEAD, reason=site.note))
        network = head.rewrite(base, example, name=site.name, form="exact", hidden=[])
    costs = trace_layers(network, example)
    why = reasons(network, example, costs, leave)
    surveyor = _Surveyor(network, known, costs.layers, progress, every_form=every_form)
    gap = site if known is not None and head_choice in ("auto", "gap") else None
    inside: tuple[str, ...] = ()
    if gap is not None:
        inside = tuple(layer.name for layer in costs.layers if _is_inside(layer.name, gap))
    # With an averaging head in any case, the old one's layers are no sites.
    forced, gone = ((gap.name,), inside) if gap is not None and head_choice == "gap" else ((), ())
    out = {*why, *gone}
    names = [layer.name for layer in costs.layers if layer.macs and layer.name not in out]
    surveyor.steps = len(names) + (gap is not None)

    def found(of_layers: Iterable[Option], of_head: Iterable[Option]) -> Survey:
        return Survey(
            network=network,
            exact=exact,
            exact_asked=head_choice == "exact",
            options=(*of_layers, *of_head),
            left_alone=(*notes, *(LeftAlone(site=n, reason=r) for n, r in why.items())),
            before=before,
            forced=forced,
            layers=costs.layers,
            head=site,
        )

    heads = [] if gap is None else _gap_options(gap, inside)
    if check is not None:
        counted = [option for name in names for option in surveyor.counted_options(name)]
        check(found(counted, heads))
    of_layers = surveyor.layer_options(names, why)
    if gap is not None:
        heads = surveyor.fitted(heads, gap, base, example)
    return found(of_layers, heads)


def _is_inside(name: str, site: head.HeadSite) -> bool:
    return name in site.occupies or name.startswith(f"{site.name}.")


def _exact_option(site: head.HeadSite) -> Option:
    return Option(
        site=site.name,
        rewrite="head",
        settings={"form": "exact"},
        before=site.cost,
        after=head.cost(site, "exact", []),
        occupies=site.occupies,
        error=0.0,
        harm=0.0,
    )


def _gap_options(site: head.HeadSite, inside: tuple[str, ...]) -> list[Option]:
    """Return an averaging head of each width and context, by its cost alone.

    Args:
        site: The head.
        inside: Names of the sites that an averaging head leaves no room for.
    """
    options = []
    for settings in head.gap_settings(site.channels):
        _, hidden, context = head.form_and_widths(settings, site=site.name)
        options.append(
            Option(
                site=site.name,
                rewrite="head",
                settings=settings,
                before=site.cost,
                after=head.cost(site, "gap", hidden, context),
                occupies=tuple(dict.fromkeys((*site.occupies, *inside))),
            )
        )
    return options


def _check_has_layers(model: nn.Module, costs: LayerCosts) -> None:
    if any(layer.macs for layer in costs.layers):
        return
    raise ModelError(
        f"The network must have a convolution or a linear layer to rewrite, but "
        f"{type(model).__name__} multiplies nowhere on this input."
    )


def _head_site(
    network: nn.Module, example: Tensor, choice: HeadChoice, notes: list[LeftAlone]
) -> head.HeadSite | None:
    if choice == "keep":
        return None
    found = head.find_head(network, example)
    if isinstance(found, head.NoHead):
        reason = found.reason
    else:
        refusal = None if choice == "exact" else head.why_not(found, "gap")
        if refusal is None:
            return found
        reason = refusal
    if choice != "auto":
        raise ModelError(
            f"The head of {type(network).__name__} cannot be rewritten as {choice!r}: {reason}."
        )
    notes.append(LeftAlone(site=HEAD, reason=reason))
    return None


# ---------------------------------------------------------------- options and their harm


@dataclass(frozen=True)
class _Probed:
    """A site's options in order of their error, and what is known of their harm."""

    options: Sequence[Option]
    harms: SiteHarms


class _Surveyor:
    """Carries what all sites are measured with."""

    def __init__(
        self,
        network: nn.Module,
        data: CalibrationData | None,
        layers: Sequence[LayerCost],
        progress: Progress | None,
        *,
        every_form: bool = False,
    ) -> None:
        self.network = network
        self._data = data
        self.every_form = every_form
        self.layers = {layer.name: layer for layer in layers}
        self.progress = progress
        self.steps = 0
        self.done = 0
        self._batches: list[Tensor] = []
        self._probes = PROBES
        self._passes: ResumedPasses | None = None

    @property
    def data(self) -> CalibrationData:
        """The calibration data, where there is some."""
        assert self._data is not None
        return self._data

    def _advance(self, message: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.steps, message)

    def layer_options(self, names: list[str], reasons: dict[str, str]) -> list[Option]:
        """Return the options of layers by themselves; ``reasons`` takes those without any."""
        if self._data is None:
            return self._kernel_options(names, reasons)
        batches, examples = self.data.batches, len(self.data)
        moments = collect(self.network, names, batches, examples=examples, enough=TO_COMPARE)
        metrics = curvature_of(self.network, names, self.data, self._macs())
        self._prepare_probes(names)
        probed: list[_Probed] = []
        for name in names:
            module, metric = module_at(self.network, name), metrics.get(name)
            problems = problems_of(module, moments.pop(name), metric=metric)
            try:
                found = self._judged(name, problems)
            except ModelError as error:
                reasons[name] = f"the network does not run with it rewritten: {error}"
            else:
                if found is None:
                    reasons[name] = f"no option saves {LEAST_GAIN:.0%} of its parameters and MACs"
                else:
                    probed.append(found)
            self._advance(f"options of {name}")
        return self._with_harm(probed)

    def _kernel_options(self, names: list[str], reasons: dict[str, str]) -> list[Option]:
        """Return options without data: their harm is the relative error of the layer's kernel."""
        options: list[Option] = []
        for name in names:
            problems = problems_of(module_at(self.network, name))
            found = self._site_options(name, problems)
            if not found:
                reasons[name] = f"no option saves {LEAST_GAIN:.0%} of its parameters and MACs"
            options += [replace(option, harm=option.error) for option in found]
            self._advance(f"options of {name}")
        return options

    def counted_options(self, name: str) -> list[Option]:
        """Return the options of a layer that no other one beats in what is counted."""
        paying = [option for options in self._paying(name).values() for option in options]
        return _front(paying, most=len(paying))

    def _paying(self, name: str) -> dict[str, list[Option]]:
        """Return for each rewrite the options of a layer that save enough, by their cost alone."""
        module, layer = module_at(self.network, name), self.layers[name]
        before = cost_before(module, layer)
        return {
            rewrite: [
                Option(
                    site=name,
                    rewrite=rewrite,
                    settings=settings,
                    before=before,
                    after=cost,
                    occupies=(name,),
                )
                for settings in how.grid(module)
                if _pays(cost := cost_of(rewrite, module, layer, settings), before)
            ]
            for rewrite, how in LAYER_REWRITES.items()
            if how.why_not(module) is None
        }

    def _site_options(self, name: str, problems: Sequence[Problem]) -> list[Option]:
        module = module_at(self.network, name)
        options = []
        # Of a layer too wide for its covariance, the outputs alone are known.
        blind = any(problem.xx is None and not problem.plain for problem in problems)
        for rewrite, paying in self._paying(name).items():
            kept = [o for o in paying if not blind or o.settings["form"] in ("expand", "pair")]
            if not kept:
                continue
            settings = [option.settings for option in kept]
            errors = layer_rewrite(rewrite).errors(problems, module, settings)
            options += [replace(o, error=e) for o, e in zip(kept, errors, strict=True)]
        if not self.every_form:
            return _front(options)
        forms: dict[tuple[str, object], list[Option]] = defaultdict(list)
        for option in options:
            forms[option.rewrite, option.settings.get("form")].append(option)
        most = max(FRONT // max(len(forms), 1), FEWEST_OF_A_FORM)
        return [option for mine in forms.values() for option in _front(mine, most=most)]

    def _judged(self, name: str, problems: Sequence[Problem]) -> _Probed | None:
        """Return a site's options with what was measured of them, in float32 where that will do."""
        module = module_at(self.network, name)
        rough = [problem.rough() for problem in problems]
        try:
            return self._probed(module, rough, self._site_options(name, rough))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return self._probed(module, problems, self._site_options(name, problems))

    def _probed(
        self, module: nn.Module, problems: Sequence[Problem], options: list[Option]
    ) -> _Probed | None:
        """Measure the harm of a few options, from the one of least error to that of most."""
        if not options:
            return None
        options = sorted(options, key=lambda option: option.error or 0.0)
        count = min(self._probes, len(options))
        spots = np.linspace(0, len(options) - 1, count).round().astype(int)
        measured: dict[int, float] = {}
        for spot in sorted({int(s) for s in spots}):
            option = options[spot]
            how = layer_rewrite(option.rewrite)
            chain = how.build(module, option.settings)
            how.fit(chain, problems, option.settings, module, rough=True)
            measured[spot] = self._harm_with(option.site, chain)
        felt = sum(problem.felt for problem in problems) / 2
        predicted = [felt * (option.error or 0.0) for option in options]
        return _Probed(options, SiteHarms(predicted, measured))

    def _with_harm(self, probed: Sequence[_Probed]) -> list[Option]:
        """Return the options of all sites, each with its harm."""
        examples = sum(len(inputs) for inputs in self._batches)
        harms = pooled_harms([site.harms for site in probed], examples)
        return [
            replace(option, harm=harm, measured=place in site.harms.measured)
            for site, found in zip(probed, harms, strict=True)
            for place, (option, harm) in enumerate(zip(site.options, found, strict=True))
        ]

    def _macs(self) -> int:
        return sum(layer.macs for layer in self.layers.values())

    def _prepare_probes(self, names: Sequence[str]) -> None:
        """Keep the original's outputs on the examples that harm is measured on."""
        each = sum(self._macs_from(name) for name in names)
        enough = min(ENOUGH_PROBE_EXAMPLES, len(self.data))
        affordable_probes = int(PROBE_MACS / max(enough * each, 1))
        self._probes = min(PROBES, max(FEWEST_PROBES, affordable_probes))
        affordable = self.data.within(PROBE_MACS, self._probes * each, fewest=FEWEST_PROBE_EXAMPLES)
        self._batches = list(affordable.first(PROBE_EXAMPLES).batches())
        if self._batches[0].ndim == 4:
            # As the inputs are laid out; weights of another layout are turned at each call.
            self.network.to(memory_format=torch.channels_last)
        self._passes = ResumedPasses(self.network, self._batches, names)

    def _macs_from(self, name: str) -> int:
        """Return what a layer and all that run after it cost, for one input."""
        order = list(self.layers)
        return sum(self.layers[later].macs for later in order[order.index(name) :])

    def _harm_with(self, site: str, new: nn.Module) -> float:
        """Return the divergence of the outputs with one module replaced."""
        assert self._passes is not None
        return self._divergence(self._passes.outputs(site, new))

    def _divergence(self, outputs: Iterable[Outputs]) -> float:
        assert self._passes is not None
        pairs = zip(self._passes.reference, outputs, strict=True)
        return float(torch.cat([mean_divergence(*pair) for pair in pairs]).double().mean())

    def fitted(
        self,
        options: Sequence[Option],
        site: head.HeadSite,
        base: nn.Module,
        example: Tensor,
    ) -> list[Option]:
        """Fit and measure averaging heads.

        Args:
            options: Each such head.
            site: The head as it was.
            base: The network with that head.
            example: An input.
        """
        network = head.rewrite(base, example, name=site.name, form="gap", hidden=[])
        features, targets = head_data(network, base, site.name, self.data)
        classes = site.linears[-1].out_features
        measured = []
        for option in options:
            _, hidden, context = head.form_and_widths(option.settings, site=site.name)
            new = GlobalAverageHead(site.channels, classes, hidden, context=context)
            # Of what they learned from, heads of many parameters remember more than they know.
            harm = head.fit_gap(new, features, targets, linear=site.linears[0], held_out=HELD_OUT)
            measured.append(replace(option, harm=harm, measured=True))
        self._advance("options of the head")
        return _steadied(measured)


def _steadied(options: Sequence[Option]) -> list[Option]:
    """Return fitted heads with the harm that the trend over their widths gives.

    A wider head can do what a narrower one does, but fits of some hundred steps scatter by several
    percent, more than a step of width is worth: of neighbors the plan would take one by luck.
    A line through the logarithms tells them apart; where it does not fall they stay as measured.
    """
    groups: dict[object, list[Option]] = defaultdict(list)
    for option in options:
        if option.settings["hidden"] and option.harm:
            groups[option.settings.get("context", 0)].append(option)
    steadied: dict[int, Option] = {}
    for group in groups.values():
        if len(group) < FEWEST_FOR_TREND:
            continue
        widths = np.log([_width(option) for option in group])
        harms = np.log([cast("float", option.harm) for option in group])
        slope, level = np.polyfit(widths, harms, 1)
        if slope < 0:
            trend = np.exp(level + slope * widths)
            steadied |= {
                id(o): replace(o, harm=float(h), measured=False)
                for o, h in zip(group, trend, strict=True)
            }
    return [steadied.get(id(option), option) for option in options]


def _width(option: Option) -> int:
    return cast("list[int]", option.settings["hidden"])[0]


def _pays(cost: Cost, before: Cost) -> bool:
    """Whether an option is well below break-even, in parameters and in MACs."""
    kept = 1 - LEAST_GAIN
    return cost.macs <= kept * before.macs and cost.params <= kept * before.params


def _front(options: list[Option], *, most: int = FRONT) -> list[Option]:
    """Return the options that no other one beats in error, MACs and parameters at once."""
    ordered = sorted(options, key=lambda o: (o.error or 0.0, o.after.macs, o.after.params))
    front: list[Option] = []
    for option in ordered:
        beaten = any(
            kept.after.macs <= option.after.macs and kept.after.params <= option.after.params
            for kept in front
        )
        if not beaten:
            front.append(option)
    if len(front) <= most:
        return front
    spots = np.linspace(0, len(front) - 1, most).round().astype(int)
    return [front[int(spot)] for spot in spots]
