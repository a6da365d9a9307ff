"""Damage to what is recorded: bytes flipped, files cut off, emptied, deleted and swapped. Each is named; what was lost is trained again
from what is whole, and nothing else; the end is the same, bit for bit.

A shorter form runs with the other tests; `make test-faults` runs all of it.
"""

import itertools
import json
import os
import random
import re
import shutil
import warnings

import pytest
import yaml
from conftest import ROOT

from alphaprune.errors import Damaged
from alphaprune.experiment import Experiment
from alphaprune.prune import prune
from alphaprune.pruned import load_pruned
from alphaprune.records import FinalRecord, read_record, write_record

WHOLE = bool(os.environ.get("ALPHAPRUNE_FAULTS"))
FLIPS = 200 if WHOLE else 15
OF_THE_CLOCK = re.compile(rb'"(seconds|start_seconds)": [\d.]+|"record_sha256": "[0-9a-f]{64}"')
GOOD = "named; no stage but one that lost a file is trained, and all ends bit for bit as it was"
TRAINED = re.compile(r"\[(\w+)\] stage \d+/\d+ ([\w.-]+): best ")


class Project:
    """A small smoke project: pretrained, two stages of Figure 4, the second of them folded, a stage of Figure 1 that was interrupted."""

    def __init__(self, root):
        self.root, self.results, self.order = root, root / "results" / "smoke", random.Random(0)
        smoke = root / "params" / "smoke"
        pretrain = yaml.safe_load((smoke / "pretrain.yaml").read_text()) | {
            "max_epochs": 1,
            "train_images": 128,
        }
        stages = {
            "fig4": [{"schedule": "listed", "by": [0.5, 0.0], "lr": 0.01, "from": "base"}],
            "fig1": [{"alpha": 0.0, "lr": 0.02, "from": "fig4/a0.5-lr0.01"}],
        }
        (smoke / "pretrain.yaml").write_text(yaml.safe_dump(pretrain))
        for name, content in stages.items():
            (smoke / f"{name}.yaml").write_text(yaml.safe_dump({"title": "t", "stages": content}))
        (smoke / "fig1.yaml").write_text((smoke / "fig1.yaml").read_text() + "max_epochs: 3\n")
        (smoke / "pruned.yaml").write_text(yaml.safe_dump({"title": "t", "folds": "fig4/a0-lr0.01"}))
        self.run("pretrain", "fig4")
        self.interrupted = self._interrupt()
        self.kept = {p: p.read_bytes() for p in self.files()}
        self.run("fig1")  # as it ends when nothing happens
        self.expected = self.contents()
        self.again()

    def _interrupt(self):
        def say(line):
            if "epoch 2/3" in line:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Experiment("smoke", "fig1", self.root).run(say)
        (folder,) = (self.results / "stages" / "fig1").iterdir()
        return folder

    def again(self):
        """Put the stage that was interrupted back to where it was."""
        shutil.rmtree(self.interrupted)
        self.interrupted.mkdir()
        for path, content in self.kept.items():
            if path.parent == self.interrupted:
                path.write_bytes(content)

    def files(self):
        return sorted(p for p in self.results.rglob("*") if p.is_file() and p.name != ".lock")

    def contents(self):
        """Every file's content but for what the clock says."""
        return {p: OF_THE_CLOCK.sub(b"", p.read_bytes()) for p in self.files()}

    def run(self, *names):
        """Run experiments, fold, and return all that was said."""
        said = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for name in names:
                Experiment("smoke", name, self.root).run(said.append)
            if "fig4" in names:
                prune(Experiment("smoke", "pruned", self.root))
        return [*said, *(str(w.message) for w in caught)]

    def stage_of(self, path):
        """The stage that is lost with a file, as `TRAINED` finds it; None if it can be had without training."""
        folder = path.parent
        if (
            folder.parent.parent.name != "stages"
            or path.name.endswith(".sha256")
            or folder.name.startswith("folded")
        ):
            return None
        return None if folder == self.interrupted else (folder.parent.name, folder.name.rpartition("-")[0])

    def survives(self, *damaged):
        """Run all; the damage must be named, and no stage trained that is not lost."""
        resumed = any(p.parent == self.interrupted for p in damaged)
        names = ["pretrain", "fig4", "fig1"] if resumed else ["pretrain", "fig4"]
        # Whoever needs what is damaged makes it good, whichever experiment comes first.
        self.order.shuffle(names)
        said = self.run(*names)
        if resumed:
            assert self.contents() == self.expected
            self.again()
        names = {str(p.relative_to(self.root)) for p in damaged}
        names |= {p.name for p in damaged if p.suffix == ".sha256"}  # behind the file that it is of
        assert any(name in line for name in names for line in said), (damaged, said)
        trained = {m.groups() for line in said if (m := TRAINED.search(line))} - {("fig1", "a0-lr0.02")}
        assert trained <= {self.stage_of(p) for p in damaged}, (damaged, said)
        now = self.contents()
        for path, content in self.kept.items():
            assert now.pop(path) == OF_THE_CLOCK.sub(b"", content), path
        assert not now


@pytest.fixture(scope="module")
def damaged_project(tmp_path_factory):
    root = tmp_path_factory.mktemp("damage") / "project"
    shutil.copytree(ROOT / "params", root / "params")
    (root / "results").mkdir()
    return Project(root)


def flip(path, chance):
    """Change one bit of one byte."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def test_every_flipped_byte_is_named_and_made_good(damaged_project, fault):
    p, chance = damaged_project, random.Random(2)
    files = list(itertools.islice(itertools.cycle(p.kept), FLIPS))  # each file as often as any other
    for path in files:
        flip(path, chance)
        p.survives(path)
    fault(
        f"a bit flipped somewhere in one of the {len(p.kept)} files of a small experiment", len(files), GOOD
    )


@pytest.mark.parametrize("first", ["pretrain", "fig4"])
def test_pretrained_weights_are_made_good_by_whoever_needs_them_first(damaged_project, first):
    p, chance = damaged_project, random.Random(3)
    of_publishing = [path for path in p.kept if path.parent.name == "pretrained"]
    assert len(of_publishing) == 4
    for path in of_publishing:
        flip(path, chance)
        said = p.run(first)
        assert any(str(path.relative_to(p.root)) in line for line in said), said
        assert not any(TRAINED.search(line) for line in said)
        assert p.contents()[path] == OF_THE_CLOCK.sub(b"", p.kept[path])


HARM = {
    "cut off": lambda path, chance: path.write_bytes(path.read_bytes()[: chance.randrange(1, path.stat().st_size)]),
    "emptied": lambda path, chance: path.write_bytes(b""),
    "deleted": lambda path, chance: path.unlink(),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_every_file_that_is_harmed_is_named_and_made_good(damaged_project, harm, fault):
    p, chance = damaged_project, random.Random(harm)
    files = list(p.kept) if WHOLE else chance.sample(list(p.kept), 7)
    for path in files:
        HARM[harm](path, chance)
        p.survives(path)
    fault(f"a file {harm}", len(files), GOOD)


def test_files_that_are_swapped_are_named_and_made_good(damaged_project, fault):
    p, chance = damaged_project, random.Random(4)
    pairs = [(a, b) for a, b in itertools.combinations(p.kept, 2) if p.kept[a] != p.kept[b]]
    alike = [(a, b) for a, b in pairs if a.name.partition(".")[2] == b.name.partition(".")[2]]
    chosen = chance.sample(alike, 30 if WHOLE else 4) + chance.sample(pairs, 20 if WHOLE else 2)
    for a, b in chosen:
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)
        p.survives(a, b)
    fault("two files swapped", len(chosen), GOOD)


def test_no_byte_of_a_record_can_change_unnoticed(tmp_path, fault):
    file = tmp_path / "final.json"
    write_record(file, {"params": 123, "macs": 456, "test_accuracy": 78.9})
    whole = file.read_bytes()
    assert read_record(file, FinalRecord) == {"params": 123, "macs": 456, "test_accuracy": 78.9}
    for at, bit in itertools.product(range(len(whole)), range(8)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        with pytest.raises(Damaged, match=r"final\.json is damaged"):
            read_record(file, FinalRecord)
    fault("each bit of a record flipped", 8 * len(whole), "named as damaged")


def test_records_from_before_there_were_checksums_stay_readable(damaged_project):
    p = damaged_project
    (file,) = (p.results / "stages" / "fig4").glob("a0.5-*/run.json")
    content = json.loads(p.kept[file])
    for key in ("record_format", "record_sha256", "history_sha256", "determines"):
        del content[key]
    file.write_text(json.dumps(content))
    assert "0 stages to train, 2 already recorded" in "\n".join(p.run("fig4"))
    file.write_bytes(p.kept[file])


def test_without_the_stage_they_come_from_pretrained_weights_have_a_remedy(damaged_project, tmp_path):
    """As in a checkout, where git has the pretrained weights, and not the stage that made them."""
    root = tmp_path / "checkout"
    shutil.copytree(damaged_project.root, root)
    shutil.rmtree(root / "results" / "smoke" / "stages")
    folder = root / "results" / "smoke" / "pretrained"
    for name in ("vgg16.safetensors", "run.json", "history.csv"):
        whole = (folder / name).read_bytes()
        flip(folder / name, random.Random(name))
        with pytest.raises(
            ValueError, match=rf"{name}.* is damaged.*git checkout -- results/smoke/pretrained"
        ):
            Experiment("smoke", "pretrain", root).published()
        (folder / name).write_bytes(whole)
    flip(folder / "vgg16.safetensors", random.Random(1))
    with pytest.raises(
        ValueError, match=r"vgg16\.safetensors is damaged.*git checkout -- results/smoke/pretrained"
    ):
        Experiment("smoke", "fig4", root).run(lambda line: None)


def test_damaged_weights_of_a_folded_network_are_made_again(damaged_project):
    p = damaged_project
    (file,) = (p.results / "stages" / "pruned").glob("folded-*/weights.safetensors")
    flip(file, random.Random(5))
    with pytest.warns(UserWarning, match=r"weights\.safetensors is damaged.*it is folded again"):
        assert load_pruned(Experiment("smoke", "pruned", p.root)) is None
    prune(Experiment("smoke", "pruned", p.root))
    assert file.read_bytes() == p.kept[file]
