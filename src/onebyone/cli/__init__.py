"""The command line ``onebyone COMMAND …``. Only the command that runs imports torch."""

from __future__ import annotations

import argparse
import importlib
import io
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from types import ModuleType
from typing import Any, NoReturn, TextIO

from onebyone.core import torchrun
from onebyone.core.units import capitalized
from onebyone.core.version import __version__

# One file for each command, in the order of the help.
COMMANDS = {
    "demo": "train and shrink a network on embedded data, in two or three minutes",
    "shrink": "make a network smaller within a budget, and prove the result",
    "sweep": "shrink under many budgets, runtimes, seeds and precisions, here or on a cluster",
    "profile": "count and time a network, in total and layer by layer",
    "plan": "choose rewrites under a budget, without carrying them out",
    "train": "train a network",
    "compare": "score networks on the same data, and time them interleaved",
    "export": "write a network for ONNX Runtime, torch.export, OpenVINO or ExecuTorch; check it",
    "bench": "time a network in all runtimes, interleaved, and show the fastest",
    "explain": "show where in images a network sees their classes",
    "report": "write the report of a run, or of several runs side by side",
    "article": "measure every claim of the article on 1×1 convolutions",
    "doctor": "say what this machine has for onebyone, and how noisy it is",
}
# Commands that several processes share.
SHARED = ("train", "shrink", "plan")
SHELLS = ("bash", "zsh", "tcsh")

EPILOG = """examples:
  onebyone demo
  onebyone profile torchvision:resnet18
  onebyone train onebyone:classic --data digits --out runs/classic
  onebyone shrink runs/classic --data digits --budget params=2% --head gap --out runs/small
  onebyone shrink torchvision:resnet18 --weights w.safetensors \\
      --data imagefolder:photos/ --budget macs=50% --out runs/r18
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wraps text to the terminal's width; each example starts on its own line."""

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
    # An option stays on one line with its value, and a last backslash with the word before it.
    units = re.sub(
        r"(--\S+) (?=[^-\s])| (?=\\$)", lambda found: f"{found[1] or ''}\0", line.strip()
    )
    parts = textwrap.wrap(
        units, width - len(start) - 6, break_long_words=False, break_on_hyphens=False
    )
    further = start if len(start) > 2 else f"{start}    "  # longer: a continued line itself
    return f" \\\n{further}".join([start + parts[0], *parts[1:]]).replace("\0", " ")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and, for a typing error, suggest the right word."""

    def error(self, message: str) -> NoReturn:
        # Shorten very long words, which would hide the message.
        message = re.sub(r"\S{120,}", lambda word: f"{word[0][:60]}…", message)
        text = capitalized(message)
        text += "" if text.endswith(("?", ".")) else "."
        self.exit(2, f"Error: {text} See: {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # A command's own parser knows the command's options, so it makes the suggestion.
        known, extra = super().parse_known_args(args, namespace)
        if extra and self._subparsers is None:
            flags = [flag for action in self._actions for flag in action.option_strings]
            import difflib  # here, for a fast start

            close = difflib.get_close_matches(extra[0], flags, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized argument {extra[0]!r}.{hint}")
        return known, extra


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    The status is 0 on success, 1 on an error, 2 on a usage error, 70 on a fault of onebyone itself,
    130 after ^C, and 143 if the system ends the process.

    Args:
        argv: The arguments without the program's name. The default is those of the process.
    """
    from onebyone.cli.boundary import guarded

    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _main(arguments), arguments)


def make_parser(commands: Sequence[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Return the parser of the whole command line.

    Args:
        commands: The commands whose own arguments it has; of the others it has the names alone.
    """
    parser = _Parser(
        prog="onebyone",
        description="Make a convolutional network smaller and faster with 1×1 convolutions, keep "
        "its weights, and prove the result on your own machine.",
        epilog=EPILOG,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"onebyone {__version__}")
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        help="print a script that completes commands and options in that shell",
    )
    children = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser, title="commands"
    )
    for name, summary in COMMANDS.items():
        child = children.add_parser(name, help=summary, add_help=False)
        if name in commands:
            _fill(child, name, summary)
    return parser


def _main(arguments: list[str]) -> int:
    if "--recipe" in (each.partition("=")[0] for each in arguments):
        from onebyone.cli.option_files import with_recipe

        arguments = with_recipe(arguments)
    parser = make_parser(arguments[:1])
    wrong = _unreadable(arguments) or _unknown_command(arguments)
    if wrong:
        sys.stderr.write(wrong)
        return 2
    if arguments[:1] == ["--print-completion"] and arguments[1:] in [[shell] for shell in SHELLS]:
        from onebyone.cli.completion import script

        sys.stdout.write(script(make_parser(), arguments[1]))
        return 0
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    parsed.command_line = ("onebyone", *arguments)
    with _processes(parsed.command), _output(parsed) as output:
        parsed.output = output
        _module(parsed.command).run(parsed)
    return 0


def _output(parsed: argparse.Namespace) -> AbstractContextManager[TextIO]:
    return _only_records() if getattr(parsed, "json", False) else nullcontext(sys.stdout)


def _processes(command: str) -> AbstractContextManager[None]:
    """Return the context in which the processes of torchrun work together, if it started some."""
    if not torchrun.is_started():
        return nullcontext()
    from onebyone.core.errors import OptionError
    from onebyone.core.processes import joined

    if command not in SHARED and torchrun.process_count() > 1:
        raise OptionError(
            f"torchrun goes with {', '.join(SHARED)}, got {command}. Run this command without it."
        )
    return joined()


@contextmanager
def _only_records() -> Iterator[TextIO]:
    """Yield where a record is written to; nothing else gets to standard output.

    What Python or C code prints meanwhile, the user's or a library's, goes to standard error.
    """
    from onebyone.core.c_output import c_output_to_errors

    record = io.StringIO()
    try:
        with c_output_to_errors(), redirect_stdout(sys.stderr):
            yield record
    finally:
        sys.stdout.write(record.getvalue())


def _unreadable(arguments: Sequence[str]) -> str:
    """Return why arguments are invalid or cannot be kept in a record; empty if they are fine."""
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not (value if equals and flag.startswith("--") else argument).strip():
            # As a path, an empty text would mean the current folder.
            name = f"the value of {flag}" if equals else "one"
            return f"Error: Arguments must not be empty, but {name} is. Is a variable not set?\n"
        if "\0" in argument or any("\ud800" <= letter <= "\udfff" for letter in argument):
            return f"Error: Arguments must be UTF-8 text, got {ascii(argument)[:80]}.\n"
    return ""


def _unknown_command(arguments: Sequence[str]) -> str:
    if not arguments or arguments[0].startswith("-") or arguments[0] in COMMANDS:
        return ""
    import difflib  # here, for a fast start

    close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    names = ", ".join(COMMANDS)
    name = arguments[0] if len(arguments[0]) <= 60 else f"{arguments[0][:59]}…"
    return f"Error: No command named {name!r}.{hint} Available: {names}.\n"


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"onebyone.cli.{command}")


def _fill(parser: argparse.ArgumentParser, name: str, summary: str) -> None:
    module = _module(name)
    parser.description = (module.__doc__ or summary).strip()
    parser.epilog = module.EPILOG
    parser.formatter_class = _Help
    parser.add_argument("-h", "--help", action="help", help="show this help and exit")
    module.add_arguments(parser)
