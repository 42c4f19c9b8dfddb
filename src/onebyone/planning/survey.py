"""Every option of every site, with its cost, its error in closed form, and its measured harm."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import le
from typing import Literal, cast

import numpy as np
import torch
from torch import nn

from onebyone.calibration.collect import collect
from onebyone.calibration.curvature import curvature_of
from onebyone.calibration.infer_task import meaning_of
from onebyone.calibration.inputs import CalibrationData
from onebyone.calibration.meaning import Meaning
from onebyone.calibration.moments import TO_COMPARE
from onebyone.calibration.prefix_cache import ResumedPasses
from onebyone.core.errors import ModelError, OptionError, PlanError
from onebyone.core.precision import float32_in
from onebyone.core.records import Cost, LayerCost, LeftAlone, Option, Step
from onebyone.core.tensor_trees import (
    Inputs,
    batch_size,
    device_of,
    first_examples,
    only_tensor,
    tensors_in,
)
from onebyone.networks.channel_groups import ChannelGroup
from onebyone.networks.layers import GlobalAverageHead
from onebyone.networks.outputs import Outputs
from onebyone.networks.surgery import (
    evaluation_copy,
    floating_type,
    lay_channels_last,
    module_at,
)
from onebyone.networks.weight_bytes import weight_bytes
from onebyone.planning.applicability import HEAD, reasons
from onebyone.planning.groups import GroupProblems, GroupSite, group_sites, judged
from onebyone.planning.harm import SiteHarms, pooled_harms
from onebyone.profiling.trace import LayerCosts, trace_layers
from onebyone.rewrites.apply import head_data
from onebyone.rewrites.head import rewrite as head
from onebyone.rewrites.head.fit import fit_gap
from onebyone.rewrites.low_rank.reduced_rank import Problem, problems_of
from onebyone.rewrites.registry import cost_before, layer_rewrite, layer_rewrites
from onebyone.rewrites.steps import cost_of, roughly_fitted

Progress = Callable[[int, int, str], None]
HeadChoice = Literal["auto", "keep", "exact", "gap"]

# What an option must save of its site's MACs and parameters: the layers that it adds cost time of
# their own in every runtime, which counts do not show.
LEAST_GAIN = 0.15
# Options of a site that go to the solver, at most.
FRONT = 60
# Errors that differ by less, relatively, are the same.
TIE = 1e-5
# Of each form, at least, where forms are not weighed against each other yet.
FEWEST_OF_A_FORM = 16
# Options of a site whose harm is measured. The harm of the others is interpolated. It is wrong by a
# factor of about two, or of a hundred if an option removes channels that the network needs. So more
# are measured where CHEAP_MACS a site, about a second, pay for them: all options of a small
# network, and of the last layers of a larger one.
PROBES = 5
FEWEST_PROBES = 3
CHEAP_MACS = 3e10
PROBE_EXAMPLES = 512
# All probes together may cost this many MACs: a minute or two on two cores. A rule in MACs, not in
# seconds, so that a plan does not depend on how busy the machine was. There are fewer probes before
# there are fewer examples than enough.
PROBE_MACS = 5e12
ENOUGH_PROBE_EXAMPLES = 32
FEWEST_PROBE_EXAMPLES = 16
# Forms that are found from a layer's outputs alone.
OF_OUTPUTS = ("expand", "pair")
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
        meaning: What the original's outputs mean; ``None`` without data.
        forced: Sites at which an option must be chosen.
        layers: The network's, in order of execution.
        head: The head as it was, if it can be rewritten.
        unchanged: What the network costs without any option, where that is not ``before``: in
            int8, while ``before`` is of float32.
        groups: Of layers that share channels, at sites of options.
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
    site = _head_site(base, example, head_choice, notes)
    exact = None
    network = base
    if site is not None and head_choice != "gap":
        changed = _with_exact_head(base, example, site, head_choice, notes)
        if changed is None:
            site = None
        else:
            network, exact = changed, _exact_option(site)
    costs = trace_layers(network, example)
    why = reasons(network, example, costs, leave)
    if known is not None and meaning is None:
        meaning = meaning_of(base, known, device=known.device)
    surveyor = _Surveyor(network, known, meaning, costs.layers, progress, every_form=every_form)
    gap = site if known is not None and head_choice in ("auto", "gap") else None
    inside: tuple[str, ...] = ()
    if gap is not None:
        inside = tuple(layer.name for layer in costs.layers if _is_inside(layer.name, gap))
    # With an averaging head in any case, the old one's layers are no sites.
    forced, gone = ((gap.name,), inside) if gap is not None and head_choice == "gap" else ((), ())
    out = {*why, *gone}
    names = [layer.name for layer in costs.layers if layer.macs and layer.name not in out]
    surveyor.steps = len(names) + (gap is not None)
    if known is not None and with_groups:
        surveyor.groups = group_sites(network, example, surveyor.layers, free=names, leave=leave)

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
            meaning=meaning,
            groups=tuple(site.group for site in surveyor.groups),
        )

    heads = [] if gap is None else _gap_options(gap, inside)
    if check is not None:
        counted = [option for name in names for option in surveyor.counted_options(name)]
        counted += [option for group in surveyor.groups for option in group.options]
        check(found(counted, heads))
    of_layers = surveyor.layer_options(names, why)
    if gap is not None:
        heads = _fitted_heads(surveyor, heads, gap, base, example, choice=head_choice, notes=notes)
    return found(of_layers, heads)


def _with_exact_head(
    base: nn.Module,
    example: Inputs,
    site: head.HeadSite,
    choice: HeadChoice,
    notes: list[LeftAlone],
) -> nn.Module | None:
    """Return the network with its head as convolutions, or note why it would not be the same."""
    try:
        network = head.rewrite(
            base,
            only_tensor(example, "The rewrite 'head'"),
            name=site.name,
            form="exact",
            hidden=[],
        )
    except PlanError as error:
        if choice == "exact":
            raise
        notes.append(LeftAlone(site=HEAD, reason=str(error).rstrip(".")))
        return None
    if site.note:
        notes.append(LeftAlone(site=HEAD, reason=site.note))
    return network


def _fitted_heads(
    surveyor: _Surveyor,
    heads: Sequence[Option],
    site: head.HeadSite,
    base: nn.Module,
    example: Inputs,
    *,
    choice: HeadChoice,
    notes: list[LeftAlone],
) -> list[Option]:
    """Return the averaging heads that can be fitted, or note why none can."""
    try:
        return surveyor.fitted(heads, site, base, example)
    except ModelError as error:
        if choice == "gap":
            raise
        notes.append(LeftAlone(site=HEAD, reason=f"no averaging head can be fitted: {error}"))
        return []


def _is_inside(name: str, site: head.HeadSite) -> bool:
    return name in site.occupies or name.startswith(f"{site.name}.")


def _exact_option(site: head.HeadSite) -> Option:
    return Option.of(
        "head",
        {"form": "exact"},
        site=site.name,
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
            Option.of(
                "head",
                settings,
                site=site.name,
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
    network: nn.Module, example: Inputs, choice: HeadChoice, notes: list[LeftAlone]
) -> head.HeadSite | None:
    if choice == "keep":
        return None
    found = head.of_inputs(network, example)
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
        meaning: Meaning | None,
        layers: Sequence[LayerCost],
        progress: Progress | None,
        *,
        every_form: bool = False,
    ) -> None:
        self.network = network
        self._data = data
        self._meaning = meaning
        self.every_form = every_form
        self.layers = {layer.name: layer for layer in layers}
        self.progress = progress
        self.groups: list[GroupSite] = []
        self.steps = 0
        self.done = 0
        self._batches: list[Inputs] = []
        self._probes = PROBES
        self._passes: ResumedPasses | None = None

    @property
    def data(self) -> CalibrationData:
        """The calibration data, where there is some."""
        assert self._data is not None
        return self._data

    @property
    def meaning(self) -> Meaning:
        """What the outputs mean, where there is data."""
        assert self._meaning is not None
        return self._meaning

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
        metrics = curvature_of(self.network, names, self.data, self._macs(), self.meaning)
        self._prepare_probes(names)
        probed: list[_Probed] = []
        of_groups = GroupProblems(self.groups)
        for name in names:
            module, metric = module_at(self.network, name), metrics.get(name)
            problems = problems_of(module, moments.pop(name), metric=metric)
            try:
                found = self._judged(name, problems)
            except ModelError as error:
                reasons[name] = f"the network does not run with it rewritten: {error}"
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                reasons[name] = f"its equations cannot be solved: {error}"
            else:
                if found is None:
                    reasons[name] = f"no option saves {LEAST_GAIN:.0%} of its parameters and MACs"
                else:
                    probed.append(found)
            for group, theirs in of_groups.seen(name, problems[0]):
                probed += self._probed_group(group, theirs)
            self._advance(f"options of {name}")
        return self._with_harm(probed)

    def _probed_group(self, site: GroupSite, problems: Sequence[Problem]) -> list[_Probed]:
        """Measure the harm of a few options of a group of layers; of none that fail."""
        probes, harm_with = self._probes_of(site.group.readers[0]), self._harm_with
        try:
            found = judged(site, self.network, problems, probes=probes, harm_with=harm_with)
        except (ModelError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            return []
        return [_Probed(*found)]

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
                Option(site=name, steps=steps, before=before, after=cost, occupies=(name,))
                for settings in how.grid(module)
                for steps in [(Step(rewrite=rewrite, settings=settings),)]
                if _pays(cost := cost_of(module, layer, steps), before)
            ]
            for rewrite, how in layer_rewrites().items()
            if how.why_not(module) is None
        }

    def _site_options(self, name: str, problems: Sequence[Problem]) -> list[Option]:
        module = module_at(self.network, name)
        options = []
        # Of a layer too wide for its covariance, the outputs alone are known.
        blind = any(problem.xx is None and not problem.plain for problem in problems)
        for rewrite, paying in self._paying(name).items():
            kept = [o for o in paying if not blind or o.first.settings["form"] in OF_OUTPUTS]
            if not kept:
                continue
            settings = [option.first.settings for option in kept]
            errors = layer_rewrite(rewrite).errors(problems, module, settings)
            options += [replace(o, error=e) for o, e in zip(kept, errors, strict=True)]
        if not self.every_form:
            return _front(options)
        forms: dict[tuple[str, object], list[Option]] = defaultdict(list)
        for option in options:
            forms[option.first.rewrite, option.first.settings.get("form")].append(option)
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
        count = min(self._probes_of(options[0].site), len(options))
        spots = np.linspace(0, len(options) - 1, count).round().astype(int)
        measured: dict[int, float] = {}
        for spot in sorted({int(s) for s in spots}):
            option = options[spot]
            chain = roughly_fitted(module, option.steps, problems)
            measured[spot] = self._harm_with(option.site, chain)
        felt = sum(problem.felt for problem in problems) / 2
        predicted = [felt * (option.error or 0.0) for option in options]
        return _Probed(options, SiteHarms(predicted, measured))

    def _with_harm(self, probed: Sequence[_Probed]) -> list[Option]:
        """Return the options of all sites, each with its harm."""
        examples = sum(map(batch_size, self._batches))
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
        if any(tensor.ndim == 4 for tensor in tensors_in(self._batches[0])):
            # As the inputs are laid out; weights of another layout are turned at each call.
            lay_channels_last(self.network)
        self._passes = ResumedPasses(self.network, self._batches, names)

    def _probes_of(self, site: str) -> int:
        """Return how many options of a site are measured, at most."""
        examples = sum(map(batch_size, self._batches))
        return max(self._probes, int(CHEAP_MACS / max(examples * self._macs_from(site), 1)))

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
        found = float(torch.cat([self.meaning.divergence(*pair) for pair in pairs]).double().mean())
        if not math.isfinite(found):
            raise ModelError("its outputs are then NaN or infinite.")
        return found

    def fitted(
        self,
        options: Sequence[Option],
        site: head.HeadSite,
        base: nn.Module,
        example: Inputs,
    ) -> list[Option]:
        """Fit and measure averaging heads.

        Args:
            options: Each such head.
            site: The head as it was.
            base: The network with that head.
            example: An input.

        Raises:
            ModelError: If none of them can be fitted.
        """
        network = head.rewrite(
            base, only_tensor(example, "The rewrite 'head'"), name=site.name, form="gap", hidden=[]
        )
        features, targets = head_data(network, base, site.name, self.data)
        classes = site.linears[-1].out_features
        measured = []
        failed: ModelError | None = None
        for option in options:
            _, hidden, context = head.form_and_widths(option.first.settings, site=site.name)
            new = GlobalAverageHead(site.channels, classes, hidden, context=context)
            # Of what they learned from, heads of many parameters remember more than they know.
            try:
                harm = fit_gap(
                    new,
                    features,
                    targets,
                    part=self.meaning.parts[0],
                    linear=site.linears[0],
                    held_out=HELD_OUT,
                )
            except ModelError as error:
                failed = failed or error
                continue
            measured.append(replace(option, harm=harm, measured=True))
        if failed is not None and not measured:
            raise failed
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
        if option.first.settings["hidden"] and option.harm:
            groups[option.first.settings.get("context", 0)].append(option)
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
    return cast("list[int]", option.first.settings["hidden"])[0]


def _pays(cost: Cost, before: Cost) -> bool:
    """Whether an option is well below break-even, in parameters and in MACs."""
    kept = 1 - LEAST_GAIN
    return cost.macs <= kept * before.macs and cost.params <= kept * before.params


def _front(options: list[Option], *, most: int = FRONT) -> list[Option]:
    """Return the options that no other one beats in error and in all that is counted."""
    ordered = sorted(options, key=lambda o: (o.error or 0.0, o.after.macs, o.after.params))
    front: list[Option] = []
    for option in ordered:
        mine = option.after.counts
        beaten = any(all(map(le, kept.after.counts, mine)) for kept in front)
        if not beaten:
            front.append(option)
    front = [option for place, option in enumerate(front) if not _ties(option, front[place + 1 :])]
    if len(front) <= most:
        return front
    spots = np.linspace(0, len(front) - 1, most).round().astype(int)
    return [front[int(spot)] for spot in spots]


def _ties(option: Option, worse: Sequence[Option]) -> bool:
    """Whether an option that costs no more has the same error, but for rounding.

    Two forms may be the same function, such as an ``expand`` and a ``tucker2`` of all its inputs.
    Without this, rounding would decide which of them are listed.
    """
    least = (option.error or 0.0) * (1 + TIE)
    return any(
        (each.error or 0.0) <= least and all(map(le, each.after.counts, option.after.counts))
        for each in worse
    )
