"""Every rewrite on the convolutional networks of torchvision and timm, against the originals.

    python benchmarks/zoo.py                        # torchvision, and timm's smallest by family
    python benchmarks/zoo.py --all --results all.jsonl
    python benchmarks/zoo.py torchvision:resnet18 timm:convnext_atto
    python benchmarks/zoo.py --only-table --table docs/zoo.md

Each network runs in a process of its own with limits on time and memory, with random weights, on
an input as small as it takes, in float64: counted and compared with torch's own counter; every
layer factorized at full rank (the same outputs), then at half rank (as many MACs as predicted);
half of the hidden channels removed (as many MACs as predicted);
the head as convolutions (the same logits); the original left as it was. Results are appended to a
file of JSON lines, so that a run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import re
import resource
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from onebyone.core.tables import Table
from onebyone.core.units import format_count
from onebyone.core.write_files import write_text
from onebyone.report.console import print_table
from onebyone.runtimes import describe_machine

sys.path.insert(0, str(Path(__file__).parent))
from zoo_checks import TOLERANCE, Row, check_model

CHECKS = ("profile", "full rank", "half rank", "narrow", "exact head", "fold", "onnx", "untouched")
# For tests: small, and of every kind of layer and head.
SAMPLE = (
    "torchvision:squeezenet1_1", "torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5",
    "timm:test_resnet", "timm:test_efficientnet", "timm:test_nfnet", "timm:test_convnext",
    "timm:test_byobnet", "timm:mobilenetv2_035", "timm:ghostnet_050", "timm:lcnet_035",
    "timm:repghostnet_050",
)  # fmt: skip
WAITING = 20  # wall seconds for a second of the processor
# Sizes in names, smallest first; numbers come in their own order.
_WORDS = (
    "zepto", "atto", "femto", "pico", "nano", "n", "xxt", "xt", "xxs", "xs", "ti", "tiny", "mini",
    "t", "s", "small", "m", "medium", "b", "base", "l", "large", "x", "xl", "xlarge", "xxl", "h",
    "huge", "g", "giant", "gigantic", "enormous",
)  # fmt: skip


# ---------------------------------------------------------------- which networks


def torchvision_models() -> list[str]:
    """Return classification, segmentation, detection and video networks."""
    import torchvision.models as zoo

    modules = (zoo, zoo.segmentation, zoo.detection, zoo.video)
    return [f"torchvision:{name}" for m in modules for name in zoo.list_models(module=m)]


def timm_families() -> dict[tuple[str, str], list[str]]:
    """Return timm's architectures by module and first word of the name, smallest first."""
    import timm

    families: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in timm.list_models():
        word = re.match(r"(?:tf_|legacy_|test_|cs3?|gc_|eca_|ese_|dm_|nf_)?[a-z]+", name)
        assert word is not None
        families[_module_of(name), word.group(0)].append(name)
    return {key: sorted(names, key=_size_of) for key, names in sorted(families.items())}


def _module_of(name: str) -> str:
    import timm

    return timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]


def _size_of(name: str) -> tuple[int, list[float], str]:
    """Order names by the sizes in them: ``_s`` before ``_b``, 18 before 50."""
    parts = re.findall(r"[a-z]+|\d+", name)
    words = [_WORDS.index(part) for part in parts[1:] if part in _WORDS]
    numbers = [float(part) for part in parts if part.isdecimal()]
    return (words[0] if words else _WORDS.index("s"), numbers, name)


def chosen(args: argparse.Namespace) -> list[str]:
    """Return the networks asked for, the first of each family before the second."""
    if args.models:
        return args.models
    if args.sample:
        return list(SAMPLE)
    names = torchvision_models() if args.library in ("both", "torchvision") else []
    if args.library in ("both", "timm"):
        families = timm_families().values()
        most = max(map(len, families)) if args.all else args.each
        for place in range(most):
            names += [f"timm:{family[place]}" for family in families if place < len(family)]
    # Those that cannot take a small input are slow: last.
    return sorted(names, key=_is_fixed)


def _is_fixed(spec: str) -> bool:
    import timm

    config = timm.get_pretrained_cfg(spec[5:]) if spec.startswith("timm:") else None
    return config is not None and bool(config.fixed_input_size)


# ---------------------------------------------------------------- running


def run_all(specs: Sequence[str], args: argparse.Namespace) -> Iterator[Row]:
    """Run networks one by one, each in a process of its own, and keep each result at once."""
    import timm  # noqa: F401 - the processes share what is imported here
    import torchvision.models  # noqa: F401

    done = {row.model for row in load(args.results)} if args.results.exists() else set()
    for place, spec in enumerate(specs):
        if spec in done:
            continue
        row = run_one(spec, args)
        with args.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(dataclasses.asdict(row)) + "\n")
        said = row.detail or "; ".join(row.failures) or f"{row.rewritten} of {row.sites} sites"
        print(
            f"{place + 1}/{len(specs)} {spec}: {row.status}, {row.seconds} CPU s, {said}",
            flush=True,
        )
        yield row


def run_one(spec: str, args: argparse.Namespace) -> Row:
    """Check a network in a process of its own, which shares what is imported already."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(spec, args, theirs))
    process.start()
    theirs.close()
    try:
        return _answer(spec, ours, process, args.seconds)
    finally:
        process.kill()
        process.join()


def _answer(spec: str, pipe: Connection, process: BaseProcess, seconds: float) -> Row:
    # The processor's time is what is limited; a machine with much else to do may take longer.
    cause = f"stopped after {seconds} s"
    if pipe.poll(WAITING * seconds + 10):
        try:
            return Row(**pipe.recv())
        except EOFError:
            process.join()
            if process.exitcode not in (-signal.SIGXCPU, -signal.SIGKILL):
                cause = f"died with exit code {process.exitcode}: out of memory?"
    return Row(spec, "failed", cause, seconds=seconds)


def _work(spec: str, args: argparse.Namespace, pipe: Connection) -> None:
    limit = int(args.memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    most = math.ceil(args.seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))
    torch.set_num_threads(1)
    pipe.send(dataclasses.asdict(check_model(spec, onnx=args.onnx)))
    pipe.close()


def load(path: Path) -> list[Row]:
    """Return the results of a file, the last of each network."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = Row(**json.loads(line))
        rows[row.model] = row
    return list(rows.values())


# ---------------------------------------------------------------- showing


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the totals, what failed, why layers were left alone, and every network."""
    ran = [row for row in rows if row.status != "skipped"]
    return [
        _totals(rows, ran), _failed(ran), _without(ran), _reasons(ran), _counts(ran), _each(ran),
    ]  # fmt: skip


def _totals(rows: Sequence[Row], ran: Sequence[Row]) -> Table:
    lines = []
    for name in CHECKS:
        found = [row.checks[name] for row in ran if name in row.checks]
        ok = sum(result.startswith("ok") for result in found)
        none = sum(result.startswith("none") for result in found)
        if found:
            tried = len(ran) - none
            share = f"{100 * ok / max(tried, 1):.1f}"
            lines.append([name, str(tried), str(ok), share, str(none)])
    sites, rewritten = sum(row.sites for row in ran), sum(row.rewritten for row in ran)
    skipped = Counter(row.detail for row in rows if row.status == "skipped")
    return Table(
        columns=("check", ">networks", ">right", ">%", ">does not apply"),
        rows=lines,
        title=f"{len(ran)} networks",
        notes=[
            f"{rewritten:,} of {sites:,} layers factorized at full rank.",
            (
                f"Outputs equal: to {TOLERANCE:.0e} of the greatest value, in float64; worst "
                f"{_worst(ran):.0e}."
            ),
            *(f"Skipped, {count}: {why}." for why, count in skipped.most_common()),
        ],
    )


def _worst(rows: Sequence[Row]) -> float:
    # ONNX Runtime is compared in float32.
    results = [r for row in rows for name, r in row.checks.items() if name != "onnx"]
    values = [float(result[3:]) for result in results if re.match(r"ok \d", result)]
    return max(values, default=0.0)


def _failed(ran: Sequence[Row]) -> Table:
    lines = [[r.model, "; ".join([*([r.detail] if r.detail else []), *r.failures])] for r in ran]
    return Table(
        columns=("network", "cause"),
        rows=[line for line in lines if line[1]],
        title="Failures",
        notes=[] if any(line[1] for line in lines) else ["None."],
    )


def _without(ran: Sequence[Row]) -> Table:
    networks: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in ran:
        for name, result in row.checks.items():
            if result.startswith("none: "):
                networks[name, _plain(result[6:])].append(row.model)
    lines = sorted(networks.items(), key=lambda line: (CHECKS.index(line[0][0]), -len(line[1])))
    return Table(
        columns=("check", "why it does not apply", ">networks", "such as"),
        rows=[[*key, str(len(found)), found[0]] for key, found in lines],
        title="Does not apply",
    )


def _plain(cause: str) -> str:
    """Return a cause without colors, the place in our code, and another package's next steps."""
    cause = re.sub(r"\x1b\[[0-9;]*m", "", cause)
    return re.sub(r" This is step .*| \([\w/]+\.py:\d+\)$", "", cause)


def _reasons(ran: Sequence[Row]) -> Table:
    layers: Counter[str] = Counter()
    networks: Counter[str] = Counter()
    for row in ran:
        layers.update(row.left_alone)
        networks.update(row.left_alone.keys())
    return Table(
        columns=("why layers are left alone", ">layers", ">networks"),
        rows=[[why, f"{count:,}", str(networks[why])] for why, count in layers.most_common()],
        title="Left alone",
        notes=["Names are shown as …, numbers as n."],
    )


def _counts(ran: Sequence[Row]) -> Table:
    differing = [row for row in ran if row.flops_note]
    operations: Counter[str] = Counter()
    for row in differing:
        operations.update({note.partition(":")[0] for note in row.flops_note.split("; ")})
    return Table(
        columns=("operation", ">networks"),
        rows=[[name, str(count)] for name, count in operations.most_common()],
        title="Counted here, not by torch's FlopCounterMode",
        notes=[
            f"In {len(ran) - len(differing)} of {len(ran)} twice our MACs are its count exactly."
        ],
    )


def _each(ran: Sequence[Row]) -> Table:
    lines = []
    for row in sorted(ran, key=lambda r: r.model):
        left = "; ".join(f"{count} {why}" for why, count in row.left_alone.items())
        lines.append(
            [
                row.model,
                row.input,
                f"{row.seconds:.0f}",
                format_count(row.params),
                format_count(row.macs),
                f"{100 * row.half_macs / row.macs:.0f}" if row.macs and row.half_macs else "–",
                f"{row.rewritten} of {row.sites}",
                row.checks.get("full rank", "–").removeprefix("ok "),
                _short(row, "exact head"),
                _short(row, "onnx"),
                f"{row.folded} of {row.folded + sum(row.unfolded.values())}",
                left or "–",
            ]
        )
    return Table(
        columns=(
            "network", "input", ">CPU s", ">params", ">MACs", ">half rank, % MACs", ">factorized",
            "full rank, difference", "exact head", "ONNX Runtime, float32", ">folded",
            "left alone",
        ),
        rows=lines,
        title="Every network",
    )  # fmt: skip


def _short(row: Row, check: str) -> str:
    """Return what a check found without the cause, which another table has."""
    return row.checks.get(check, "–").removeprefix("ok ").split(":")[0].split(",")[0]


def markdown(rows: Sequence[Row], args: argparse.Namespace) -> str:
    """Return all tables as a page."""
    import timm
    import torchvision

    machine = describe_machine("cpu")
    parts = [
        "# The zoos",
        "",
        (
            f"Made by `python benchmarks/zoo.py --onnx --table {args.table}`: torch "
            f"{torch.__version__}, "
            f"torchvision {torchvision.__version__}, timm {timm.__version__}, {machine.processor}. "
            "Random weights, 20 classes, small random inputs, float64 (float32 in ONNX Runtime), "
            "one thread. What each check does is said in `benchmarks/zoo_checks.py`."
        ),
        "",
    ]
    return "\n".join([*parts, *(table.to_markdown() for table in tables(rows))])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="such as timm:resnet18; the zoos by default")
    parser.add_argument("--library", choices=("both", "torchvision", "timm"), default="both")
    parser.add_argument("--each", type=int, default=2, help="networks of each timm family (2)")
    parser.add_argument("--all", action="store_true", help="every network of timm")
    parser.add_argument("--sample", action="store_true", help="a dozen, for tests")
    parser.add_argument("--onnx", action="store_true", help="also export and run the half-rank one")
    parser.add_argument(
        "--seconds", type=float, default=240, help="of the processor, for a network (240)"
    )
    parser.add_argument("--memory-gb", type=float, default=8, help="limit for a network (8)")
    parser.add_argument("--results", type=Path, default=Path("runs/zoo.jsonl"))
    parser.add_argument("--table", type=Path, help="write the tables to this Markdown file")
    parser.add_argument("--only-table", action="store_true", help="of the results there are")
    args = parser.parse_args(argv)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    if not args.only_table:
        torch.set_num_threads(1)
        for _ in run_all(chosen(args), args):
            pass
    rows = load(args.results)
    for table in tables(rows)[:-1]:
        print_table(table)
    if args.table:
        write_text(args.table, markdown(rows, args))
    return int(any(row.status == "failed" for row in rows))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no process behind
    sys.exit(main())
