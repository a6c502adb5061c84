"""Draw what the committed results say, into docs/.

    pip install '.[benchmarks]'
    python benchmarks/plots.py

Reads every JSON line under benchmarks/results/; of several results of the same label and configuration the last counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Result = dict[str, Any]
CLIENTS = [1, 2, 4, 8, 16, 32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of .jsonl files")
    parser.add_argument("--into", type=Path, default=ROOT / "docs", help="folder of the pictures")
    arguments = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        sys.exit("plots need matplotlib: pip install '.[benchmarks]'")
    matplotlib.use("Agg")
    results = read_results(arguments.results)
    for draw in (draw_serve_load, draw_prefill, draw_kv_memory, draw_soak, draw_placement, draw_together):
        draw(results, arguments.into)


def read_results(folder: Path) -> list[Result]:
    """All results, oldest file first. Those without a label get the name of their file."""
    results: list[Result] = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in filter(str.strip, path.read_text().splitlines()):
            result = json.loads(line)
            results.append(result | {"label": result.get("label") or path.stem})
    return results


def draw_serve_load(results: list[Result], into: Path) -> None:
    """Tokens per second and time between tokens, by the number of clients; a row of panels per configuration."""
    rows = [
        (_configuration(result), result["label"], row)
        for result in _of(results, "serve_load")
        if result["loop"] == "closed"
        for row in result["rows"]
        if "ratio" in row
    ]
    configurations = list(dict.fromkeys(configuration for configuration, _, _ in rows))
    for axes, configuration in _panels(into / "serve_load.png", configurations, columns=2):
        mine = [(label, row) for each, label, row in rows if each == configuration]
        speed, gaps = axes
        for each in axes:
            each.set_xscale("log", base=2)
            each.set_xlim(0.9, 36)
            each.set_xticks(CLIENTS, CLIENTS)
        for label, points in _by_label(mine, "clients"):
            (line,) = speed.plot(*_curve(points, "clients", lambda row: row["swarm_tokens_per_s"]), "o-", label=label)
            color = line.get_color()
            speed.plot(
                *_curve(points, "clients", lambda row: row["local_tokens_per_s"]), "s--", color=color, alpha=0.4,
                label=f"local batch, same run ({label})",
            )  # fmt: skip
            for name, style in (("p50", "o-"), ("p95", "^:")):
                curve = _curve(points, "clients", lambda row, name=name: 1000 * row["swarm_between_tokens_s"][name])
                gaps.plot(*curve, style, color=color, label=f"{label}, {name}")
        _name(speed, configuration, "clients", "tokens/s, all clients")
        _name(gaps, configuration, "clients", "ms between tokens")


def draw_prefill(results: list[Result], into: Path) -> None:
    """Time to the first token by the length of the prompt."""
    rows = [(_configuration(each), each["label"], row) for each in _of(results, "prefill") for row in each["rows"]]
    configurations = list(dict.fromkeys(configuration for configuration, _, _ in rows))
    for axes, configuration in _panels(into / "prefill.png", configurations):
        mine = [(label, row) for each, label, row in rows if each == configuration]
        for label, points in _by_label(mine, "length"):
            (line,) = axes[0].plot(*_curve(points, "length", lambda row: row["swarm_first_token_s"]), "o-", label=label)
            curve = _curve(points, "length", lambda row: row["local_first_token_s"])
            axes[0].plot(*curve, "s--", color=line.get_color(), alpha=0.4, label=f"local, same run ({label})")
        _name(axes[0], configuration, "tokens of the prompt", "s to the first token")


def draw_kv_memory(results: list[Result], into: Path) -> None:
    """Cache in use against what the tokens need, for each row of the benchmark."""
    found = _of(results, "kv_memory")
    configurations = list(dict.fromkeys(_configuration(result) for result in found))
    for axes, configuration in _panels(into / "kv_memory.png", configurations):
        mine = [result for result in found if _configuration(result) == configuration]
        names = [f"{row['question']}: {row['number']} x {row['tokens']}" for row in mine[0]["rows"]]
        for index, result in enumerate(mine):
            heights = [place + index * 0.8 / len(mine) for place in range(len(names))]
            axes[0].barh(heights, [row["used_ratio"] for row in result["rows"]], 0.8 / len(mine), label=result["label"])
        axes[0].set_yticks(range(len(names)), names, fontsize=7)
        axes[0].axvline(1.0, color="black", linewidth=0.8)
        axes[0].invert_yaxis()
        _name(axes[0], configuration, "cache in use / what the distinct tokens need", "")


def draw_soak(results: list[Result], into: Path) -> None:
    """Resident memory of each server over time."""
    found = _of(results, "soak")
    configurations = list(dict.fromkeys(_configuration(result) for result in found))
    for axes, configuration in _panels(into / "soak.png", configurations):
        for result in (each for each in found if _configuration(each) == configuration):
            times_s, servers = zip(*result["rss_mib_over_time"], strict=True)
            for number, values in enumerate(zip(*servers, strict=True)):
                axes[0].plot([s / 60 for s in times_s], values, label=f"{result['label']}, server {number + 1}")
        _name(axes[0], configuration, "minutes", "MiB resident")


def draw_placement(results: list[Result], into: Path) -> None:
    """Throughput as a share of the optimum, and moves, by the number of servers; a row of panels per scenario."""
    newest = {(each["scenario"], row["servers"], row["seed"], row["rule"]): row
              for each in _of(results, "placement") for row in each.get("rows", [])}  # fmt: skip
    scenarios = list(dict.fromkeys(scenario for scenario, *_ in newest))
    for axes, scenario in _panels(into / "placement.png", scenarios, columns=2):
        mine = [(key[3], row) for key, row in newest.items() if key[0] == scenario]
        for rule in dict.fromkeys(rule for rule, _ in mine):
            rows = sorted((row for each, row in mine if each == rule), key=lambda row: row["servers"])
            for panel, name in zip(axes, ("of_optimum", "moves"), strict=True):
                panel.plot(*_curve(rows, "servers", lambda row, name=name: row[name]), "o", alpha=0.6, label=rule)
                panel.set_xscale("log")
        _name(axes[0], scenario, "servers", "throughput / optimum, mean over time")
        _name(axes[1], scenario, "servers", "moves")


def draw_together(results: list[Result], into: Path) -> None:
    """Losses of those that train together and of a single one, by update; a panel for each example."""
    titles = {
        "train_together": "LoRA: one of three peers is killed, another one joins",
        "pretrain_together": "From nothing: three peers",
    }
    samples = {name: [sample for each in _of(results, name) for sample in each["samples"]] for name in titles}
    for axes, name in _panels(into / "train_together.png", [name for name in titles if samples[name]]):
        for sample in samples[name]:
            for who, style in (("together", "-"), ("alone", "--")):
                losses = sample["losses"][who]
                axes[0].plot(range(1, len(losses) + 1), losses, style, label=f"{who}, seed {sample['seed']}")
        _name(axes[0], titles[name], "update", "loss of a peer's own batches, nats per token")


def _of(results: list[Result], benchmark: str) -> list[Result]:
    return [result for result in results if result["benchmark"] == benchmark]


def _configuration(result: Result) -> str:
    servers = f"{result['num_servers']} server" + "s" * (result["num_servers"] > 1)
    return f"{result['shape']}, {result['dtype']}, {servers}"


def _by_label(rows: list[tuple[str, Result]], key: str) -> Iterator[tuple[str, list[Result]]]:
    """The rows of each label in the order of a number; of several with the same number, the last."""
    for label in dict.fromkeys(label for label, _ in rows):
        points = {row[key]: row for each, row in rows if each == label}
        yield label, [points[number] for number in sorted(points)]


def _curve(rows: list[Result], key: str, value: Callable[[Result], float]) -> tuple[list[float], list[float]]:
    return [row[key] for row in rows], [value(row) for row in rows]


def _panels(path: Path, configurations: list[str], *, columns: int = 1) -> Iterator[tuple[Any, str]]:
    """Yield the axes of each configuration, then save the picture; none is made of nothing."""
    if not configurations:
        return
    from matplotlib import pyplot

    size = 6.0 * columns, 4.0 * len(configurations)
    figure, axes = pyplot.subplots(len(configurations), columns, figsize=size, squeeze=False)
    yield from zip(axes, configurations, strict=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(path)


def _name(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if y:  # not the bars, which have names in its place
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


if __name__ == "__main__":
    main()
