"""What each option takes in a runtime, between two neighbors and in turns with what it replaces."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor, nn

from onebyone.core.errors import OneByOneError
from onebyone.core.memory import free_bytes
from onebyone.core.randomness import seeded
from onebyone.core.records import Deployment, LayerCost, Option, Ratio, Step
from onebyone.networks.channel_groups import ChannelGroup
from onebyone.networks.conv_layers import is_linear, shape_of
from onebyone.networks.examples import example_input
from onebyone.networks.layers import GlobalAverageHead
from onebyone.networks.surgery import copy_network, floating_type, module_at
from onebyone.planning.joins import is_int8, rewrites_of
from onebyone.planning.latency.cache import Site, Timed, Timings
from onebyone.planning.latency.group_chain import group_chain, group_text
from onebyone.planning.latency.precision import FLOAT32, preparing
from onebyone.profiling.latency import Samples, interleave, threads
from onebyone.rewrites.head.rewrite import HeadSite, form_and_widths
from onebyone.rewrites.registry import is_group_rewrite
from onebyone.rewrites.steps import built
from onebyone.runtimes import Prepared

Progress = Callable[[int, int, str], None]

# Interleaved rounds of a site's options; fewer where they would take longer than this.
ROUNDS = 9
SECONDS_A_SITE = 6.0
# More rounds, as many times, for options whose gain the first did not decide.
MOST_TRIES = 4
# Some runtimes keep the memory of a call: of what is free, the maps of all chains that are ready to
# run at once may take this share.
MEMORY_SHARE = 0.25
# Options of one form that are timed before the rest is predicted from them.
POINTS = 7
# A site is timed with as many examples of a batch as take no more MACs a call, less than a tenth
# of a second on a core: its maps are larger than the caches then, and more take as much longer.
MOST_MACS = 4e9
# Channels of the input that the first neighbor makes the site's input of.
LEAD_CHANNELS = 16
# Parts of a chain with that neighbor.
_WITH_LEAD = 5
# An input of no more channels than this is the network's own: nothing comes before it.
IMAGE_CHANNELS = 4

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class LayerTimer:
    """Times the options of a network's sites where they are to run.

    A layer alone is not what it is in a network: runtimes lay maps out in their own way and would
    turn them at its borders. So a site is timed between two neighbors, a 1×1 convolution that
    makes its input and an average over its output, in turns with the same neighbors around what
    could replace it: what the neighbors take is the same on both sides, and the difference is the
    site's. Sites of equal layers and shapes are timed once.

    Args:
        network: Whose sites they are. Not modified.
        layers: By name, with their shapes.
        deployment: Where to time.
        timings: What was timed earlier; new ones are added.
        head: The network's head as it was, if it can be rewritten.
        leaving_ms: What it takes to convert a site's outputs from int8, where precisions are mixed.
        groups: Of layers that share channels, which options of several layers rewrite.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Mapping[str, LayerCost],
        deployment: Deployment,
        timings: Timings,
        *,
        head: HeadSite | None = None,
        leaving_ms: Callable[[str], float] | None = None,
        groups: Sequence[ChannelGroup] = (),
    ) -> None:
        self._leaving_ms = leaving_ms
        self.network = network
        self.layers = layers
        self.deployment = deployment
        self.timings = timings
        self.head = head
        self.groups = {group.site: group for group in groups}
        self.failures: dict[str, str] = {}
        self._dtype = floating_type(network)

    def survey(self, options: Sequence[Option], progress: Progress | None = None) -> list[Option]:
        """Time a few options of each form at each site, and predict the others from them.

        Args:
            options: Not modified.
            progress: Told of the sites done.

        Returns:
            The same options with their milliseconds, without those that the runtime cannot run:
            ``failures`` says why, by site.
        """
        by_modules: dict[tuple[str, ...], list[Option]] = defaultdict(list)
        for option in options:
            by_modules[option.site, *option.occupies].append(option)
        found: list[Option] = []
        for done, ((site, *_), mine) in enumerate(by_modules.items()):
            try:
                timed = self._measured(_spread(mine))
            except OneByOneError as error:
                self.failures[site] = f"{self.deployment.runtime} cannot run it: {error}"
            else:
                found += _completed(mine, timed)
            if progress is not None:
                progress(done + 1, len(by_modules), f"{self.deployment.runtime}: {site}")
        self.timings.save()
        return found

    def exactly(self, options: Iterable[Option]) -> list[Option]:
        """Return options with times that are their own, not predicted from others."""
        found = []
        for option in options:
            if option.gain is None:
                timed = self._measured([option])[_key_of(option)]
                found.append(_with_time(option, timed, timed.before_ms))
            else:
                found.append(option)
        self.timings.save()
        return found

    def neighbours_ms(self, option: Option) -> float:
        """Return what the neighbors take that a site is timed between, without it."""
        prepare = preparing(self.deployment).layers
        with seeded(0, self.deployment.device), threads(self.deployment.threads):
            chain, example = self._chain(option, as_it_is=True)
            if option.first.rewrite == "head":
                parts = list(chain)[:2]
            else:
                parts = [*list(chain)[:-3], *list(chain)[-2:]]
            alone = prepare(nn.Sequential(*parts), example)
            samples = interleave(
                {"": alone},
                rounds=ROUNDS,
                device=self.deployment.device,
                seconds=SECONDS_A_SITE,
            )
        longer = self.deployment.batch / self._examples(option)
        return longer * float(np.median(samples.ms[""]))

    def _measured(self, options: Sequence[Option]) -> dict[str, Timed]:
        """Return times by settings, of options of one site; only those not known are run."""
        key = self._site_key(options[0])
        found = {}
        missing = []
        for option in options:
            known = self.timings.get(key, _key_of(option))
            if known is None:
                missing.append(option)
            else:
                found[_key_of(option)] = known
        if missing:
            fresh = self._run(missing)
            for name, timed in fresh.items():
                if not timed.disturbed:
                    self.timings.put(key, name, timed)
            found |= fresh
        return found

    def _site_key(self, option: Option) -> Site:
        if option.first.rewrite == "head":
            assert self.head is not None
            head = self.head
            size = (head.channels, head.map_height, head.map_width)
            return Site(f"head {' '.join(map(str, head.steps))} {self._dtype}", size)
        if is_group_rewrite(option.first.rewrite):
            first = self.layers[option.site]
            rows = _rows(module_at(self.network, option.site), first)
            text = group_text(self.network, self.groups[option.site])
            return Site(f"{text} {self._dtype}", (rows, *first.input_shape))
        module, layer = module_at(self.network, option.site), self.layers[option.site]
        text = f"{type(module).__qualname__}({module.extra_repr()}) {self._dtype}"
        if layer.calls > 1:
            text += f" {_times_longer(module, layer):.6g} times"
        return Site(text, (_rows(module, layer), *layer.input_shape))

    def _run(self, options: Sequence[Option]) -> dict[str, Timed]:
        ways = preparing(self.deployment)
        prepare = ways.layers
        found: dict[str, Timed] = {}
        with seeded(0, self.deployment.device), threads(self.deployment.threads):
            before, example = self._chain(options[0], as_it_is=True)
            original = prepare(before, example)
            free = free_bytes(self.deployment.device)
            room = math.inf if free is None else MEMORY_SHARE * free
            contenders, taken = {"": original}, 0
            for option in options:
                chain, _ = self._chain(option)
                held = _map_bytes(chain, example)
                if len(contenders) > 1 and taken + held > room:
                    found |= self._compared(contenders)
                    contenders, taken = {"": original}, 0
                if ways.in_int8 is not None and is_int8(option):
                    ready = ways.in_int8(chain, example, len(chain) == _WITH_LEAD)
                else:
                    ready = prepare(chain, example)
                contenders[_key_of(option)] = ready
                taken += held
            found |= self._compared(contenders)
        longer = self.deployment.batch / self._examples(options[0])
        rewrite, site = options[0].first.rewrite, options[0].site
        if rewrite != "head" and not is_group_rewrite(rewrite):
            longer *= _times_longer(module_at(self.network, site), self.layers[site])
        leaving = {_key_of(option): self._leaving(option) for option in options}
        return {
            name: replace(
                timed,
                before_ms=longer * timed.before_ms,
                after_ms=longer * timed.after_ms + leaving[name],
            )
            for name, timed in found.items()
        }

    def _leaving(self, option: Option) -> float:
        mixed = self._leaving_ms is not None and is_int8(option)
        return self._leaving_ms(option.site) if self._leaving_ms and mixed else 0.0

    def _examples(self, option: Option) -> int:
        """Return how many examples of the batch a site is timed with; a power of two if not all."""
        batch = self.deployment.batch
        if self.deployment.device != "cpu" or batch * option.before.macs <= MOST_MACS:
            return batch
        return 1 << int(math.log2(max(1.0, MOST_MACS / option.before.macs)))

    def _compared(self, contenders: Mapping[str, Prepared]) -> dict[str, Timed]:
        """Return times of rewritten chains, in turns with the original, whose name is empty."""
        pairs: dict[str, Samples] = {}
        undecided = list(contenders)
        for _ in range(MOST_TRIES):
            samples = interleave(
                {name: contenders[name] for name in undecided},
                rounds=ROUNDS,
                device=self.deployment.device,
                seconds=SECONDS_A_SITE,
            )
            for name in undecided:
                if name:
                    mine = samples.only("", name)
                    known = pairs.get(name)
                    pairs[name] = mine if known is None else known.followed_by(mine)
            undecided = ["", *(name for name, pair in pairs.items() if _is_open(pair, name))]
            if len(undecided) == 1:
                break
        return {name: _timed(pair, name) for name, pair in pairs.items()}

    def _chain(self, option: Option, *, as_it_is: bool = False) -> tuple[nn.Sequential, Tensor]:
        """Return a site, as it is or rewritten, between its neighbors, and an input for it."""
        if option.first.rewrite == "head":
            return self._head_chain(option, as_it_is=as_it_is)
        module, layer = module_at(self.network, option.site), self.layers[option.site]
        steps = () if as_it_is else rewrites_of(option)
        last = layer
        if is_group_rewrite(option.first.rewrite):
            group = self.groups[option.site]
            inner: nn.Module = group_chain(self.network, group, steps)
            last = self.layers[group.readers[-1]]
        else:
            inner = built(copy_network(module), steps, site=option.site)
        _fill(inner)
        size, linear = layer.input_shape, is_linear(module)
        batch = self._examples(option) * _rows(module, layer)
        if linear:
            lead: nn.Module = nn.Linear(LEAD_CHANNELS, size[-1])
            tail: nn.Module = nn.Identity()
            shape = (batch, *size[:-1], LEAD_CHANNELS)
        else:
            dimensions = len(size) - 1
            lead = _CONVOLUTIONS[dimensions](LEAD_CHANNELS, size[0], 1)
            flat = len(last.output_shape) != len(size)
            tail = nn.Identity() if flat else _POOLS[dimensions](1)
            shape = (batch, LEAD_CHANNELS, *size[1:])
        if self.deployment.precision != FLOAT32:
            # What no layer reads would be left in float32.
            tail = _ReadByLayer(tail, 0 if linear else dimensions)
        parts = [lead, nn.ReLU(), inner, nn.ReLU(), tail]
        if not linear and size[0] <= IMAGE_CHANNELS:
            parts, shape = parts[2:], (batch, *size)
        return self._ready(parts, shape)

    def _head_chain(self, option: Option, *, as_it_is: bool) -> tuple[nn.Sequential, Tensor]:
        head = self.head
        assert head is not None
        inner: list[nn.Module]
        if as_it_is:
            pooled = (head.height, head.width) != (head.map_height, head.map_width)
            size = (1, 1) if head.averaged else (head.height, head.width)
            pool = [nn.AdaptiveAvgPool2d(size)] if head.averaged or pooled else []
            inner = [*pool, nn.Flatten(1), *(copy_network(step) for step in head.steps)]
        else:
            _, hidden, context = form_and_widths(option.first.settings, site=option.site)
            classes = head.linears[-1].out_features
            new = GlobalAverageHead(head.channels, classes, hidden, context=context)
            inner = [built(new, option.steps[1:], site=option.site, after=option.first)]
        for part in inner:
            _fill(part)
        lead = nn.Conv2d(LEAD_CHANNELS, head.channels, 1)
        shape = (self._examples(option), LEAD_CHANNELS, head.map_height, head.map_width)
        return self._ready([lead, nn.ReLU(), *inner], shape)

    def _ready(
        self, parts: Sequence[nn.Module], shape: tuple[int, ...]
    ) -> tuple[nn.Sequential, Tensor]:
        chain = nn.Sequential(*parts).to(self._dtype).eval()
        return chain, example_input(shape, device=self.deployment.device, dtype=self._dtype)


class _ReadByLayer(nn.Module):
    """A module, and a layer that reads its first channel."""

    def __init__(self, module: nn.Module, dimensions: int) -> None:
        super().__init__()
        self.module = module
        self.layer = _CONVOLUTIONS[dimensions](1, 1, 1) if dimensions else nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Any:
        """Return one channel."""
        x = self.module(x)
        return self.layer(x[..., :1] if isinstance(self.layer, nn.Linear) else x[:, :1])


def _map_bytes(chain: nn.Sequential, example: Tensor) -> int:
    """Return what all maps between the layers of a chain take."""
    x = example.to("meta")  # shapes alone
    values = x.numel()
    for layer in _in_order(copy.deepcopy(chain).to("meta")):
        x = layer(x)
        values += x.numel()
    return values * x.element_size()


def _in_order(chain: nn.Sequential) -> Iterator[nn.Module]:
    for part in chain:
        if type(part) is nn.Sequential:
            yield from _in_order(part)
        else:
            yield part


def _is_open(pair: Samples, name: str) -> bool:
    """Whether an option seems to be faster, and more rounds are needed to show it."""
    gain = _gain(pair, name)
    return gain.value > 1 and gain.verdict != "faster"


def _gain(pair: Samples, name: str) -> Ratio:
    return pair.ratio("", name, looks=MOST_TRIES)


def _timed(pair: Samples, name: str) -> Timed:
    kept = pair.quiet("", name)
    original = pair.ms[""][kept]
    before_ms = float(np.median(original))
    saved = float(np.median(original - pair.ms[name][kept]))
    return Timed(
        before_ms=before_ms,
        after_ms=max(before_ms - saved, 0.0),
        gain=_gain(pair, name),
        disturbed=pair.disturbed("", name),
    )


def _fill(module: nn.Module) -> None:
    """Give weights ordinary values, as times are kept by shape alone: subnormal ones are slow."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.05)


def _times_longer(module: nn.Module, layer: LayerCost) -> float:
    """Return how much longer all calls of a layer take than the rows it is timed with, by MACs."""
    return _exact_rows(module, layer) / _rows(module, layer) if layer.calls > 1 else 1.0


def _rows(module: nn.Module, layer: LayerCost) -> int:
    """Return how many rows a layer sees for one input of the network: windows of a map, regions."""
    return max(1, round(_exact_rows(module, layer)))


def _exact_rows(module: nn.Module, layer: LayerCost) -> float:
    """Return how many rows of the first call's size have the MACs of all calls together."""
    shape = shape_of(module)
    inner, outer = (
        (layer.input_shape[:-1], layer.output_shape[:-1])
        if is_linear(module)
        else (layer.input_shape[1:], layer.output_shape[1:])
    )
    places = int(np.prod(inner if shape.transposed else outer))
    own = shape.values * shape.out * places
    return layer.macs / own if own else 1.0


def _key_of(option: Option) -> str:
    return " + ".join(_key_of_step(step) for step in option.steps)


def _key_of_step(step: Step) -> str:
    settings = " ".join(f"{name}={value}" for name, value in sorted(step.settings.items()))
    return f"{step.rewrite} {settings}"


def _form_of(option: Option) -> str:
    return " + ".join(f"{step.rewrite} {step.settings.get('form')}" for step in option.steps)


def _spread(options: Sequence[Option]) -> list[Option]:
    """Return a few options of each form, from the cheapest to the dearest."""
    groups: dict[str, list[Option]] = defaultdict(list)
    for option in options:
        groups[_form_of(option)].append(option)
    found = []
    for group in groups.values():
        ordered = sorted(group, key=lambda option: option.after.macs)
        spots = np.linspace(0, len(ordered) - 1, min(POINTS, len(ordered))).round().astype(int)
        found += [ordered[spot] for spot in sorted({int(s) for s in spots})]
    return found


def _completed(options: Sequence[Option], timed: Mapping[str, Timed]) -> list[Option]:
    """Return options with times: their own, or predicted from those of the same form."""
    before = float(np.median([each.before_ms for each in timed.values()]))
    groups: dict[str, list[Option]] = defaultdict(list)
    for option in options:
        groups[_form_of(option)].append(option)
    found: dict[int, Option] = {}
    for group in groups.values():
        known = [option for option in group if _key_of(option) in timed]
        own = {id(o): _with_time(o, timed[_key_of(o)], before) for o in known}
        times = np.array([cast("float", own[id(o)].after.ms) for o in known])
        guesses = _fitted([_features(o) for o in known], times, [_features(o) for o in group])
        for option, guess in zip(group, guesses, strict=True):
            predicted = replace(
                option,
                before=replace(option.before, ms=before),
                after=replace(option.after, ms=float(guess)),
            )
            found[id(option)] = own.get(id(option), predicted)
    return [found[id(option)] for option in options]


def _with_time(option: Option, timed: Timed, before: float) -> Option:
    # In other rounds the site itself took another time: what the option saves is what carries over.
    saved = timed.before_ms - timed.after_ms
    return replace(
        option,
        before=replace(option.before, ms=before),
        after=replace(option.after, ms=max(before - saved, 0.0)),
        gain=timed.gain,
    )


def _features(option: Option) -> list[float]:
    """Return what a time is taken to be linear in: the work of each factor, and a constant."""
    ranks = [step.settings.get("ranks") for step in option.steps]
    numbers = [float(rank) for each in ranks if isinstance(each, list) for rank in each]
    if numbers:
        return [1.0, *numbers, float(np.prod(numbers))] if len(numbers) > 1 else [1.0, *numbers]
    return [1.0, float(option.after.macs)]


def _fitted(
    known: Sequence[Sequence[float]],
    times: NDArray[np.float64],
    wanted: Sequence[Sequence[float]],
) -> NDArray[np.float64]:
    """Return predicted times, with no part below zero, that miss the known ones by least share."""
    rows = np.asarray(known)
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-12)
    weights = 1 / np.maximum(times, 1e-9)
    parts, _ = nnls(rows / scale * weights[:, None], times * weights)
    return np.asarray(np.asarray(wanted) / scale @ parts)
