"""The paper's ablation (UniAlignment, arXiv 2509.23760, Figure 8) on text-image pairs of the shapes world: which alignment helps?

    python ablation.py                          four arms, three seeds each: neither alignment, cross-modal, intrinsic, both
    python ablation.py --arms unseen heavy      a search: other forms of an alignment (--help lists the arms)

All arms have the same data, autoencoder, teacher, noise and steps; a seed changes initial weights, noise and the order of the data.
Each run is scored on held-out scenes on the way and at its end, with averaged weights. An interrupted ablation continues where it
was. Results go to --out: results.jsonl, table.md and curve.svg; what the teacher costs is counted in the minutes of the arms that
look at it.
"""
import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import write_atomically
from evaluate import held_out_examples, score_pairs
from sample import Pipeline
from text_encoder import T5Tokenizer
from train import PRESETS, Ranks, TrainConfig, align, caught_signals, load_tasks, parts_of, prepare, timed, train, write_config

OFF = {"cross_weight": 0.0, "intrinsic_weight": 0.0}
PAPER = ("neither", "cross", "intrinsic", "both")
ARMS = {                                # what each arm changes; first the paper's four, then the search
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
FIGURES = {"objects": ("text_to_image", "objects"), "scenes": ("text_to_image", "exact"), "captions": ("captions", "exact")}


def arm_config(arm: str, seed: int, out: Path, base: TrainConfig) -> TrainConfig:
    """The configuration of one run: the frozen parts and the data are those in out/parts."""
    parts = parts_of(base, out / "parts")
    return replace(base, out=str(out / f"{arm}-{seed}"), seed=seed, data=str(parts.data[0].parent), vae_path=str(parts.vae),
                   t5_path=str(parts.text_encoder), tokenizer_path=str(parts.tokenizer), teacher_path=str(parts.teacher), **ARMS[arm])


def prepare_all(base: TrainConfig, folder: Path) -> None:
    """What all runs share, the teacher's features as well: runs side by side only read them."""
    prepare(base, folder)
    if "features" not in json.loads((folder / "seconds.json").read_text()):
        parts = parts_of(base, folder)
        with timed(folder, "features"):
            alone = Ranks(0, 1, torch.device("cpu"))
            align(load_tasks(base, parts, T5Tokenizer(parts.tokenizer), alone), base, parts, base.model.align_dims[1], alone)


def run_one(task: tuple[str, int, Path, TrainConfig, int, int]) -> bool:
    """Train one arm with one seed from wherever it was, and score what it kept; False if a signal stopped it."""
    arm, seed, out, base, threads, scenes = task
    torch.set_num_threads(threads)
    config = arm_config(arm, seed, out, base)
    run = Path(config.out)
    parts = parts_of(config, run)
    write_config(config, run)
    if not train(config, Ranks(0, 1, torch.device("cpu")), parts, run):
        return False
    seconds = {m["step"]: m["seconds"] for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    examples = [e for e in held_out_examples(run) if e.prompt == e.caption][:scenes]
    lines = []
    for step in config.keep:
        pipeline = Pipeline.from_parts(run / f"kept-{step:08d}.safetensors", parts.vae, parts.text_encoder, parts.tokenizer, None,
                                       config.sampling)
        scores = score_pairs(pipeline, examples, ceiling=False)[0]
        lines.append({"arm": arm, "seed": seed, "step": step, "seconds": seconds[step], "n": len(examples)}
                     | {name: scores[task][figure] for name, (task, figure) in FIGURES.items()})
    write_atomically(run / "results.jsonl", lambda file: file.write_text("".join(json.dumps(line) + "\n" for line in lines)))
    return True


def run_all(tasks: list, jobs: int) -> bool:
    """`run_one` of every task, `jobs` at a time; False if a signal stopped them, after each has saved where it was."""
    waiting, running, complete = list(tasks), set(), True
    spawn = multiprocessing.get_context("spawn")
    with (ProcessPoolExecutor(jobs, spawn, max_tasks_per_child=1) as pool,      # no run is timed in another's leftovers
          caught_signals() as signals, tqdm(total=len(tasks), desc="runs", unit="run") as bar):
        while waiting or running:
            while waiting and len(running) < jobs:              # not all at once: what is submitted cannot be taken back
                running.add(pool.submit(run_one, waiting.pop(0)))
            done, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            complete &= all([future.result() for future in done])
            bar.update(len(done))
            if signals or not complete:
                for worker in multiprocessing.active_children():
                    worker.terminate()                          # SIGTERM, upon which a training saves and ends
                return False
    return complete


# ---------------------------------------------------------------- what came out

def collect(out: Path, arms: Sequence[str]) -> list[dict]:
    """The results of all finished runs, with `minutes`: those of the arm's median step, and of the teacher if the arm has one.

    The median over an arm's runs, since single runs are as fast as whatever else the machine does allows.
    """
    results = [json.loads(line) for arm in arms for file in sorted(out.glob(f"{arm}-[0-9]*/results.jsonl"))
               for line in file.read_text().splitlines()]
    prepared = json.loads((out / "parts" / "seconds.json").read_text())
    for arm in {r["arm"] for r in results}:
        mine = [r for r in results if r["arm"] == arm]
        per_step = np.median([r["seconds"] / r["step"] for r in mine])
        teacher = prepared["teacher"] + prepared["features"] if ARMS[arm]["intrinsic_weight"] else 0.0
        for r in mine:
            r["minutes"] = (teacher + per_step * r["step"]) / 60
    return results


def at_time(results: list[dict], arm: str, figure: str, minutes: float) -> np.ndarray:
    """A figure of every run of an arm at equal time, between scores linear in the logarithm of time, NaN outside; (seeds,)."""
    values = []
    for seed in sorted({r["seed"] for r in results if r["arm"] == arm}):
        mine = sorted((r["minutes"], r[figure]) for r in results if (r["arm"], r["seed"]) == (arm, seed))
        x, y = np.log([m for m, _ in mine]), [v for _, v in mine]
        values.append(np.interp(np.log(minutes), x, y, left=np.nan, right=np.nan))
    return np.array(values)


def _cell(values: Sequence[float]) -> str:
    values = np.asarray(values, dtype=float)
    if not len(values) or np.isnan(values).any():
        return "-"
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def tables(results: list[dict], arms: Sequence[str]) -> str:
    """Markdown: every figure at equal steps, and at equal time."""
    arms = [arm for arm in arms if any(r["arm"] == arm for r in results)]
    steps, lines = sorted({r["step"] for r in results}), []
    times = [2.0 ** k for k in range(4)] + [min(max(r["minutes"] for r in results if r["arm"] == arm) for arm in arms)]
    for figure in FIGURES:
        lines += [f"| {figure} at step | " + " | ".join(map(str, steps)) + " |", "|---" * (len(steps) + 1) + "|"]
        for arm in arms:
            cells = [_cell([r[figure] for r in results if r["arm"] == arm and r["step"] == step]) for step in steps]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        lines += ["", f"| {figure} after minutes | " + " | ".join(f"{t:.1f}" for t in times) + " |", "|---" * (len(times) + 1) + "|"]
        lines += [f"| {arm} | " + " | ".join(_cell(at_time(results, arm, figure, t)) for t in times) + " |" for arm in arms] + [""]
    seeds = ", ".join(f"{arm} {len({r['seed'] for r in results if r['arm'] == arm})}" for arm in arms)
    pace = ", ".join(f"{arm} {next(60e3 * (r['minutes']) / r['step'] for r in results if r['arm'] == arm and r['step'] == steps[-1]):.0f}"
                     for arm in arms)
    return "\n".join([*lines, f"Held-out scenes: {results[0]['n']}. Seeds: {seeds}. Milliseconds a step, teacher included: {pace}.", ""])


def curves_svg(results: list[dict], arms: Sequence[str], width: int = 330, height: int = 240) -> str:
    """Every figure over minutes (logarithmic), mean and range of the seeds, side by side."""
    colors = ("#777777", "#d08020", "#2060c0", "#208040", "#a03080", "#20a0a0", "#902020", "#606020", "#4040a0", "#a0a020",
              "#000000")                            # one for each of ARMS
    low, high = (np.log2(f(r["minutes"] for r in results)) for f in (min, max))
    parts = []
    for k, figure in enumerate(FIGURES):
        left, top, w, h = 40 + k * width, 30, width - 55, height - 70
        parts.append(f'<text x="{left}" y="16" font-size="13">{figure}</text>'
                     f'<rect x="{left}" y="{top}" width="{w}" height="{h}" fill="none" stroke="#bbb"/>')
        for y in (0, 0.25, 0.5, 0.75, 1):
            parts.append(f'<text x="{left - 30}" y="{top + h * (1 - y) + 4:.0f}">{y}</text>')
        for minute in (m for m in (0.5, 1, 2, 4, 8, 16) if low <= np.log2(m) <= high):
            x = left + w * (np.log2(minute) - low) / (high - low)
            parts.append(f'<text x="{x:.0f}" y="{top + h + 14}">{minute}</text>')
        for arm, color in zip(arms, colors):
            mine = [r for r in results if r["arm"] == arm]
            points = []
            for step in sorted({r["step"] for r in mine}):
                values = [r[figure] for r in mine if r["step"] == step]
                x = left + w * (np.log2(next(r["minutes"] for r in mine if r["step"] == step)) - low) / (high - low)
                y, y0, y1 = (top + h * (1 - v) for v in (np.mean(values), min(values), max(values)))
                points.append(f"{x:.1f},{y:.1f}")
                parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y0:.1f}" y2="{y1:.1f}" stroke="{color}"/>')
            parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" stroke-width="1.6"/>')
    spacing = min(110, (len(FIGURES) * width - 40) // len(arms))
    for i, (arm, color) in enumerate(zip(arms, colors)):
        parts.append(f'<text x="{40 + i * spacing}" y="{height - 8}" fill="{color}" font-size="13">{arm}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(FIGURES) * width}" height="{height}" font-family="sans-serif" '
            f'font-size="11"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n')


# ---------------------------------------------------------------- command line

def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of the ablation (default: %(default)s)")
    p.add_argument("--arms", nargs="+", choices=ARMS, default=PAPER, metavar="ARM", help=f"of {', '.join(ARMS)} (default: the first four)")
    p.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="N", help="one run of each arm for each (default: 0 1 2)")
    p.add_argument("--preset", choices=("tiny", "mini"), default="tiny", help="mini: a rehearsal (default: %(default)s)")
    p.add_argument("--steps", type=int, default=6000, help="of every run (default: %(default)s)")
    p.add_argument("--scored", type=int, nargs="+", default=(600, 1200, 2400, 4800), metavar="STEP",
                   help="steps at which runs are scored, besides the last: here about 1, 2, 4 and 8 minutes (default: 600 1200 2400 4800)")
    p.add_argument("--scenes", type=int, default=240, help="held-out scenes of a score (default: %(default)s)")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, each with its share of the threads (default: %(default)s)")
    a = p.parse_args(argv)
    if a.jobs < 1 or a.steps < 1 or a.scenes < 1:
        p.error("--jobs, --steps and --scenes must be positive")
    keep = tuple(sorted({step for step in a.scored if 0 < step < a.steps} | {a.steps}))
    base = replace(PRESETS[a.preset], weights="text_to_image=1", steps=a.steps, keep=keep)
    threads = max(1, torch.get_num_threads() // a.jobs)
    torch.set_num_threads(threads)                              # for the teacher as well, whose time is compared with that of the runs
    settings, file = json.loads(json.dumps(asdict(base) | {"scenes": a.scenes})), a.out / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        p.error(f"{a.out} holds an ablation with other settings (settings.json); choose another --out")
    try:
        (a.out / "parts").mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda file: file.write_text(json.dumps(settings) + "\n"))
        prepare_all(base, a.out / "parts")
        tasks = [(arm, seed, a.out, base, threads, a.scenes) for seed in a.seeds for arm in a.arms
                 if not (a.out / f"{arm}-{seed}" / "results.jsonl").exists()]
        finished = run_all(tasks, a.jobs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        finished = False
    if not finished:
        sys.exit("interrupted; the same command continues")
    found = collect(a.out, [arm for arm in ARMS if list(a.out.glob(f"{arm}-[0-9]*/results.jsonl"))])
    arms = list(dict.fromkeys(r["arm"] for r in found))
    write_atomically(a.out / "results.jsonl", lambda file: file.write_text("".join(json.dumps(r) + "\n" for r in found)))
    write_atomically(a.out / "table.md", lambda file: file.write_text(tables(found, arms)))
    write_atomically(a.out / "curve.svg", lambda file: file.write_text(curves_svg(found, arms)))
    print(tables(found, arms) + f"\nwrote {a.out}/results.jsonl, table.md and curve.svg")


if __name__ == "__main__":
    main()
