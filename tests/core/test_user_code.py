import pytest
import torch
from torch import nn

from onebyone.core.errors import DataError, ModelError, OptionError
from onebyone.core.user_code import is_out_of_memory, place_of, users_code
from onebyone.evaluation.scores import evaluate
from onebyone.networks.surgery import run
from onebyone.training.train import train

X, Y = torch.randn(8, 3), torch.arange(8) % 2


class OwnError(Exception):
    pass


class WordlessError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


ERRORS = [
    AssertionError("three"), ZeroDivisionError("three"), StopIteration("three"), OwnError("three"),
    RecursionError("three"), NotImplementedError("three"), OSError("three"), KeyError("three"),
    UserWarning("three"), UnicodeError("three"),
]  # fmt: skip


class Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.error = error

    def forward(self, x):
        raise self.error


def network(error):
    return nn.Sequential(nn.ReLU(), nn.Sequential(Fails(error)))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_exception_of_a_forward_is_a_model_error_with_the_place(error):
    with pytest.raises(ModelError) as caught:
        run(network(error), X)
    for part in (
        "Sequential must run on an input of shape 8×3", "it failed: ", "three",
        type(error).__name__, "in layer '1.0'", "test_user_code.py:",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert caught.value.__cause__ is error


def test_an_exception_without_words_is_named_by_its_class():
    with pytest.raises(ModelError, match="it failed: WordlessError"):
        run(network(WordlessError()), X)


def test_what_stops_the_program_passes():
    for stop in (KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(stop)):
            run(network(stop), X)


def test_an_exception_in_torchs_own_code_has_the_place_that_called_it():
    class Wrong(nn.Module):
        def forward(self, x):
            return torch.cat([x, x[:, :1]], dim=0)

    with pytest.raises(ModelError, match=r"RuntimeError, at tests.*test_user_code.py:\d+"):
        run(Wrong(), X)


def test_out_of_memory_has_a_cure_of_its_own():
    for error in (MemoryError(), torch.OutOfMemoryError("full")):
        assert is_out_of_memory(error)
        with pytest.raises(ModelError, match="Free memory, give a smaller batch"):
            run(network(error), X)


def test_our_own_errors_pass():
    with pytest.raises(DataError, match=r"^mine$"), users_code("Must", "Cure"):
        raise DataError("mine")


def test_a_place_is_of_the_users_innermost_frame():
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(1, 2, 3).view(7)
    assert place_of(caught.value).rpartition(":")[0].endswith("test_user_code.py")


@pytest.mark.parametrize("error", ERRORS[:4], ids=lambda error: type(error).__name__)
def test_any_exception_of_a_metric_or_a_loss_is_an_option_error(error):
    def fails(outputs, targets):
        raise error

    linear = nn.Linear(3, 2)
    with pytest.raises(OptionError, match=r"metric 'fails' .* failed on outputs \(8, 2\).*three"):
        evaluate(linear.eval(), (X, Y), metric=fails)
    with pytest.raises(OptionError, match=r"`loss` .* failed on outputs \(8, 2\).*three"):
        train(linear, (X, Y), epochs=1, batch_size=8, loss=fails)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda outputs, targets: outputs.sum(1), "shape .8,."),
        (lambda outputs, targets: outputs.sum().detach(), "without a gradient"),
        (lambda outputs, targets: 1.0, "got 1.0"),
    ],
)
def test_a_loss_must_be_a_number_that_depends_on_the_outputs(loss, match):
    with pytest.raises(OptionError, match=f"must give a tensor of one number.*{match}"):
        train(nn.Linear(3, 2), (X, Y), epochs=1, batch_size=8, loss=loss)
