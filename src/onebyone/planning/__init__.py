"""From a budget to a plan: the options of least harm that meet it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from onebyone.calibration import CalibrationData, as_calibration
from onebyone.errors import OptionError
from onebyone.planning.applies import applies
from onebyone.planning.budget import check_budgets, parse_budgets
from onebyone.planning.deployed import Deployed, deployment_of, is_shown_faster
from onebyone.planning.front import front_of
from onebyone.planning.memory import memory_bytes, within_memory
from onebyone.planning.options import HeadChoice, Survey, survey
from onebyone.planning.solve import choose
from onebyone.planning.timings import Timings, cache_folder
from onebyone.planning.uniform import uniform_plan
from onebyone.profiling import example_input
from onebyone.records import Budget, CalibrationInfo, Cost, LeftAlone, Option, Plan
from onebyone.rewrites.layerwise import LAYER_REWRITES
from onebyone.sites import check_finite, floating_type
from onebyone.units import format_percent

__all__ = ["HEAD_CHOICES", "HeadChoice", "applies", "plan", "plan_from", "uniform_plan"]

HEAD_CHOICES = ("auto", "keep", "exact", "gap")
# How much more harm than the least a fastest network may do.
FASTEST = 1.1


def plan(
    model: nn.Module,
    calibration: object,
    *,
    budget: str | Iterable[str],
    head: HeadChoice = "auto",
    leave: Sequence[str] = (),
    runtime: str | None = None,
    batch: int = 1,
    num_threads: int | None = None,
    fastest: bool = False,
    input_shape: tuple[int, ...] | None = None,
    cache: str | Path | Literal[False] | None = None,
    name: str | None = None,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Plan:
    """Choose a rewrite for each site so that the budgets are met with the least harm.

    For a runtime, each option is timed in it, on this machine, between two neighbors and in turns
    with the layer that it replaces; one that is not shown to be faster is not taken. The planned
    network is then built and measured whole, in turns with the original, and planned again until
    prediction and measurement agree.

    Args:
        model: Not modified.
        calibration: Unlabelled inputs: a tensor ``(n, …)``, a split, a torch data set or loader.
            A few hundred to a few thousand. ``None``: harm is then the relative error of the
            layers' kernels, which tells far less.
        budget: Such as ``"latency=50%"`` or ``["macs=50%", "params=2M", "memory=8MB"]``. Latency
            is of a call in the runtime; memory is that of the weights and of the activations that
            are alive at once; both for ``batch`` inputs.
        head: ``auto``: a GAP head is one option among others; ``keep``: the head stays; ``exact``:
            it becomes convolutions of the same function; ``gap``: 1×1 convolutions and a global
            average.
        leave: Names of modules to leave alone, with all inside them.
        runtime: What the network is to run in, one of :data:`onebyone.runtimes.RUNTIMES`. With a
            budget for latency ``eager`` by default; else, by default, nothing is timed.
        batch: Inputs of a call.
        num_threads: Torch's and the runtime's; what torch is set to, by default.
        fastest: Return the fastest network whose harm is at most a tenth above the least that
            meets the budgets.
        input_shape: Without calibration data, the shape of an input with the batch in front.
        cache: Folder where times are kept for the next plan; ``False`` keeps none; by default
            ``ONEBYONE_CACHE`` or a folder in the user's cache.
        name: What to call the network; its class by default.
        device: Where to run it.
        progress: Told of the steps done.

    Raises:
        BudgetError: If a budget cannot be read or reached; says what is reachable.
        ModelError: If the network has nothing to rewrite, or cannot be run on the data.
        WeightsError: If a weight is not finite.
        UnknownNameError: If there is no such runtime.
        MissingExtraError: If the runtime is not installed.
        OptionError: If another option cannot be obeyed.
    """
    if head not in HEAD_CHOICES:
        raise OptionError(f"`head` must be one of {', '.join(HEAD_CHOICES)}, got {head!r}.")
    check_finite(model)
    texts = [budget] if isinstance(budget, str) else list(budget)
    bounded = check_budgets(texts)  # a typing error should not wait for a survey
    deployment = None
    if runtime is not None or fastest or "latency" in bounded:
        deployment = deployment_of(
            runtime or "eager", device=device, batch=batch, num_threads=num_threads
        )
    data = None
    if calibration is not None:
        data = as_calibration(calibration, device=device, dtype=floating_type(model))
    example = _example(model, data, input_shape, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # fresh weights of the heads that are tried
        found = survey(
            model,
            example if data is None else data,
            head_choice=head,
            leave=leave,
            every_form=deployment is not None,
            progress=progress,
        )
    batched = example.expand(batch, *example.shape[1:]).contiguous()
    choice = _Choice(
        model=model,
        example=batched,
        network=name or type(model).__name__,
        calibration=None if data is None else data.info(),
        fastest=FASTEST if fastest else None,
    )
    if deployment is None:
        made = choice.plan(found, choice.budgets(texts, found.before))
    else:
        folder = None if cache is False else Path(cache) if cache is not None else cache_folder()
        timings = Timings(deployment, folder)
        deployed = Deployed(model, found, batched, deployment, timings, progress=progress)
        made = deployed.plan(choice.budgets(texts, deployed.survey().before), choice.plan)
        found = deployed.survey()
        made = _never_slower(made, found, fastest=fastest)
    return replace(made, front=front_of(found, made.budgets[0].quantity, choice.plan))


def plan_from(
    found: Survey,
    budget: str | Iterable[str],
    *,
    network: str,
    input_shape: tuple[int, ...],
    calibration: CalibrationInfo | None,
) -> Plan:
    """Choose among options already surveyed: a moment's work, for any number of budgets.

    Args:
        found: The options.
        budget: As for :func:`plan`, of what is counted: ``macs`` and ``params``.
        network: What to call the network.
        input_shape: With the batch in front.
        calibration: What harm was measured on.

    Raises:
        BudgetError: If a budget cannot be read or reached; says what is reachable.
    """
    budgets = parse_budgets(budget, found.before)
    return _plan_within(
        found, budgets, network=network, input_shape=input_shape, calibration=calibration
    )


def _example(
    model: nn.Module,
    data: CalibrationData | None,
    shape: tuple[int, ...] | None,
    device: str,
) -> Tensor:
    """Return one input."""
    if data is not None:
        return data.example()
    if shape is None:
        raise OptionError("Without calibration data, `input_shape` must be given.")
    return example_input((1, *shape[1:]), device=device, dtype=floating_type(model))


@dataclass(frozen=True)
class _Choice:
    """How a plan is chosen from a survey; see :func:`plan`."""

    model: nn.Module
    example: Tensor
    network: str
    calibration: CalibrationInfo | None
    fastest: float | None

    def budgets(self, texts: Sequence[str], before: Cost) -> tuple[Budget, ...]:
        """Read budgets, of which percentages are of the network as it is."""
        needed = None
        if "memory" in check_budgets(texts):
            needed = memory_bytes(self.model, self.example)
        return parse_budgets(texts, before, memory_bytes=needed)

    def plan(self, found: Survey, budgets: Sequence[Budget]) -> Plan:
        """Choose among options, within every budget."""
        within = partial(
            _plan_within,
            found,
            network=self.network,
            input_shape=tuple(self.example.shape),
            calibration=self.calibration,
            fastest=self.fastest,
        )
        memory = [budget for budget in budgets if budget.quantity == "memory"]
        if not memory:
            return within(budgets)
        return within_memory(self.model, self.example, memory[0], budgets, within)


def _plan_within(
    found: Survey,
    budgets: Sequence[Budget],
    *,
    network: str,
    input_shape: tuple[int, ...],
    calibration: CalibrationInfo | None,
    fastest: float | None = None,
) -> Plan:
    exact = found.exact if found.exact_asked else None
    start = found.before - exact.saved if exact else found.before
    chosen = choose(
        found.options,
        budgets,
        start,
        forced=found.forced,
        obstacles=_obstacles(found),
        fastest=fastest,
    )
    if found.exact is not None and any(_is_inside(option, found.exact) for option in chosen):
        exact = found.exact
    after = found.before
    choices = chosen if exact is None else (exact, *chosen)
    for option in choices:
        after = after - option.saved
    return Plan(
        network=network,
        input_shape=input_shape,
        budgets=tuple(budgets),
        before=found.before,
        after=after,
        choices=choices,
        left_alone=_left_alone(found, choices, exact),
        calibration=calibration,
        harm=sum(option.harm or 0.0 for option in chosen),
    )


def _never_slower(made: Plan, found: Survey, *, fastest: bool) -> Plan:
    """Return a plan, or one that changes nothing where it is only for speed and shows no gain."""
    if is_shown_faster(made) or not made.choices or not fastest:
        return made
    if any(budget.quantity != "latency" for budget in made.budgets):
        return made  # asked for smaller, too: that it is
    assert made.latency is not None
    reason = f"the rewritten network is not shown to be faster: {made.latency.ratio}"
    left = [LeftAlone(site=option.site, reason=reason) for option in made.choices]
    return replace(
        made, choices=(), left_alone=(*left, *made.left_alone), after=found.before, harm=0.0
    )


def _is_inside(option: Option, head: Option) -> bool:
    """Whether an option's site is a layer that only the exact head has."""
    return option.rewrite in LAYER_REWRITES and option.site.startswith(f"{head.site}.")


def _left_alone(
    found: Survey, choices: Sequence[Option], exact: Option | None
) -> tuple[LeftAlone, ...]:
    touched = {name for option in choices for name in (*option.occupies, option.site)}
    reasons = {item.site: item.reason for item in found.left_alone if item.site not in touched}
    for option in found.options:
        if option.site not in touched:
            reasons[option.site] = "the budget is met with less harm elsewhere"
    if found.exact is not None and exact is None:
        # The layers of the exact head are not in the network that the plan is for.
        inside = f"{found.exact.site}."
        gone = [site for site in reasons if site.startswith(inside)]
        for site in gone:
            reason = reasons.pop(site)
            if found.exact.site not in touched:
                reasons[found.exact.site] = reason
    order = {layer.name: place for place, layer in enumerate(found.layers)}
    return tuple(
        LeftAlone(site=site, reason=reason)
        for site, reason in sorted(reasons.items(), key=lambda x: order.get(x[0], len(order)))
    )


def _obstacles(found: Survey) -> str:
    """Say what share of the MACs the sites hold that cannot be rewritten."""
    fixed = {item.site for item in found.left_alone}
    held = sum(layer.macs for layer in found.layers if layer.name in fixed)
    if not held:
        return ""
    worst = max((layer for layer in found.layers if layer.name in fixed), key=lambda x: x.macs)
    reason = next(item.reason for item in found.left_alone if item.site == worst.name)
    share = format_percent(held / max(found.before.macs, 1))
    return (
        f"Layers that cannot be rewritten hold {share} of the MACs, the largest "
        f"{worst.name!r} ({reason}). "
    )
