"""The report of a run: one page that holds scores, pictures, films, curves and the command.

Scores come first, one line for each task; then samples, wrong ones marked; films of the diffusions;
curves of losses and scores; and how to repeat the run. What a run lacks is left out. To rebuild the
page from the files of a run (scores.json, samples.json, film-*.gif, metrics.jsonl, run.json, ...):

    python -m experiments.report RUN
"""
import base64
import html
import io
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from checkpoint import write_atomically
from config import PRESETS, RunFiles, read_config
from experiments.curves import curve_svg
from previews import TILE, Case, case_picture, join, text_picture
from run_folder import read_seconds, read_until

GRID = 6                                            # most pictures in a row, most rows in a section
SHOWN = 12                                          # most cases in a section

Sections = Sequence[tuple[str, Sequence[Case]]]     # (title, cases)


# ---------------------------------------------------------------- samples

def shown_cases(cases: Sequence[Case]) -> tuple[Sequence[Case], int]:
    """The first cases of a section, and how many fit in a row of a sheet."""
    columns = max(1, GRID // max(len(case.pictures) for case in cases))
    return cases[:min(SHOWN, GRID * columns)], columns


def sheet(sections: Sections) -> Image.Image:
    """Draw sections below each other, each with as many columns as fit.

    Only the first cases of a section appear; a section without cases is left out.
    """
    parts = []
    for title, cases in sections:
        if not cases:
            continue
        shown, columns = shown_cases(cases)
        pictures = [case_picture(case) for case in shown]
        parts.append(text_picture(title, GRID * TILE, 16))
        for start in range(0, len(pictures), columns):
            parts.append(join(pictures[start:start + columns], 1))
    return ImageOps.expand(Image.fromarray(join(parts, 0, gap=8)), 10, "white")


def encode_png(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def write_cases(run: Path, samples: Mapping[str, Sections]) -> None:
    """Write what the sheets show as samples.json, from which the page makes cards.

    samples: the sections of each sheet. A picture becomes [PNG in base64, width, label].
    """
    sheets = {name: [] for name in samples}
    for name, sections in samples.items():
        for title, cases in sections:
            shown = [{"pictures": [(encode_png(picture), picture.shape[1], label)
                                   for picture, label in case.pictures],
                      "text": case.text, "wrong": case.wrong}
                     for case in (shown_cases(cases)[0] if cases else ())]
            sheets[name] += [{"title": title, "cases": shown}] if shown else []
    text = json.dumps(sheets) + "\n"
    write_atomically(RunFiles(run).cases, lambda file: file.write_text(text))


def card(case: dict) -> str:
    """Show a case of samples.json; a wrong one has a thick frame and says so."""
    pictures = "".join(
        f'<figure><img alt="" class="{"small" if width < TILE else ""}" '
        f'src="data:image/png;base64,{data}"><figcaption>{html.escape(label)}</figcaption></figure>'
        for data, width, label in case["pictures"])
    mark = "<strong>✗ wrong</strong> " if case["wrong"] else ""
    return (f'<div class="card{" wrong" if case["wrong"] else ""}"><div class="row">{pictures}'
            f'</div><p>{mark}{html.escape(case["text"])}</p></div>')


def cards(title: str, cases: Sequence[dict]) -> str:
    """Show a section of samples.json, and how many of its cases are wrong if they were judged."""
    judged = [case["wrong"] for case in cases if case["wrong"] is not None]
    count = f": {sum(judged)} of the first {len(judged)} wrong" if judged else ""
    shown = "".join(card(case) for case in cases)
    return f'<h3>{html.escape(title)}{count}</h3><div class="cards">{shown}</div>'


def image_file(file: Path) -> str:
    """Embed a picture, by its name."""
    data, kind = base64.b64encode(file.read_bytes()).decode(), file.suffix[1:]
    name = html.escape(file.stem)
    heading = name.replace("_", " ").replace("-", " ").capitalize()
    return (f'<div><h3>{heading}</h3>'
            f'<img class="sheet" alt="{name}" src="data:image/{kind};base64,{data}"></div>')


def samples_part(files: RunFiles) -> str:
    """Cards of samples.json; of an older run, which has none, the sheets."""
    if not files.cases.exists():
        return "".join(image_file(file) for file in files.all_samples())
    sheets = json.loads(files.cases.read_text())
    return "".join(
        f'<section id="samples_{html.escape(name)}">'
        + "".join(cards(section["title"], section["cases"]) for section in sections) + "</section>"
        for name, sections in sheets.items())


# ---------------------------------------------------------------- all figures

# titles of figures whose name in scores.json explains too little
TITLES = {
    "text_to_image": "generated scenes",
    "n": "held out",
    "exact_by_count": "exact by number of objects",
    "by_kind": "exact by kind",
    "by_references": "exact by number of pictures",
    "multi_turn": "one after another",
    "partial": "open prompts",
    "direct": "drawn directly",
    "stochastic": "drawn with new noise in every step",
    "planned": "planned in words first",
    "strict": "and nothing else",
    "geneval": "others allowed, as GenEval",
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


def table(rows: Sequence[tuple[str, str]]) -> str:
    cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
             for name, value in rows)
    return f'<table>{"".join(cells)}</table>'


# ---------------------------------------------------------------- one line for each task

class Line(NamedTuple):
    """A task and where its score is: names in scores.json, joined by dots.

    n: the number of trials; ceiling: what the autoencoder alone reaches, where that is scored.
    kind: "share" of the trials, another "score" from 0 to 1, or an "error", of which less is better
    """
    task: str
    words: str
    score: str
    n: str
    ceiling: str = ""
    kind: str = "share"


def partial_line(words: str, score: str, group: str = "overall") -> Line:
    return Line("partial", words, f"partial.{score}.{group}", f"partial.categories_n.{group}")


LINES = (
    Line("text_to_image", "draws a full caption: every object and the background right",
         "text_to_image.exact", "text_to_image.n", "ceiling.vae"),
    partial_line("draws an open prompt, and nothing else", "direct.strict"),
    partial_line("draws an open prompt, other objects allowed as in GenEval", "direct.geneval"),
    partial_line("draws an open prompt with a negation", "direct.strict", "negation"),
    partial_line("draws an open prompt with new noise in every step, and nothing else",
                 "stochastic.strict"),
    partial_line("plans an open prompt in words, draws the plan, and nothing else",
                 "planned.strict"),
    partial_line("plans and draws, other objects allowed as in GenEval", "planned.geneval"),
    partial_line("plans and draws a prompt with a negation", "planned.strict", "negation"),
    Line("captions", "describes a picture: every word right", "captions.exact", "captions.n"),
    Line("questions", "answers a question about a picture", "questions.exact", "questions.n"),
    Line("edits", "edits a picture as told and leaves the rest", "edits.exact", "edits.n"),
    Line("edits", "edits its own results: right after the third edit",
         "edits.multi_turn.exact.3", "edits.multi_turn.n"),
    Line("edges", "draws the edges of a picture: intersection over union",
         "edges.iou", "edges.n", "ceiling.vae_edges_iou", "score"),
    Line("depth", "draws the depth of a picture: error, less is better",
         "depth.error", "depth.n", "ceiling.vae_depth_error", "error"),
    Line("pose", "draws where every arrow points", "pose.exact", "pose.n",
         "ceiling.vae_pose_exact"),
    Line("personalisation", "puts the objects of several pictures into a new one",
         "personalisation.exact", "personalisation.n"),
)


def figure(scores: dict, path: str) -> float | None:
    """A figure by its names, joined by dots; None where the scores lack it."""
    for name in path.split("."):
        scores = scores.get(name) if isinstance(scores, dict) else None
    return scores


def lines_of(scores: dict) -> list[Line]:
    """The lines that have a score; a task that LINES does not know has one for "exact"."""
    known = {line.task for line in LINES}
    others = [Line(name, figure_title(name), f"{name}.exact", f"{name}.n")
              for name in scores if name not in known]
    return [line for line in (*LINES, *others) if figure(scores, line.score) is not None]


def standard_error(share: float, n: int) -> float:
    """Of a share of n independent trials."""
    return math.sqrt(share * (1 - share) / n)


def score_row(line: Line, scores: dict) -> str:
    score, n, ceiling = (figure(scores, path) for path in (line.score, line.n, line.ceiling))
    error = f"± {standard_error(score, n):.3f}" if line.kind == "share" and n else "–"
    mark = f'<u style="left:{100 * min(ceiling, 1):.1f}%"></u>' if ceiling is not None else ""
    limit = "–" if ceiling is None else f"{ceiling:.3f}"
    bar = f'<div class="bar"><i style="width:{100 * min(score, 1):.1f}%"></i>{mark}</div>'
    return (f"<tr><th>{html.escape(line.words)}</th><td>{bar}</td><td><b>{score:.3f}</b></td>"
            f'<td data-of="error">{error}</td><td data-of="n">{n or "–"}</td>'
            f'<td data-of="autoencoder">{limit}</td></tr>')


def scores_part(scores: dict) -> str:
    """One line for each task, then every figure."""
    columns = ("task", "score", "", "standard error", "n", "autoencoder alone")
    head = "".join(f"<th>{column}</th>" for column in columns)
    rows = "".join(score_row(line, scores) for line in lines_of(scores))
    lines = f'<table class="lines"><thead><tr>{head}</tr></thead>{rows}</table>' if rows else ""
    return f"{lines}<details><summary>All figures</summary>{table(table_rows(scores))}</details>"


# ---------------------------------------------------------------- curves

LOSSES = ("loss", "flow_matching", "masked_token", "contrastive", "intrinsic")
SMOOTHED = 0.05                                     # share of a curve that a mean takes in
NEIGHBOURS = 2                                      # samplings on each side: one scores few records


def loss_points(metrics: Sequence[dict]) -> dict[str, list[tuple[float, float]]]:
    """The points (step, value) of each loss, in the order of LOSSES.

    metrics: the lines of metrics.jsonl; a line may lack some of the losses.
    """
    points = {}
    for entry in metrics:
        for name, value in entry.items():
            if name.rpartition(".")[2] in LOSSES:
                points.setdefault(name, []).append((entry["step"], value))
    return {name: points[name]
            for loss in LOSSES for name in points if name.rpartition(".")[2] == loss}


def curves(metrics: Sequence[dict], scored: Sequence[dict] = ()) -> str:
    """Draw every loss and every score over the steps, those over all tasks first, then by task.

    scored: the lines of scores.jsonl.
    """
    groups = {"": []}                               # task -> curves, in the order of appearance
    for line in dict.fromkeys(line for entry in scored for line in lines_of(entry)):
        values = [(entry["step"], figure(entry, line.score)) for entry in scored]
        points = [(step, value) for step, value in values if value is not None]
        axis = "error" if line.kind == "error" else "score"
        groups.setdefault(line.task, []).append(curve_svg(line.words, points, axis, NEIGHBOURS))
    for name, points in loss_points(metrics).items():
        svg = curve_svg(name, points, "loss", round(SMOOTHED / 2 * len(points)))
        groups.setdefault(name.rpartition(".")[0], []).append(svg)
    return "".join(f'<h3>{html.escape(figure_title(task)).capitalize() or "All tasks"}</h3>'
                   f'<div class="curves">{"".join(svgs)}</div>'
                   for task, svgs in groups.items() if svgs)


# ---------------------------------------------------------------- how to repeat the run

def flat_options(config: dict, prefix: str = "") -> dict[str, str]:
    """The fields of a configuration as options of train.py, with their values as typed."""
    options = {}
    for name, value in config.items():
        if isinstance(value, dict):
            options |= flat_options(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            options[prefix + name] = ",".join(map(str, value))
        else:
            options[prefix + name] = str(value).lower() if isinstance(value, bool) else str(value)
    return options


def repeating_command(run: Path) -> str:
    """The shortest command that trains this run again, into another folder.

    Raises ValueError for a configuration that this version cannot read.
    """
    own = flat_options(asdict(read_config(RunFiles(run).config)) | {"out": f"{run.name}-again"})
    changes = {}
    for preset, config in PRESETS.items():
        defaults = flat_options(asdict(config))
        changes[preset] = {name: own[name] for name in own if own[name] != defaults[name]}
    preset = min(changes, key=lambda name: len(changes[name]))
    options = [f"--{name}={value}" for name, value in changes[preset].items()]
    return shlex.join(["python", "train.py", "--preset", preset, *options])


def run_part(files: RunFiles, seconds: dict[str, float]) -> str:
    """The configuration, the times, and the command that repeats the run."""
    part = ""
    if files.config.exists():
        config = html.escape(files.config.read_text())
        part += f"<details><summary>Configuration</summary><pre>{config}</pre></details>"
    if seconds:
        times = [(figure_title(name), f"{value / 60:.1f} minutes")
                 for name, value in seconds.items()]
        part += f"<h3>Times</h3>{table(times)}"
    if files.config.exists():
        try:
            command = repeating_command(files.folder.absolute())
        except ValueError as error:                 # of a run by another version
            command = f"unknown: {error}"
        part += f"<h3>The command that repeats it</h3><pre>{html.escape(command)}</pre>"
    return part


# ---------------------------------------------------------------- the page

STYLE = Path(__file__).with_name("report.css")


def write_report(run: Path) -> None:
    """Write report.html of a run from the other files in its folder; images are embedded.

    Raises FileNotFoundError for a folder that holds no run.
    """
    files = RunFiles(run)
    if not any(file.exists() for file in (files.config, files.metrics, files.scores)):
        raise FileNotFoundError(f"{run}: no run.json, metrics.jsonl or scores.json in it; expected "
                                "the folder of a run")
    scores = json.loads(files.scores.read_text()) if files.scores.exists() else {}
    metrics, scored = (read_until(file, sys.maxsize, rewrite=False)
                       for file in (files.metrics, files.scored))
    films = "".join(image_file(file) for file in files.films())
    seconds = scores.get("seconds") or read_seconds(run)
    parts = {
        "Scores on held-out scenes": scores_part(scores) if scores else "",
        "Samples": samples_part(files),
        "Films": films and f'<div class="films">{films}</div>',
        "Curves": curves(metrics, scored),
        "The run": run_part(files, seconds)}
    parts = {heading: part for heading, part in parts.items() if part}
    title, name = "UniAlignment on the shapes world", html.escape(files.folder.absolute().name)
    steps = f", {metrics[-1]['step']} steps" if metrics else ""
    links = "".join(f'<a href="#part{i}">{heading}</a>' for i, heading in enumerate(parts))
    body = "".join(f'<h2 id="part{i}">{heading}</h2>{part}'
                   for i, (heading, part) in enumerate(parts.items()))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}: {name}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><h1>{title}</h1><p>{name}{steps}</p><nav>{links}</nav>{body}</body></html>\n")
    write_atomically(files.report, lambda file: file.write_text(page, encoding="utf-8"))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        write_report(Path(sys.argv[1]))
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
