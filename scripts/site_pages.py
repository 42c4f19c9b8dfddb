"""Pages of the site that are not in docs/: made from README.md, the changelog and the parser.

MkDocs calls `on_files` as a hook; see mkdocs.yml.
"""

import argparse
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from onebyone.cli import COMMANDS, make_parser  # noqa: E402

# Files at the top level that are pages too.
FROM_ROOT = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
WIDTH = 88


def on_files(files, *, config):
    """Add the generated pages."""
    pages = {page: page_from_root(name) for name, page in FROM_ROOT.items()}
    pages["reference/commands.md"] = commands_page()
    pages["reference/python.md"] = python_page()
    made = [File.generated(config, uri, content=text) for uri, text in pages.items()]
    return Files([*files, *made])


def page_from_root(name: str) -> str:
    """Return a file of the top level with its links as they are in the site."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    for other, page in FROM_ROOT.items():
        text = text.replace(f"]({other})", f"]({page})")
    return re.sub(r'(src|href)="docs/', r'\1="', text)


def commands_page() -> str:
    """Return the reference of every command: its help, as the parser prints it."""
    parser = make_parser()
    children = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))  # noqa: SLF001
    parts = ["# Commands\n\nEach is what `onebyone COMMAND --help` prints.\n"]
    for name, summary in COMMANDS.items():
        parts.append(f"## {name}\n\n{_sentence(summary)}\n\n{_command(children.choices[name])}")
    return "\n".join(parts)


def _command(parser: argparse.ArgumentParser) -> str:
    """Return usage, a table for each group of arguments, and the examples."""
    usage = re.sub(r"\s+", " ", parser.format_usage().removeprefix("usage: ")).strip()
    parts = [f"```text\n{_wrapped(usage)}\n```\n"]
    for group in parser._action_groups:  # noqa: SLF001
        shown = [a for a in group._group_actions if a.help != argparse.SUPPRESS]  # noqa: SLF001
        rows = [_row(parser, action) for action in shown if action.dest != "help"]
        if rows:
            title = "arguments" if group.title == "positional arguments" else group.title
            parts.append(f"| {title} | |\n|---|---|\n" + "\n".join(rows) + "\n")
    text = (parser.epilog or "").strip("\n")
    for part in text.split("\n\n"):
        lines = part.splitlines()
        if len(lines) > 1 and lines[0].endswith(":") and lines[1].startswith("  "):
            body = "\n".join(line[2:] for line in lines[1:])
            parts.append(f"{_sentence(lines[0][:-1], end=':')}\n\n```text\n{body}\n```\n")
        elif part.strip():
            parts.append(_escaped(" ".join(part.split())) + "\n")
    return "\n".join(parts)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    flags = ", ".join(action.option_strings)
    if action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    words = f"{flags} {value}".strip()
    text = (action.help or "") % {"default": action.default, "prog": parser.prog}
    return f"| `{words}` | {_escaped(text)} |"


def _escaped(text: str) -> str:
    """Return plain text that Markdown shows as it is."""
    return re.sub(r"([\\|*_<>\[\]])", r"\\\1", text)


def _sentence(text: str, end: str = ".") -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}{end}"


def _wrapped(usage: str) -> str:
    lines, line = [], ""
    for word in re.findall(r"\[[^\]]*\]|\S+", usage):
        if line and len(line) + len(word) >= WIDTH:
            lines.append(line)
            line = f"    {word}"
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


# The public names, in the order in which a reader meets them.
PYTHON = {
    "The whole line": ["shrink", "load_model", "import_onnx", "load_data", "compare", "export",
                       "explain"],
    "Step by step": ["profile", "plan", "apply", "distill", "train", "reconstruct", "evaluate",
                     "bench"],
    "Rewrites that stay the same function": ["fold", "deepen", "flush_subnormals"],
    "Without data": ["applies", "uniform_plan", "restructure"],
    "Layers and views": ["Pointwise", "MLPConv", "GlobalAverageHead", "RawDetector"],
    "Data, tasks and records": ["Data", "Shards", "Task", "MeanAveragePrecision", "Plan", "Profile",
                                "Comparison", "Compared",
                                "RunRecord", "Reconstruction", "BenchRecord", "ExportRecord"],
    "Extending": ["check_rewrite", "check_runtime"],
    "Errors": ["OneByOneError"],
}  # fmt: skip


def python_page() -> str:
    """Return the reference of the public names, for mkdocstrings to fill."""
    start = (
        "# Python\n\n`import onebyone as obo`. Every error that is raised on purpose is an "
        "`obo.OneByOneError`. No function modifies the network, data or files that it is given.\n"
    )
    parts = [start]
    for title, names in PYTHON.items():
        parts.append(f"## {title}\n")
        parts += [f"::: onebyone.{name}\n" for name in names]
    return "\n".join(parts)
