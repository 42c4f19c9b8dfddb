import pytest
import torch
from torch import nn
from torch.testing import assert_close

from onebyone.core.errors import ModelError, OptionError, WeightsError
from onebyone.core.tensor_trees import tensors_in
from onebyone.networks.surgery import (
    aliases,
    call,
    check_finite,
    copy_network,
    evaluation_copy,
    hooks_removed,
    in_evaluation_mode,
    module_at,
    replace_module,
    run,
)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.body = nn.Sequential(
            nn.Linear(3, 3), nn.ReLU(), nn.ModuleDict({"x": nn.Linear(3, 3)})["x"]
        )
        self.b = self.a

    def forward(self, x):
        return self.b(self.body(self.a(x)))


def test_a_copy_shares_no_memory_and_an_evaluation_copy_is_in_evaluation_mode():
    net = Nested().train()
    for duplicate in (copy_network(net), evaluation_copy(net)):
        mine = {p.data_ptr() for p in net.parameters()}
        assert not mine & {p.data_ptr() for p in duplicate.parameters()}
        assert duplicate.a is duplicate.b
    assert not any(m.training for m in evaluation_copy(net).modules())
    assert all(m.training for m in net.modules())


def test_a_network_that_cannot_be_copied_says_what_to_do():
    net = nn.Linear(3, 3)
    net.kept = net.weight * 2
    with pytest.raises(
        ModelError, match=r"must be deep-copyable.*copying Linear failed.*Detach tensors"
    ):
        copy_network(net)


def test_a_network_ready_for_evaluation_is_not_copied():
    net = Nested().eval()
    assert in_evaluation_mode(net) is net
    net.body[0].train()
    assert in_evaluation_mode(net) is not net
    assert net.body[0].training


@pytest.mark.parametrize("name", ["a", "body.0", "body.2"])
def test_a_replaced_module_keeps_the_place_the_order_and_the_mode(name):
    net = Nested()
    module_at(net, name).eval()
    names = [n for n, _ in net.named_modules(remove_duplicate=False)]
    new = nn.Linear(3, 3, bias=False)
    assert replace_module(net, name, new) is net
    assert module_at(net, name) is new
    assert not new.training
    assert [n for n, _ in net.named_modules(remove_duplicate=False)] == names
    net(torch.randn(2, 3))


def test_replacing_the_root_gives_the_replacement():
    net, new = Nested().eval(), nn.Linear(3, 3)
    assert replace_module(net, "", new) is new
    assert not new.training


@pytest.mark.parametrize("name", ["c", "body.9", "a.weight", "body..0"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(OptionError, match=f"Nested has no module named {name!r}"):
        module_at(Nested(), name)


def test_aliases_are_all_names_of_a_module_by_the_first():
    found = aliases(Nested())
    assert found["a"] == ("a", "b")
    assert found["body.0"] == ("body.0",)
    assert "b" not in found


def test_inputs_may_be_a_tensor_arguments_or_keywords():
    def model(x, y=0):
        return x + y

    one = torch.ones(1)
    assert call(model, one) == 1
    assert call(model, (one, 2)) == 3
    assert call(model, {"x": one, "y": 3}) == 4


def test_tensors_are_found_in_nested_values():
    a, b = torch.zeros(1), torch.ones(2)
    assert [t.shape for t in tensors_in({"p": [a, (b, 3)], "q": None})] == [(1,), (2,)]


def test_a_failing_forward_is_a_model_error_with_shape_and_reason_and_grads_are_off():
    with pytest.raises(
        ModelError,
        match=r"Linear must run on an input of shape 2×4, but it failed: .*mat1.*\. Check",
    ):
        run(nn.Linear(3, 3), torch.randn(2, 4))
    assert not run(nn.Linear(3, 3), torch.randn(2, 3)).requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
def test_weights_and_buffers_that_are_not_finite_are_named(name, value):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    check_finite(net)
    net.state_dict()[name].view(-1)[1] = value
    with pytest.raises(WeightsError, match=f"1 of .* values of '{name}' are NaN or infinite"):
        check_finite(net)


def test_extra_state_that_is_no_tensor_is_no_matter():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 1}

    check_finite(Extra(2, 2))


def test_hooks_come_off_after_an_exception_too():
    net = nn.Linear(3, 3)
    with pytest.raises(ZeroDivisionError), hooks_removed([net.register_forward_hook(print)]):
        _ = 1 // 0
    assert not net._forward_hooks
    assert_close(net(torch.zeros(3)), net.bias)
