"""Stages with what their results are functions of, and the hash of that: their identity.

A stage recorded under its identity is not run again, whichever experiment or machine recorded it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from alphaprune.recipe import BRANCHES_VERSION, MUON_VERSION, RIDGE, TRAINING_VERSION, TRIVIAL_VERSION
from alphaprune.settings import Settings, Stage

# Part of the identity of every stage whose network is plain and narrow. Raise it when what it begins with changes.
NARROWING_VERSION = 1
SCRATCH, BASE = "scratch", "base"


@dataclass(frozen=True)
class Node:
    """A stage together with the experiment it belongs to, its parent and its identity."""

    settings: Settings
    stage: Stage
    parent: Node | str  # another stage, or SCRATCH or BASE
    determines: dict[str, Any] = field(hash=False, compare=False)  # all that its result is a function of
    identity: str  # a hash of it

    @property
    def name(self) -> str:
        return f"{self.settings.experiment}/{self.stage.name}"

    @property
    def narrowed_at(self) -> Node | None:
        """This stage or the one before that made the network a plain narrow one; None while it has not been."""
        return next((n for n in self.line if n.stage.narrow), None)

    @property
    def origin(self) -> str:
        """What the first stage of all before this one starts from: SCRATCH or BASE."""
        return self.line[-1].parent

    @property
    def line(self) -> list[Node]:
        """This stage, its parent, the parent's parent and so on."""
        found = [self]
        while isinstance(found[-1].parent, Node):
            found.append(found[-1].parent)
        return found

    @property
    def key(self) -> str:
        """What the stage's random numbers are a function of."""
        return f"{self.settings.seed}/{self.name}"


def narrow_or_branched(stage: Stage, parent: Node | str) -> tuple[bool, bool]:
    """Whether a stage's network is a plain narrow one, and whether it has branches."""
    after = isinstance(parent, Node) and parent.narrowed_at is not None
    return stage.narrow is not None or after, stage.alpha is not None


def identified(
    settings: Settings,
    stage: Stage,
    parent: Node | str,
    origin: str,
    data: str,
    ratios: dict[str, float] | None,
) -> Node:
    """A stage with its identity. Everything that determines its result is part of it; hardware and colours are not.

    Args:
        settings, stage: of the experiment.
        parent: what the stage starts from.
        origin: the identity of the parent, the SHA-256 of the pretrained weights, or SCRATCH.
        data: checksum of the images.
        ratios: the keep_ratio a layer, where it is not one for all.
    """
    narrow, branches = narrow_or_branched(stage, parent)
    network: dict[str, Any] = {
        f"{settings.network}_width": settings.width,
        "keep_ratio": settings.keep_ratio if branches or narrow else None,
    }
    if branches:
        network |= {"anneal": settings.anneal, "branches": BRANCHES_VERSION}
    if narrow:
        network["narrowing"] = NARROWING_VERSION
    if (branches or narrow) and (settings.init != "random" or stage.refit):
        network |= {"init": settings.init, "init_images": settings.init_images}
        if settings.init_ridge != RIDGE:  # what was recorded before there was a choice has none
            network["init_ridge"] = settings.init_ridge
        if settings.select_by != "variance":  # likewise
            network["select_by"] = settings.select_by
    if ratios is not None:
        network["widths"] = ratios
    recipe = asdict(settings.recipe(stage))
    if recipe["augment"] == "crop":  # likewise
        del recipe["augment"], recipe["augment_until"]
    elif recipe["augment"] == "mirror":
        del recipe["augment_until"]
    else:
        recipe["trivial_version"] = TRIVIAL_VERSION
    if recipe["keep"] == "best":
        del recipe["keep"]
    if recipe["optimizer"] == "sgd":
        del recipe["optimizer"]
    else:
        recipe["muon_version"] = MUON_VERSION
    determines = {
        "training_version": TRAINING_VERSION,
        "experiment": settings.experiment,
        "stage": stage.determines(),
        "parent": origin,
        "recipe": recipe,
        "network": network,
        "data": [data, settings.train_images, settings.val_images],
        "seed": settings.seed,
    }
    identity = hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()
    return Node(settings, stage, parent, determines, identity)
