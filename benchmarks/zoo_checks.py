"""What ``zoo.py`` does with one network: every rewrite, each against the network as it was.

All outputs are compared in float64 on random weights and inputs. Batch norms get the statistics
that the network's own activations have, then shaken; parameters that are constant at the start
(norms, layer scales, zeroed last layers) are drawn at random, so that no branch is trivially dead.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import onebyone as obo
from group_plans import plan_of_widths
from onebyone.core.errors import OneByOneError
from onebyone.core.records import Option, Plan
from onebyone.core.tensor_trees import Inputs, spec_of, tensors_in
from onebyone.networks.surgery import call, evaluation_copy
from onebyone.networks.zoo.load import build
from onebyone.profiling.counts import macs_of
from onebyone.profiling.trace import LayerCosts, trace_layers
from onebyone.rewrites.fold.fold import fold
from onebyone.rewrites.head import rewrite as head
from onebyone.runtimes import find_runtime, outputs_of

# Greatest difference of two outputs, relative to the greatest output, that rounding may make.
TOLERANCE = 1e-6
# The same for ONNX Runtime, which is compared in float32. Some random networks amplify rounding
# beyond that: then the rewritten one may differ by no more than the original itself.
ONNX_TOLERANCE = 1e-3
# Two inputs' outputs must differ by this share of the outputs: else nothing was compared.
AMPLIFICATION = 1e4  # of roundings, at most, where the input can be chosen
ALIVE = 1e-6
SIZES = (32, 64, 96, 128, 160, 192)
# By a part of the name: detectors take the size of their pictures, the rest few classes, because a
# thousand are no other case and take time.
OPTIONS: dict[str, dict[str, Any]] = {
    "rcnn": {"min_size": 96, "max_size": 128},
    "retinanet": {"min_size": 96, "max_size": 128},
    "fcos": {"min_size": 96, "max_size": 128},
    "ssd": {},
    ":": {"num_classes": 20},
}


class Skip(Exception):  # noqa: N818 - not an error
    """The network is not one for this benchmark; says why."""


@dataclass
class Row:
    """What was found of one network; a line of the results."""

    model: str
    status: str = "ok"  # ok, skipped, failed
    detail: str = ""
    input: str = ""
    seconds: float = 0.0  # of the processor
    params: int = 0
    macs: int = 0
    half_macs: int = 0
    flops_note: str = ""
    alive: float = 0.0
    sites: int = 0
    rewritten: int = 0
    halved: int = 0
    narrowed: int = 0
    folded: int = 0
    unfolded: dict[str, int] = field(default_factory=dict)
    left_alone: dict[str, int] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)  # name -> "ok …", "none: …", "failed: …"

    @property
    def failures(self) -> list[str]:
        """The checks that failed, each with the cause."""
        return [f"{k}: {v[8:]}" for k, v in self.checks.items() if v.startswith("failed: ")]


def check_model(spec: str, *, onnx: bool = False) -> Row:
    """Build a network and do everything with it that the benchmark is about."""
    row = Row(model=spec)
    started = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check(row, spec, onnx=onnx)
    except Skip as reason:
        row.status, row.detail = "skipped", str(reason)
    except Exception as error:  # noqa: BLE001 - the cause goes into the table
        row.status, row.detail = "failed", _cause(error)
    if row.failures:
        row.status = "failed"
    row.seconds = round(time.process_time() - started, 2)
    return row


def _check(row: Row, spec: str, *, onnx: bool) -> None:
    _skip_unless_convolutional(spec)
    torch.manual_seed(0)
    model = _made(spec)
    inputs, reference, others = _inputs(spec, model)
    row.input = ", ".join("×".join(map(str, t.shape)) for t in tensors_in(inputs))
    row.params = sum(p.numel() for p in model.parameters())
    pairs = zip(others, reference, strict=False)
    same = [pair for pair in pairs if pair[0].shape == pair[1].shape]
    row.alive = _apart(*map(list, zip(*same, strict=True)))
    model.train()
    fingerprint = _fingerprint(model)
    if not math.isfinite(row.alive) or row.alive < ALIVE:
        raise RuntimeError(f"the random network is dead: outputs differ by {row.alive:.1e}")
    costs: dict[str, LayerCosts] = {}
    run = _Runner(row)
    run("profile", lambda: _profile(row, model, inputs, costs))
    if "layers" in costs:
        run("full rank", lambda: _full_rank(row, model, inputs, reference))
        run("half rank", lambda: _half_rank(row, model, inputs, onnx=onnx))
        run("narrow", lambda: _narrow(row, model, inputs, costs["layers"]))
        run("exact head", lambda: _exact_head(model, inputs, reference, costs["layers"]))
        run("fold", lambda: _fold(row, model, inputs, reference))
    same = _fingerprint(model) == fingerprint
    row.checks["untouched"] = "ok" if same else "failed: the original was changed"


class _Runner:
    def __init__(self, row: Row) -> None:
        self.row = row

    def __call__(self, name: str, check: Callable[[], str]) -> None:
        """Run a check, and keep what it says or why it failed."""
        try:
            self.row.checks[name] = check()
        except OneByOneError as error:
            # Refused with a reason of the package's own, not a crash; still not done.
            self.row.checks[name] = f"failed: refused: {error}"
        except Exception as error:  # noqa: BLE001 - the cause goes into the table
            self.row.checks[name] = f"failed: {_cause(error)}"


def _cause(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    place = error.__traceback__
    where = ""
    while place is not None:
        name = place.tb_frame.f_code.co_filename
        if "/onebyone/" in name:
            where = f" ({name.rsplit('/onebyone/', 1)[1]}:{place.tb_lineno})"
        place = place.tb_next
    return f"{type(error).__name__}: {lines[0][:200]}{where}"


# ---------------------------------------------------------------- the network and its inputs


def _made(spec: str) -> nn.Module:
    options = next((o for key, o in OPTIONS.items() if key in spec), {})
    model = build(spec, **options).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            values = parameter.detach()
            # What is constant at the start: norms, layer scales, biases, zeroed last layers.
            if (
                values.is_floating_point()
                and values.numel() > 1
                and bool((values == values.flatten()[0]).all())
            ):
                start = float(values.flatten()[0])
                drawn = torch.randn(values.shape, generator=generator, dtype=values.dtype)
                parameter.copy_(0.5 * (1 if 0 < abs(start) < 0.1 else start) + 0.1 * drawn)
    return model


def _skip_unless_convolutional(spec: str) -> None:
    try:
        with torch.device("meta"):  # without memory: most are transformers
            model = build(spec)
    except OneByOneError:  # some compute with their weights when they are made
        model = build(spec)
    kinds = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]  # noqa: SLF001
    if len(kinds) < 2:
        what = "one convolution, the patch embedding" if kinds else "no convolution"
        raise Skip(f"not a convolutional network: {what}")


def _inputs(spec: str, model: nn.Module) -> tuple[Inputs, list[Tensor], list[Tensor]]:
    """Return an input as small as the network takes, its outputs, and those of another one.

    Settles the network's batch norms on it. Where maps of very few values make a network so
    sensitive that roundings show in its outputs, equality cannot be judged: a larger one then.
    """
    problem: Exception | None = None
    sensitive: tuple[Inputs, list[Tensor], list[Tensor]] | None = None
    for shape in _shapes(spec, model):
        try:
            inputs = [_example(spec, shape, seed) for seed in (2, 3)]
            if all(isinstance(each, Tensor) for each in inputs):
                # Near the one that batch norms are settled on, where nothing overflows.
                inputs[1] = inputs[0] + 0.3 * inputs[1]
            _settle(model, inputs[0])
            outputs = [_outputs(model, each) for each in inputs]
            if not all(bool(torch.isfinite(t).all()) for each in outputs for t in each):
                raise RuntimeError("outputs are not finite")
        except Exception as error:  # noqa: BLE001 - too small, perhaps: try a larger one
            problem = error
            continue
        if _amplification(model, inputs[0], outputs[0]) <= AMPLIFICATION:
            return inputs[0], *outputs
        sensitive = (inputs[0], *outputs)
    if sensitive is not None:
        return sensitive
    raise RuntimeError(f"does not run by itself: {_cause(problem) if problem else ''}")


def _amplification(model: nn.Module, inputs: Inputs, outputs: list[Tensor]) -> float:
    """Return by how much a tiny relative change of all weights grows in the outputs."""
    tiny = 1e-12
    generator = torch.Generator().manual_seed(5)
    changed = evaluation_copy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            draws = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.mul_(1 + tiny * draws)
    return _apart(_outputs(changed, inputs), outputs) / tiny


def _shapes(spec: str, model: nn.Module) -> Iterator[tuple[int, ...]]:
    if any(kind in spec for kind in ("r3d", "mc3", "r2plus1d", "s3d")) and "torchvision" in spec:
        yield 2, 3, 8, 32, 32
        yield 1, 3, 16, 224, 224
        return
    if "torchvision:mvit" in spec:
        yield 1, 3, 16, 224, 224
        return
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *native = config.get("input_size") or (3, 299 if "inception" in spec else 224, 224)
    if not config.get("fixed_input_size", False):
        yield from ((2, channels, size, size) for size in SIZES if size < native[0])
    yield 1, channels, *native


def _example(spec: str, shape: tuple[int, ...], seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    if any(kind in spec for kind in ("rcnn", "retinanet", "fcos", "ssd")):
        # Values of pictures: these networks normalize by themselves, and take a list.
        sizes = [(3, 96, 112), (3, 112, 96)]
        return ([torch.rand(s, generator=generator, dtype=torch.float64) for s in sizes],)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _settle(model: nn.Module, inputs: Inputs) -> None:
    """Give batch norms the statistics of their activations, then shake them."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
        norm.train()
    handles = [norm.register_forward_pre_hook(_at_least_two_values) for norm in norms]
    try:
        with torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    generator = torch.Generator().manual_seed(4)
    for norm in norms:
        if norm.running_var is None:
            continue
        spread = norm.running_var.clamp_min(1e-6).sqrt()
        draws = torch.randn(2, len(spread), generator=generator, dtype=spread.dtype)
        norm.running_mean += 0.1 * spread * draws[0]
        norm.running_var.clamp_(min=1e-6).mul_((0.2 * draws[1]).exp())


def _at_least_two_values(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    x = args[0]
    if x.numel() // x.shape[1] < 2:
        norm.eval()


# ---------------------------------------------------------------- comparing


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return all tensors that a network gives, and those of a detector's backbone and heads."""
    network = evaluation_copy(model) if model.training else model
    kept: list[Tensor] = []
    detector = not isinstance(inputs, Tensor)

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        kept.extend(t.detach() for t in tensors_in(output))

    handles = [
        module.register_forward_hook(keep)
        for name, module in network.named_modules()
        if detector and re.search(r"(^|\.)(backbone|head|\w+_head|\w+_predictor)$", name)
    ]
    with torch.no_grad():
        output = call(network, inputs)
    for handle in handles:
        handle.remove()
    return [*kept, *(t for t in tensors_in(output) if t.is_floating_point())]


def _apart(found: list[Tensor], reference: list[Tensor]) -> float:
    """Return the greatest difference, relative to the greatest value of each output."""
    if [t.shape for t in found] != [t.shape for t in reference]:
        return math.inf
    worst = 0.0
    for mine, theirs in zip(found, reference, strict=True):
        if theirs.numel():
            scale = float(theirs.abs().max()) or 1.0
            difference = float((mine.double() - theirs.double()).abs().max()) / scale
            worst = max(worst, difference) if math.isfinite(difference) else math.inf
    return worst


def _equal(found: list[Tensor], reference: list[Tensor]) -> str:
    worst = _apart(found, reference)
    if not worst <= TOLERANCE:
        raise AssertionError(f"outputs differ by {worst:.1e} of their greatest")
    return f"ok {worst:.0e}"


def _fingerprint(model: nn.Module) -> str:
    """Return a digest of all that a rewrite must not touch: values, modes, structure, hooks."""
    digest = hashlib.sha256()
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)  # noqa: SLF001
        extra = sorted(k for k in vars(module) if not k.startswith("_"))
        digest.update(
            f"{name} {type(module)} {module.training} {hooks} {extra} {id(module)}".encode()
        )
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.requires_grad} {tensor.grad is None}".encode())
            digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- the checks


class _MacsByOperation(TorchDispatchMode):
    """Sums MACs by operation with the package's rules, to explain a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        macs = macs_of(func, args, output)
        if macs:
            self.macs[str(func._overloadpacket)] += macs  # noqa: SLF001
        return output


def _profile(row: Row, model: nn.Module, inputs: Inputs, costs: dict[str, LayerCosts]) -> str:
    """Count, and compare with torch's own counter: ours times two is theirs."""
    found = trace_layers(model, inputs)
    costs["layers"] = found
    row.macs = found.macs
    if found.params != row.params:
        raise AssertionError(f"{found.params:,} parameters counted of {row.params:,}")
    counter, ours = FlopCounterMode(display=False), _MacsByOperation()
    # Torch's counter stumbles over a parameter that is a module's input.
    frozen = evaluation_copy(model).requires_grad_(requires_grad=False)
    with torch.no_grad(), counter, ours:
        call(frozen, inputs)
    theirs = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    differing = sorted(
        f"{op}: {2 * ours.macs.get(op, 0):,} ≠ {theirs.get(op, 0):,}"
        for op in {*ours.macs, *theirs}
        if 2 * ours.macs.get(op, 0) != theirs.get(op, 0)
    )
    row.flops_note = "; ".join(differing)
    unexplained = [d for d in differing if not d.endswith("≠ 0")]
    if unexplained:
        raise AssertionError(f"counts differ from torch's: {'; '.join(unexplained)}")
    batch = next(tensors_in(inputs)).shape[0] if isinstance(inputs, Tensor) else 2
    total = sum(ours.macs.values())
    if not 0 <= total - batch * found.macs < batch * len(found.layers) + 1:
        raise AssertionError(f"layers add up to {batch} × {found.macs:,} of {total:,} MACs")
    return "ok" + (", more than torch counts" if differing else "")


def _full_rank(row: Row, model: nn.Module, inputs: Inputs, reference: list[Tensor]) -> str:
    """Factorize every layer at its full ranks: the same function."""
    plan = obo.uniform_plan(model, inputs, ranks=1)
    row.sites = len(plan.choices) + len(plan.left_alone)
    row.rewritten = len(plan.choices)
    row.left_alone = dict(Counter(_kind_of(item.reason) for item in plan.left_alone))
    if not plan.choices:
        return "none: no layer can be factorized"
    rewritten = obo.apply(model, plan, None)
    return _equal(_counted(rewritten, plan, inputs), reference)


def _kind_of(reason: str) -> str:
    """Return a reason without the names and numbers that differ from layer to layer."""
    reason = re.sub(r"(?<!\w)'[^']*'(?!\w)", "…", reason)
    return re.sub(r"\d+", "n", reason)


def _half_rank(row: Row, model: nn.Module, inputs: Inputs, *, onnx: bool) -> str:
    """Factorize at half the ranks, where that pays: fewer MACs, as many as predicted."""
    plan = obo.uniform_plan(model, inputs, ranks=0.5)
    row.halved, row.half_macs = len(plan.choices), plan.after.macs
    if not plan.choices:
        return "none: half the ranks save nothing anywhere"
    if not plan.after.macs < plan.before.macs:
        raise AssertionError("no fewer MACs")
    rewritten = obo.apply(model, plan, None)
    outputs = _counted(rewritten, plan, inputs)
    if not all(bool(torch.isfinite(t).all()) for t in outputs):
        raise AssertionError("outputs are not finite")
    if onnx:
        row.checks["onnx"] = _onnx(rewritten, model, inputs)
    return "ok"


def _narrow(row: Row, model: nn.Module, inputs: Inputs, costs: LayerCosts) -> str:
    """Remove half of the channels of each group that excludes none before it: MACs as predicted.

    That groups without channels give what their readers give that ignore these is proved by
    ``find``; here all are narrowed, and what they cost is counted.
    """
    if not isinstance(inputs, Tensor):
        return "none: takes more than one tensor"
    plan = plan_of_widths(model, inputs, costs, lambda channels: channels // 2)
    row.narrowed = len(plan.choices)
    if not plan.choices:
        return "none: no channels can be removed"
    outputs = _counted(obo.apply(model, plan, None), plan, inputs)
    if not all(bool(torch.isfinite(t).all()) for t in outputs):
        raise AssertionError("outputs are not finite")
    return "ok"


def _counted(rewritten: nn.Module, plan: Plan, inputs: Inputs) -> list[Tensor]:
    """Check that a network costs what was predicted; return its outputs."""
    costs = trace_layers(rewritten, inputs)
    found = costs.cost
    if not isinstance(inputs, Tensor):
        # How many regions a detector looks at depends on its outputs, and with it the MACs.
        found = replace(found, macs=plan.after.macs)
    if found != plan.after:
        raise AssertionError(
            f"counted {costs.params:,} parameters and {costs.macs:,} MACs, but predicted "
            f"{plan.after.params:,} and {plan.after.macs:,}"
        )
    if isinstance(inputs, Tensor):
        return list(tensors_in(costs.output))
    return _outputs(rewritten.eval(), inputs)


def _onnx(rewritten: nn.Module, model: nn.Module, inputs: Inputs) -> str:
    """Export, and compare ONNX Runtime's outputs with eager's, in float32."""
    if not isinstance(inputs, Tensor):
        return "none: takes more than one tensor"
    example = inputs[:1].float()
    try:
        worst = _onnx_apart(rewritten, example)
    except Exception as error:  # noqa: BLE001 - the cause goes into the table
        try:
            _onnx_apart(model, example)
        except Exception as same:  # noqa: BLE001 - so does this one
            return f"none: the original cannot be exported: {_cause(same)}"
        return f"failed: {_cause(error)}"
    if worst <= ONNX_TOLERANCE:
        return f"ok {worst:.0e}"
    own = _onnx_apart(model, example)
    said = f"{worst:.0e}, the original's by {own:.0e}"
    return f"ok {said}" if worst <= own else f"failed: outputs differ by {said}"


def _onnx_apart(model: nn.Module, example: Tensor) -> float:
    """Return by how much ONNX Runtime's outputs of a network differ from eager's."""
    network = evaluation_copy(model).float()
    exported = outputs_of(find_runtime("onnxruntime").prepare(network, example)())
    with torch.no_grad():
        return _apart(exported, list(tensors_in(network(example))))


def _exact_head(
    model: nn.Module, inputs: Inputs, reference: list[Tensor], before: LayerCosts
) -> str:
    """Make the head convolutions of the same function: the same logits."""
    if not isinstance(inputs, Tensor):
        return "none: the network takes something that is not one tensor"
    found = head.find_head(model, inputs)
    if isinstance(found, head.NoHead):
        return f"none: {found.reason}"
    option = Option.of(
        "head",
        {"form": "exact"},
        site=found.name,
        before=found.cost,
        after=head.cost(found, "exact", []),
        occupies=found.occupies,
    )
    cost = before.cost
    plan = Plan(
        network="", inputs=spec_of(inputs), budgets=(), before=cost,
        after=cost - option.saved, choices=(option,), left_alone=(),
    )  # fmt: skip
    rewritten = obo.apply(model, plan, None)
    return _equal(_counted(rewritten, plan, inputs), reference)


def _fold(row: Row, model: nn.Module, inputs: Inputs, reference: list[Tensor]) -> str:
    """Fold batch norms and 1×1 convolutions into their neighbours: the same function."""
    folded, plan = fold(model, inputs)
    row.folded = len(plan.choices)
    row.unfolded = dict(Counter(_kind_of(item.reason) for item in plan.left_alone))
    if not plan.choices:
        return "none: nothing to fold"
    return _equal(_counted(folded, plan, inputs), reference)
