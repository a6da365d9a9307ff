"""A network trained on a loader of one's own: what the loop comes to, what it changes, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from alphaprune import ParallelModel, UsageError, accuracy, fold, training


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def images(count: int = 96) -> TensorDataset:
    """Three classes that differ by the channel that is bright."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (count,), generator=draw)
    x = torch.randn(count, 3, 8, 8, generator=draw)
    x[torch.arange(count), labels] += 1.0
    return TensorDataset(x, labels)


def loader(**more) -> DataLoader:
    return DataLoader(images(), 16, **more)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_network_learns_and_says_so_epoch_by_epoch(optimizer):
    net = network()
    before = accuracy(net, loader())
    epochs = list(training(net, loader(shuffle=True), epochs=8, lr=0.1, optimizer=optimizer))
    assert [e.number for e in epochs] == list(range(1, 9)) and epochs[-1].loss < epochs[0].loss / 2
    assert accuracy(net, loader()) > 0.9 > before
    assert str(epochs[0]).startswith("epoch 1/8: loss ") and "alpha" not in str(epochs[0])


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_model_with_branches_is_annealed_until_it_can_be_folded(optimizer):
    net = network()
    list(training(net, loader(shuffle=True), epochs=8, lr=0.1))
    x = images().tensors[0]
    model = ParallelModel(net, 0.5, x[:2], init="least_squares", images=x, ridge=0.1)
    torch.manual_seed(0)
    run = training(model, loader(shuffle=True), epochs=8, lr=0.05, teacher=net, optimizer=optimizer)
    alphas = [next(run).alpha for _ in range(8)]
    assert alphas == pytest.approx([0.75, 0.5, 0.25, 0, 0, 0, 0, 0])
    assert next(run, None) is None and not model.training
    small, certificate = fold(model, x)
    assert certificate.exact
    assert accuracy(small, loader()) == accuracy(model, loader()) > 0.9


def test_muon_takes_other_steps_than_sgd():
    found = []
    for optimizer in ("sgd", "muon"):
        net = network()
        list(training(net, loader(), epochs=1, lr=0.1, optimizer=optimizer))
        found.append(net[0].weight)
    assert not torch.allclose(*found, rtol=1e-2)


def test_what_learns_from_a_teacher_learns_it_from_wrong_labels():
    net = network()
    list(training(net, loader(shuffle=True), epochs=8, lr=0.1))
    x, labels = images().tensors
    wrong = DataLoader(TensorDataset(x, (labels + 1) % 3), 16, shuffle=True)
    student = network()
    list(training(student, wrong, epochs=8, lr=0.1, teacher=net))
    assert accuracy(student, loader()) > 0.9
    list(training(student, wrong, epochs=8, lr=0.1))
    assert accuracy(student, loader()) < 0.1


@pytest.mark.parametrize(("count", "epochs"), [(10, 1), (80, 1), (16, 5), (90, 2)])
def test_any_number_of_steps_trains(count, epochs):
    """One step, five of them, and batches that are not equal."""
    net = network()
    before = net[0].weight.clone()
    assert len(list(training(net, DataLoader(images(count), 16), epochs, lr=0.1))) == epochs
    assert not torch.equal(net[0].weight, before)


def test_the_loss_of_an_epoch_is_the_mean_over_its_images():
    x, labels = images(20).tensors
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    losses = nn.functional.cross_entropy(net(x), labels, reduction="none").tolist()
    (epoch,) = training(net, DataLoader(TensorDataset(x, labels), 16), epochs=1, lr=1e-30)
    assert epoch.loss == pytest.approx(sum(losses) / 20, rel=1e-5)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64])
def test_labels_may_be_any_whole_numbers(kind):
    x, labels = images(32).tensors
    batches = DataLoader(TensorDataset(x, labels.to(kind)), 16)
    assert next(training(network(), batches, epochs=1, lr=0.1)).loss > 0
    assert 0 <= accuracy(network(), batches) <= 1


def test_frozen_parameters_stay():
    net = network()
    net[0].requires_grad_(False)
    first = net[0].weight.clone()
    second = net[3].weight.clone()
    list(training(net, loader(), epochs=1, lr=0.1))
    assert torch.equal(net[0].weight, first) and not torch.equal(net[3].weight, second)


class Broken(Exception):
    pass


class Breaks:
    """A loader that fails in the middle of its second epoch."""

    def __init__(self):
        self.epochs = 0

    def __len__(self):
        return 6

    def __iter__(self):
        self.epochs += 1
        for n, batch in enumerate(loader()):
            if self.epochs == 2 and n == 3:
                raise Broken
            yield batch


@pytest.mark.parametrize("how", ["nan", "nan looked for early", "an error of the loader"])
def test_what_ends_an_epoch_early_leaves_the_model_as_it_was(how, monkeypatch):
    net, data = network(), images()
    model = ParallelModel(net, 0.5, data.tensors[0][:2])
    run = training(model, Breaks() if "loader" in how else DataLoader(data, 16), epochs=4, lr=0.05)
    next(run)
    good = {k: v.clone() for k, v in model.state_dict().items()}
    data.tensors[0][40] = float("nan")
    if how.endswith("early"):
        monkeypatch.setitem(training.__globals__, "LOOKED_AFTER", 1)
    error, says = (
        (Broken, None) if "loader" in how else (UsageError, "epoch 2: the loss is no longer finite.*0.05")
    )
    with pytest.raises(error, match=says):
        next(run)
    assert all(torch.equal(v, good[k]) for k, v in model.state_dict().items())
    assert model.alpha == 0.5 and not model.training


def test_weights_that_the_last_step_made_infinite_are_not_kept():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    before = net[1].weight.clone()
    with pytest.raises(UsageError, match="no longer finite"):
        x, labels = images(16).tensors
        list(training(net, [(1000 * x, labels)], epochs=1, lr=3e38))
    assert torch.equal(net[1].weight, before)


def test_a_loop_that_is_left_early_leaves_what_it_has_learned():
    net = network()
    before = net[0].weight.clone()
    for epoch in training(net, loader(), epochs=4, lr=0.1):
        if epoch.number == 2:
            break
    assert not net.training and not torch.equal(net[0].weight, before)


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(images())


class Two(nn.Module):
    """Two inputs, or two outputs in training."""

    def __init__(self, inputs: int):
        super().__init__()
        self.inputs, self.layer = inputs, nn.Linear(192, 3)

    def forward(self, x, *more):
        if len(more) != self.inputs - 1:
            raise TypeError("forward() missing an argument")
        logits = self.layer(x.flatten(1))
        return (logits, logits) if self.training else logits


x, y = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"epochs": 0}, "epochs is 0; give a whole number"),
        ({"epochs": 1.5}, "epochs is 1.5; give a whole number"),
        ({"lr": 0}, "lr is 0; give a number above 0"),
        ({"lr": float("nan")}, "lr is nan; give a number above 0"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; use sgd, muon"),
        ({"loader": []}, "no batches"),
        ({"loader": DataLoader(images(8), 16, drop_last=True)}, "with drop_last it needs"),
        ({"loader": DataLoader(Streamed(), 16)}, "no length"),
        ({"model": Two(2)}, "do not fit the network"),
        ({"model": Two(1)}, "in training the network gives tuple and not logits alone"),
        ({"model": nn.Conv2d(3, 3, 1)}, "gives Tensor of shape (1, 3, 8, 8)"),
        ({"model": network().requires_grad_(False)}, "there is nothing to train"),
        ({"loader": iter([(x, y)])}, "no length"),
        ({"loader": [x]}, "a batch is two tensors"),
        ({"loader": [{"image": x, "label": y}]}, "a batch is two tensors"),
        ({"loader": [(x, y.float())]}, "one whole number an image"),
        ({"loader": [(x, y[:2])]}, "one whole number an image"),
        ({"loader": [(x, y + 3)]}, "labels go from 3 to 3, but the network tells 3 classes apart"),
        ({"loader": [(x[:, :2], y)]}, "do not fit the network"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(192, 5))}, "the teacher gives (5,) logits"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(given, says):
    arguments = {"model": network(), "loader": [(x, y)], "epochs": 1, "lr": 0.1} | given
    with pytest.raises(UsageError) as error:
        list(training(**arguments))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_accuracy_needs_a_batch():
    with pytest.raises(UsageError, match="no batches"):
        accuracy(network(), [])
