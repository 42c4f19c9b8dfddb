"""What is said of an exporter that failed: its words, the operator and the user's line."""

import pytest
from torch import nn

import onebyone as obo
from onebyone.core.errors import ExportError
from onebyone.pipeline.exporting.failure import why_it_failed


def test_colors_and_advice_go_and_lines_and_the_operator_stay():
    cause = RuntimeError(
        "No decomposition for <OpOverload(op='aten.lu_solve', overload='default')>"
    )
    error = ValueError(
        "\x1b[96mFailed to export the model.\x1b[0m This is step 2/3.\n"
        "Its second line.\n## Exception summary\nRefer to https://x.y/z for more."
    )
    error.__cause__ = cause
    assert why_it_failed(error).splitlines() == [
        "Failed to export the model. This is step 2/3",
        "Its second line",
        "No decomposition for <OpOverload(op='aten.lu_solve', overload='default')>",
        "Operator: aten.lu_solve.default",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "KeyError"),
        ("unsupported aten::fft_fft2 here", "Operator: aten::fft_fft2"),
        ('x\n  File "/a/net.py", line 12, in forward\n    if y.sum() > 0:', "At /a/net.py, line 12: if y"),
    ],
)  # fmt: skip
def test_whatever_is_said_is_found(text, words):
    assert words in why_it_failed(KeyError() if not text else RuntimeError(text))


def test_errors_that_cause_each_other_end():
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert why_it_failed(one) == "one\ntwo"


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else 2 * x


def test_the_line_of_a_network_that_cannot_be_exported_is_named(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Branches()).eval()
    with pytest.raises(ExportError) as caught:
        obo.export(network, tmp_path / "out", formats=["pt2"], input_shape=(1, 3, 8, 8))
    assert "data-dependent expression" in str(caught.value)
    assert "test_failure.py, line " in str(caught.value)
    assert "return x if x.sum() > 0" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "TORCH_LOGS" not in str(caught.value)
