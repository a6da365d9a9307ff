"""How long the methods of a comparison take, measured apart from it, so that budgets can be compared by time too.

    python -m alphaprune.pace controls quick

The seconds in a comparison's own tables are of runs beside others, on whatever machine had time. Here each method trains an epoch a
stage, one method after the other, and in the next round all of them again. Recorded as `results/<preset>/pace/<name>.json`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from alphaprune.interrupt import while_importing

    while_importing()

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field

from alphaprune.errors import UsageError
from alphaprune.experiment import Experiment
from alphaprune.interrupt import Interrupted, ending_with_a_line
from alphaprune.methods import check, check_method, chosen_methods, load_comparison, settings_of
from alphaprune.records import PaceRecord, read_if_whole, write_record
from alphaprune.settings import project_root

ROUNDS = 3
Rounds = Annotated[int, Field(ge=2, le=100)]  # one would have no spread
SECONDS = (30, 100, 300, 1000)  # that methods are compared at
COLUMNS = ["method", "keep_ratio", "before", "an_image", "spread", "others", "trusted"]


def pace(
    name: str,
    preset: str,
    root: Path | None = None,
    methods: Sequence[str] = (),
    rounds: int = ROUNDS,
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Time the methods of a comparison and record it.

    Args:
        name, preset, root, methods: as of `comparison.compare`.
        rounds: that each method trains, each with another seed; 2 to 100.
        say: takes the lines of progress.

    Returns:
        As of `recorded`, with those that were timed before.

    Raises:
        UsageError: if there is no such comparison, preset or method, a method could not begin, or there is no pretrained network.
    """
    from alphaprune.provenance import provenance

    root = root or project_root()
    plan, chosen = load_comparison(name, root), chosen_methods(name, root, methods)
    check("rounds", rounds, Rounds, "give a number from 2 to 100")
    # The lowest of the rates: the time does not depend on it, and with a high one the loss may end.
    lr, keep_ratio = min(plan.lrs), plan.keep_ratios[0]
    for method in chosen:
        check_method(name, preset, method, lr, keep_ratio, 0, root)
    whole = Experiment(preset, name, root)
    whole.base_network()  # what is missing or damaged is said of where it lies
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="alphaprune-pace-") as temporary, _lost_if_stopped():
        # Nothing is recorded there, so all of it trains, and the widths are measured.
        apart = Path(temporary)
        for folder in (Path("params"), Path(whole.settings.base).parent):
            shutil.copytree(root / folder, apart / folder)
        for seed in range(rounds):
            for method in chosen:
                shared = settings_of(name, apart, method, lr, keep_ratio, seed)
                runs.append({"method": method} | _run(name, preset, apart, shared | {"max_epochs": 1}))
                done = f"{len(runs)}/{rounds * len(chosen)}"
                say(f"[{done}] {method}: {1000 * runs[-1]['an_image']:.3g} ms an image")
    of = {method: _row(own) for method, own in pd.DataFrame(runs).groupby("method", sort=False)}
    earlier = read_if_whole(_file(name, preset, root), PaceRecord)
    if earlier and earlier["keep_ratio"] == keep_ratio:
        of = {m: of.get(m) or earlier["methods"].get(m) for m in plan.methods}
    record = {"keep_ratio": keep_ratio, "methods": {m: row for m, row in of.items() if row}}
    write_record(_file(name, preset, root), record | provenance(root, command(name, preset)))
    return recorded(name, preset, root)


def recorded(name: str, preset: str, root: Path | None = None) -> pd.DataFrame:
    """What `pace` measured.

    Returns:
        A row a method, none where nothing is recorded: `keep_ratio`, the file's first; `before`, seconds from the pretrained network to the first step,
        with measuring what widths are chosen by; `an_image`, seconds of training for each image seen, with the
        measurements after each epoch; both the median over rounds, but for the widths, which are measured once; `spread`, the slowest less the fastest `an_image`,
        as a share of the median; `others`, how many cores other processes kept busy, the most of all rounds; `trusted`, see `timing.trusted`.
    """
    content = read_if_whole(_file(name, preset, root or project_root()), PaceRecord)
    rows = [
        {"method": method, "keep_ratio": content["keep_ratio"], **row}
        for method, row in (content["methods"] if content else {}).items()
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def timed(budgets: pd.DataFrame, pace: pd.DataFrame) -> pd.DataFrame:
    """A table of budgets with the seconds that a pace says, in place of those that were counted.

    Args:
        budgets: columns method, keep_ratio, images and seconds, as of `comparison.compare`.
        pace: as of `recorded`.

    Returns:
        The same rows, `seconds = before + images * an_image`; NaN for what has no pace.
    """
    rows = budgets.merge(pace[["method", "keep_ratio", "before", "an_image"]], how="left")
    seconds = rows["before"] + rows["images"] * rows["an_image"]
    return budgets.assign(seconds=seconds.to_numpy(float))


def at_seconds(budgets: pd.DataFrame, seconds: Sequence[float] = SECONDS) -> pd.DataFrame:
    """What each method has reached after so many seconds.

    Args:
        budgets: columns method, seconds, val_accuracy, as of `timed`.
        seconds: of preparation and training together.

    Returns:
        A row a method, a column for each of `seconds`: the accuracy, between two budgets on a straight line over the logarithm of the
        time; NaN where the method was trained for neither less nor more.
    """
    rows = {}
    for method, own in budgets.dropna(subset="seconds").sort_values("seconds").groupby("method", sort=False):
        known, accuracy = np.log(own["seconds"]), own["val_accuracy"]
        rows[method] = np.interp(np.log(seconds), known, accuracy, left=np.nan, right=np.nan)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(seconds), dtype=float)
    return table.rename_axis("method")


def command(name: str, preset: str) -> str:
    """What measures it again."""
    return f"python -m alphaprune.pace {name} {preset}"


def _file(name: str, preset: str, root: Path) -> Path:
    return root / "results" / preset / "pace" / f"{name}.json"


def _run(name: str, preset: str, apart: Path, settings: dict[str, Any]) -> dict[str, float]:
    """An experiment that is not recorded, trained: seconds before it and of each image."""
    import torch

    from alphaprune.timing import cores_of_others, moment

    begun = moment()
    of = Experiment(preset, name, apart, **settings)
    of.run(lambda line: None)
    outcomes = [of.record(n.name)["outcome"] for n in of.stages]
    taken, images, start = (sum(o[key] for o in outcomes) for key in ("seconds", "images", "start_seconds"))
    shutil.rmtree(apart / "results" / preset / "stages")  # weights, of which nothing is wanted
    return {
        "before": start + of.seconds_for_widths(),
        "an_image": taken / images,
        "others": cores_of_others(begun, moment()),
        "threads": torch.get_num_threads(),
    }


@contextmanager
def _lost_if_stopped() -> Iterator[None]:
    try:
        yield
    except Interrupted as e:
        raise Interrupted(e.number, "what was timed is lost", "begins anew") from None


def _row(own: pd.DataFrame) -> dict[str, Any]:
    from alphaprune.timing import trusted

    before, an_image = own["before"].median(), own["an_image"].median()
    spread, others = (own["an_image"].max() - own["an_image"].min()) / an_image, own["others"].max()
    found = {"before": before, "an_image": an_image, "spread": spread, "others": others}
    rounded = {key: float(f"{value:.4g}") for key, value in found.items()}
    return rounded | {"trusted": trusted(spread, others, int(own["threads"].max()))}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alphaprune.pace", description="Time the methods of a comparison."
    )
    parser.add_argument("name", help="a file in params/, such as controls")
    parser.add_argument("preset")
    parser.add_argument("--method", action="append", default=[], help="only this; may be given several times")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="that each method trains")
    args = parser.parse_args(arguments)

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        with ending_with_a_line():
            table = pace(args.name, args.preset, None, args.method, args.rounds, say)
        print(table.to_string(index=False, float_format="{:.4g}".format))
    except UsageError as e:
        print(f"alphaprune: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
