"""Every method at the same sites, bits and data: how near its images stay to the floating-point model's.

    python benchmarks/fidelity.py build/fidelity --docs docs/fidelity.md    # about an hour and a half on two cores
    python benchmarks/fidelity.py build/fidelity --table ablation --images 512 --seeds 3

Trains each row on shapes-64 with the serial dataset of the first, then runs `sdq-deploy evaluate` on all of them over
held-out prompts (runs by the torch reference that export is checked against). Finished rows are kept. Prints a Markdown
table and writes it, with everything that evaluate writes, into the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdq_deploy.recipes.load import load_recipe
from sdq_engines.formats import PRECISIONS

WEIGHTS_ALONE = tuple(name for name, each in PRECISIONS.items() if each.weights_alone)
INPUTS_TOO = tuple(name for name in PRECISIONS if name not in WEIGHTS_ALONE)
INTEGERS = tuple(name for name, each in PRECISIONS.items() if all(part.kind == "integer" for part in each.formats))
S2P_PLAIN = ["--set", "fit.ild_weight=0", "--set", "freezing.enabled=false"]


@dataclass(frozen=True)
class Row:
    """One line of a table: its name, and the options of `sdq-deploy train` that make it."""

    name: str
    options: tuple[str, ...] = ()
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    steps: float = 1.0
    """Training steps, as a multiple of the recipe's."""


# Alone on two cores 80 steps take EfficientDM 39.0 s, with no distillation of layers, and ours 54.9 s. So it gets
# half as many again, a little more than our time.
METHODS = (
    Row("s2p"),
    Row("efficientdm", ("--method", "efficientdm"), steps=1.5),
    Row("reconstruction", ("--method", "ptq-reconstruction"), INTEGERS),
    Row("ptq-search", ("--method", "ptq", "--ptq-algorithm", "search")),
    Row("ptq-mse", ("--method", "ptq", "--ptq-algorithm", "mse")),
    Row("ptq-max", ("--method", "ptq", "--ptq-algorithm", "max")),
    Row("ptq-percentile", ("--method", "ptq", "--ptq-algorithm", "percentile")),
    Row("ptq-smoothquant", ("--method", "ptq", "--ptq-algorithm", "smoothquant"), INPUTS_TOO),
    Row("ptq-awq", ("--method", "ptq", "--ptq-algorithm", "awq"), WEIGHTS_ALONE),
)

# Time information precalculation has no row: the tables hold the very values of the layers they replace.
ABLATION = (
    Row("serial", ("--pipeline", "serial", *S2P_PLAIN, "--set", "quantization.groups=1")),
    Row("parallel", ("--pipeline", "parallel", *S2P_PLAIN, "--set", "quantization.groups=1")),
    Row("s2p-1-group", (*S2P_PLAIN, "--set", "quantization.groups=1")),
    Row("s2p-2-groups", (*S2P_PLAIN, "--set", "quantization.groups=2")),
    Row("s2p-5-groups", (*S2P_PLAIN, "--set", "quantization.groups=5")),
    Row("s2p-T-groups", tuple(S2P_PLAIN)),
    Row("s2p-T-groups-ild", ("--set", "freezing.enabled=false")),
    Row("s2p-T-groups-ild-sf"),
)

SCALES = (
    Row("one-scale", ("--method", "ptq", "--ptq-algorithm", "search", "--set", "quantization.groups=1")),
    Row("per-step-scales", ("--method", "ptq", "--ptq-algorithm", "search")),
    Row("s2p"),
)

TABLES = {"methods": METHODS, "ablation": ABLATION, "scales": SCALES}
COLUMNS = ("psnr", "ssim", "feature_fid", "caption_accuracy")


def train(row: Row, run: Path, dataset: Path | None, precision: str, seed: int) -> None:
    """Train one row unless its run is complete; the first row's dataset serves all of its seed."""
    record = run / "run.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["status"] == "complete":
        return
    command = ["train", "shapes-64", "--out", str(run), "--precision", precision, "--seed", str(seed), *row.options]
    if row.steps != 1:
        recipe = load_recipe("shapes-64", {"quantization.precision": precision})
        command += ["--max-train-steps", str(round(row.steps * recipe.fit.max_train_steps))]
    command += ["--dataset", str(dataset)] if dataset is not None else []
    command += ["--resume"] if record.is_file() else []
    sdq(command)


def sdq(command: list[str]) -> None:
    print("$ sdq-deploy", *command, flush=True)
    subprocess.run([sys.executable, "-m", "sdq_deploy.cli.main", *command], check=True)


def table(results: dict[str, Any], runs: dict[str, Path]) -> str:
    """Markdown: figures with their 95 % intervals, and what the fit took."""
    lines = [
        "| | PSNR, dB | 1 − SSIM | feature FID to FP | captions right | fit | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = results["reference"]["figures"]["caption_accuracy"]
    lines.append(f"| FP | – | – | – | {percent(reference)} | – | – |")
    for candidate in results["candidates"]:
        psnr, ssim, fid, captions = (candidate["figures"][name] for name in COLUMNS)
        stage = json.loads((runs[candidate["name"]] / "run.json").read_text(encoding="utf-8"))["stages"]["fit"]
        peak = stage.get("measured", {}).get("peak_memory_bytes")
        cells = [
            candidate["name"],
            spread(psnr, 1),
            f"{1 - ssim['value']:.4f} ({1 - ssim['high']:.4f} … {1 - ssim['low']:.4f})",
            spread(fid, 3),
            percent(captions),
            f"{stage['seconds']:.0f} s",
            "–" if not peak else f"{peak / 1e9:.2f} GB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_seeds(results: dict[str, Any], rows: list[Row], seeds: int) -> str:
    """Markdown: each row's mean over the seeds, and the least and the most of them."""
    lines = ["| | PSNR, dB | 1 − SSIM | feature FID to FP | captions right |", "|---|---|---|---|---|"]
    found = {candidate["name"]: candidate["figures"] for candidate in results["candidates"]}
    for row in rows:
        figures = [found[f"{row.name}-seed{seed}"] for seed in range(seeds)]
        psnr, ssim, fid, captions = ([each[name]["value"] for each in figures] for name in COLUMNS)
        cells = [
            row.name,
            over_seeds(psnr, 1),
            over_seeds([1 - value for value in ssim], 4),
            over_seeds(fid, 3),
            f"{over_seeds([100 * value for value in captions], 1)} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def over_seeds(values: list[float], digits: int) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} … {max(values):.{digits}f})"


def spread(figure: dict[str, float], digits: int) -> str:
    if figure["low"] is None:
        return f"{figure['value']:.{digits}f}"
    return f"{figure['value']:.{digits}f} ({figure['low']:.{digits}f} … {figure['high']:.{digits}f})"


def percent(figure: dict[str, float]) -> str:
    return f"{100 * figure['value']:.1f} % ({100 * figure['low']:.1f} … {100 * figure['high']:.1f})"


def differences(results: dict[str, Any], first: str) -> str:
    """Paired differences of one row to all others and to FP, Markdown."""
    lines = [f"| {first} minus | PSNR, dB | SSIM | captions right, points |", "|---|---|---|---|"]
    rows: dict[str, dict[str, str]] = {}
    for found in results["comparisons"]:
        if first not in (found["first"], found["second"]):
            continue
        sign = 1 if found["first"] == first else -1
        other = found["second"] if sign == 1 else found["first"]
        low, high = sorted((sign * found["low"], sign * found["high"]))
        factor, digits = {"psnr": (1, 2), "ssim": (1, 4), "caption_accuracy": (100, 1)}[found["figure"]]
        value, low, high = (factor * part for part in (sign * found["value"], low, high))
        rows.setdefault(other, {})[found["figure"]] = f"{value:+.{digits}f} ({low:+.{digits}f} … {high:+.{digits}f})"
    for other, cells in rows.items():
        lines.append(
            f"| {other} | {' | '.join(cells.get(name, '–') for name in ('psnr', 'ssim', 'caption_accuracy'))} |"
        )
    return "\n".join(lines)


def insert(path: Path, name: str, text: str) -> None:
    """Replace what stands between the comments `<!-- name -->` and `<!-- /name -->` of a Markdown file."""
    before, opening, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name} -->")
    _, closing, after = rest.partition(f"<!-- /{name} -->")
    if not closing:
        raise SystemExit(f"{path} has no place for the table {name}: <!-- {name} --> … <!-- /{name} -->")
    path.write_text(f"{before}{opening}\n\n{text}\n{closing}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", choices=TABLES, default="methods")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="w4a8")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each row")
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--processes", type=int, default=2, help="rows trained, and images made, at once")
    parser.add_argument("--docs", type=Path, help="put the tables in their place in this Markdown file")
    parser.add_argument("--place", help="its name there; TABLE-PRECISION if not given")
    arguments = parser.parse_args()
    # rows that train beside each other share the cores: more threads than cores wait for one another
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.processes))
    folder: Path = arguments.folder / f"{arguments.table}-{arguments.precision}"
    rows = [row for row in TABLES[arguments.table] if not arguments.only or row.name in arguments.only]
    rows = [row for row in rows if arguments.precision in row.precisions]
    runs: dict[str, Path] = {}
    for seed in range(arguments.seeds):
        named = {row.name if arguments.seeds == 1 else f"{row.name}-seed{seed}": row for row in rows}
        runs |= (of_seed := {name: folder / "runs" / name for name in named})
        first = next(iter(of_seed.values()))
        with ThreadPoolExecutor(arguments.processes) as pool:
            # all rows take the dataset of the first, which is there once its training has begun in earnest
            train(rows[0], first, None, arguments.precision, seed)
            rest = [(named[name], run) for name, run in of_seed.items() if run != first]
            for done in [pool.submit(train, row, run, first, arguments.precision, seed) for row, run in rest]:
                done.result()
    out = folder / "evaluation"
    candidates = [f"{name}={run}" for name, run in runs.items()]
    options = ["--split", "held_out", "--num-images", str(arguments.images), "--out", str(out)]
    options += ["--processes", str(arguments.processes)]
    sdq(["evaluate", *candidates, *options])
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    if arguments.seeds > 1:
        text = f"{table_of_seeds(results, rows, arguments.seeds)}\n"
    else:
        text = f"{table(results, runs)}\n\n{differences(results, next(iter(runs)))}\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    if arguments.docs is not None:
        insert(arguments.docs, arguments.place or f"{arguments.table}-{arguments.precision}", text)
    print(text)


if __name__ == "__main__":
    main()
