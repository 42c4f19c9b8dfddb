"""The script that completes commands in a shell."""

import subprocess
import sys

import pytest

from onebyone.cli import COMMANDS, main, make_parser


def test_the_whole_parser_has_every_command_with_its_options():
    children = next(a for a in make_parser()._actions if a.dest == "command").choices
    assert list(children) == list(COMMANDS)
    for child in children.values():
        assert child.description
        assert "--help" in child._option_string_actions


def test_without_the_package_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--print-completion", "bash"]) == 1
    assert "pip install 'onebyone[completion]'" in capsys.readouterr().err


def test_bash_completes_commands_and_options():
    pytest.importorskip("shtab", reason="shtab is not installed")
    ask = (
        "source <(%s -m onebyone --print-completion bash); "
        "COMP_WORDS=(onebyone {words}); COMP_CWORD=%d; _shtab_onebyone 2>/dev/null; "
        'echo "${{COMPREPLY[@]}}"'
    )

    def completed(*words):
        script = ask.format(words=" ".join(words)) % (sys.executable, len(words))
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert set(completed("d")) == {"demo", "doctor"}
    assert "--max-drop" in completed("shrink", "--max")
