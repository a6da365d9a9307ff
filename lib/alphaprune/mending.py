"""What is damaged and can be made good without training: checksums of whole weights, and what one experiment published for all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from alphaprune import pretrained, yaml_text
from alphaprune.errors import Damaged, UsageError
from alphaprune.identity import BASE
from alphaprune.recorded import Recorded
from alphaprune.settings import load_settings
from alphaprune.storage import digest_file, digest_of, read_digest, write_bytes, write_digest


def mend(of: Recorded, say: Callable[[str], None]) -> None:
    """Make good what an experiment's stages come from, as far as that needs no training.

    Args:
        of: the experiment.
        say: takes a line for everything that was damaged.
    """
    for node in {n.name: n for stage in of.stages for n in stage.line}.values():
        path = of.weights(node)
        if of.why(node) is not None or not path.is_file() or of.weights_damage(node) is not None:
            continue
        if _mend_checksum(path, of.record(node.name)["weights_sha256"]):
            say(_mended(path))
        remove_leftovers(path.parent)
    damage = pretrained.damage(of.settings, of.root)
    if damage is None:
        return
    if publishes(of):
        say(f"{damage}; published again when all stages are recorded")
    if not any(n.origin == BASE for n in of.stages):
        return
    digest, path = pretrained.digest(of.settings, of.root), of.root / of.settings.base
    if path.is_file() and digest_of(path) == digest:
        if _mend_checksum(path, digest):
            say(_mended(path))
        if (damage := pretrained.damage(of.settings, of.root)) is None:
            return
    for publisher in _publishers(of):
        last = publisher.stages[-1]
        record = publisher.record(last.name)
        if record and record["weights_sha256"] == digest and publisher.weights_damage(last) is None:
            publish(publisher)
            say(f"{damage}; published again from {publisher.folder(last)}")
            return
    # Weights of large networks are not in git. What needs them says so.
    if not pretrained.is_recorded(of.settings, of.root):
        say(f"{damage}; {pretrained.remedy(of.settings)}")


def remove_leftovers(folder: Path) -> None:
    """Remove from a recorded stage's folder the states it resumed from; a run that was killed as it ended may have left them."""
    for leftover in (*folder.glob("resume.*"), *folder.glob(".*.tmp")):
        with suppress(OSError):  # another run does the same, or nothing may be written here
            leftover.unlink()


def publishes(of: Recorded) -> bool:
    """Whether an experiment publishes what it comes to: not where it was given settings that differ from its file's."""
    return of.settings.publish is not None and of.label == of.settings.experiment


def publish(of: Recorded) -> None:
    """Copy the whole weights and the records of an experiment's last stage to the folder that its settings name.

    What is there already is not written again, so that nothing needs the right to where nothing changes.

    Raises:
        UsageError: if there is neither what to copy nor what was copied before.
    """
    last, folder = of.stages[-1], of.root / of.settings.publish
    if not of.weights(last).is_file():  # left behind; what was published may be whole all the same
        if damage := pretrained.damage(of.settings, of.root):
            raise UsageError(f"{damage}; {pretrained.remedy(of.settings)}")
        return
    weights = folder / Path(of.settings.base).name
    sources = {
        folder / "history.csv": of.folder(last) / "history.csv",
        folder / "run.json": of.folder(last) / "run.json",
        weights: of.weights(last),
    }
    for target, source in sources.items():
        content = source.read_bytes()
        if not (target.is_file() and target.read_bytes() == content):
            write_bytes(target, content)
    _mend_checksum(weights, of.record(last.name)["weights_sha256"])


def _mend_checksum(path: Path, digest: str) -> bool:
    """Write the checksum of whole weights where it is not as it was written. Returns whether it was not."""
    try:
        if read_digest(path) == digest:
            return False
    except Damaged:
        pass
    write_digest(path, digest)
    return True


def _mended(path: Path) -> str:
    return f"{digest_file(path)} was damaged or missing; written again, since {path.name} is whole"


def _publishers(of: Recorded) -> list[Recorded]:
    """The experiments of the preset that publish the pretrained weights."""
    preset, folder = of.settings.preset, Path(of.settings.base).parent
    files = sorted(p for p in (of.root / "params" / preset).glob("*.yaml") if p.stem != "preset")
    # Other notebooks' parameters lie there too; what publishes says so.
    names = [p.stem for p in files if "publish" in (yaml_text.read(p) or {})]
    where = {name: load_settings(preset, name, of.root).publish for name in names}
    return [Recorded(preset, n, of.root) for n in names if where[n] is not None and Path(where[n]) == folder]
