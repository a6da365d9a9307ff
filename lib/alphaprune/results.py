"""What the records of a preset say as a whole: accuracies by name, all stages in one table.

python -m alphaprune.results gpu     # the report's claims against what is recorded so far
"""

from __future__ import annotations

if __name__ == "__main__":
    from alphaprune.interrupt import while_importing

    while_importing()

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from alphaprune import plots
from alphaprune.errors import UsageError
from alphaprune.experiment import Experiment
from alphaprune.provenance import merged
from alphaprune.pruned import fold_command, load_pruned, pruned_provenance
from alphaprune.scorecard import load_claims, score
from alphaprune.settings import project_root

TRAINED = ("week_before", "earlier_run", "fig1", "section21", "fig2", "fig3", "fig4")
PRUNED = "pruned"
# Of the report.
FIGURES = ("figure1", "figure2", "figure3", "figure4", "overview", "pruned")


class Results:
    """The recorded experiments of a preset.

    Args:
        preset: a folder in params/.
        root: the project's folder; found from the working directory if None.
        given: settings that replace those of the files, such as `seed`.
    """

    def __init__(self, preset: str, root: Path | None = None, **given: Any):
        self.preset, self.root = preset, root or project_root()
        self.experiments = {name: Experiment(preset, name, self.root, **given) for name in (*TRAINED, PRUNED)}
        self.pruned = load_pruned(self.experiments[PRUNED])

    @property
    def folder(self) -> Path:
        return self.root / "results" / self.preset

    def named(self, what: str) -> str:
        """A name for what is made of all the experiments, see `Experiment.named`."""
        return self.experiments["fig4"].named(what)

    def figure(self, name: str) -> Path:
        """Where a figure of all the experiments lies, without ending, see `Experiment.figure`."""
        return self.experiments["fig4"].figure(name)

    def check_trained(self) -> None:
        """Raise UsageError, with the command that makes it, if a stage is not recorded."""
        for name in TRAINED:
            run = self.experiments[name]
            for node in run.stages:
                if why := run.why(node):
                    raise self._missing(f"stage {node.name}: {why}", run.command)

    def check_complete(self) -> None:
        """The same also if the final model is not folded or a figure is not drawn."""
        self.check_trained()
        run = self.experiments[PRUNED]
        fold, draw = fold_command(run), "papermill notebooks/04_figures.ipynb out.ipynb"
        if self.pruned is None:
            raise self._missing(f"{run.to_fold()} is not folded", fold)
        for name in FIGURES:
            if not plots.is_saved(self.figure(name)):
                given = f"-p preset {self.preset} -p seed {run.settings.seed}"
                command = fold if name == PRUNED else f"{draw} {given}"
                raise self._missing(f"figure {self.named(name)} is not drawn", command)

    def _missing(self, what: str, command: str) -> UsageError:
        if not self.experiments[PRUNED].changed:  # what make runs
            command = f"make reproduce-figures PRESET={self.preset}"
        return UsageError(f"nothing to report yet ({what}); run {command}")

    def accuracy(self, name: str) -> float | None:
        """Percent by name: `<experiment>/<stage>` on validation, `pruned/<network>` on the test set; None if not run."""
        experiment, _, stage = name.partition("/")
        if experiment == PRUNED:
            if self.pruned is None:
                return None
            return 100 * self.pruned.table.set_index("network").at[stage, "test_accuracy"]
        record = self.experiments[experiment].record(stage)
        return None if record is None else 100 * record["metrics"]["val_accuracy"]

    def provenance(self) -> dict[str, Any]:
        """What figures and tables of all the experiments were made from, in the form of `alphaprune.provenance`."""
        trained = [self.experiments[name].provenance() for name in TRAINED]
        return merged([*trained, *([pruned_provenance(self.experiments[PRUNED])] if self.pruned else [])])

    def summaries(self) -> pd.DataFrame:
        """Every recorded stage of every experiment, one a row, with the column `experiment`."""
        parts = [self.experiments[name].summary().assign(experiment=name) for name in TRAINED]
        return pd.concat([p for p in parts if len(p)], ignore_index=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alphaprune.results",
        description="The report's claims against what is recorded so far.",
    )
    parser.add_argument("preset")
    try:
        results = Results(parser.parse_args(arguments).preset)
        card = score(load_claims(results.root / "params" / "claims.yaml"), results.accuracy)
    except UsageError as e:
        print(f"alphaprune: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    print(
        card[["claim", "report", "ours", "verdict"]].to_string(
            index=False, na_rep="-", float_format="{:.1f}".format
        )
    )
    print(", ".join(f"{n} {verdict}" for verdict, n in card["verdict"].value_counts().items()))


if __name__ == "__main__":
    main()
