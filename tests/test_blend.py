"""Where the signal comes from: the share of the wide program, and what BatchNorm makes of alpha."""

import pytest
import torch

from alphaprune import ParallelModel, data
from alphaprune.blend import wide_share
from alphaprune.models import VGG

IMAGES = next(data.batches(data.load("sample").train, 32))[0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = VGG([6, "M", 8, "M", 8, "M", "M", "M"], 10).train()
    network(IMAGES)
    return ParallelModel(network.eval(), 0.5, IMAGES[:2], init="select", images=IMAGES).eval()


def test_the_share_falls_from_one_to_nothing_and_by_its_formula(model):
    shares = []
    for alpha in (1.0, 0.6, 0.2, 0.0):
        model.alpha = alpha
        shares.append(wide_share(model, IMAGES))
    names = {m.name for m in model.mixers if m.key in model.expand}
    assert all(set(s) <= names for s in shares)
    assert set(shares[1]) == names
    for name in names:
        falling = [s.get(name, 1.0) for s in shares]
        assert falling == sorted(falling, reverse=True) and falling[-1] == 0
    # The first mixer that reads a blend: what both programs hold there is known.
    first = next(m for m in model.mixers if m.key in model.expand)
    seen = {}
    model.alpha, model.observer = 0.6, lambda key, wide, narrow: seen.setdefault(key, (wide, narrow))
    model(IMAGES)
    model.observer = None
    wide, narrow = seen[first.key]
    a = (0.6 * wide).var((0, 2, 3), correction=0).sum()
    b = (0.4 * model.expand[first.key](narrow)).var((0, 2, 3), correction=0).sum()
    assert shares[1][first.name] == pytest.approx((a / (a + b)).item(), rel=1e-5)


def test_one_value_a_layer_and_the_model_stays_as_it_was(model):
    count = len([m for m in model.mixers if m.key in model.expand])
    model.alpha = [0.0] + [0.5] * (count - 1)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = list(wide_share(model, IMAGES).values())
    assert found[0] == 0 and min(found[1:]) > 0
    assert model.training and model.observer is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
