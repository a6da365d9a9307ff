"""What is damaged and can be made good without training: checksums of whole weights, and what one experiment published for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alphaprune import pretrained
from alphaprune.errors import Damaged
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
        if of.why(node) is None and path.is_file() and of.weights_damage(node) is None:
            _mend_checksum(path, of.record(node.name)["weights_sha256"], say)
    damage = pretrained.damage(of.settings, of.root)
    if damage is None:
        return
    if publishes(of):
        say(f"{damage}; published again when all stages are recorded")
    if not any(n.origin == BASE for n in of.stages):
        return
    digest, path = pretrained.digest(of.settings, of.root), of.root / of.settings.base
    if path.is_file() and digest_of(path) == digest:
        _mend_checksum(path, digest, say)
        if (damage := pretrained.damage(of.settings, of.root)) is None:
            return
    for publisher in _publishers(of):
        last = publisher.stages[-1]
        record = publisher.record(last.name)
        if record and record["weights_sha256"] == digest and publisher.weights_damage(last) is None:
            publish(publisher)
            say(f"{damage}; published again from {publisher.folder(last)}")
            return
    say(f"{damage}; {pretrained.remedy(of.settings)}")


def publishes(of: Recorded) -> bool:
    """Whether an experiment publishes what it comes to: not where it was given settings that differ from its file's."""
    return of.settings.publish is not None and of.label == of.settings.experiment


def publish(of: Recorded) -> None:
    """Copy the whole weights and the records of an experiment's last stage to the folder that its settings name."""
    last, target = of.stages[-1], of.root / of.settings.publish
    for name in ("history.csv", "run.json"):
        write_bytes(target / name, (of.folder(last) / name).read_bytes())
    weights = target / Path(of.settings.base).name
    write_bytes(weights, of.weights(last).read_bytes())
    write_digest(weights, of.record(last.name)["weights_sha256"])


def _mend_checksum(path: Path, digest: str, say: Callable[[str], None]) -> None:
    """Write the checksum of whole weights again where it is not as it was written."""
    try:
        whole = read_digest(path) == digest
    except Damaged:
        whole = False
    if not whole:
        write_digest(path, digest)
        say(f"{digest_file(path)} was damaged or missing; written again, since {path.name} is whole")


def _publishers(of: Recorded) -> list[Recorded]:
    """The experiments of the preset that publish the pretrained weights."""
    preset, folder = of.settings.preset, Path(of.settings.base).parent
    names = sorted(p.stem for p in (of.root / "params" / preset).glob("*.yaml") if p.stem != "preset")
    where = {name: load_settings(preset, name, of.root).publish for name in names}
    return [Recorded(preset, n, of.root) for n in names if where[n] is not None and Path(where[n]) == folder]
