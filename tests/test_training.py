"""A network trained on a loader of one's own: what the loop comes to, what it changes, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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


def test_a_network_learns_and_says_so_epoch_by_epoch():
    net = network()
    before = accuracy(net, loader())
    epochs = list(training(net, loader(shuffle=True), epochs=8, lr=0.1))
    assert [e.number for e in epochs] == list(range(1, 9)) and epochs[-1].loss < epochs[0].loss / 2
    assert accuracy(net, loader()) > 0.9 > before
    assert str(epochs[0]).startswith("epoch 1/8: loss ") and "alpha" not in str(epochs[0])


def test_a_model_with_branches_is_annealed_until_it_can_be_folded():
    net = network()
    list(training(net, loader(shuffle=True), epochs=8, lr=0.1))
    x = images().tensors[0]
    model = ParallelModel(net, 0.5, x[:2], init="least_squares", images=x, ridge=0.1)
    torch.manual_seed(0)
    run = training(model, loader(shuffle=True), epochs=8, lr=0.05, teacher=net)
    alphas = [next(run).alpha for _ in range(8)]
    assert alphas == pytest.approx([0.75, 0.5, 0.25, 0, 0, 0, 0, 0])
    assert next(run, None) is None and not model.training
    small, certificate = fold(model, x)
    assert certificate.exact
    assert accuracy(small, loader()) == accuracy(model, loader()) > 0.9


def test_what_learns_from_a_teacher_comes_nearer_to_its_answers():
    net = network()
    list(training(net, loader(), epochs=4, lr=0.1))
    x = images().tensors[0]
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))

    def distance():
        with torch.no_grad():
            return nn.functional.kl_div(
                student(x).log_softmax(1), net(x).log_softmax(1), reduction="batchmean", log_target=True
            ).item()

    before = distance()
    list(training(student, loader(), epochs=8, lr=0.01, teacher=net))
    assert distance() < before / 2


def test_frozen_parameters_stay():
    net = network()
    net[0].requires_grad_(False)
    first = net[0].weight.clone()
    second = net[3].weight.clone()
    list(training(net, loader(), epochs=1, lr=0.1))
    assert torch.equal(net[0].weight, first) and not torch.equal(net[3].weight, second)


def test_a_loss_that_is_not_finite_leaves_the_weights_of_the_epoch_before():
    net = network()
    data = images()
    run = training(net, DataLoader(data, 16), epochs=3, lr=0.05)
    next(run)
    good = {k: v.clone() for k, v in net.state_dict().items()}
    data.tensors[0][40] = float("nan")
    with pytest.raises(UsageError, match=r"epoch 2: the loss is no longer finite.*lower rate than 0.05"):
        next(run)
    assert all(torch.equal(v, good[k]) for k, v in net.state_dict().items())


x, y = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"epochs": 0}, "epochs is 0; give a whole number"),
        ({"epochs": 1.5}, "epochs is 1.5; give a whole number"),
        ({"lr": 0}, "lr is 0; give a number above 0"),
        ({"lr": float("nan")}, "lr is nan; give a number above 0"),
        ({"loader": []}, "no batches"),
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
