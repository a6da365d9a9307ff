"""The figures of a stage's course: what a reader needs to tell its lines apart."""

import pandas as pd
from matplotlib.colors import to_hex

from alphaprune.plots import MARKERS, stage_curves

LAST = "best weights of a stage, folded"


def curves(*stages):
    """Two validation points, two of the fold-now accuracy and its end for each (experiment, stage, color)."""
    rows = []
    for i, (experiment, stage, color) in enumerate(stages):
        own = {
            "experiment": experiment,
            "stage": stage,
            "alpha": 1 / (i + 2),
            "lr": 1e-3,
            "color": color,
            "start": 10 * i,
        }
        for step in (0, 10):
            rows += [
                own | {"step": step, "split": "val", "metric": m, "value": 0.5}
                for m in ("accuracy", "fold_now_running")
            ]
        rows.append(own | {"step": 10, "split": "val", "metric": "fold_now", "value": 0.4})
    return pd.DataFrame(rows)  # fmt: skip


def test_grey_stages_have_markers_of_their_own_and_the_folded_lines_their_stages_colour():
    figure = stage_curves(
        curves(*[("before", f"b{i}", None) for i in range(8)], ("own", "a", "#cc3311"), ("own", "b", "#0077bb")),
        "Figure", fold_now=True,
    )  # fmt: skip
    _, validation, folded = figure.axes
    lines = [line for line in validation.lines if len(line.get_xdata())]
    assert [line.get_marker() for line in lines] == [*MARKERS[:8], "o", "o"]
    assert [to_hex(line.get_color()) for line in lines[8:]] == ["#cc3311", "#0077bb"]
    measured, ends = folded.lines[0:20:2], folded.lines[1:20:2]
    for stage, line, end in zip(lines, measured, ends, strict=True):
        assert to_hex(line.get_color()) == to_hex(end.get_color()) == to_hex(stage.get_color())
        assert end.get_marker() == stage.get_marker() and len(end.get_xdata()) == 1
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(set(labels)) == 11 and labels[-1] == LAST
    assert [label.startswith("before: ") for label in labels] == [True] * 8 + [False] * 3


def test_without_the_reports_colours_every_stage_has_its_own():
    figure = stage_curves(curves(*[("own", f"s{i}", None) for i in range(5)]), "Figure")
    assert len(figure.axes) == 2
    assert len({to_hex(line.get_color()) for line in figure.axes[1].lines}) == 5
    assert LAST not in [text.get_text() for text in figure.legends[0].get_texts()]
