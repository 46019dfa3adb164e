"""The report of a run: sheets of its samples, and a self-contained page with scores, loss curves and those sheets.

Run alone to rebuild report.html of a run from the scores.json, metrics.jsonl and samples*.png there:   python report.py RUN
"""
import base64
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from checkpoint import write_atomically

TILE, GRID, SHOWN = 128, 6, 12                      # pixels of a picture; of a section at most: pictures in a row, or rows; cases


class Case(NamedTuple):
    """One thing that a sheet shows: pictures (h, w, 3) uint8 with what stands under each, and what stands under all of them."""
    pictures: Sequence[tuple[np.ndarray, str]]
    text: str = ""
    wrong: bool = False


# ---------------------------------------------------------------- sheets of samples

def _join(parts: Sequence[np.ndarray], axis: int, gap: int = 0) -> np.ndarray:
    """Pictures (h, w, 3) below each other (axis 0) or side by side (axis 1), white after each and where one is smaller."""
    size = max(part.shape[1 - axis] for part in parts)
    missing = [((0, gap), (0, size - part.shape[1 - axis]))[::1 - 2 * axis] for part in parts]
    return np.concatenate([np.pad(part, (*m, (0, 0)), constant_values=255) for part, m in zip(parts, missing)], axis)


def _text(text: str, width: int, size: int = 12, color: str = "black") -> np.ndarray:
    """Text broken into lines that fit, on white, (h, width, 3)."""
    font, lines = ImageFont.load_default(size), []
    for word in text.split():
        fits = lines and font.getlength(f"{lines[-1]} {word}") <= width
        lines[-1:] = [f"{lines[-1]} {word}"] if fits else [*lines[-1:], word]
    image = Image.new("RGB", (width, (size + 4) * len(lines)), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((0, (size + 4) * i), line, color, font)
    return np.asarray(image)


def _case(case: Case) -> np.ndarray:
    """Its pictures, enlarged and framed, with all of its texts, (h, w, 3)."""
    tiles = []
    for picture, label in case.pictures:
        large = Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.NEAREST)
        tiles.append(_join([np.asarray(ImageOps.expand(large, 1, "gray")), _text(label, TILE + 2)], 0, gap=4))
    row = _join(tiles, 1, gap=10)
    return _join([row, _text(case.text, row.shape[1] - 10, color="crimson" if case.wrong else "black")], 0)


def sheet(sections: Sequence[tuple[str, Sequence[Case]]]) -> Image.Image:
    """Titles, each above its first cases in as many columns as fit; without the sections that have none."""
    parts = []
    for title, cases in [section for section in sections if section[1]]:
        columns = max(1, GRID // max(len(case.pictures) for case in cases))
        images = [_case(case) for case in cases[:min(SHOWN, GRID * columns)]]
        parts += [_text(title, GRID * TILE, 16), *(_join(images[i:i + columns], 1) for i in range(0, len(images), columns))]
    return ImageOps.expand(Image.fromarray(_join(parts, 0, gap=8)), 10, "white")


# ---------------------------------------------------------------- the page

LOSSES = ("loss", "flow_matching", "masked_token", "contrastive", "intrinsic")
# what the names in the scores mean, where they say too little
NAMES = {"text_to_image": "generated scenes", "n": "held out", "exact_by_count": "exact by number of objects",
         "by_kind": "exact by kind", "by_references": "exact by number of pictures", "multi_turn": "one after another",
         "categories": "of partial prompts, satisfied", "categories_n": "of partial prompts, held out", "color": "colour",
         "outline_error": "outline error (0 to 255)", "untouched": "change where nothing should (0 to 255)",
         "iou": "intersection over union", "error": "error (0 to 1)", "keypoint_error": "keypoints off by (pixels)"}


def curve_svg(title: str, points: Sequence[tuple[float, float]]) -> str:
    """(step, value) as one curve in inline SVG, on a logarithmic axis where all values are positive."""
    steps, values = np.array(points).T                                                        # (n,) each
    heights = np.log(values) if values.min() > 0 else values
    x = 50 + 360 * steps / steps.max()
    y = 20 + 155 * (heights.max() - heights) / max(np.ptp(heights), 1e-3)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    return (f'<svg width="420" height="200" font-size="11"><text x="50" y="12">{html.escape(title)}</text>'
            f'<polyline points="{line}" fill="none" stroke="steelblue"/><text x="340" y="194">step {steps.max():.0f}</text>'
            f'<text x="2" y="26">{values.max():.3g}</text><text x="2" y="175">{values.min():.3g}</text></svg>')


def loss_curves(metrics: Sequence[dict]) -> str:
    """A curve of every loss, over all tasks ("flow_matching") and then of each ("edits.flow_matching"); a line may lack some."""
    names = dict.fromkeys(name for line in metrics for name in line if name.rpartition(".")[2] in LOSSES)
    return "".join(curve_svg(name, [(line["step"], line[name]) for line in metrics if name in line])
                   for name in sorted(names, key=lambda name: "." in name))


def _name(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))


def _told(value: dict | float | None) -> str:
    """A figure, or several by their names."""
    if isinstance(value, dict):
        return ", ".join(f"{_name(name)}: {_told(part)}" for name, part in value.items())
    return "-" if value is None else str(round(value, 4))


def table_rows(scores: dict, about: str = "") -> list[tuple[str, str]]:
    """The scores as (what, value) for the screen and the report; figures that stand in a dictionary of their own share a row."""
    rows = []
    for name, value in scores.items():
        what = f"{about} {_name(name)}".strip()
        nested = isinstance(value, dict) and any(isinstance(part, dict) for part in value.values())
        rows += table_rows(value, what) if nested else [(what, _told(value))]
    return rows


def write_report(run: Path) -> None:
    """report.html of a run from the files in its folder; it needs no others to be shown."""
    rows = "".join(f"<tr><td>{html.escape(what)}</td><td>{html.escape(value)}</td></tr>"
                   for what, value in table_rows(json.loads((run / "scores.json").read_text())))
    curves = loss_curves([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    sheets = "".join(f'<h2>{file.stem.replace("_", " ").capitalize()}</h2><img alt="{file.stem}" '
                     f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'
                     for file in sorted(run.glob("samples*.png")))
    title = "UniAlignment on the shapes world"
    page = (f'<!doctype html><meta charset="utf-8"><title>{title}</title><body style="font-family:sans-serif"><h1>{title}</h1>'
            f'<h2>Scores on held-out scenes</h2><table>{rows}</table><h2>Training losses</h2>{curves}{sheets}</body>\n')
    write_atomically(run / "report.html", lambda file: file.write_text(page))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        write_report(Path(sys.argv[1]))
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
