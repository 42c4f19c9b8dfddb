"""Works that one process and several must do alike; as a script, those of torchrun do them."""

import copy
import sys
from pathlib import Path

import tiny
import torch
from torch import nn
from torch.utils.data import Dataset

import onebyone
from onebyone.calibration.collect import Across, collect
from onebyone.calibration.moments import Enough
from onebyone.core import processes
from onebyone.data import Augmentation, Data, TensorSplit, as_split
from onebyone.training.distill import distill
from onebyone.training.train import train

READ = []  # examples that all processes together have loaded
EXAMPLES = 66  # the last batch has two examples: too few for three processes


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3),
        ).eval()  # fmt: skip


def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (EXAMPLES, 1, 8, 8), dtype=torch.uint8, generator=generator)
    how = {"augmentation": Augmentation(shift=1)}
    split = TensorSplit(images, torch.arange(EXAMPLES) % 3, **how)
    return Data(name="d", train=split, validation=split, test=split, classes=tuple("abc"))


def trained():
    how = {"accumulate": 2, "ema": 0.9}
    return train(network(), data(), epochs=3, batch_size=16, precision="float32", **how)


class Items(Dataset):
    """The same data, an example at a time; notes which are read."""

    def __init__(self):
        self.read = []
        self.images, self.labels = next(iter(data().train.batches(EXAMPLES)))

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        self.read.append(index)
        return self.images[index], self.labels[index]


def loaded():
    """Train on a data set whose examples each process loads for itself."""
    items, held = Items(), data()
    given = Data(name="d", train=as_split(items), validation=held.test, test=held.test)
    items.read.clear()
    made = train(network(), given, epochs=3, batch_size=16, accumulate=2, precision="float32")
    READ.append(sum(processes.gathered(len(items.read))))
    return made


def distilled():
    """Distil with trials, mixed images and temporary norms."""
    plain = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 3),
    )  # fmt: skip
    torch.manual_seed(1)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.2)
    how = {"teacher": network(), "precision": "float32", "norms": True, "mix": 0.5}
    return distill(plain.eval(), data(), epochs=20, batch_size=6, **how)


def moments():
    """Measure layers whose maps are sampled, in groups, and a linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(2),
            nn.Linear(36, 5), nn.Flatten(), nn.Linear(20, 3),
        ).eval()  # fmt: skip
    images = torch.rand(EXAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + 10
    names, few = ["0", "2", "4", "6"], Enough(macs=0, fewest=4)
    # The last batch has two examples, fewer than three processes.
    found = collect(net, names, lambda: images.split(16), examples=EXAMPLES, enough=few)
    other = copy.deepcopy(net)
    across = Across(net, lambda: images.split(16), examples=EXAMPLES, start=other, sites=names)
    return found, [across.moments(other, [name]) for name in names]


def planned():
    """Plan and carry out a plan; some options are of groups of layers, some of the head."""
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 3),
    )  # fmt: skip
    torch.manual_seed(3)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.rand(EXAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    how = {"budget": "macs=50%", "task": "classification"}
    made = onebyone.plan(net.eval(), images, **how)
    small = onebyone.apply(net, made, images)
    return made, small.state_dict(), small(images).detach()


def timed():
    """Plan for a latency, which each process would measure in its own way."""
    images = data().train.batches(EXAMPLES).__next__()[0]
    how = {"budget": "latency=90%", "closest": True, "runtime": "eager", "num_threads": 1}
    return onebyone.plan(network(), images, task="classification", cache=False, **how)


def shrunk(out):
    """Shrink a network whose outputs vary, so that its losses are far above rounding."""
    net = tiny.network()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.4)
    return tiny.shrink(out, net=net, reconstruct=0, precision="float32").record


def told():
    """Say how often callbacks are called."""
    calls = []
    how = {"on_epoch": calls.append, "progress": lambda *_: calls.append(None)}
    train(network(), data(), epochs=1, batch_size=33, **how)
    return [len(each) for each in processes.gathered(calls)]


WORKS = {"train": trained, "load": loaded, "distil": distilled}


def done(names):
    """Return the weights and the log of each work."""
    torch.set_num_threads(1)
    results = {}
    for name in names:
        model, log = WORKS[name]()
        losses = [(epoch.loss, epoch.validation) for epoch in log.epochs]
        results[name] = (model.state_dict(), losses, log.objective)
    return results


if __name__ == "__main__":
    out, *names = sys.argv[1:]
    with processes.joined():
        results = done(names)
        alike = processes.gathered({name: each[0] for name, each in results.items()})
        found = {"results": results, "alike": alike, "calls": told(), "moments": moments()}
        found["read"] = READ
        found["plans"] = processes.gathered(planned())
        found["timed"] = processes.gathered(timed())
        found["run"] = shrunk(Path(out).with_name("run"))
        if processes.is_main():
            torch.save(found, out)
