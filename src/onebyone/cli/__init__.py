"""The command line: ``onebyone COMMAND …``; torch is only imported by the command that runs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from onebyone import __version__

# A file a command. The order is that of the help.
COMMANDS = {
    "demo": "the whole line on embedded data, in a minute or two",
    "shrink": "make a network smaller within a budget, and prove the result",
    "profile": "what a network costs, whole and layer by layer",
    "plan": "choose rewrites under a budget, without carrying them out",
    "train": "train a network",
    "compare": "networks on the same data, interleaved",
    "export": "a network for ONNX Runtime, torch.export, OpenVINO or ExecuTorch, checked there",
    "bench": "a network in all runtimes, interleaved, and which is the fastest",
    "explain": "where in images a network sees their classes",
    "report": "the report of a run, or of several runs side by side",
    "article": "every claim of the article on 1×1 convolutions, measured here",
}

EPILOG = """examples:
  onebyone demo
  onebyone profile torchvision:resnet18
  onebyone train onebyone:classic --data digits --out runs/classic
  onebyone shrink runs/classic --data digits --budget params=2% --head gap --out runs/small
  onebyone shrink torchvision:resnet18 --weights w.safetensors \\
      --data imagefolder:photos/ --budget macs=50% --out runs/r18
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Fits prose and examples to the terminal's width; examples keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        del indent
        return "\n\n".join(_paragraph(part, width) for part in text.strip("\n").split("\n\n"))


def _paragraph(text: str, width: int) -> str:
    lines = text.splitlines()
    if not any(line.startswith("  ") for line in lines):
        return textwrap.fill(" ".join(text.split()), width)
    return "\n".join(_example(line, width) for line in lines)


def _example(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    start = line[: len(line) - len(line.lstrip())]
    parts = textwrap.wrap(
        line.strip(), width - len(start) - 6, break_long_words=False, break_on_hyphens=False
    )
    return f" \\\n{start}    ".join([start + parts[0], *parts[1:]])


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and, for a slip of the hand, suggest the right word."""

    def error(self, message: str) -> NoReturn:
        text = message[:1].upper() + message[1:]
        text += "" if text.endswith(("?", ".")) else "."
        self.exit(2, f"Error: {text} See: {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # A command's own parser sees the slip first, and it alone knows the command's options.
        known, extra = super().parse_known_args(args, namespace)
        if extra and self._subparsers is None:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(extra[0], flags, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized argument {extra[0]!r}.{hint}")
        return known, extra


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0; 1 on an error; 2 on a usage error; 130 on ^C.

    Args:
        argv: The arguments, without the program's name; those of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        prog="onebyone",
        description="Make a convolutional network smaller and faster with 1×1 convolutions, keep "
        "its weights, and prove the result on your own machine.",
        epilog=EPILOG,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"onebyone {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser, title="commands"
    )
    for name, summary in COMMANDS.items():
        child = commands.add_parser(name, help=summary, add_help=False)
        if arguments[:1] == [name]:
            _fill(child, name, summary)
    wrong = _unknown_command(arguments)
    if wrong:
        sys.stderr.write(wrong)
        return 2
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    parsed.command_line = ("onebyone", *arguments)
    return _run(_module(parsed.command), parsed)


def _unknown_command(arguments: Sequence[str]) -> str:
    if not arguments or arguments[0].startswith("-") or arguments[0] in COMMANDS:
        return ""
    close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    names = ", ".join(COMMANDS)
    return f"Error: No command named {arguments[0]!r}.{hint} Available: {names}.\n"


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"onebyone.cli.{command}")


def _fill(parser: argparse.ArgumentParser, name: str, summary: str) -> None:
    module = _module(name)
    parser.description = (module.__doc__ or summary).strip()
    parser.epilog = module.EPILOG
    parser.formatter_class = _Help
    parser.add_argument("-h", "--help", action="help", help="show this help and exit")
    module.add_arguments(parser)


def _run(module: ModuleType, parsed: Any) -> int:
    from onebyone.errors import OneByOneError

    try:
        module.run(parsed)
    except OneByOneError as error:
        from onebyone.report.console import print_error

        print_error(error)
        return error.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
    except BrokenPipeError:
        # The reader of a pipe, such as head, has gone: nothing is wrong, and nothing more is said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
