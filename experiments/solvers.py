"""Solvers of the flow on the shapes world: steps against error and exact scores.

    python -m experiments.solvers --run runs/tiny

One line for each solver, interval of guidance and number of steps: passes of the model for a
picture, the distance to the solution of 500 Euler steps from the same noise and with the same
interval (mean absolute difference of latents), the share of exact pictures, and the error of pixels
that the evaluation reports. The cases are held-out prompts and edits. The solver sde draws
new noise and so stays away from that solution in any number of steps.
"""
import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from config import SOLVERS
from experiments.evaluate import (Trial, held_out_examples, judge_drawing, judge_edit, load,
                                  respond, score)
from sample import Pipeline, flow_sigmas

STEPS = (5, 8, 10, 14, 20, 28, 50)
REFERENCE = 500                             # steps of the solution that the others are compared to
INTERVALS = ((0.0, 1.0), (0.0, 0.9), (0.2, 1.0), (0.2, 0.9))
# judge of a task, and its figure for pixels: errors (0 to 255) of objects, of cells to be left
JUDGES = {"text_to_image": (judge_drawing, "outline_error"), "edits": (judge_edit, "untouched")}


def cases(run: Path, size: int, count: int) -> dict[str, list[Trial]]:
    """The first `count` held-out cases of each task."""
    examples = held_out_examples(run)
    return {task: [load(e, size) for e in examples if e.task == task][:count] for task in JUDGES}


def draw(pipeline: Pipeline, trials: Sequence[Trial], label: str) -> tuple[list[Trial], Tensor]:
    """The results of the model, and their latents (B, C, H, W)."""
    latents, decode = [], pipeline.vae.decode

    def noted(x: Tensor) -> Tensor:
        latents.append(x)
        return decode(x)

    pipeline.vae.decode = noted
    trials = respond(pipeline, trials, 0, 50, label)
    pipeline.vae.decode = decode
    return trials, torch.cat(latents)


def passes(steps: int, shift: float, interval: tuple[float, float], each: int) -> int:
    """Passes of the model for a picture; `each`: of a guided step."""
    sigmas = flow_sigmas(steps, shift)[:-1].tolist()
    guided = sum(interval[0] <= sigma <= interval[1] for sigma in sigmas)
    return steps + guided * (each - 1)


def table(run: Path, count: int, steps_list: Sequence[int]) -> None:
    """Print the table, line by line as it is measured."""
    pipeline = Pipeline.from_run(run)
    settings = pipeline.settings
    print(f"{'task':14} {'interval':10} {'solver':6} {'steps':>5} {'passes':>6} {'distance':>8} "
          f"{'exact':>6} {'pixels':>6} {'seconds':>7}")
    for task, trials in cases(run, settings.image_size, count).items():
        each = 3 if task == "edits" and settings.image_guidance != 1 else 2
        for interval in INTERVALS:
            pipeline.settings = replace(settings, steps=REFERENCE, solver="euler",
                                        guidance_interval=interval)
            drawn, solution = draw(pipeline, trials, "reference")
            rows = [("euler", REFERENCE, drawn, solution, 0.0)]
            for solver in SOLVERS:
                for steps in steps_list:
                    pipeline.settings = replace(pipeline.settings, steps=steps, solver=solver)
                    start = time.process_time()
                    drawn, latents = draw(pipeline, trials, f"{solver} {steps}")
                    rows.append((solver, steps, drawn, latents, time.process_time() - start))
            for solver, steps, drawn, latents, seconds in rows:
                distance = (latents - solution).abs().mean().item()
                judge, pixels = JUDGES[task]
                scores = score(judge, drawn)
                cost = passes(steps, settings.shift, interval, each)
                print(f"{task:14} {interval[0]} {interval[1]}    {solver:6} {steps:5} {cost:6} "
                      f"{distance:8.4f} {scores['exact']:6.3f} {scores[pixels]:6.2f} "
                      f"{seconds:7.1f}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m experiments.solvers", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("runs/tiny"),
                   help="folder of a training run on the shapes world (default: %(default)s)")
    p.add_argument("--count", type=int, default=150, help="cases of each task "
                   "(default: %(default)s)")
    p.add_argument("--steps", type=int, nargs="+", default=STEPS, help="(default: %(default)s)")
    a = p.parse_args(argv)
    try:
        table(a.run, a.count, a.steps)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
