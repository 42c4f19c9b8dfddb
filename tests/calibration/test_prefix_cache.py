import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from onebyone.calibration import cached_modules
from onebyone.calibration.prefix_cache import Advancing, ResumedPasses
from onebyone.core.errors import ModelError
from onebyone.networks.surgery import replace_module


class Block(nn.Module):
    """Adds in place and activates in place, as most residual networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.side = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.conv1(x)))
        out += self.side(x)
        return torch.relu_(out)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(Block(), Block())
        self.shrink = nn.Conv2d(8, 4, 1)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x *= 2  # not in a module: runs anew in each pass
        y = self.blocks(x)
        z = self.shrink(torch.cat([x, y], dim=1))
        return self.last(z.mean(dim=(2, 3)))


SITES = (
    "first", "blocks.0.conv1", "blocks.0.conv2", "blocks.0.side", "blocks.1.conv1",
    "blocks.1.conv2", "blocks.1.side", "shrink", "last",
)  # fmt: skip


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


@pytest.fixture
def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, 3, 6, 6, dtype=torch.float64) for n in (3, 2)]


def changed(net: nn.Module, site: str) -> nn.Module:
    return nn.Sequential(net.get_submodule(site), nn.Tanh())


def whole(net: nn.Module, site: str, batches: list[Tensor]) -> list[tuple[Tensor]]:
    old = net.get_submodule(site)
    replace_module(net, site, changed(net, site))
    with torch.no_grad():
        outputs = [(net(inputs),) for inputs in batches]
    replace_module(net, site, old)
    return outputs


def test_a_resumed_pass_gives_what_a_whole_one_gives(net, batches):
    passes = ResumedPasses(net, batches, SITES)
    # What the first layer gives is written into by no module, so that it can not be left out.
    assert passes.resumed == SITES[2:]
    for site in SITES:
        for _ in range(2):  # what the first pass was given is as it was
            found = list(passes.outputs(site, changed(net, site)))
            assert_close(found, whole(net, site, batches), rtol=0, atol=0)


def test_what_lies_before_does_not_run(net, batches):
    # What the first layer gives is written into, so that it runs in every pass.
    passes = ResumedPasses(net, batches, SITES)
    list(passes.outputs("blocks.1.conv1", changed(net, "blocks.1.conv1")))
    ran = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            # Its own work, not its call: that a given output takes the place of.
            module._conv_forward = lambda *args, n=name, f=module._conv_forward: (
                ran.append(n),
                f(*args),
            )[1]
    list(passes.outputs("blocks.1.conv1", changed(net, "blocks.1.conv1")))
    assert set(ran) == {"first", "blocks.1.conv1", "blocks.1.conv2", "blocks.1.side", "shrink"}


def test_sites_may_be_left_out_and_come_again(net, batches):
    passes = ResumedPasses(net, batches, SITES)
    for site in ("blocks.1.conv2", "last", "blocks.0.conv1", "first", "shrink"):
        found = list(passes.outputs(site, changed(net, site)))
        assert_close(found, whole(net, site, batches), rtol=0, atol=0)


def test_the_network_is_as_it_was_also_after_an_error(net, batches):
    before = {name: (module, set(vars(module))) for name, module in net.named_modules()}
    passes = ResumedPasses(net, batches, SITES)
    with pytest.raises(ModelError, match="must run on an input"):
        list(passes.outputs("shrink", nn.Linear(5, 5).double()))
    list(passes.outputs("last", changed(net, "last")))
    after = {name: (module, set(vars(module))) for name, module in net.named_modules()}
    assert before == after


def test_what_is_not_read_takes_no_memory(batches):
    torch.manual_seed(0)
    chain = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(6))).double().eval()
    passes = ResumedPasses(chain, batches, [str(place) for place in range(6)])
    list(passes.outputs("5", changed(chain, "5")))
    sizes = [one.untyped_storage().nbytes() for each in passes._stored for one in each.values()]
    assert sum(size > 8 for size in sizes) == len(batches)  # the input of the last


def seen_by(net: nn.Module, site: str, inputs: Tensor) -> Tensor:
    """Return what a layer is given."""
    seen = []
    handle = net.get_submodule(site).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )
    with torch.no_grad():
        net(inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("order", [SITES, SITES[::-1], (SITES[5], *SITES[2:5], *SITES[6:])])
def test_passes_that_advance_give_sites_what_whole_ones_give(net, batches, order):
    advancing = Advancing(net, batches[0], SITES, examples=5)
    assert advancing.resumed == SITES[2:]
    for site in order:
        for place, inputs in enumerate(batches):
            with advancing.going_to(net, place, [site]):
                found = seen_by(net, site, inputs)
            assert_close(found, seen_by(net, site, inputs), rtol=0, atol=0)
        replace_module(net, site, changed(net, site))


def test_passes_that_advance_run_from_the_last_site_on(net, batches):
    advancing = Advancing(net, batches[0], SITES, examples=5)
    with advancing.going_to(net, 0, ["shrink", "blocks.1.conv2"]):
        seen_by(net, "shrink", batches[0])
    ran = []
    for name, module in net.named_modules():
        module.register_forward_pre_hook(lambda _, __, name=name: ran.append(name))
    with advancing.going_to(net, 0, ["last"]):
        seen_by(net, "last", batches[0])
    # The convolution before gives what it gave; its activation writes into that and runs.
    assert "blocks.1.conv2" in ran
    assert "blocks.0.conv1" not in ran


def test_what_does_not_fit_into_memory_is_not_kept(net, batches, monkeypatch):
    held = 2 * 4 * 16 * 8  # two maps of 4 channels and 4×4 places, in float64
    monkeypatch.setattr(cached_modules, "KEPT_BYTES", 5 * held)
    assert Advancing(net, batches[0], SITES, examples=5).resumed == SITES[2:]
    one_map = ("blocks.0.conv2", "blocks.0.side", "blocks.1.conv1", "shrink")
    assert Advancing(net, batches[0], SITES, examples=10).resumed == one_map
    assert Advancing(net, batches[0], SITES, examples=50).resumed == ()


class ReadsBefore(nn.Module):
    """Reads what a layer gave, before an activation writes into it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        mean = y.mean((2, 3), keepdim=True)
        return self.second(self.relu(y)) + mean


def test_what_is_read_before_an_activation_in_place_is_not_what_it_leaves(batches):
    torch.manual_seed(0)
    net = ReadsBefore().double().eval()
    passes = ResumedPasses(net, batches, ["first", "second"])
    assert passes.resumed == ()  # with the activation it would read too much, without is nothing
    found = list(passes.outputs("second", changed(net, "second")))
    assert_close(found, whole(net, "second", batches), rtol=0, atol=0)


class Remembers(nn.Module):
    """A network whose later part reads what an earlier module left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.kept = Keeper()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.kept(self.first(x))) + self.kept.value


class Keeper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.value = x
        return x


def test_a_network_that_remembers_is_run_whole():
    torch.manual_seed(0)
    net = Remembers().double().eval()
    batches = [torch.randn(2, 3, dtype=torch.float64) for _ in range(2)]
    passes = ResumedPasses(net, batches, ["first", "second"])
    assert passes.resumed == ()
    found = list(passes.outputs("second", changed(net, "second")))
    assert_close(found, whole(net, "second", batches), rtol=0, atol=0)


def test_a_module_with_hooks_runs(net, batches):
    handle = net.first.register_forward_hook(lambda _, __, output: output + 1)
    passes = ResumedPasses(net, batches, SITES)
    for site in SITES:
        found = list(passes.outputs(site, changed(net, site)))
        assert_close(found, whole(net, site, batches), rtol=0, atol=0)
    handle.remove()


def test_outputs_that_cannot_be_compared_are_refused(batches):
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.mean()

    with pytest.raises(ModelError, match="must have the batch first"):
        ResumedPasses(Whole(), batches, [])
