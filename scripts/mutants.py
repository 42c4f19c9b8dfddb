#!/usr/bin/env python3
"""Change the mathematics in one place at a time, and check that a test fails each time.

Cosmic Ray makes the mutants; two more kinds are made here. Each runs in a process of its own,
forked after the slow imports, with the tests of its module. No file is changed. A mutant that no
test can tell from the original is listed in mutants_equivalent.toml with the reason.

    scripts/mutants.py                                   # every module; most of an hour
    scripts/mutants.py statistics knapsack --sample 50
    scripts/mutants.py --again                           # only those that survived the last time
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import random
import resource
import signal
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).parents[1]
SURVIVORS = ROOT / ".mutants.json"
LOW_RANK = "tests/rewrites/low_rank"
# Module -> the tests that concern it.
MODULES = {
    "core.statistics": ["tests/core/test_statistics.py"],
    "planning.exact_search": [
        *["tests/planning/test_exact_search.py", "tests/planning/test_knapsack.py"],
    ],
    "planning.knapsack": ["tests/planning/test_knapsack.py", "tests/planning/test_least_cost.py"],
    "profiling.counts": ["tests/profiling/test_counts.py", "tests/profiling/test_trace.py"],
    "rewrites.low_rank.factorize": [f"{LOW_RANK}/test_factorize.py", f"{LOW_RANK}/test_ranks.py"],
    "rewrites.low_rank.factors": [
        *[f"{LOW_RANK}/test_factorize.py", f"{LOW_RANK}/test_factors.py"],
    ],
    "rewrites.low_rank.eigen": [
        *[f"{LOW_RANK}/test_factorize.py", f"{LOW_RANK}/test_eigen.py"],
    ],
    "rewrites.low_rank.reduced_rank": [
        *[f"{LOW_RANK}/test_factorize.py", f"{LOW_RANK}/test_factors.py"],
        f"{LOW_RANK}/test_reduced_rank.py",
    ],
    "rewrites.low_rank.separable": [f"{LOW_RANK}/test_separable.py"],
    "rewrites.low_rank.separable_terms": [
        *[f"{LOW_RANK}/test_separable.py", f"{LOW_RANK}/test_separable_terms.py"],
    ],
}
# Cosmic Ray's operators: each pair once, and of comparisons the boundary and the opposite.
REPLACED = {
    "Binary": [
        *["Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul", "Pow_Mul"],
        *["RShift_LShift", "LShift_RShift", "BitAnd_BitOr", "BitOr_BitAnd"],
    ],
    "Comparison": [
        *["Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt"],
        *["Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is"],
    ],
    "Unary": ["Delete_USub", "Delete_Not"],
}
NAMED = [
    *["AddNot", "NumberReplacer", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue"],
    *["ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceBreakWithContinue"],
    *["ReplaceContinueWithBreak", "ZeroIterationForLoop"],
]
# Plain asserts, as their rewriting would come too late for what is imported already.
QUIET = ["-q", "--assert=plain", "-p", "no:cacheprovider"]


class DropCall(Operator):
    """Drop ``.method(…)`` or ``.T``: ``x.clamp_min(0).sqrt()`` becomes ``x.sqrt()``."""

    MODULES = ("torch", "np", "math", "stats", "nn", "os", "sys", "time", "ctypes", "threading")

    def mutation_positions(self, node):
        """Return a position for each call that can be dropped; where it is, nobody asks."""
        return [((0, 0), (0, 0)) for _ in self._places(node)]

    def mutate(self, node, index):
        """Drop one of them."""
        start, end = self._places(node)[index]
        del node.children[start:end]
        return node

    def _places(self, node) -> list[tuple[int, int]]:
        parts = getattr(node, "children", ())
        if node.type not in ("atom_expr", "power") or parts[0].get_code().strip() in self.MODULES:
            return []
        found = []
        for place, part in enumerate(parts):
            if part.type != "trailer" or part.children[0].value != ".":
                continue
            after = parts[place + 1] if place + 1 < len(parts) else None
            if getattr(after, "type", "") == "trailer" and after.children[0].value == "(":
                found.append((place, place + 2))
            elif part.children[1].value in ("T", "mT"):
                found.append((place, place + 1))
        return found

    @classmethod
    def examples(cls):
        """Return none: they are for Cosmic Ray's own tests."""
        return ()


class FirstOfTwo(Operator):
    """Make ``max(a, b)`` and ``min(a, b)`` their first argument."""

    def mutation_positions(self, node):
        """Return a position where a node is such a call."""
        return [((0, 0), (0, 0))] if self._is_one(node) else []

    def mutate(self, node, _index):
        """Keep the first argument."""
        first = node.children[1].children[1].children[0]
        node.children[0].value = ""
        node.children[1].children[1].children = [first]
        return node

    def _is_one(self, node) -> bool:
        if node.type not in ("atom_expr", "power") or len(node.children) != 2:
            return False
        name, call = node.children
        inside = call.children[1] if call.type == "trailer" and len(call.children) == 3 else None
        if getattr(inside, "type", "") != "arglist" or len(inside.children) != 3:
            return False
        plain = all(part.type != "argument" for part in inside.children)
        return plain and getattr(name, "value", "") in ("max", "min")

    @classmethod
    def examples(cls):
        """Return none: they are for Cosmic Ray's own tests."""
        return ()


def operators() -> list[Operator]:
    """Return what makes mutants."""
    names = [f"Replace{kind}Operator_{each}" for kind, all_ in REPLACED.items() for each in all_]
    known = [get_operator(f"core/{name}")() for name in names + NAMED]
    return [*known, DropCall(), FirstOfTwo()]


# ---------------------------------------------------------------- mutants


@dataclass(frozen=True)
class Mutant:
    """A module's source with one change, and the lines that it changes."""

    source: str
    line: int
    where: str
    before: str
    after: str

    @property
    def key(self) -> str:
        """What the list of equivalent mutants calls it."""
        return f"{self.where}: {self.before} -> {self.after}"


def path_of(module: str) -> Path:
    """Return a module's file."""
    return ROOT / "src" / "onebyone" / f"{module.replace('.', '/')}.py"


def mutants_of(module: str, sample: int, seed: int) -> tuple[list[Mutant], int]:
    """Return a module's mutants, or a sample of them, and how many there are."""
    source = path_of(module).read_text(encoding="utf-8")
    nodes = list(ast_nodes(get_ast(source)))
    settings = _settings(source)
    places = [
        (operator, occurrence)
        for operator in operators()
        for occurrence in range(sum(len(list(operator.mutation_positions(n))) for n in nodes))
    ]
    meaning = _meaning(source)
    random.Random(f"{seed} {module}").shuffle(places)
    found: list[Mutant] = []
    count = len(places)
    for operator, occurrence in places:
        if len(found) == sample:
            break
        mutated = mutate_code(source, operator, occurrence)
        if mutated is None or _meaning(mutated) in (None, meaning):
            count -= 1  # in an annotation, or no Python
            continue
        mutant = _described(source, mutated)
        if mutant.line in settings:
            count -= 1
        else:
            found.append(mutant)
    return sorted(found, key=lambda mutant: mutant.line), count


def _settings(source: str) -> set[int]:
    """Return the lines of a module's numbers with names: choices, of which the next is as good."""
    tree = ast.parse(source)
    plain = [each for each in tree.body if isinstance(each, ast.Assign)]
    kinds = ast.Constant | ast.BinOp
    return {each.lineno for each in plain if isinstance(each.value, kinds)}


def _meaning(source: str) -> str | None:
    """Return what a module does; ``None`` where it is no Python.

    Without annotations, what decorates its classes, and which arguments must be named.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        match node:
            case ast.arg():
                node.annotation = None
            case ast.AnnAssign():
                node.annotation = ast.Constant(None)
            case ast.ClassDef():
                node.decorator_list = []
            case ast.FunctionDef():
                node.returns = None
            case ast.arguments():
                node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
                node.defaults = [*node.defaults, *(d for d in node.kw_defaults if d)]
                node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
    return ast.dump(tree)


def _described(source: str, mutated: str) -> Mutant:
    old, new = source.splitlines(), mutated.splitlines()
    line = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    where = ""
    for node in ast.walk(ast.parse(source)):
        inside = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if inside and node.lineno <= line + 1 <= node.end_lineno:
            where = node.name
    # A change that joins lines is told by its first.
    return Mutant(mutated, line + 1, where or "module", old[line].strip(), new[line].strip())


# ---------------------------------------------------------------- a mutant in a process of its own


class _Loader(importlib.machinery.SourceFileLoader):
    source = ""

    def get_code(self, _fullname):
        return compile(self.source, self.path, "exec", dont_inherit=True)


class Finder:
    """Finds a mutant in place of its module."""

    def __init__(self, module: str, source: str) -> None:
        self.name, self.path, self.source = f"onebyone.{module}", path_of(module), source

    def find_spec(self, name, *_):
        """Return where a module's code is from: the mutant's, if it is the one."""
        if name != self.name:
            return None
        loader = _Loader(name, str(self.path))
        loader.source = self.source
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


class Watch:
    """Orders the tests, and notes how long each took and which one failed."""

    def __init__(
        self, kills: Counter[str], seconds: dict[str, float], left_out: Sequence[str] = ()
    ) -> None:
        self.kills, self.before, self.left_out = kills, seconds, left_out
        self.seconds: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items):
        """Put those that caught most before first, and of the others the fastest."""
        items[:] = [item for item in items if item.nodeid not in self.left_out]
        items.sort(key=lambda i: (-self.kills[i.nodeid], self.before.get(i.nodeid, 0.0)))

    def pytest_runtest_logreport(self, report):
        """Note a test's time, and whether it failed."""
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)


@dataclass
class Ended:
    """How a process ended: its status, and what its tests told."""

    status: int
    failed: list[str]
    seconds: dict[str, float]
    text: str
    cpu: float = 0.0


def tested(module: str, mutant: Mutant | None, watch: Watch, cpu: float) -> Ended:
    """Run a module's tests on a mutant in a forked process."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder, "note.json")
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = os.fork()
        if not process:
            _run_tests(module, mutant, watch, Path(folder), cpu)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        told = json.loads(note.read_text()) if note.exists() else {"failed": [], "seconds": {}}
        text = Path(folder, "log.txt").read_text(errors="replace")
    spent = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    return Ended(status, told["failed"], told["seconds"], text, spent)


def _run_tests(module: str, mutant: Mutant | None, watch: Watch, folder: Path, cpu: float) -> None:
    status = 99
    try:
        output = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _limit(cpu)
        if mutant is not None:
            sys.meta_path.insert(0, Finder(module, mutant.source))
        hypothesis.settings.load_profile("mutants")
        options = [*QUIET, "--tb=line", "--hypothesis-seed=0", *(["-x"] if mutant else [])]
        status = int(pytest.main([*options, *MODULES[module]], plugins=[watch]))
        Path(folder, "note.json").write_text(
            json.dumps({"failed": watch.failed, "seconds": watch.seconds})
        )
    finally:
        os._exit(status)


def _limit(cpu: float) -> None:
    """End a process that computes or waits far longer than the original, or eats the memory."""
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(cpu), math.ceil(cpu) + 1))
    signal.alarm(math.ceil(10 * cpu))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + 4 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def preload(tests: list[str]) -> None:
    """Import what the tests import from other packages, once for all processes."""
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder, "names.json")
        process = os.fork()
        if not process:
            try:
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, 1)
                pytest.main([*QUIET, "--collect-only", *tests])
                names.write_text(json.dumps([*_of_packages()]))
            finally:
                os._exit(0)
        os.waitpid(process, 0)
        found = json.loads(names.read_text())
    for name in found:
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001 - it is then imported where it is needed
                continue


def _of_packages() -> Iterator[str]:
    """Yield the modules that are installed packages', but no plugins of pytest."""
    installed = Path(sysconfig.get_paths()["purelib"])
    places = {str(installed), *(p for p in sys.path if p.endswith("site-packages"))}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        plugin = "pytest" in name or name.startswith(("xdist", "onebyone"))
        if not plugin and any(file.startswith(place) for place in places):
            yield name


# ---------------------------------------------------------------- all of them


@dataclass
class Score:
    """What became of a module's mutants."""

    there: int
    tried: int = 0
    killed: int = 0
    equivalent: int = 0

    @property
    def survived(self) -> int:
        """How many nobody has explained."""
        return self.tried - self.killed - self.equivalent


def try_module(
    module: str, args: argparse.Namespace, explained: dict[str, str], again: list[str] | None
) -> tuple[Score, list[str]]:
    """Try a module's mutants; return what became of them, and the survivors' keys."""
    kills: Counter[str] = Counter()
    plain = tested(module, None, Watch(kills, {}), 600)
    if plain.status not in (0, 1) or len(plain.failed) == len(plain.seconds):
        raise SystemExit(f"The tests of {module} cannot run:\n{plain.text}")
    for test in plain.failed:
        print(f"fails without any change, and is left out: {test}")
    mutants, there = mutants_of(module, args.sample if again is None else 10**6, args.seed)
    if again is not None:
        mutants = [mutant for mutant in mutants if mutant.key in again]
    score, survivors = Score(there), []
    cpu = 3 * plain.cpu + 10
    for mutant in mutants:
        _progress(f"{module} {score.tried}/{len(mutants)}, {len(survivors)} survived")
        found = tested(module, mutant, Watch(kills, plain.seconds, plain.failed), cpu)
        score.tried += 1
        kills.update(found.failed)
        if found.status:
            score.killed += 1
            if args.verbose:
                by = found.failed or found.status
                print(f"killed by {by}: {mutant.line}: {mutant.key}")
        elif mutant.key in explained:
            score.equivalent += 1
        else:
            survivors.append(mutant.key)
            print(f"{module}:{mutant.line} in {mutant.where}")
            print(f"  - {mutant.before}\n  + {mutant.after}", flush=True)
    return score, survivors


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)


def explained_mutants() -> dict[str, dict[str, str]]:
    """Return the mutants that no test can tell from the original, of each module."""
    path = Path(__file__).with_name("mutants_equivalent.toml")
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main() -> int:
    """Try the mutants that are asked for, and print those that survive."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    short = {module.split(".")[-1]: module for module in MODULES}
    parser.add_argument("modules", nargs="*", help=f"all, or some of {', '.join(short)}")
    parser.add_argument("--sample", type=int, default=250, help="at most, of each module (250)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument("--again", action="store_true", help="only the last time's survivors")
    parser.add_argument("--verbose", action="store_true", help="say what killed each")
    args = parser.parse_args()
    if unknown := set(args.modules) - set(short):
        parser.error(f"no module {', '.join(sorted(unknown))}; there are {', '.join(short)}")
    names = [short[each] for each in args.modules or short]
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "src"))
    hypothesis.settings.register_profile(
        "mutants",
        database=None,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    )
    preload(sorted({test for name in names for test in MODULES[name]}))
    explained = explained_mutants()
    last = json.loads(SURVIVORS.read_text()) if SURVIVORS.exists() else {}
    scores: dict[str, Score] = {}
    for name in names:
        again = last.get(name, []) if args.again else None
        began = time.monotonic()
        scores[name], last[name] = try_module(name, args, explained.get(name, {}), again)
        SURVIVORS.write_text(json.dumps(last, indent=1))
        _progress("")
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(f"{'module':32}{'mutants':>8}{'tried':>8}{'killed':>8}{'equivalent':>12}{'survived':>10}")
    for name, score in scores.items():
        print(
            f"{name:32}{score.there:8}{score.tried:8}{score.killed:8}{score.equivalent:12}"
            f"{score.survived:10}"
        )
    return 1 if any(score.survived for score in scores.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
