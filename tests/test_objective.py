"""What a stage trains for: each part of the loss, against its formula."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from alphaprune import ParallelModel, UsageError, data
from alphaprune.models import VGG
from alphaprune.objective import Loss, Objective, Teacher, drawn
from alphaprune.train import Recipe, fit

SAMPLE = data.load("sample")
IMAGES, LABELS = next(data.batches(SAMPLE.train, 24))
CHANNELS = [6, "M", 8, "M", 8, "M", "M", "M"]


def network(classes=10):
    torch.manual_seed(1)
    return VGG(CHANNELS, classes).eval()


def model(alpha=0.5, init="least_squares"):
    made = ParallelModel(network(), 0.5, IMAGES[:2], init=init, images=None if init == "random" else IMAGES)
    made.alpha = alpha
    return made


def loss(made, teacher=None, **parts):
    return Loss(Objective(**parts), made, made, teacher)(IMAGES, LABELS)[0]


def test_the_default_is_the_cross_entropy():
    made = model().eval()
    assert loss(made) == F.cross_entropy(made(IMAGES), LABELS)


def test_distillation_by_its_formula_and_nothing_to_learn_of_oneself():
    made, teacher = model().eval(), network()
    t, share = 3.0, 0.7
    p, q = (F.softmax(f(IMAGES) / t, 1) for f in (teacher, made))
    soft = (p * (p.log() - q.log())).sum(1).mean()
    expected = (1 - share) * F.cross_entropy(made(IMAGES), LABELS) + share * t * t * soft
    assert torch.isclose(loss(made, teacher, distill=share, temperature=t), expected, rtol=1e-4)
    made.alpha = 1.0  # now it is the teacher
    assert loss(made, teacher, distill=1.0).abs() < 1e-6
    assert loss(made, teacher, distill=1.0, match_logits=1.0).abs() < 1e-6
    matched = loss(model().eval(), teacher, match_logits=2.0) - loss(model().eval())
    assert torch.isclose(matched, 2 * F.mse_loss(model().eval()(IMAGES), teacher(IMAGES)), rtol=1e-3)


def test_layers_match_where_all_channels_stay_and_only_there():
    teacher = network()
    for keep_ratio, same in ((1.0, True), (0.5, False)):
        made = ParallelModel(network(), keep_ratio, IMAGES[:2], init="select", images=IMAGES).eval()
        made.alpha = 0.0
        gap = loss(made, teacher, match_layers=1.0) - loss(made)
        assert (gap.abs() < 1e-5) == same
        assert made.observer is None


def test_matching_layers_trains_them_to_match():
    made, teacher = model(alpha=0.0, init="random"), network()
    gap = lambda: (loss(made.eval(), teacher, match_layers=1.0) - loss(made)).item()  # noqa: E731
    before = gap()
    optimizer = torch.optim.SGD(made.parameters(), 0.05)
    for _ in range(40):
        optimizer.zero_grad()
        loss(made.train(), teacher, match_layers=20.0).backward()
        optimizer.step()
    assert gap() < 0.6 * before


def test_layers_are_matched_as_they_are_in_the_blend_also_beside_the_narrow_program():
    made = model(alpha=0.5, init="random").eval()
    both, alone = (
        loss(made, network(), match_layers=1.0, **more).item() for more in ({"alongside": 1e-9}, {})
    )
    assert both == pytest.approx(alone, rel=1e-6)


def test_alongside_adds_the_narrow_program_and_restores_alpha():
    made = model(alpha=0.4).eval()
    blended = loss(made)
    made.alpha = 0.0
    narrow = loss(made)
    made.alpha = 0.4
    assert torch.isclose(loss(made, alongside=0.5), blended + 0.5 * narrow)
    assert made.alpha == 0.4


@pytest.mark.parametrize("alpha", [0.3, (0.0, 0.5, 1.0)])
def test_alphas_are_drawn_a_mixer_and_a_batch(alpha):
    torch.manual_seed(0)
    mean = alpha if isinstance(alpha, tuple) else (alpha,) * 3
    draws = {
        kind: torch.tensor([drawn(kind, alpha, 3) for _ in range(2000)]) for kind in ("bernoulli", "uniform")
    }
    assert set(draws["bernoulli"].unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(draws["bernoulli"].mean(0), torch.tensor(mean), atol=0.05)
    assert torch.allclose(draws["uniform"].mean(0), torch.tensor(mean) / 2, atol=0.05)
    assert (draws["uniform"] <= torch.tensor(mean)).all()
    made = model(alpha=0.4)
    loss(made, draw="uniform")
    assert made.alpha == 0.4


def test_held_batchnorms_keep_statistics_and_scale(tmp_path):
    recipe = Recipe(lr=0.05, max_epochs=1, batch_size=12)
    for held in (True, False):
        made = model(alpha=0.5)
        made.hold_batchnorm = held
        before = copy.deepcopy(made.network.state_dict())
        fit(made, SAMPLE.train.first(48), SAMPLE.val.first(12), recipe, "k", tmp_path / str(held))
        norms = [n for n, m in made.network.named_modules() if isinstance(m, nn.BatchNorm2d)]
        same = [
            torch.equal(before[f"{n}.{part}"], made.network.state_dict()[f"{n}.{part}"].cpu())
            for n in norms
            for part in ("running_mean", "weight")
        ]
        assert all(same) if held else not any(same)
        assert not torch.equal(before["features.0.weight"], made.network.features[0].weight.cpu())


@pytest.mark.parametrize(
    "parts",
    [
        {"distill": 0.9, "match_logits": 0.1},
        {"match_layers": 1.0},
        {"alongside": 1.0, "distill": 0.5},
        {"draw": "bernoulli"},
        {"draw": "uniform", "hold_batchnorm": True},
    ],
    ids=str,
)
def test_every_part_trains_what_remains(parts, tmp_path):
    made = model(alpha=0.5)
    before = copy.deepcopy(made.state_dict())
    outcome = fit(
        made, SAMPLE.train.first(96), SAMPLE.val.first(24), Recipe(lr=0.02, max_epochs=2, batch_size=24), "k",
        tmp_path / "resume.safetensors", objective=Objective(**parts), teacher=network(),
    )  # fmt: skip
    assert not outcome.diverged and made.alpha == 0.5
    changed = [
        k for k, v in made.state_dict().items() if not torch.equal(v.cpu(), before[k]) and "reduce" in k
    ]
    assert changed


def test_what_does_not_fit_is_refused():
    plain = network()
    for parts in ({"match_layers": 1.0}, {"alongside": 1.0}, {"draw": "uniform"}, {"hold_batchnorm": True}):
        with pytest.raises(UsageError, match="need a model with branches"):
            Loss(Objective(**parts), plain, plain, network())
    with pytest.raises(UsageError, match="need a teacher"):
        Loss(Objective(distill=0.5), plain, plain)
    with pytest.raises(UsageError, match=r"teacher gives \(7,\) logits, the model \(10,\)"):
        loss(plain, network(7), distill=0.5)


def test_a_teacher_is_a_frozen_copy():
    source = network().train()
    teacher = Teacher(source)
    with torch.no_grad():
        source.classifier.weight.zero_()
    logits, read = teacher(IMAGES)
    assert source.training and not read and logits.std() > 0 and not logits.requires_grad
    assert (
        dataclasses.replace(Objective(), distill=0.1).needs_teacher
        and not Objective(alongside=1.0).needs_teacher
    )


def test_a_teacher_may_hold_layers_of_three_dimensions():
    network = nn.Sequential(nn.Conv3d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(2, 3, 6, 6, 6)
    expected = network(x)
    teacher = Teacher(network).to(torch.device("cpu"))
    torch.testing.assert_close(teacher(x)[0], expected)


class ReadThenOverwritten(nn.Module):
    """What a mixer reads is overwritten behind it: by a layer, a function or a method, directly or by a view."""

    def __init__(self, overwrite):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu, self.head, self.overwrite = nn.ReLU(inplace=True), nn.Linear(6, 10), overwrite

    def forward(self, x):
        x = self.first(x)
        z = self.second(x)
        return self.head((z + self.overwrite(self, x)).mean((2, 3)))


@pytest.mark.parametrize(
    "overwrite",
    [
        lambda self, x: self.relu(x),
        lambda self, x: F.relu(x, inplace=True),
        lambda self, x: x.relu_(),
        lambda self, x: x.flatten(2).relu_().view(x.shape),
        lambda self, x: torch.relu(x),
    ],
    ids=["layer", "function", "method", "view", "not at all"],
)
def test_what_a_layer_in_place_overwrites_is_matched_as_it_was_read(overwrite):
    torch.manual_seed(0)
    teacher = ReadThenOverwritten(overwrite).eval()
    made = ParallelModel(teacher, 1.0, IMAGES[:2]).eval()
    asked = Teacher(teacher, made.structure)
    logits, read = asked(IMAGES)
    expected = teacher.first(IMAGES)
    (key,) = {m.source for m in made.mixers if m.name == "second"}
    torch.testing.assert_close(read[key], expected)
    torch.testing.assert_close(logits, teacher(IMAGES))
