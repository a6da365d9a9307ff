"""Methods of a comparison as data: what `params/<name>.yaml` holds, and the experiment that each method is.

A method is a list of stages and settings of its own, with `{lr}` for the learning rate; what all share is an experiment of the preset.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from alphaprune import yaml_text
from alphaprune.errors import UsageError, like, shown
from alphaprune.experiment import Experiment
from alphaprune.records import FinalRecord, read_if_whole
from alphaprune.settings import Name, Positive, Settings, check_names, load_settings, project_root

MOST = 100  # values in a list
KeepRatio = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Method(BaseModel):
    """Stages with `{lr}` for the learning rate, and settings that replace the experiment's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    settings: dict[str, Any] = {}

    def stages_at(self, lr: float) -> list[dict[str, Any]]:
        def filled(value: Any) -> Any:
            if value == "{lr}":
                return lr
            return value.replace("{lr}", f"{lr:g}") if isinstance(value, str) else value

        return [{key: filled(value) for key, value in stage.items()} for stage in self.stages]


class Comparison(BaseModel):
    """What `params/<name>.yaml` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lrs: Annotated[list[Positive], Field(min_length=1, max_length=MOST)]
    first_lr: Positive
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=MOST)]
    keep_ratios: Annotated[list[KeepRatio], Field(min_length=1, max_length=MOST)]
    budgets: Annotated[
        list[Positive], Field(max_length=MOST)
    ] = []  # further ones, in multiples of the preset's epochs
    methods: Annotated[dict[Annotated[str, Field(min_length=1, max_length=200)], Method], Field(min_length=1)]


def check(what: str, value: Any, kind: Any, remedy: str) -> None:
    """Raise UsageError, with `what` and `remedy`, if a value is not of a kind, a type with the bounds it has for pydantic."""
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        raise UsageError(f"{what} is {shown(value)}; {remedy}") from None


def load_comparison(name: str, root: Path) -> Comparison:
    """Read and check `params/<name>.yaml` (raises UsageError)."""
    check("name", name, Name, "give that of a file in params/, such as controls")
    file = root / "params" / f"{name}.yaml"
    if not file.exists():
        others = [
            p.stem
            for p in sorted(file.parent.glob("*.yaml"))
            if "\nmethods:" in p.read_text(errors="replace")
        ]
        raise UsageError(f"{file} does not exist; there are: {', '.join(others)}")
    try:
        found = Comparison.model_validate(yaml_text.read(file))
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(part)[:60] for part in first["loc"])
        raise UsageError(f"{file}: {key}: {first['msg']}, not {shown(first['input'])}") from None
    if found.first_lr not in found.lrs:
        raise UsageError(f"{file}: first_lr {found.first_lr:g} is none of lrs")
    return found


def chosen_methods(name: str, root: Path, methods: Sequence[str]) -> list[str]:
    """Those of a comparison's methods that are asked for, all if none is, each once (raises UsageError)."""
    known = load_comparison(name, root).methods
    if unknown := set(methods) - set(known):
        first = sorted(unknown)[0]
        raise UsageError(f"method {shown(first)} is unknown{like(first, known, between='; ')}")
    return list(dict.fromkeys(methods or known))


def experiment(
    name: str,
    preset: str,
    method: str,
    lr: float,
    keep_ratio: float,
    seed: int,
    budget: float = 1.0,
    root: Path | None = None,
) -> Experiment:
    """The experiment that a method of a comparison is, whether it is recorded or not.

    Args:
        name, preset, root: as of `compare`.
        method: one of the file's.
        lr, keep_ratio, seed: as in a row of the table.
        budget: in multiples of the preset's epochs.
    """
    root = root or project_root()
    shared = settings_of(name, root, method, lr, keep_ratio, seed)
    settings = load_settings(preset, name, root, **shared)
    return Experiment(preset, name, root, **(shared | of_budget(settings, budget)))


def check_method(
    name: str, preset: str, method: str, lr: float, keep_ratio: float, seed: int, root: Path
) -> None:
    """Raise UsageError if a method's experiment could not begin; nothing is measured or trained for that."""
    shared = settings_of(name, root, method, lr, keep_ratio, seed)
    settings = load_settings(preset, name, root, **shared)
    if settings.widths == "sensitivity":  # would be measured, and nothing that can be wrong depends on them
        shared |= {"widths": "uniform", "round_to": 1, "damage_power": 1.0}
    Experiment(preset, name, root, **shared)


def of_budget(settings: Settings, budget: float) -> dict[str, int]:
    """What a budget, in multiples of the preset's epochs, comes to for each of a method's stages, as settings.

    Whole epochs, one at least; where that is less than one, an epoch of fewer images, if the preset says how many it has.
    """
    epochs = budget * settings.max_epochs / len(settings.stages)
    if epochs >= 1 or settings.train_images is None:
        return {"max_epochs": max(round(epochs), 1)}
    return {"max_epochs": 1, "train_images": max(round(epochs * settings.train_images), settings.batch_size)}


def final_file(of: Experiment) -> Path:
    """What the network that a method comes to costs and scores is recorded here, see `method_result`."""
    return of.folder(of.stages[-1]) / "final.json"


def final(of: Experiment) -> dict[str, Any] | None:
    """What is recorded there of the weights that the last stage left; None if nothing is, or of others."""
    content = read_if_whole(final_file(of), FinalRecord)
    if content is None:
        return None
    digest = content.pop("weights_sha256", None)  # None where it was recorded before there was one
    return content if digest in (None, of.record(of.stages[-1].name)["weights_sha256"]) else None


def settings_of(
    name: str, root: Path, method: str, lr: float, keep_ratio: float, seed: int
) -> dict[str, Any]:
    """What a method says, to replace what the experiment's file says."""
    chosen = load_comparison(name, root).methods[method]
    check_names(chosen.settings, f"params/{name}.yaml: methods.{method}")
    return {**chosen.settings, "keep_ratio": keep_ratio, "seed": seed, "stages": chosen.stages_at(lr)}
