"""``onebyone plan --ranks``: a plan without data."""

import pytest

from onebyone.cli import main
from onebyone.core.records import Plan


def test_a_plan_by_ranks_needs_no_data_and_is_written(tmp_path, capsys):
    arguments = ["plan", "onebyone:classic", "--ranks", "25%", "--form", "expand"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    plan = Plan.load(tmp_path / "plan.json")
    assert {option.first.settings["form"] for option in plan.choices} == {"expand"}
    assert "Left alone, has no form 'expand', only pair" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --data to plan for a budget, or --ranks"),
        (["--ranks", "50%", "--data", "digits"], "--data does not go with --ranks"),
        (["--ranks", "50%", "--budget", "macs=50%"], "--budget does not go with --ranks"),
        (["--ranks", "150%"], "must be a share such as 50% or 0.5, got '150%'"),
        (["--ranks", "half"], "must be a share such as 50% or 0.5, got 'half'"),
        (["--ranks", "50%", "--form", "tuker2"], "Did you mean 'tucker2'?"),
    ],
)
def test_what_does_not_go_together_is_one_line(arguments, message, capsys):
    assert main(["plan", "onebyone:classic", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error
