"""Results as a page of tables, and as a plot."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.speed.peers import PEERS
from experiments.speed.ratios import AT_MOST, LABELS, bounds, met, ratios

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""By name of the configuration and number of threads."""

SUMMARY = ("jax_full", "torch_full", "torch_leaves", "keras_full", "over_forward")
FAMILIES = {
    "pockjax": "tab:blue", "jax": "tab:gray", "torch": "tab:orange", "compile": "tab:red",
    "peft": "tab:pink", "keras": "tab:green", "ort": "tab:purple", "executorch": "tab:brown",
}  # fmt: skip


def page(results: Results) -> str:
    """All results as Markdown."""
    lines = [
        "Steps per peer are taken in turn with the others', after the losses of the first step and",
        "the gradients were found equal. Milliseconds are medians, with the 10th and 90th",
        "percentile; build time is that of compiling and of the first step. *Peak* is resident",
        "memory of a step above that of the peer with all weights loaded and all compiled;",
        "*XLA* is argument + output − alias + temp. Not all tables are of the same machine; the",
        "rate of a large product tells them apart.",
        "",
        "## Ratios",
        "",
        *_summary(results),
    ]
    for name, by_threads in results.items():
        lines += ["", f"## {name}", ""]
        lines += [*_peers(by_threads), "", *_ratios(by_threads), "", *_bounds(by_threads)]
        for threads, result in sorted(by_threads.items()):
            worst = ", ".join(f"{who} {far:.0e}" for who, far in result["differences"].items())
            lines += ["", f"Largest relative difference from plain JAX, {_t(threads)}: {worst}."]
            machine = result["limits"]["machine"]
            if "processor" in machine:  # results from before have none
                lines += ["", f"Processor, {_t(threads)}: {machine['processor']}."]
            turns = [figure.get("turns", 0) for figure in result["peers"].values()]
            left_out = sum(figure.get("turns_apart", 0) for figure in result["peers"].values())
            if left_out:
                lines[-1] += (
                    f" {left_out} of {sum(turns)} turns do not count: the cores were farther apart"
                    " then."
                )
    return "\n".join(lines) + "\n"


def _t(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    rule = "|---|" + "---:|" * (len(heads) - 1)
    return ["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(r) + " |" for r in rows)]


def _value(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.2f}"


def _judged(key: str, result: Mapping[str, Any], found: Mapping[str, float]) -> str:
    target = result["targets"].get(key)
    if key not in found:
        return "not measured" if target else ""
    if target is None:
        return _value(found[key])
    return f"{_value(found[key])} {'met' if met(key, found[key], target) else 'missed'}"


def _asked(key: str, targets: Mapping[str, float]) -> str:
    return f"{'≤' if key in AT_MOST else '≥'} {targets[key]}" if key in targets else ""


def _summary(results: Results) -> list[str]:
    rows = []
    for name, by_threads in results.items():
        for threads, result in sorted(by_threads.items()):
            found = ratios(result)
            cells = [_judged(key, result, found) for key in SUMMARY]
            asked = [_asked(key, result["targets"]) for key in SUMMARY]
            both = [f"{c} ({a})" if a else c for c, a in zip(cells, asked, strict=True)]
            rate = result["limits"]["machine"]["flops_per_second"]
            rows.append([name, str(threads), *both, f"{rate / 1e9:.0f}"])
    heads = ["model", "threads", *(LABELS[key] for key in SUMMARY), "a large product, GFLOP/s"]
    return _table(heads, rows)


def _peers(by_threads: Mapping[int, Mapping[str, Any]]) -> list[str]:
    counts = sorted(by_threads)
    most = by_threads[counts[-1]]
    heads = ["peer"]
    for threads in counts:
        heads += [f"ms, {_t(threads)}", "p10–p90"]
    heads += ["steps", "build, s", "faults a step", "peak, MB", "XLA, MB", "version"]
    rows = []
    for peer in PEERS:
        cells: list[str] = []
        for threads in counts:
            result = by_threads[threads]
            if peer in result["peers"]:
                ms = result["peers"][peer]["milliseconds"]
                cells += [f"{ms['median']:.1f}", f"{ms['p10']:.1f}–{ms['p90']:.1f}"]
            else:
                cells += [result["absent"].get(peer, "not asked for"), ""]
        figure = most["peers"].get(peer)
        if figure is None:
            rows.append([peer, *cells, *[""] * 6])
            continue
        xla = figure.get("total_bytes")
        cells += [str(figure["count"]), f"{figure['build_seconds']:.1f}"]
        cells += [f"{figure['faults_per_step']:.0f}", f"{figure['peak_above_ready'] / 1e6:.0f}"]
        rows.append([peer, *cells, "" if xla is None else f"{xla / 1e6:.1f}", figure["version"]])
    return _table(heads, rows)


def _ratios(by_threads: Mapping[int, Mapping[str, Any]]) -> list[str]:
    found = {threads: ratios(result) for threads, result in sorted(by_threads.items())}
    rows = []
    for key, label in LABELS.items():
        targets = next(iter(by_threads.values()))["targets"]
        cells = [_judged(key, by_threads[threads], found[threads]) for threads in found]
        if any(cells):
            rows.append([label, _asked(key, targets), *cells])
    return _table(["ratio", "asked", *map(_t, found)], rows)


def _bounds(by_threads: Mapping[int, Mapping[str, Any]]) -> list[str]:
    rows = []
    for threads, result in sorted(by_threads.items()):
        machine = result["limits"]["machine"]
        for what, b in bounds(result).items():
            rows.append([
                f"{what}, {_t(threads)}", f"{b['milliseconds']:.1f}",
                f"{b['products']:.1f} ({100 * b['products_share']:.0f} %)",
                f"{b['at_best']:.1f} ({100 * b['at_best'] / b['milliseconds']:.0f} %)",
                f"{b['traffic']:.1f} ({100 * b['traffic_share']:.0f} %)",
                f"{b['flops_per_second'] / 1e9:.0f}",
                f"{machine['flops_per_second'] / 1e9:.0f}",
                f"{machine['bytes_per_second'] / 1e9:.1f}",
            ])  # fmt: skip
    return _table(
        [
            "ours", "ms", "its products alone, ms",
            "at the rate of a large product, ms", "its memory traffic alone, ms",
            "its products, GFLOP/s", "a large product, GFLOP/s", "memory, GB/s",
        ],
        rows,
    )  # fmt: skip


def plot(results: Results, path: Path) -> None:
    """Each peer's time over ours, for the largest number of threads, as a vector graphic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = {"svg.fonttype": "none", "svg.hashsalt": "speed"}
    with pyplot.rc_context(settings):  # pyright: ignore[reportArgumentType]
        columns = 2
        height = max(1, math.ceil(len(results) / columns))
        figure, axes = pyplot.subplots(
            height, columns, figsize=(11, 0.6 + 4.2 * height), layout="constrained", squeeze=False
        )
        for axis in axes.flat[len(results) :]:
            axis.set_visible(False)
        for axis, (name, by_threads) in zip(axes.flat, results.items(), strict=False):
            threads = max(by_threads)
            peers = by_threads[threads]["peers"]
            over = {peer: peers[peer]["over_ours"] for peer in reversed(PEERS) if peer in peers}
            colours = [FAMILIES[peer.split("-")[0]] for peer in over]
            bars = axis.barh(list(over), list(over.values()), color=colours)
            axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
            axis.set_xscale("log")
            axis.axvline(1, color="black", linewidth=0.8)
            axis.margins(x=0.12)
            axis.tick_params(labelsize=7)
            axis.set_title(f"{name}, {_t(threads)}", fontsize=9)
            axis.set_xlabel("time of a step over ours", fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)
