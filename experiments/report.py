"""The report of a run: sheets of its samples, and a self-contained page with scores and curves.

The page shows the scores, a curve of each loss and the sheets. To rebuild it from the scores.json,
metrics.jsonl and samples*.png of a run:

    python -m experiments.report RUN
"""
import base64
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from checkpoint import write_atomically
from config import RunFiles
from previews import TILE, Case, case_picture, join, text_picture

GRID = 6                                            # most pictures in a row, most rows in a section
SHOWN = 12                                          # most cases in a section


# ---------------------------------------------------------------- sheets of samples

def sheet(sections: Sequence[tuple[str, Sequence[Case]]]) -> Image.Image:
    """Draw sections (title, cases) below each other, each with as many columns as fit.

    Only the first cases of a section appear; a section without cases is left out.
    """
    parts = []
    for title, cases in sections:
        if not cases:
            continue
        columns = max(1, GRID // max(len(case.pictures) for case in cases))
        count = min(SHOWN, GRID * columns)
        pictures = [case_picture(case) for case in cases[:count]]
        parts.append(text_picture(title, GRID * TILE, 16))
        for start in range(0, len(pictures), columns):
            parts.append(join(pictures[start:start + columns], 1))
    return ImageOps.expand(Image.fromarray(join(parts, 0, gap=8)), 10, "white")


# ---------------------------------------------------------------- curves

LOSSES = ("loss", "flow_matching", "masked_token", "contrastive", "intrinsic")


def curve_svg(title: str, points: Sequence[tuple[float, float]]) -> str:
    """Draw points (step, value) as inline SVG, on a logarithmic axis if all values are positive."""
    steps, values = np.array(points).T                                          # (n,) each
    heights = np.log(values) if values.min() > 0 else values
    x = 50 + 360 * steps / steps.max()
    y = 20 + 155 * (heights.max() - heights) / max(np.ptp(heights), 1e-3)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    return (
        '<svg width="420" height="200" font-size="11">'
        f'<text x="50" y="12">{html.escape(title)}</text>'
        f'<polyline points="{line}" fill="none" stroke="steelblue"/>'
        f'<text x="340" y="194">step {steps.max():.0f}</text>'
        f'<text x="2" y="26">{values.max():.3g}</text>'
        f'<text x="2" y="175">{values.min():.3g}</text></svg>')


def loss_curves(metrics: Sequence[dict]) -> str:
    """Draw every loss: first those over all tasks ("loss"), then those of a task ("edits.loss").

    metrics: the lines of metrics.jsonl; a line may lack some of the losses.
    """
    losses = {}                                     # name -> points, in the order of appearance
    for line in metrics:
        for name, value in line.items():
            if name.rpartition(".")[2] in LOSSES:
                losses.setdefault(name, []).append((line["step"], value))
    names = sorted(losses, key=lambda name: "." in name)
    return "".join(curve_svg(name, losses[name]) for name in names)


# ---------------------------------------------------------------- the page

# titles of figures whose name in scores.json explains too little
TITLES = {
    "text_to_image": "generated scenes",
    "n": "held out",
    "exact_by_count": "exact by number of objects",
    "by_kind": "exact by kind",
    "by_references": "exact by number of pictures",
    "multi_turn": "one after another",
    "categories": "of partial prompts, satisfied",
    "categories_n": "of partial prompts, held out",
    "color": "colour",
    "outline_error": "outline error (0 to 255)",
    "untouched": "change where nothing should (0 to 255)",
    "iou": "intersection over union",
    "error": "error (0 to 1)",
    "keypoint_error": "keypoints off by (pixels)",
}


def figure_title(name: str) -> str:
    return TITLES.get(name, name.replace("_", " "))


def format_figure(value: dict | float | None) -> str:
    """Format a number, or several with their titles."""
    if isinstance(value, dict):
        parts = (f"{figure_title(name)}: {format_figure(part)}" for name, part in value.items())
        return ", ".join(parts)
    return "-" if value is None else str(round(value, 4))


def table_rows(scores: dict, prefix: str = "") -> list[tuple[str, str]]:
    """List the scores as rows (title, value); a dictionary of numbers takes a single row."""
    rows = []
    for name, value in scores.items():
        title = f"{prefix} {figure_title(name)}".strip()
        if isinstance(value, dict) and any(isinstance(part, dict) for part in value.values()):
            rows += table_rows(value, title)
        else:
            rows.append((title, format_figure(value)))
    return rows


def write_report(run: Path) -> None:
    """Write report.html of a run from the other files in its folder; images are embedded."""
    files = RunFiles(run)
    scores = json.loads(files.scores.read_text())
    metrics = [json.loads(line) for line in files.metrics.read_text().splitlines()]

    rows = ""
    for name, value in table_rows(scores):
        rows += f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
    sheets = ""
    for file in files.all_samples():
        heading = file.stem.replace("_", " ").capitalize()
        data = base64.b64encode(file.read_bytes()).decode()
        sheets += f'<h2>{heading}</h2><img alt="{file.stem}" src="data:image/png;base64,{data}">'
    title = "UniAlignment on the shapes world"
    page = (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>'
        f'<body style="font-family:sans-serif"><h1>{title}</h1>'
        f"<h2>Scores on held-out scenes</h2><table>{rows}</table>"
        f"<h2>Training losses</h2>{loss_curves(metrics)}{sheets}</body>\n")
    write_atomically(files.report, lambda file: file.write_text(page))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        write_report(Path(sys.argv[1]))
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
