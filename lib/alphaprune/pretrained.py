"""The pretrained weights that a preset's experiments start from, and the records that were published with them."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from alphaprune.errors import Damaged, Missing, UsageError
from alphaprune.records import StageRecord, read_history, read_record
from alphaprune.settings import Settings
from alphaprune.storage import digest_file, digest_of, read_digest

if TYPE_CHECKING:
    from torch import nn


def digest(settings: Settings, root: Path) -> str:
    """The SHA-256 of the pretrained weights, which is part of the identity of all that starts from them.

    The file itself, the checksum beside it and the record published with it each say what it is. Where one of them is damaged,
    the other two agree; where two are, the record of the stage they were published from agrees with the third. A checksum alone
    is believed, so that figures are drawn from records where the weights are not.

    Raises:
        Missing: if the weights are.
        Damaged: if no two agree.
    """
    path = root / settings.base
    if not path.is_file() and not digest_file(path).exists():
        raise Missing(f"the pretrained weights {settings.base} are missing; run `{_trained_by(settings)}`")
    said = [digest_of(path)] if path.is_file() else []
    with suppress(UsageError):
        said.append(read_digest(path))
    with suppress(Damaged):
        said.append(read_record(path.with_name("run.json"), StageRecord)["weights_sha256"])
    best, agreeing = Counter(said).most_common(1)[0] if said else ("", 0)
    if agreeing > 1 or (len(said) == 1 and not path.is_file()):
        return best
    known = set(said) & _recorded(settings, root)
    if len(known) == 1:
        return known.pop()
    raise Damaged(f"{path} or {digest_file(path).name} is damaged: they disagree; {remedy(settings)}")


def _recorded(settings: Settings, root: Path) -> set[str]:
    """The SHA-256 of the weights of every recorded stage of an experiment that publishes to where these lie."""
    folder, found = Path(settings.base).parent, set()
    for file in (root / "results" / settings.preset / "stages").glob("*/*/run.json"):
        with suppress(Damaged):
            record = read_record(file, StageRecord)
            where = record["settings"].get("publish") if isinstance(record.get("settings"), dict) else None
            if isinstance(where, str) and Path(where) == folder:
                found.add(record["weights_sha256"])
    return found


def damage(settings: Settings, root: Path) -> str | None:
    """What is damaged of the pretrained weights and what was published with them; None if nothing is, or there is nothing."""
    path = root / settings.base
    record, history = path.with_name("run.json"), path.with_name("history.csv")
    if not any(p.exists() for p in (path, digest_file(path), record, history)):
        return None
    try:
        whole = digest(settings, root)
        if not path.is_file():
            return f"{path} is missing"
        if digest_of(path) != whole:
            return f"{path} is damaged (its SHA-256 is not the one that its records have)"
        if not digest_file(path).is_file() or read_digest(path) != whole:
            return f"{digest_file(path)} is damaged or missing"
        if record.exists() or history.exists():  # weights from elsewhere need none
            content = read_record(record, StageRecord)
            if content["weights_sha256"] != whole:
                return f"{record} is of other weights than {path.name}"
            read_history(history, sha256=content.get("history_sha256"))
    except UsageError as e:
        return str(e)
    return None


def is_recorded(settings: Settings, root: Path) -> bool:
    """Whether record and history are there and whole where the weights themselves are missing, as git may have them."""
    path = root / settings.base
    try:
        content = read_record(path.with_name("run.json"), StageRecord)
        read_history(path.with_name("history.csv"), sha256=content.get("history_sha256"))
        return not path.is_file() and content["weights_sha256"] == digest(settings, root)
    except UsageError:
        return False


def remedy(settings: Settings) -> str:
    """What to do about damaged pretrained weights that nothing here can make good."""
    folder = Path(settings.base).parent.as_posix()
    return (
        f"bring them back, with `git checkout -- {folder}` where git has them, or `{_trained_by(settings)}`"
    )


def _trained_by(settings: Settings) -> str:
    """The command that trains what lies in the folder of `base`: `pretrained` is the preset's VGG-16, `pretrained_x` another network."""
    folder = Path(settings.base).parent.name
    if folder.startswith("pretrained_"):
        other = folder.removeprefix("pretrained_")
        return f"python -m alphaprune.experiment params/{settings.preset}/pretrain_{other}.yaml"
    return f"make pretrain PRESET={settings.preset}"


def network(settings: Settings, root: Path) -> nn.Module:
    """The network with the pretrained weights (raises UsageError if they are missing, damaged or another network's)."""
    from alphaprune.models import NETWORKS  # bring torch, which the digest does not need
    from alphaprune.weights import WrongWeights, load_weights

    made = NETWORKS[settings.network](settings.width)
    try:
        load_weights(made, root / settings.base)
    except WrongWeights as e:
        raise UsageError(
            f"the weights in {settings.base} do not fit a {settings.network} of width {settings.width:g}; set width to "
            f"theirs, or base to another file and run `{_trained_by(settings)}` ({e})"
        ) from None
    except Damaged as e:
        raise Damaged(f"{e}; {remedy(settings)}") from None
    return made
