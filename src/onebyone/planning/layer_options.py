"""The options of a network's layers, with errors in closed form and harms that are measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import le

import numpy as np
import torch
from torch import nn

from onebyone.calibration.collect import collect
from onebyone.calibration.curvature import curvature_of
from onebyone.calibration.inputs import CalibrationData
from onebyone.calibration.meaning import Meaning
from onebyone.calibration.moments import TO_COMPARE
from onebyone.core.errors import ModelError
from onebyone.core.processes import gathered, is_mine
from onebyone.core.records import Cost, LayerCost, Option, Step
from onebyone.core.run_lines import LOGGER
from onebyone.core.settings.planning import Effort
from onebyone.networks.surgery import module_at
from onebyone.planning.estimate import tell_seconds
from onebyone.planning.groups import GroupProblems, GroupSite, judged
from onebyone.planning.harm import Measured, SiteHarms, places_to_measure, pooled_harms
from onebyone.planning.probes import MOST_OPTIONS, Counts, Probes
from onebyone.rewrites.low_rank.reduced_rank import Problem, problems_of
from onebyone.rewrites.registry import cost_before, layer_rewrite, layer_rewrites
from onebyone.rewrites.steps import cost_of, roughly_fitted

Progress = Callable[[int, int, str], None]

# What an option must save of its site's MACs and parameters: the layers that it adds cost time of
# their own in every runtime, which counts do not show.
LEAST_GAIN = 0.15
# Errors that differ by less, relatively, are the same.
TIE = 1e-5
# Of each form, at least, where forms are not weighed against each other yet.
FEWEST_OF_A_FORM = 16
# Forms that are found from a layer's outputs alone.
OF_OUTPUTS = ("expand", "pair")


@dataclass(frozen=True)
class _Probed:
    """A site's options in order of their error, and what is known of their harm."""

    options: Sequence[Option]
    harms: SiteHarms


@dataclass(frozen=True)
class _Found:
    """What was found out about a layer, or about a group of which it is the last reader.

    Attributes:
        place: Of the layer among those that are surveyed.
        probed: The options; none, or those of one site.
        reason: Why the layer has none.
    """

    place: int
    probed: Sequence[_Probed] = ()
    reason: str = ""


class Surveyor:
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
        effort: Effort = "normal",
    ) -> None:
        self._effort = effort
        self.network = network
        self._data = data
        self._meaning = meaning
        self.every_form = every_form
        self.layers = {layer.name: layer for layer in layers}
        self.progress = progress
        self.groups: list[GroupSite] = []
        self.steps = 0
        self.done = 0
        self._probing: Probes | None = None
        self._paying_of: dict[str, Mapping[str, Sequence[Option]]] = {}

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

    @property
    def _probes(self) -> Probes:
        assert self._probing is not None
        return self._probing

    def advance(self, message: str) -> None:
        """Report that another step is done."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.steps, message)

    def skip(self, count: int) -> None:
        """Report that the options of so many layers are known from an earlier survey."""
        self.done += count - 1
        LOGGER.info(f"options of {count} layers: kept from an earlier plan")
        self.advance("options kept from an earlier plan")

    def layer_options(self, names: list[str], reasons: dict[str, str]) -> list[Option]:
        """Return the options of layers by themselves; ``reasons`` takes those without any."""
        if self._data is None:
            return self._kernel_options(names, reasons)
        counts = Counts.of(self.layers, names, len(self.data), self._effort)
        readers = [site.group.readers[0] for site in self.groups]
        tell_seconds(self.network, self.layers, names, counts, readers, data=self.data)
        batches, examples = self.data.batches, len(self.data)
        moments = collect(self.network, names, batches, examples=examples, enough=TO_COMPARE)
        metrics = curvature_of(self.network, names, self.data, self._macs(), self.meaning)
        self._probing = Probes(self.network, self.data, self.meaning, names, counts)
        of_groups = GroupProblems(self.groups)
        found: list[_Found] = []
        for place, name in enumerate(names):
            # Several processes take turns; a group goes to the one that has its last reader.
            mine, seen = is_mine(place), moments.pop(name)
            if mine or of_groups.needs(name):
                module = module_at(self.network, name)
                problems = problems_of(module, seen, metric=metrics.get(name))
                if mine:
                    found.append(self._found(place, name, problems))
                for group, theirs in of_groups.seen(name, problems[0]):
                    if mine:
                        found.append(_Found(place, self._probed_group(group, theirs)))
            self.advance(f"options of {name}")
        ordered = sorted(chain.from_iterable(gathered(found)), key=lambda each: each.place)
        reasons |= {names[each.place]: each.reason for each in ordered if each.reason}
        return self._with_harm([site for each in ordered for site in each.probed])

    def _found(self, place: int, name: str, problems: Sequence[Problem]) -> _Found:
        """Measure the harm of a few options of a layer, or say why it has none."""
        try:
            found = self._judged(name, problems)
        except ModelError as error:
            return _Found(place, reason=f"the network does not run with it rewritten: {error}")
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            return _Found(place, reason=f"its equations cannot be solved: {error}")
        if found is None:
            reason = f"no option saves {LEAST_GAIN:.0%} of its parameters and MACs"
            return _Found(place, reason=reason)
        return _Found(place, [found])

    def _probed_group(self, site: GroupSite, problems: Sequence[Problem]) -> list[_Probed]:
        """Measure the harm of a few options of a group of layers; of none that fail."""
        probes, harm_with = self._probes.counts.at(site.group.readers[0]), self._probes.harm_with
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
            self.advance(f"options of {name}")
        return options

    def counted_options(self, name: str) -> list[Option]:
        """Return the options of a layer that no other one beats in what is counted."""
        paying = [option for options in self._paying(name).values() for option in options]
        return _front(paying, most=len(paying))

    def _paying(self, name: str) -> Mapping[str, Sequence[Option]]:
        """Return for each rewrite the options of a layer that save enough, by their cost alone."""
        if name not in self._paying_of:
            self._paying_of[name] = self._counted(name)
        return self._paying_of[name]

    def _counted(self, name: str) -> dict[str, list[Option]]:
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
        most = max(MOST_OPTIONS // max(len(forms), 1), FEWEST_OF_A_FORM)
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
        count = self._probes.counts.at(options[0].site)
        measured: dict[int, Measured] = {}
        for place in places_to_measure(len(options), count):
            option = options[place]
            new = roughly_fitted(module, option.steps, problems)
            measured[place] = self._probes.harm_with(option.site, new)
        felt = sum(problem.felt for problem in problems) / 2
        predicted = [felt * (option.error or 0.0) for option in options]
        return _Probed(options, SiteHarms.of(predicted, measured))

    def _with_harm(self, probed: Sequence[_Probed]) -> list[Option]:
        """Return the options of all sites, each with its harm."""
        harms = pooled_harms([site.harms for site in probed], self._probes.counts.examples)
        return [
            replace(option, harm=harm, measured=place in site.harms.measured)
            for site, found in zip(probed, harms, strict=True)
            for place, (option, harm) in enumerate(zip(site.options, found, strict=True))
        ]

    def _macs(self) -> int:
        return sum(layer.macs for layer in self.layers.values())


def _pays(cost: Cost, before: Cost) -> bool:
    """Whether an option is well below break-even, in parameters and in MACs."""
    kept = 1 - LEAST_GAIN
    return cost.macs <= kept * before.macs and cost.params <= kept * before.params


def _front(options: list[Option], *, most: int = MOST_OPTIONS) -> list[Option]:
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
