import inspect

import pytest

from onebyone.core import errors
from onebyone.core.errors import MissingExtraError, OneByOneError, UnknownNameError, UsageError


def every_error():
    return [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if kind.__module__ == errors.__name__
    ]


def test_the_tree_drawn_at_the_top_is_the_tree():
    drawn = [line for line in (errors.__doc__ or "").splitlines() if "Error" in line]
    names = [
        line.replace("│", " ").replace("├", " ").replace("└", " ").replace("─", " ").split()[0]
        for line in drawn
    ]
    assert sorted(names) == sorted(kind.__name__ for kind in every_error())
    depth = {
        line.split("Error")[0].strip("│├└─ ").split()[0]: line.index(line.strip("│├└─ ")[0]) // 4
        for line in drawn
    }
    for kind in every_error():
        level = len([base for base in kind.__mro__ if issubclass(base, OneByOneError)]) - 1
        assert depth[kind.__name__.removesuffix("Error")] == level


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_usage_errors_exit_with_2_and_others_with_1(kind):
    assert issubclass(kind, OneByOneError)
    assert kind.exit_status == (2 if issubclass(kind, UsageError) else 1)


def test_an_unknown_name_is_told_its_neighbors_and_what_there_is():
    error = UnknownNameError("rewrite", "factorise", {"head", "factorize"})
    assert str(error) == (
        "No rewrite named 'factorise'. Did you mean 'factorize'? Available: factorize, head."
    )


def test_a_name_like_nothing_gets_no_guess_and_a_long_list_is_cut():
    error = UnknownNameError("model", "qqq", [f"net{i:02d}" for i in range(20)], listed=3)
    assert str(error) == "No model named 'qqq'. Available: net00, net01, net02, …."


def test_a_missing_extra_says_how_to_install_it():
    text = str(MissingExtraError("onnxruntime", "onnx", "The runtime 'onnxruntime'"))
    assert "pip install 'onebyone[onnx]'" in text
    assert text.startswith("The runtime 'onnxruntime' needs the package 'onnxruntime'")
