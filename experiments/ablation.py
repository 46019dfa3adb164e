"""Which alignment helps? The paper's ablation (arXiv 2509.23760, Figure 8) on the shapes world.

    python -m experiments.ablation                      the paper's four arms
    python -m experiments.ablation --arms unseen heavy  a search: other forms of an alignment

The paper's arms are neither alignment, cross-modal, intrinsic and both. Every arm trains on
text-image pairs with three seeds. All arms have the same data, autoencoder,
teacher, noise and steps. A seed changes the initial weights, the noise and the order of the data.
Each run is scored on held-out scenes, with its averaged weights, at some steps on the way and at
its end. The minutes of an arm with the intrinsic alignment include those of its teacher.

Results go to --out: results.jsonl, table.md and curve.svg. The same command continues an
interrupted ablation.
"""
import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import write_atomically
from config import PRESETS, RunFiles, TrainConfig, parts_of, write_config
from experiments.evaluate import held_out_examples, score_pairs
from experiments.parts import prepare
from run_folder import load_tasks, read_seconds, timed
from sample import Pipeline
from text_encoder import T5Tokenizer
from train import Ranks, align, caught_signals, train

OFF = {"cross_weight": 0.0, "intrinsic_weight": 0.0}
PAPER = ("neither", "cross", "intrinsic", "both")
ARMS = {                                            # changes to the preset: PAPER, then the search
    "neither": OFF,
    "cross": OFF | {"cross_weight": 0.05},
    "intrinsic": OFF | {"intrinsic_weight": 0.1},
    "both": {"cross_weight": 0.05, "intrinsic_weight": 0.1},
    "warm": OFF | {"cross_weight": 0.05, "cross_temperature": 0.5},
    "heavy": OFF | {"cross_weight": 0.5},
    "unseen": OFF | {"cross_weight": 0.05, "cross_unseen": True},
    "unseen-heavy": OFF | {"cross_weight": 0.5, "cross_unseen": True},
    "intrinsic-heavy": OFF | {"intrinsic_weight": 0.5},
    "intrinsic-early": OFF | {"intrinsic_weight": 0.1, "align_depth": 1},
    "intrinsic-late": OFF | {"intrinsic_weight": 0.1, "align_depth": 3},
}
FIGURES = {                                         # figure -> task and name in the scores
    "objects": ("text_to_image", "objects"),
    "scenes": ("text_to_image", "exact"),
    "captions": ("captions", "exact"),
}
ALONE = Ranks(0, 1, torch.device("cpu"))


# ---------------------------------------------------------------- files

def parts_folder(out: Path) -> Path:
    return out / "parts"


def arm_folder(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm}-{seed}"


def results_file(folder: Path) -> Path:
    """The results of one run, or of the whole ablation."""
    return folder / "results.jsonl"


def write_lines(file: Path, records: Iterable[dict]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(file, lambda path: path.write_text(text))


# ---------------------------------------------------------------- runs

def arm_config(arm: str, seed: int, out: Path, base: TrainConfig) -> TrainConfig:
    """Configure one run; its data and frozen parts are the shared ones."""
    parts = parts_of(base, parts_folder(out))
    return replace(
        base,
        out=str(arm_folder(out, arm, seed)),
        seed=seed,
        data=str(parts.data[0].parent),
        vae_path=str(parts.vae),
        t5_path=str(parts.text_encoder),
        tokenizer_path=str(parts.tokenizer),
        teacher_path=str(parts.teacher),
        **ARMS[arm])


def prepare_all(base: TrainConfig, folder: Path) -> None:
    """Make the shared parts and the teacher's features, which parallel runs then only read."""
    prepare(base, folder)
    if "features" in read_seconds(folder):
        return
    parts = parts_of(base, folder)
    with timed(folder, "features"):
        dataset = load_tasks(base, parts, T5Tokenizer(parts.tokenizer))
        align(dataset, base, parts, base.model.align_dims[1], ALONE)


def score_run(config: TrainConfig, scenes: int) -> list[dict]:
    """Score the averaged weights that a run has kept, on up to `scenes` held-out pairs."""
    files = RunFiles(config.out)
    parts = parts_of(config, files.folder)
    metrics = [json.loads(line) for line in files.metrics.read_text().splitlines()]
    seconds = {line["step"]: line["seconds"] for line in metrics}
    pairs = [e for e in held_out_examples(files.folder) if e.prompt == e.caption][:scenes]
    results = []
    for step in config.keep:
        pipeline = Pipeline.from_parts(
            files.kept(step), parts.vae, parts.text_encoder, parts.tokenizer, None, config.sampling)
        scores, _ = score_pairs(pipeline, pairs, ceiling=False)
        result = {"step": step, "seconds": seconds[step], "n": len(pairs)}
        result |= {figure: scores[task][name] for figure, (task, name) in FIGURES.items()}
        results.append(result)
    return results


def run_one(arm: str, seed: int, out: Path, base: TrainConfig, threads: int, scenes: int) -> bool:
    """Train one arm with one seed from its last checkpoint, then score it.

    Returns False if a signal stopped the training.
    """
    torch.set_num_threads(threads)
    config = arm_config(arm, seed, out, base)
    folder = arm_folder(out, arm, seed)
    write_config(config, folder)
    if not train(config, ALONE, parts_of(config, folder), folder):
        return False
    results = [{"arm": arm, "seed": seed} | result for result in score_run(config, scenes)]
    write_lines(results_file(folder), results)
    return True


def run_all(tasks: Sequence[tuple], jobs: int) -> bool:
    """Call `run_one` with the arguments in every task, `jobs` at a time.

    Returns False if a signal stopped the runs, after each has saved its state.
    """
    waiting, running, complete = list(tasks), set(), True
    spawn = multiprocessing.get_context("spawn")
    with (ProcessPoolExecutor(jobs, spawn, max_tasks_per_child=1) as pool,   # comparable timings
          caught_signals() as signals,
          tqdm(total=len(tasks), desc="runs", unit="run") as bar):
        while waiting or running:
            while waiting and len(running) < jobs:      # a submitted task cannot be withdrawn
                running.add(pool.submit(run_one, *waiting.pop(0)))
            done, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            finished = [future.result() for future in done]
            complete = complete and all(finished)
            bar.update(len(done))
            if signals or not complete:
                for worker in multiprocessing.active_children():
                    worker.terminate()                  # SIGTERM: the training saves and ends
                return False
    return complete


# ---------------------------------------------------------------- results

def select(results: Sequence[dict], **fields) -> list[dict]:
    """The results that have these values."""
    return [r for r in results if all(r[name] == value for name, value in fields.items())]


def collect(out: Path, arms: Iterable[str]) -> list[dict]:
    """Read the results of all finished runs and add the minutes until each.

    Minutes follow from the arm's median time per step, since single runs share the machine with
    others, plus the time of the teacher where the arm has one.
    """
    results = []
    for arm in arms:
        for file in sorted(out.glob(f"{arm}-[0-9]*/results.jsonl")):
            results += [json.loads(line) for line in file.read_text().splitlines()]
    seconds = read_seconds(parts_folder(out))
    for arm in {r["arm"] for r in results}:
        of_arm = select(results, arm=arm)
        per_step = np.median([r["seconds"] / r["step"] for r in of_arm])
        has_teacher = ARMS[arm]["intrinsic_weight"] > 0
        teacher = seconds["teacher"] + seconds["features"] if has_teacher else 0.0
        for r in of_arm:
            r["minutes"] = (teacher + per_step * r["step"]) / 60
    return results


def at_time(results: list[dict], arm: str, figure: str, minutes: float) -> np.ndarray:
    """A figure of each run of an arm at a time, (seeds,); NaN before its first and after its last.

    Between two scores it is linear in the logarithm of time.
    """
    of_arm = select(results, arm=arm)
    values = []
    for seed in sorted({r["seed"] for r in of_arm}):
        points = sorted((r["minutes"], r[figure]) for r in select(of_arm, seed=seed))
        times, scores = zip(*points)
        values.append(np.interp(
            np.log(minutes), np.log(times), scores, left=np.nan, right=np.nan))
    return np.array(values)


# ---------------------------------------------------------------- tables

def format_cell(values: Sequence[float]) -> str:
    """Mean and standard deviation of the seeds; "-" if one of them is missing."""
    values = np.asarray(values, dtype=float)
    if not len(values) or np.isnan(values).any():
        return "-"
    if len(values) == 1:
        return f"{values.mean():.3f}"
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|---" * len(rows[0]) + "|"
    return "\n".join([head, rule, *body, ""])


def step_table(results: list[dict], arms: Sequence[str], figure: str) -> str:
    steps = sorted({r["step"] for r in results})
    rows = [[f"{figure} at step", *map(str, steps)]]
    for arm in arms:
        seeds = [[r[figure] for r in select(results, arm=arm, step=step)] for step in steps]
        rows.append([arm, *map(format_cell, seeds)])
    return markdown_table(rows)


def time_table(results: list[dict], arms: Sequence[str], figure: str) -> str:
    """Compare the arms after 1, 2, 4 and 8 minutes, and when the fastest arm ends."""
    ends = [max(r["minutes"] for r in select(results, arm=arm)) for arm in arms]
    times = [1.0, 2.0, 4.0, 8.0, min(ends)]
    rows = [[f"{figure} after minutes", *(f"{minutes:.1f}" for minutes in times)]]
    for arm in arms:
        seeds = [at_time(results, arm, figure, minutes) for minutes in times]
        rows.append([arm, *map(format_cell, seeds)])
    return markdown_table(rows)


def tables(results: list[dict], arms: Sequence[str]) -> str:
    """Compare the arms in every figure, at equal steps and at equal time, as Markdown."""
    arms = [arm for arm in arms if select(results, arm=arm)]
    parts = []
    for figure in FIGURES:
        parts.append(step_table(results, arms, figure))
        parts.append(time_table(results, arms, figure))

    last = max(r["step"] for r in results)
    seeds, paces = [], []
    for arm in arms:
        seeds.append(f"{arm} {len({r['seed'] for r in select(results, arm=arm)})}")
        end = select(results, arm=arm, step=last)[0]
        paces.append(f"{arm} {60e3 * end['minutes'] / end['step']:.0f}")
    parts.append(
        f"Held-out scenes: {results[0]['n']}. Seeds: {', '.join(seeds)}. "
        f"Milliseconds a step, teacher included: {', '.join(paces)}.\n")
    return "\n".join(parts)


# ---------------------------------------------------------------- curves

PANEL_WIDTH, PANEL_HEIGHT = 330, 240                # pixels, labels included
MARGIN, TOP = 40, 30                                # pixels beside the frame and above it
WIDTH, HEIGHT = PANEL_WIDTH - 55, PANEL_HEIGHT - 70         # pixels of the frame
COLORS = (                                          # as many as ARMS
    "#777777", "#d08020", "#2060c0", "#208040", "#a03080", "#20a0a0", "#902020", "#606020",
    "#4040a0", "#a0a020", "#000000")


class Panel:
    """The plot of one figure: scores from 0 to 1 over minutes, on a logarithmic axis."""

    def __init__(self, figure: str, left: int, start: float, end: float):
        self.figure, self.left = figure, left
        self.low, self.high = np.log2(start), np.log2(end)

    def x(self, minutes: float) -> float:
        return self.left + WIDTH * (np.log2(minutes) - self.low) / (self.high - self.low)

    def y(self, score: float) -> float:
        return TOP + HEIGHT * (1 - score)

    def frame(self) -> str:
        parts = [
            f'<text x="{self.left}" y="16" font-size="13">{self.figure}</text>',
            f'<rect x="{self.left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" '
            'stroke="#bbb"/>']
        for score in (0, 0.25, 0.5, 0.75, 1):
            y = self.y(score) + 4
            parts.append(f'<text x="{self.left - 30}" y="{y:.0f}">{score}</text>')
        for minutes in (0.5, 1, 2, 4, 8, 16):
            if self.low <= np.log2(minutes) <= self.high:
                x, y = self.x(minutes), TOP + HEIGHT + 14
                parts.append(f'<text x="{x:.0f}" y="{y}">{minutes}</text>')
        return "".join(parts)

    def curve(self, results: Sequence[dict], color: str) -> str:
        """Draw the mean of the seeds as a curve, their range as vertical lines."""
        ranges, points = [], []
        for step in sorted({r["step"] for r in results}):
            at_step = select(results, step=step)
            scores = [r[self.figure] for r in at_step]
            x, y = self.x(at_step[0]["minutes"]), self.y(np.mean(scores))
            low, high = self.y(min(scores)), self.y(max(scores))
            points.append(f"{x:.1f},{y:.1f}")
            ranges.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" '
                          f'stroke="{color}"/>')
        line = (f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" '
                'stroke-width="1.6"/>')
        return "".join(ranges) + line


def curves_svg(results: list[dict], arms: Sequence[str]) -> str:
    """Draw every figure over minutes, side by side, with a legend of the arms below."""
    width = len(FIGURES) * PANEL_WIDTH
    minutes = [r["minutes"] for r in results]
    parts = []
    for i, figure in enumerate(FIGURES):
        panel = Panel(figure, MARGIN + i * PANEL_WIDTH, min(minutes), max(minutes))
        parts.append(panel.frame())
        for arm, color in zip(arms, COLORS):
            parts.append(panel.curve(select(results, arm=arm), color))
    spacing = min(110, (width - MARGIN) // len(arms))
    for i, (arm, color) in enumerate(zip(arms, COLORS)):
        x, y = MARGIN + i * spacing, PANEL_HEIGHT - 8
        parts.append(f'<text x="{x}" y="{y}" fill="{color}" font-size="13">{arm}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{PANEL_HEIGHT}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'{"".join(parts)}</svg>\n')


# ---------------------------------------------------------------- command line

def argument_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m experiments.ablation", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/ablation"),
                   help="folder of the ablation (default: %(default)s)")
    p.add_argument("--arms", nargs="+", choices=ARMS, default=PAPER, metavar="ARM",
                   help=f"any of {', '.join(ARMS)} (default: the first four)")
    p.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="N",
                   help="seeds; every arm has a run with each (default: 0 1 2)")
    p.add_argument("--preset", choices=("tiny", "mini"), default="tiny",
                   help="mini is for a rehearsal (default: %(default)s)")
    p.add_argument("--steps", type=int, default=6000,
                   help="training steps of every run (default: %(default)s)")
    p.add_argument("--scored", type=int, nargs="+", default=(600, 1200, 2400, 4800), metavar="STEP",
                   help="steps to score besides the last one (default: 600 1200 2400 4800, after "
                        "about 1, 2, 4 and 8 minutes)")
    p.add_argument("--scenes", type=int, default=240,
                   help="held-out scenes that are scored (default: %(default)s)")
    p.add_argument("--jobs", type=int, default=2,
                   help="runs at a time, which share the threads (default: %(default)s)")
    return p


def claim_folder(out: Path, base: TrainConfig, scenes: int) -> bool:
    """Write settings.json; False, and nothing is written, if it is there with other settings."""
    file = out / "settings.json"
    text = json.dumps(asdict(base) | {"scenes": scenes}) + "\n"
    if file.exists() and json.loads(file.read_text()) != json.loads(text):
        return False
    write_atomically(file, lambda path: path.write_text(text))
    return True


def write_results(out: Path) -> None:
    """Write results.jsonl, table.md and curve.svg from all finished runs, and print the tables."""
    results = collect(out, ARMS)
    arms = list(dict.fromkeys(r["arm"] for r in results))
    table, curves = tables(results, arms), curves_svg(results, arms)
    write_lines(results_file(out), results)
    write_atomically(out / "table.md", lambda file: file.write_text(table))
    write_atomically(out / "curve.svg", lambda file: file.write_text(curves))
    print(f"{table}\nwrote {out}/results.jsonl, table.md and curve.svg")


def main(argv: Sequence[str] | None = None) -> None:
    p = argument_parser()
    a = p.parse_args(argv)
    if a.jobs < 1 or a.steps < 1 or a.scenes < 1:
        p.error("--jobs, --steps and --scenes must be positive")
    before_end = {step for step in a.scored if 0 < step < a.steps}
    keep = tuple(sorted({*before_end, a.steps}))
    base = replace(PRESETS[a.preset], weights="text_to_image=1", steps=a.steps, keep=keep)
    threads = max(1, torch.get_num_threads() // a.jobs)
    torch.set_num_threads(threads)                      # teacher and runs: comparable times
    try:
        if not claim_folder(a.out, base, a.scenes):
            p.error(f"{a.out} holds an ablation with other settings (settings.json); "
                    "choose another --out")
        prepare_all(base, parts_folder(a.out))
        tasks = [
            (arm, seed, a.out, base, threads, a.scenes)
            for seed in a.seeds for arm in a.arms
            if not results_file(arm_folder(a.out, arm, seed)).exists()]
        finished = run_all(tasks, a.jobs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        finished = False
    if not finished:
        sys.exit("interrupted; the same command continues")
    write_results(a.out)


if __name__ == "__main__":
    main()
