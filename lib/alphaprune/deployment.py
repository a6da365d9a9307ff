"""What to deploy with on a CPU: the same network as it is, optimised, in bfloat16, in ONNX Runtime and through torch.compile, in turns."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from torch import Tensor, nn

from alphaprune.compare import close, run
from alphaprune.errors import UsageError
from alphaprune.inference import TOLERANCE, optimise_for_inference
from alphaprune.measure import multiply_adds
from alphaprune.narrowing import folded_at_once
from alphaprune.onnx_file import check_installed, save_onnx
from alphaprune.passes import forward
from alphaprune.sensitivity import allot
from alphaprune.timing import alternate, torch_threads

Way = Literal["as it is", "optimised", "bfloat16", "ONNX Runtime", "torch.compile"]
WAYS: tuple[str, ...] = get_args(Way)
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def pair(network: nn.Module, example_input: Tensor, keep_ratio: float) -> dict[str, nn.Module]:
    """A network in eval mode, `original`, and what it folds to with random branches, `pruned`: weights change nothing about time.

    Args:
        network: on the CPU.
        example_input: (N, C, H, W), of which one image is used.
        keep_ratio: share of each layer's channels that stays, in (0, 1].
    """
    return {
        "original": network.eval(),
        "pruned": folded_at_once(network, keep_ratio, example_input[:1]),
    }


def rounded(
    network: nn.Module,
    damages: Mapping[str, Mapping[float, float]],
    example_input: Tensor,
    keep_ratio: float,
    multiples: Sequence[int],
) -> dict[str, nn.Module]:
    """What a network folds to with channels in multiples of a number, beside other widths at the same cost.

    Args:
        network, example_input, keep_ratio: as of `pair`.
        damages: what narrowing hurts, as of `sensitivity.damages`.
        multiples: numbers that channel counts are rounded to.

    Returns:
        By name: one ratio for all, rounded down to each of `multiples`; then widths by sensitivity, as they are and rounded to each.
    """
    x = example_input[:1]
    found = {f"pruned, round_to {n}": folded_at_once(network, keep_ratio, x, n) for n in multiples}
    for n in (1, *multiples):
        ratios = allot(network, damages, keep_ratio, x, round_to=n)
        name = f"pruned, widths by sensitivity{f', round_to {n}' if n > 1 else ''}"
        found[name] = folded_at_once(network, ratios, x)
    return found


def deployment(
    networks: Mapping[str, nn.Module],
    example_input: Tensor,
    ways: Sequence[Way] = WAYS,
    seconds: float = 20.0,
    threads: int | None = None,
) -> pd.DataFrame:
    """Time each network in each way, all in turns, on the CPU: ONNX Runtime and the optimised kernels are those of a CPU.

    Args:
        networks: by name, in eval mode on the CPU, the original first.
        example_input: the batch, (N, C, H, W).
        ways: "as it is", in torch; "optimised" and "bfloat16", as of `optimise_for_inference`; "ONNX Runtime", from the file that a bundle holds;
            "torch.compile", the optimised network through inductor, its weights frozen.
        seconds: of timing, for all together.
        threads: of torch and of ONNX Runtime; those that torch has if None.

    Returns:
        One row a network and way: `network`, `way`, `batch`, `milliseconds` (median), `spread`, `others`, `trusted`, `threads` as of `timing.alternate`; `faster`, than
        the original as it is; `faster_than_same`, than the original in the same way; `predicted`, how many times fewer multiply-adds
        than the original it has; `reached`, faster_than_same by predicted; `start`, seconds that preparing it took, with the first call.

    Raises:
        UsageError: if a way does not work or computes something else.
    """
    if unknown := [w for w in ways if w not in WAYS]:
        raise UsageError(f"way {unknown[0]!r} is unknown; use {', '.join(WAYS)}")
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    start = {}
    with (
        tempfile.TemporaryDirectory(prefix="deployment-") as folder,
        _cache_in(folder),
        torch_threads(threads),
    ):
        for name, network in networks.items():
            for way in ways:
                started = time.monotonic()
                calls[name, way] = _prepared(way, network, example_input, Path(folder) / f"{len(calls)}.onnx")
                calls[name, way]()
                start[name, way] = time.monotonic() - started
        times = alternate({"\n".join(key): call for key, call in calls.items()}, seconds)
    original = next(iter(networks))
    costs = {name: multiply_adds(n, example_input[:1]) for name, n in networks.items()}
    rows = []
    for (name, way), t in zip(calls, times.itertuples(), strict=True):
        same, predicted = times.at[f"{original}\n{way}", "ratio"], costs[original] / costs[name]
        rows.append(
            {
                "network": name,
                "way": way,
                "batch": len(example_input),
                "milliseconds": 1000 * t.median,
                "faster": t.ratio,
                "faster_than_same": t.ratio / same,
                "predicted": predicted,
                "reached": t.ratio / same / predicted,
                "start": start[name, way],
                "spread": t.spread,
                "others": t.others,
                "trusted": t.trusted,
                "threads": t.threads,
            }
        )
    return pd.DataFrame(rows)


@contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    """Where inductor keeps what it compiled: a new place, so that `start` is what it takes where nothing is compiled yet."""
    before = os.environ.get(CACHE)
    os.environ[CACHE] = folder
    try:
        yield
    finally:
        os.environ.pop(CACHE)
        if before is not None:
            os.environ[CACHE] = before


def _prepared(way: str, network: nn.Module, x: Tensor, file: Path) -> Callable[[], Any]:
    if way == "as it is":
        return forward(network, x)
    if way == "ONNX Runtime":
        return _in_onnx_runtime(network, x, file)
    fast = optimise_for_inference(network, x, torch.bfloat16 if way == "bfloat16" else None)
    if way != "torch.compile":
        return forward(fast, x)
    try:
        compiled = torch.compile(fast, options={"freezing": True})
        with torch.inference_mode():
            same = close(run(compiled, (x,), way), run(network, (x,), "the network"), TOLERANCE[x.dtype])
    except Exception as e:  # such as no C++ compiler
        raise UsageError(
            f"torch.compile does not work here ({' '.join(str(e).split())[:160]}); leave it out of `ways`"
        ) from None
    if not same:
        raise UsageError("torch.compile computes something else; leave it out of `ways`")
    return forward(compiled, x)


def _in_onnx_runtime(network: nn.Module, x: Tensor, file: Path) -> Callable[[], Any]:
    check_installed()
    import onnxruntime

    with torch.no_grad():
        save_onnx(network, (x[:2],), file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # nor slow the others in their turn
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)
