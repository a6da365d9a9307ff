"""Experiment files: what may stand in them, and the checks that run before any work starts.

The settings of an experiment are those of its preset, `params/<preset>/preset.yaml`, then those of its own file,
`params/<preset>/<experiment>.yaml`, then what a command line or a notebook gives. All keys are flat, so that
`papermill -p seed 1` reaches each of them. `stages_of: report` takes over what the same experiment does in
another preset, so that a preset says only what differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from alphaprune import yaml_text
from alphaprune.errors import UsageError, like, shown
from alphaprune.recipe import (
    LARGEST_RIDGE,
    RIDGE,
    Augment,
    Draw,
    Init,
    Keep,
    Objective,
    OptimizerName,
    Recipe,
    SelectBy,
)
from alphaprune.schedule import THRESHOLD, Kind, Order, alphas, falling

Unit = Annotated[float, Field(ge=0, le=1)]
# Bounds far beyond what anyone trains with: what is larger is a slip, and would run out of memory, time or float32.
Positive = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Start = Literal["fold", "scratch", "torch-pruning-l1", "torch-pruning-bn", "torch-pruning-l2"]
WidthsBy = Literal["uniform", "sensitivity", "torch-pruning-l1", "torch-pruning-bn", "torch-pruning-l2"]
Count = Annotated[int, Field(ge=1, le=10**9)]
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.,=-]{0,79}"  # of files and folders too, so no slash, and no dot in front
Name = Annotated[str, Field(pattern=f"^{_NAME}$")]
StageOf = Annotated[str, Field(pattern=f"^({_NAME}/)?{_NAME}$")]  # `<stage>` or `<experiment>/<stage>`
Text = Annotated[str, Field(max_length=300)]
MOST_STAGES = 500  # of an experiment


def _inside_results(path: str) -> str:
    parts = path.split("/")
    if parts[0] != "results" or len(parts) < 2 or not all(re.fullmatch(r"[\w.,=+ -]+", p) for p in parts):
        raise ValueError("give a path that begins with results/, from the project's folder")
    if any(p.strip(". ") == "" for p in parts):
        raise ValueError("give a path inside results/, without dots in place of names")
    return path


def _drawable(color: str) -> str:
    from matplotlib.colors import is_color_like  # only files with colours need it

    if not is_color_like(color):
        raise ValueError("matplotlib knows no such colour; give one such as royalblue or '#4169e1'")
    return color


InResults = Annotated[str, Field(max_length=200), AfterValidator(_inside_results)]
Color = Annotated[str, Field(max_length=40), AfterValidator(_drawable)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)


class _Training(_Strict):
    """How a stage trains besides its alpha and rate; `objective` has the formula."""

    train_wide: bool = True
    distill: Unit = 0.0
    temperature: Positive = 4.0
    match_logits: NotNegative = 0.0
    match_layers: NotNegative = 0.0
    alongside: NotNegative = 0.0
    draw: Draw = "fixed"
    hold_batchnorm: bool = False
    order: Order = "together"  # in which the layers' alphas fall

    def objective(self) -> Objective:
        return Objective(**{f: getattr(self, f) for f in Objective.__dataclass_fields__})


class Stage(_Training):
    """One training stage. `from` names where its weights come from: `scratch` (a new network), `base` (the
    preset's pretrained network), a stage of this experiment, or `<experiment>/<stage>`."""

    name: Name
    alpha: Unit | None = None  # None trains a plain network, without branches
    lr: Positive
    parent: StageOf = Field(alias="from")
    narrow: Start | None = None  # makes what it starts from a plain narrow network first
    refit: Init | None = None  # new branches beside the wide weights of what it starts from
    alpha_from: Unit | None = None  # where alpha begins; it falls to `alpha` while the stage trains
    falls_over: Annotated[float, Field(gt=0, le=1)] = 0.5  # the share of the stage's steps that this takes
    color: Color | None = None  # of the curve in the report's figure; not part of the identity

    @model_validator(mode="after")
    def _something_trains(self) -> Stage:
        begins = self.alpha if self.alpha_from is None else self.alpha_from
        drawn_below = self.draw == "uniform" and self.alpha_from is not None
        if begins == 1 and not self.train_wide and not self.alongside and not drawn_below:
            raise ValueError(
                "alpha 1 with train_wide false trains nothing; lower alpha or set train_wide: true"
            )
        if self.draw == "bernoulli" and not self.train_wide and not self.alongside:
            raise ValueError(
                "draw: bernoulli with train_wide false trains nothing where a batch draws 1 for every layer; "
                "set train_wide: true, alongside, or draw: uniform"
            )
        return self

    @model_validator(mode="after")
    def _has_branches(self) -> Stage:
        with_branches = (
            self.alongside or self.draw != "fixed" or self.hold_batchnorm or self.order != "together"
        )
        if self.alpha is None and (with_branches or self.match_layers):
            raise ValueError(
                "match_layers, alongside, draw, hold_batchnorm and order belong to branches; give an alpha"
            )
        if self.refit and self.alpha is None and self.narrow != "fold":
            raise ValueError("refit makes new branches; give the stage an alpha, or narrow: fold")
        if self.alpha is not None and self.narrow:
            raise ValueError("narrow gives a plain network, which has no alpha; leave one of them out")
        return self

    @model_validator(mode="after")
    def _falls(self) -> Stage:
        if self.alpha_from is None:
            if self.falls_over != Stage.model_fields["falls_over"].default:
                raise ValueError("falls_over says how fast alpha falls from alpha_from; give that too")
        elif self.alpha is None or self.alpha >= self.alpha_from:
            raise ValueError(f"alpha falls from alpha_from, {self.alpha_from:g}; give a smaller alpha")
        return self

    def alpha_at(self, done: float) -> float | None:
        """Alpha when a share of the stage's steps, in [0, 1], is done."""
        if self.alpha_from is None:
            return self.alpha
        return falling(done / self.falls_over, self.alpha_from, self.alpha)

    def determines(self) -> dict[str, Any]:
        """What the stage's result is a function of, for its identity: of what is set only where it is not the default."""
        always = {"name", "alpha", "lr", "train_wide"}
        rest = self.model_dump(exclude={*always, "color", "parent"}, exclude_defaults=True)
        return self.model_dump(include=always) | rest


class Adaptive(_Training):
    """Stages whose alphas are found while they train: see `schedule.next_try`."""

    lr: Positive
    parent: StageOf = Field(alias="from")
    survive: Unit = 0.01  # validation accuracy that a step may cost
    first: Annotated[float, Field(ge=0.001, le=1)] = 0.5  # the first step of alpha
    smallest: Annotated[float, Field(ge=0.001, le=1)] = 0.01  # a step this small is taken whatever it costs

    @model_validator(mode="after")
    def _its_stages_can_train(self) -> Adaptive:
        self.example()
        return self

    def example(self) -> Stage:
        """Its first stage; the others have another alpha."""
        return self.stage(1, 1 - self.first, self.parent)

    def stage(self, number: int, alpha: float, parent: str) -> Stage:
        fields = self.model_dump(include=set(_Training.model_fields))
        name = f"try{number:02d}-a{alpha:.4g}"
        return Stage(**fields, name=name, alpha=alpha, lr=self.lr, parent=parent)


class Settings(_Strict):
    """Everything that determines an experiment. Units: epochs, images, shares of 1."""

    preset: Name
    experiment: Name
    title: Text
    # data and network
    data: Literal["cifar10", "cifar10-49500", "sample"]
    train_images: Count | None = None  # None: all, 45,000 of cifar10
    val_images: Count | None = None  # None: all, 5,000 of cifar10
    network: Literal["vgg16", "resnet20"] = "vgg16"
    width: Annotated[float, Field(gt=0, le=16)]  # factor on the network's channels
    keep_ratio: Annotated[float, Field(gt=0, le=1)]
    anneal: Literal["channels", "skips"] = (
        "channels"  # what alpha weighs: the wide channels, or the shortcuts
    )
    init: Init = "random"  # what the branches start from
    init_images: Count = 2000  # of the training images, for the branches to be fitted to, and for the widths
    select_by: SelectBy = "variance"  # which channels the branches start from, see `ParallelModel`
    init_ridge: Annotated[float, Field(gt=0, le=LARGEST_RIDGE)] = (
        RIDGE  # of least squares, see `ParallelModel`
    )
    widths: WidthsBy = "uniform"  # one keep_ratio for all layers, or one each for as many multiply-adds
    round_to: Count = 1  # with widths by sensitivity, channels of a layer are a multiple of this
    damage_power: Annotated[float, Field(gt=0, le=1)] = (
        1.0  # with widths by sensitivity, of each layer's damage before they are added, see `allot`
    )
    base: InResults  # file of the pretrained weights, from the project's folder
    # training, see train.Recipe
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    threads: Annotated[int, Field(ge=1, le=1024)] | None = (
        None  # CPU threads; None leaves the choice to torch
    )
    batch_size: Count
    lr_schedule: Literal["plateau", "one_cycle"] = "plateau"
    lr_scale: Positive = 1.0  # every lr is multiplied by it; figures and names keep the report's lr
    max_epochs: Count
    patience: Count
    lr_patience: Count
    lr_factor: Annotated[float, Field(gt=0, lt=1)]
    optimizer: OptimizerName = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NotNegative = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    augment: Augment = "crop"
    augment_until: Annotated[float, Field(gt=0, le=1)] = 1.0
    keep: Keep = "best"
    log_every: Count
    fold_now_every: Count = 3  # epochs between two measurements of what the network would score if folded
    # what to do
    stages: Annotated[tuple[Stage, ...], Field(max_length=MOST_STAGES)] = ()
    adaptive: Adaptive | None = None  # more stages behind these
    folds: StageOf | None = (
        None  # the stage whose model is folded, `<experiment>/<stage>`, or `best` of its own at alpha 0
    )
    publish: InResults | None = None  # folder that the last stage's weights and records are copied to

    @model_validator(mode="after")
    def _names_differ(self) -> Settings:
        names = [s.name for s in self.stages]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"stage name {twice[0]!r} stands twice; give each stage a name of its own")
        return self

    @property
    def _first_of_each(self) -> tuple[Stage, ...]:
        """The stages, and the first of the adaptive ones, which differ in alpha alone."""
        return self.stages if self.adaptive is None else (*self.stages, self.adaptive.example())

    @property
    def heading(self) -> str:
        """The title, and how the rates differ from those that names and figures show."""
        return self.title if self.lr_scale == 1 else f"{self.title} (trained at {self.lr_scale:g} × lr)"

    @model_validator(mode="after")
    def _skips_train_everything(self) -> Settings:
        if self.anneal == "skips" and not all(s.train_wide for s in self._first_of_each):
            raise ValueError("anneal: skips has no branches that could train alone; leave train_wide out")
        branches = {
            "match_layers",
            "alongside",
            "draw",
            "hold_batchnorm",
            "order",
            "narrow",
            "refit",
            "alpha_from",
        }
        if self.anneal == "skips" and (
            used := sorted(branches & set().union(*(s.determines() for s in self._first_of_each)))
        ):
            raise ValueError(f"anneal: skips has no branches, which {used[0]} needs; leave it out")
        return self

    @model_validator(mode="after")
    def _widths_are_chosen(self) -> Settings:
        for name, plain in (("round_to", 1), ("damage_power", 1.0)):
            if getattr(self, name) != plain and self.widths != "sensitivity":
                raise ValueError(f"{name} is for widths: sensitivity; set that, or leave {name} out")
        return self

    @model_validator(mode="after")
    def _channels_are_selected(self) -> Settings:
        inits = {self.init, *(s.refit for s in self.stages)}
        if self.select_by != "variance" and not inits & {"select", "least_squares"}:
            raise ValueError(
                "select_by is for init: select or least_squares; set one, or leave select_by out"
            )
        return self

    @model_validator(mode="after")
    def _augment_ends(self) -> Settings:
        if self.augment_until != 1 and (self.augment != "trivial" or self.lr_schedule != "one_cycle"):
            raise ValueError(
                "augment_until is for augment: trivial and lr_schedule: one_cycle; set both, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _last_is_an_end(self) -> Settings:
        if self.keep == "last" and self.lr_schedule != "one_cycle":
            raise ValueError("keep: last is for lr_schedule: one_cycle; set that, or leave keep out")
        return self

    @model_validator(mode="after")
    def _steps_are_known(self) -> Settings:
        if self.lr_schedule != "one_cycle" and (
            fall := [s.name for s in self.stages if s.alpha_from is not None]
        ):
            raise ValueError(
                f"stage {fall[0]!r} has alpha_from, but may end early; set lr_schedule: one_cycle"
            )
        return self

    def recipe(self, stage: Stage) -> Recipe:
        shared = {f: getattr(self, f) for f in Recipe.__dataclass_fields__ if f != "lr"}
        return Recipe(lr=stage.lr * self.lr_scale, **shared)


KEYS = [*Settings.model_fields, "stages_of"]  # what may stand in a file


class _Schedule(_Training):
    """Several stages, each from the one before, one for every alpha of a schedule."""

    schedule: Kind
    by: Positive | Annotated[list[Unit], Field(max_length=MOST_STAGES)]
    threshold: Unit = THRESHOLD
    lr: Positive
    parent: StageOf = Field(alias="from")
    colors: dict[str, Color] = {}  # colour by stage name


def stage_name(alpha: float, lr: float) -> str:
    """The name of a stage that is given none, such as `a0.0125-lr0.0001`."""
    return f"a{alpha:.4g}-lr{lr:g}"


def project_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` (the working directory) that holds `params` and `results`."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "params").is_dir() and (folder / "results").is_dir():
            return folder
    raise UsageError(f"{here} is not inside the project; run from the folder that holds params/ and results/")


def given_parameters(variables: Mapping[str, Any], before: set[str]) -> dict[str, Any]:
    """The parameters of a notebook: its plain variables that were not there before the parameters cell.

    Args:
        variables: the notebook's `globals()`.
        before: the names that were there before. Every later one counts, so a misspelt parameter is found.
    """
    plain = (bool, int, float, str, list, dict, type(None))
    found = {k: v for k, v in variables.items() if k not in before and not k.startswith("_")}
    return {k: v for k, v in found.items() if type(v) in plain}


def check_names(given: Mapping[str, Any], source: str) -> None:
    """Refuse parameters that no file may hold, or that say which file is read (raises UsageError naming `source`)."""
    for key in given:
        if key in ("preset", "experiment") or key not in KEYS:
            known = [k for k in KEYS if k not in ("preset", "experiment")]
            raise UsageError(f"{source}: parameter '{str(key)[:60]}' is unknown{like(str(key), known)}")


def check_preset(preset: str, presets: Iterable[str]) -> None:
    """Raise UsageError if a preset is none of those there are."""
    known = sorted(presets)
    if preset not in known:
        raise UsageError(f"preset {shown(preset)} is unknown; there are: {', '.join(known)}")


def load_settings(preset: str, experiment: str, root: Path | None = None, **given: Any) -> Settings:
    """Read, merge and check the settings of an experiment.

    Args:
        preset: name of a folder in params/.
        experiment: name of a file in it, without `.yaml`.
        root: the project's folder; found from the working directory if None.
        given: settings that replace those of the files.

    Raises:
        UsageError: naming file, key and remedy.
    """
    folder = (root or project_root()) / "params"
    presets = sorted(p.parent.name for p in folder.glob("*/preset.yaml"))
    check_preset(preset, presets)
    experiments = sorted(p.stem for p in (folder / preset).glob("*.yaml") if p.stem != "preset")
    if experiment not in experiments:
        raise UsageError(
            f"experiment '{experiment}' is unknown in preset '{preset}'; there are: {', '.join(experiments)}"
        )
    own_file = folder / preset / f"{experiment}.yaml"
    shared_file = folder / preset / "preset.yaml"
    sources = {
        shared_file: _read_yaml(shared_file),
        own_file: _read_yaml(own_file),
        "the parameters given": given,
    }
    merged: dict[str, Any] = {}
    origin: dict[str, Any] = {}  # where each value stands, for errors
    for source, content in sources.items():
        for key in content:
            if key not in KEYS:
                raise UsageError(f"{source}: parameter '{str(key)[:60]}' is unknown{like(str(key), KEYS)}")
            origin[key] = source
        merged |= content
    if (other := merged.pop("stages_of", None)) is not None:
        if other not in presets:
            raise UsageError(
                f"{origin['stages_of']}: stages_of: preset {shown(other)} does not exist; there are: {', '.join(presets)}"
            )
        shared = _what_to_do(theirs := folder / other / f"{experiment}.yaml")
        merged, origin = shared | merged, dict.fromkeys(shared, theirs) | origin
    if (merged.get("preset", preset), merged.get("experiment", experiment)) != (preset, experiment):
        raise UsageError(
            f"{own_file}: preset and experiment must be '{preset}' and '{experiment}', as the file's place says"
        )
    merged |= {"preset": preset, "experiment": experiment}
    merged["stages"] = _expand(merged.get("stages", ()), origin.get("stages", own_file))
    return _validate(Settings, merged, own_file, origin=origin)


def parameter_files(preset: str, experiment: str, root: Path) -> list[str]:
    """The files that `load_settings` reads for an experiment, from the project's folder."""
    own = f"params/{preset}/{experiment}.yaml"
    other = _read_yaml(root / own).get("stages_of")
    shared = [f"params/{other}/{experiment}.yaml"] if other else []
    return [f"params/{preset}/preset.yaml", own, *shared]


def _what_to_do(file: Path) -> dict[str, Any]:
    """Title, stages and fold of another preset's experiment, for a preset that trains the same at another scale."""
    if not file.is_file():
        raise UsageError(f"stages_of: {file} does not exist; name a preset that has this experiment")
    content = _read_yaml(file)
    return {key: content[key] for key in ("title", "stages", "adaptive", "folds") if key in content}


def _read_yaml(path: Path) -> dict[str, Any]:
    content = yaml_text.read(path)
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise UsageError(f"{path} must hold parameters, one `name: value` a line")
    return content


def _expand(entries: Any, file: Path | str) -> tuple[Stage, ...]:
    """Stages and schedules as they stand in a file -> stages, named."""
    if not isinstance(entries, list | tuple):
        raise UsageError(f"{file}: stages must be a list")
    if len(entries) > MOST_STAGES:
        raise UsageError(
            f"{file}: stages: {len(entries)} are more than the {MOST_STAGES} of an experiment; make it two"
        )
    stages: list[Stage] = []
    for i, entry in enumerate(entries):
        where = f"stages.{i}."
        if isinstance(entry, Stage):
            stages.append(entry)
        elif isinstance(entry, dict) and "schedule" in entry:
            s = _validate(_Schedule, entry, file, where)
            parent = s.parent
            try:
                values = alphas(s.schedule, s.by, s.threshold)
            except UsageError as e:
                raise UsageError(f"{file}: {where}by: {e}") from None
            for alpha in values:
                name = stage_name(alpha, s.lr)
                fields = s.model_dump(include=set(_Training.model_fields))
                fields |= {"name": name, "alpha": alpha, "lr": s.lr, "from": parent}
                stages.append(_validate(Stage, fields | {"color": s.colors.get(name)}, file, where))
                parent = name
        elif isinstance(entry, dict):
            numbers = [entry.get("alpha"), entry.get("lr")]
            named = all(isinstance(n, int | float) and abs(n) <= 1e6 for n in numbers)
            name = stage_name(*numbers) if named else f"stage-{i}"
            stages.append(_validate(Stage, {"name": name} | entry, file, where))
        else:
            raise UsageError(
                f"{file}: stages.{i} is {shown(entry)}; give `{{alpha: 0.5, lr: 0.001, from: base}}`"
            )
    return tuple(stages)


def _validate(
    model: type[BaseModel],
    content: dict[str, Any],
    file: Path | str,
    where: str = "",
    origin: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    try:
        return model.model_validate(content)
    except ValidationError as e:
        first = e.errors()[0]
        key = where + ".".join(str(part)[:60] for part in first["loc"])
        value = first.get("input")
        message = first["msg"]
        if first["type"] == "extra_forbidden":
            message = f"unknown parameter{like(str(first['loc'][-1]), [f.alias or n for n, f in model.model_fields.items()])}"
        elif first["type"] == "missing":
            message = "missing; add it here or in preset.yaml"
        elif isinstance(value, str) and first["type"] in ("float_type", "int_type"):
            hint = (
                "; YAML reads 1.0e-3 as a number, but 1e-3 as text"
                if re.match(r"[+-]?\d+e", value, re.I)
                else ""
            )
            message = f"{shown(value)} is text, a number is needed{hint}"
        else:
            message = f"{message}, not {shown(value)}"
        file = origin.get(str(first["loc"][0]) if first["loc"] else key, file)
        raise UsageError(f"{file}: {key}: {message}" if key else f"{file}: {message}") from None
