"""What pruning would give, before any training: a table of the layers, wide and folded, and measured latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from alphaprune.fold import fold
from alphaprune.graph import Mixer, attribute
from alphaprune.modes import in_eval_mode
from alphaprune.parallel import ParallelModel
from alphaprune.passes import forward
from alphaprune.timing import alternate
from alphaprune.trace import as_inputs
from alphaprune.widths import KeepRatio, costs

SECONDS = 1.0  # of timing both networks


@dataclass(frozen=True)
class Plan:
    """A network's layers as they are and as they would be.

    Attributes:
        table: one row a layer, in the order of their first use: `layer`, `kind`, `in`, `out` and `in_folded`,
            `out_folded` (channels), `parameters`, `multiply_adds` and the same `_folded` (multiply-adds of one image), and
            `why_wide`: why a layer keeps all its output channels, empty where it does not.
        keep_ratio: as given, or as found for a target.
        milliseconds, milliseconds_folded: median latency of a batch like the example, on its device and torch's present
            number of threads; None if it was not measured.
        images: in that batch.
    """

    table: pd.DataFrame
    keep_ratio: KeepRatio
    milliseconds: float | None
    milliseconds_folded: float | None
    images: int

    def share(self, cost: str) -> float:
        """What is left of the `parameters` or `multiply_adds`, as a share of the original."""
        return float(self.table[f"{cost}_folded"].sum() / self.table[cost].sum())

    def totals(self) -> str:
        """What is left of the whole network, a line each: parameters, multiply-adds, milliseconds if measured, keep_ratio, and how many layers stay wide."""
        t = self.table
        lines = [
            f"parameters     {t['parameters'].sum():>15,} -> {t['parameters_folded'].sum():>13,}  ({self.share('parameters'):.1%})",
            f"multiply-adds  {t['multiply_adds'].sum():>15,} -> {t['multiply_adds_folded'].sum():>13,}  ({self.share('multiply_adds'):.1%})",
        ]
        if self.milliseconds is not None:
            share = self.milliseconds_folded / self.milliseconds
            lines.append(
                f"milliseconds   {self.milliseconds:>15.1f} -> {self.milliseconds_folded:>13.1f}  ({share:.1%}), "
                f"images {self.images}, threads {torch.get_num_threads()}"
            )
        each = isinstance(self.keep_ratio, Mapping)
        lines.append(
            f"keep_ratio     {f'one a layer, {len(self.keep_ratio)} given' if each else self.keep_ratio}"
        )
        wide = t[t["why_wide"] != ""]
        lines.append(f"{len(wide)} of {len(t)} layers keep all their channels")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.table.to_string(index=False)}\n\n{self.totals()}"


def plan(
    network: nn.Module,
    keep_ratio: KeepRatio | None = None,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    *,
    exclude: Sequence[str] = (),
    round_to: int = 1,
    for_macs: float | None = None,
    for_params: float | None = None,
    latency: bool = True,
) -> Plan:
    """Say what would become of a network. Arguments and errors are those of `ParallelModel`.

    Args:
        latency: measure it, which takes some forward passes of both networks.

    Example:
        >>> import torch
        >>> from alphaprune.models import resnet20
        >>> p = plan(resnet20(), example_input=torch.zeros(1, 3, 32, 32), for_macs=0.25, latency=False)
        >>> p.share("multiply_adds") <= 0.25
        True
    """
    options = {"exclude": exclude, "round_to": round_to, "for_macs": for_macs, "for_params": for_params}
    with torch.random.fork_rng():  # the branches that are made to plan with leave no trace
        model = ParallelModel(network, keep_ratio, example_input, **options)
    milliseconds = (None, None)
    if latency:
        model.alpha = 0.0
        small, _ = fold(model)
        milliseconds = _latency(network, small, as_inputs(example_input))
    return Plan(_table(model), model.keep_ratio, *milliseconds, images=len(model.example_input[0]))


def _table(model: ParallelModel) -> pd.DataFrame:
    s = model.structure
    owners = {o.name: o for o in (*s.mixers.values(), *s.channel_layers.values())}
    wide, folded = (pd.DataFrame(costs(s, w)).groupby("name", sort=False) for w in (None, model.widths))
    total = ["parameters", "multiply_adds"]
    table = pd.concat([wide[["in", "out"]].first(), wide[total].sum()], axis=1)
    narrow = pd.concat([folded[["in", "out"]].first(), folded[total].sum()], axis=1)
    table = table.join(narrow.add_suffix("_folded")).reset_index(names="layer")
    kinds = [_kind(model.network, name) if name in owners else "function" for name in table["layer"]]
    table.insert(1, "kind", kinds)
    computed = "it is called with a computed weight"
    table["why_wide"] = [
        _why_wide(model, owners[name]) if name in owners else computed for name in table["layer"]
    ]
    counted = {
        id(p) for name in table["layer"] if name in owners for p in _parameters_of(model.network, name)
    }
    counted |= {id(attribute(model.network, n)) for m in s.mixers.values() for n in (m.weight, m.bias) if n}
    called = {n.target for n in s.trace.nodes}
    rest = []
    for name, m in model.network.named_modules():
        if n := sum(p.numel() for p in m.parameters(recurse=False) if id(p) not in counted):
            why = "no rule narrows it" if name in called else "not called in forward() as a layer"
            rest.append(
                {
                    "layer": name,
                    "kind": type(m).__name__,
                    "parameters": n,
                    "parameters_folded": n,
                    "why_wide": why,
                }
            )
    return (
        pd.concat([table, pd.DataFrame(rest)])
        .fillna({c: 0 for c in table if table[c].dtype.kind in "if"})
        .astype({c: int for c in table if table[c].dtype.kind in "if"})
    )


def _parameters_of(network: nn.Module, name: str) -> list[Tensor]:
    """Of a layer, or the parameter itself."""
    try:
        return list(network.get_submodule(name).parameters())
    except AttributeError:
        return [attribute(network, name)]


def _kind(network: nn.Module, name: str) -> str:
    try:
        return type(network.get_submodule(name)).__name__
    except AttributeError:
        return "parameter"


def _why_wide(model: ParallelModel, owner: Any) -> str:
    if isinstance(owner, Mixer):
        kept, reason = model.widths.positions(owner.ids), model.structure.why_fixed(owner)
    else:
        narrow = owner.key in model.narrow_layers or owner.key in model.narrow_parameters
        kept, reason = model.widths.held_by(owner), None if narrow else "what it reads is wide"
    if reason or len(kept) < len(owner.ids):
        return reason or ""
    atoms = [a for a in model.structure.atoms if torch.isin(model.structure.ties.roots(owner.ids), a).any()]
    alone = any(len(a) == 1 for a in atoms) and len(owner.ids) > 1
    return "each of its groups has one channel, and keeps it" if alone else "its share is all of its channels"


def _latency(network: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Median milliseconds of each, in eval mode, in turns."""
    with in_eval_mode(network, small):
        calls = {"wide": forward(network, *inputs), "folded": forward(small, *inputs)}
        median = alternate(calls, SECONDS)["median"]
    return 1000 * median["wide"], 1000 * median["folded"]
