"""A plan carried out on a copy: the structure alone, or with weights fitted to data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.calibration.infer_task import meaning_of
from onebyone.calibration.inputs import CalibrationData, as_calibration
from onebyone.calibration.meaning import Meaning, TaskLike, planned_task
from onebyone.core.arguments import checked
from onebyone.core.errors import PlanError, UnknownNameError
from onebyone.core.precision import float32_in
from onebyone.core.processes import copy_from_main
from onebyone.core.randomness import seeded
from onebyone.core.records import Option, Plan
from onebyone.core.tensor_trees import Inputs, device_of, first_examples, only_tensor, to_device
from onebyone.core.torch_state import ordinary_torch
from onebyone.networks.examples import example_of
from onebyone.networks.held import forget_made, held
from onebyone.networks.layers import GlobalAverageHead
from onebyone.networks.outputs import check_finite_outputs, floating_tensors
from onebyone.networks.subnormals import flush_in_place
from onebyone.networks.surgery import (
    as_network,
    check_finite,
    copy_network,
    evaluation_copy,
    floating_type,
    hooks_removed,
    in_evaluation_mode,
    replace_module,
    run,
)
from onebyone.profiling.subnormals import without_subnormals
from onebyone.rewrites.equivalence import TOLERANCES, version_of
from onebyone.rewrites.fit_layers import (
    Groups,
    carried_out,
    check_plain,
    groups_at,
    leading_exact,
    of_full_rank,
    planned_layer,
    planned_module,
    refitted,
)
from onebyone.rewrites.head import rewrite as head
from onebyone.rewrites.head.fit import fit_gap
from onebyone.rewrites.registry import (
    GRAPH_REWRITES,
    group_rewrite,
    is_group_rewrite,
    is_layer_rewrite,
    rewrite_names,
)
from onebyone.rewrites.steps import are_exact, built

Progress = Callable[[int, int, str], None]

_MOST_VALUES = 2**32  # of one input: 16 GB

# Examples on which outputs without subnormal weights are compared with the original's.
FLUSH_EXAMPLES = 32

_LAYERWISE = "layerwise"
# Weights of a full rank are rounded once: what that moves outputs by, relative to the largest.
_ROUNDED_WEIGHTS = {**TOLERANCES, torch.float32: 1e-4}


@checked
@ordinary_torch()
def restructure(model: nn.Module, plan: Plan | str | Path) -> nn.Module:
    """Return a copy of a network with the structure that a plan gives, but not its weights.

    For weights that are loaded afterwards. See :func:`apply` for the weights.

    Args:
        model: Not modified.
        plan: Read for ``site`` and ``steps`` of its choices; or the file of one.

    Raises:
        PlanError: If the plan does not fit the network.
    """
    model, plan = as_network(model), _as_plan(plan)
    network = copy_network(model)
    example = _example(model, plan)
    with seeded(0, device_of(example)):  # fresh weights
        for kind, group in groupby(plan.choices, key=_kind):
            options = list(group)
            if kind in GRAPH_REWRITES:
                network = _regraphed(network, options, example, structure_only=True)
            else:
                groups: Groups = {}
                if kind == _LAYERWISE:
                    groups = groups_at(network, example, options, proved=False)
                for option in options:
                    network = _first_step(network, option, example, groups)
            for option in options:
                network = _later_steps(network, option)
    return network


@ordinary_torch()
@float32_in("float32")
@checked
def apply(
    model: nn.Module,
    plan: Plan | str | Path,
    calibration: object,
    *,
    task: TaskLike | Meaning | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> nn.Module:
    """Return a copy of a network rewritten as planned, its weights fitted to calibration data.

    Subnormal weights are set to zero first, where the outputs are the same without them; see
    :func:`onebyone.flush_subnormals`. Factorized layers are fitted in order of execution, each to
    give what the original layer gave from what the layer really sees now, so that it compensates
    the errors of those before it. Where no rank is lowered the function stays the same, which is
    checked on calibration data and noise.

    Args:
        model: Not modified.
        plan: Read for ``site`` and ``steps`` of its choices; or the file of one, which may be
            edited by hand.
        calibration: Unlabelled inputs: a tensor ``(n, …)``, a split, a torch data set or loader.
            ``None``: the weights come from the kernels alone, which is far less accurate.
        task: What the outputs mean, which weights are fitted by; that of the plan by default.
        device: Where the passes over the data run. The result is on the network's own device.
        progress: Told of the layers done.

    Returns:
        A new network in the mode of the old one.

    Raises:
        PlanError: If the plan does not fit the network, was made for another task, a site does
            something else than its weights say, or a plan of full ranks would change the function.
        WeightsError: If a weight is not finite.
        ModelError: If activations are not finite, or no weights are found for a layer; names it.
        DataError: If the calibration data is empty or of an unknown form.
    """
    model, plan = as_network(model), _as_plan(plan)
    check_finite(model)
    data = None
    if calibration is not None:
        data = as_calibration(calibration, device=device, dtype=floating_type(model))
    task = planned_task(plan.task, task)
    example = _example(model, plan)
    home = device_of(example)
    example = to_device(example, device)
    model, flushed = _flushed(model, example, data)
    reference = evaluation_copy(model, device=device)
    total, done = len(plan.choices), 0

    def advance(count: int, message: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total, message)

    work = _Work(
        network=copy_network(model).to(device),
        reference=reference,
        example=example,
        witness=example if data is None else data.example(),
        data=data,
        meaning=_meaning(reference, data, plan, task),
        macs=plan.before.macs,
        advance=advance,
    )
    with seeded(0, device):  # fresh weights
        for kind, group in groupby(plan.choices, key=_kind):
            work.carry_out(kind, list(group))
    _flush_fitted(work.network, allowed=flushed)
    _check_outputs(work.reference, work.network, work.witness, plan.choices, exact=work.exact)
    # Processors of several kinds may have rounded in their own ways.
    copy_from_main([*work.network.parameters(), *work.network.buffers()])
    return work.network.to(home)


@dataclass(kw_only=True)
class _Work:
    """A plan while it is carried out.

    Attributes:
        network: With the choices so far.
        reference: The same function as the original in all that it is compared by, under the names
            that choices refer to.
        example: Blank inputs.
        witness: The inputs that both are compared on.
        data: The calibration data.
        meaning: Of the outputs; ``None`` where nothing is fitted to them.
        macs: Of the original.
        advance: Told of the choices done.
        exact: Whether all choices so far keep the function.
    """

    network: nn.Module
    reference: nn.Module
    example: Inputs
    witness: Inputs
    data: CalibrationData | None
    meaning: Meaning | None
    macs: int
    advance: Callable[[int, str], None]
    exact: bool = True

    def carry_out(self, kind: str, options: Sequence[Option]) -> None:
        """Carry out choices in a row whose first steps are of one kind."""
        if kind in GRAPH_REWRITES:
            self._change_graph(options)
        elif kind == _LAYERWISE:
            self._change_layers(options)
        else:
            for option in options:
                self._change_head(option)

    def _change_graph(self, options: Sequence[Option]) -> None:
        # The same function under new names: later choices refer to these.
        self.network = _regraphed(self.network, options, self.example)
        self.reference = _regraphed(self.reference, options, self.example)
        for option in options:
            self._later_steps(option)
        self.advance(len(options), " + ".join(options[-1].rewrites))

    def _change_layers(self, options: Sequence[Option]) -> None:
        with held(self.reference, self.witness):
            self._change_plain_layers(options)

    def _change_plain_layers(self, options: Sequence[Option]) -> None:
        groups = groups_at(self.reference, self.witness, options)
        check_plain(self.reference, self.witness, options)
        forget_made(self.reference)  # a copy in float64
        kept = leading_exact(self.network, options, groups) if self.exact else []
        self.network = of_full_rank(self.network, kept, groups)
        if kept:
            self.advance(len(kept), " + ".join(kept[-1].rewrites))
        rest = options[len(kept) :]
        self.exact = self.exact and not rest
        self.network = refitted(
            self.network,
            self.reference,
            rest,
            self.data,
            meaning=self.meaning,
            macs=self.macs,
            advance=self.advance,
            groups=groups,
        )

    def _change_head(self, option: Option) -> None:
        self.network = _first_step(self.network, option, self.example)
        if option.first.settings.get("form") == "exact":
            self.reference = _first_step(self.reference, option, self.example)
        else:
            self.exact = False
            _fit_head(self.network, self.reference, option, self.data, self.meaning)
        self._later_steps(option)
        self.advance(1, " + ".join(option.rewrites))

    def _later_steps(self, option: Option) -> None:
        self.exact = self.exact and _later_are_exact(self.network, option)
        self.network = _later_steps(self.network, option, fit=True)


def _flushed(
    model: nn.Module, example: Inputs, data: CalibrationData | None
) -> tuple[nn.Module, bool]:
    """Return a network without subnormal weights, and whether it is the same without them."""
    shown = example
    if data is not None:
        shown = first_examples(next(iter(data.batches())), FLUSH_EXAMPLES)
    flushed, found = without_subnormals(model, shown)
    return flushed, found is None or found.exact


def _flush_fitted(network: nn.Module, *, allowed: bool) -> None:
    if allowed:  # what was fitted may have subnormal weights too
        flush_in_place(network)


def _meaning(
    reference: nn.Module,
    data: CalibrationData | None,
    plan: Plan,
    task: TaskLike | Meaning | None,
) -> Meaning | None:
    """Return what the outputs mean; ``None`` where nothing is fitted to them."""
    if data is None or not plan.choices:
        return None
    return meaning_of(reference, data, task, device=data.device)


def _check_outputs(
    reference: nn.Module,
    network: nn.Module,
    witness: Inputs,
    options: Sequence[Option],
    *,
    exact: bool,
) -> None:
    """Check a rewritten network's outputs: the original's where it is to be the same function.

    Raises:
        PlanError: If they differ; names the first site that does.
        ModelError: If they are not finite though the original's are.
    """
    if not exact:
        _check_finite_outputs(reference, network, witness)
        return
    version = version_of(reference, witness)
    own, most = version.like(network), _ROUNDED_WEIGHTS.get(floating_type(network))
    reason = None if version.decides else version.why_changed(own, within=most)
    if reason is None:
        return
    names = dict(own.named_modules())
    sites = [o.site for o in options if o.site in names and is_layer_rewrite(o.first.rewrite)]
    wrong = (site for site in sites if version.at([site]).why_changed(own, within=most))
    site = next(wrong, None)
    where = "" if site is None else f" The first site that gives something else is {site!r}."
    raise PlanError(
        f"A plan of full ranks must keep the network's function, but {reason}.{where} The forward "
        "depends on more than what its layers compute. Leave the sites up to there as they are."
    )


def _check_finite_outputs(reference: nn.Module, network: nn.Module, witness: Inputs) -> None:
    seen = in_evaluation_mode(network, device=device_of(witness))
    before, after = (floating_tensors(run(n, witness)) for n in (reference, seen))
    if all(bool(tensor.isfinite().all()) for tensor in before):
        check_finite_outputs(after, seen, witness)


def _kind(option: Option) -> str:
    """Return what choices in a row are carried out together."""
    name = option.first.rewrite
    return _LAYERWISE if is_layer_rewrite(name) or is_group_rewrite(name) else name


def _regraphed(
    network: nn.Module, options: Sequence[Option], example: Inputs, *, structure_only: bool = False
) -> nn.Module:
    """Return a copy of a network after rewrites that need to know which layer feeds which."""
    how = GRAPH_REWRITES[options[0].first.rewrite]
    return how.rewrite_all(network, example, options, structure_only=structure_only)


def _as_plan(plan: Plan | str | Path) -> Plan:
    if isinstance(plan, str | Path):
        return Plan.load(plan)
    if not isinstance(plan, Plan):
        raise PlanError(
            f"A plan must be a Plan or the file of one, got {type(plan).__name__}. Make it by "
            "`onebyone.plan`."
        )
    return plan


def _example(model: nn.Module, plan: Plan) -> Inputs:
    """Return one blank example for a plan, of the network's type and on its device."""
    if plan.inputs.values > _MOST_VALUES:
        raise PlanError(
            f"The plan is for inputs of {plan.inputs.example_text()}, which no machine holds. The "
            "file was changed or is damaged: make the plan again."
        )
    return example_of(model, plan.inputs.with_batch(1), blank=True)


def _first_step(
    network: nn.Module, option: Option, example: Inputs, groups: Groups | None = None
) -> nn.Module:
    """Return the network with an option's first step as a structure; it may be modified."""
    step = option.first
    if groups and is_group_rewrite(step.rewrite):
        return group_rewrite(step.rewrite).build(network, groups[option.site], step.settings)
    if is_layer_rewrite(step.rewrite):
        old = planned_layer(network, option)
        return replace_module(network, option.site, built(old, [step], site=option.site))
    if step.rewrite == "head":
        form, hidden, context = head.form_and_widths(step.settings, site=option.site)
        return head.rewrite(
            network,
            only_tensor(example, "The rewrite 'head'"),
            name=option.site,
            form=form,
            hidden=hidden,
            context=context,
        )
    raise UnknownNameError("rewrite", step.rewrite, rewrite_names())


def _later_steps(network: nn.Module, option: Option, *, fit: bool = False) -> nn.Module:
    """Return the network with all steps of an option but the first; it may be modified.

    With ``fit`` their weights are written. There are no problems to fit them to: what the first
    step made of the site is no layer.
    """
    steps = option.steps[1:]
    if not steps:
        return network
    made = planned_module(network, option.site)
    if not fit:
        new = built(made, steps, site=option.site, after=option.first)
        return replace_module(network, option.site, new)
    return carried_out(network, option, made, (), steps=steps)


def _later_are_exact(network: nn.Module, option: Option) -> bool:
    steps = option.steps[1:]
    return not steps or are_exact(planned_module(network, option.site), steps, site=option.site)


def _fit_head(
    network: nn.Module,
    reference: nn.Module,
    option: Option,
    data: CalibrationData | None,
    meaning: Meaning | None,
) -> None:
    """Fit the averaging head of a network, in place, to the reference's outputs."""
    if data is None:
        raise PlanError(
            f"The head {option.site!r} as 'gap' needs calibration data to be fitted to, got None."
        )
    new = network.get_submodule(option.site)
    assert isinstance(new, GlobalAverageHead)
    features, targets = head_data(
        in_evaluation_mode(network, device=data.device), reference, option.site, data
    )
    linear = reference.get_submodule(option.site)
    assert meaning is not None
    fit_gap(
        new,
        features,
        targets,
        part=meaning.parts[0],
        linear=linear if isinstance(linear, nn.Linear) else None,
    )


def head_data(
    network: nn.Module, reference: nn.Module, site: str, data: CalibrationData
) -> tuple[Tensor, Tensor]:
    """Return the maps that a head sees and the reference's outputs, on the CPU.

    Args:
        network: In evaluation mode; has the head at ``site``.
        reference: In evaluation mode.
        site: The head's name.
        data: The inputs.

    Returns:
        Maps ``(n, channels, height, width)`` and outputs ``(n, classes)``.
    """
    maps: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        # A copy: what follows may write into it.
        maps.append(args[0].detach().clone().float().cpu())

    targets = []
    handle = network.get_submodule(site).register_forward_pre_hook(keep)
    with hooks_removed([handle]), torch.no_grad():
        for inputs in data.batches():
            run(network, inputs)
            given = run(reference, inputs).float().cpu()
            check_finite_outputs((given,), reference, inputs)
            targets.append(given)
    return torch.cat(maps), torch.cat(targets)
