"""Exact scores on the shapes world: generated pictures are read back into scenes, captions are parsed, and both are compared.

    python evaluate.py shapes --run runs/tiny       scores.json, samples.png and report.html of a run, written into its folder

What the scorer itself gets wrong on rendered pictures, and what the autoencoder alone loses, stands beside every score.
"""
import argparse
import base64
import html
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import shapes
from checkpoint import write_atomically
from data import Example, load_image, read_jsonl, to_pictures
from sample import Pipeline
from shapes import Scene


# ---------------------------------------------------------------- scores

def by_count(scenes: Sequence[Scene], exact: np.ndarray) -> dict[str, float]:
    """The share of exact ones among the scenes with one, two, ... objects."""
    counts = np.array([len(scene.objects) for scene in scenes])
    return {str(c): float(exact[counts == c].mean()) for c in sorted(set(counts.tolist()))}


def compare_pictures(scenes: Sequence[Scene], pictures: Sequence[np.ndarray]) -> dict:
    """How well pictures (64, 64, 3) uint8 show the scenes that they should.

    objects: share of the wanted objects that are there with shape, colour, size and place all right; exact: share of pictures
    with all of them, nothing else and the right background; outline_error: mean absolute error (0 to 255) inside the objects'
    cells against a clean drawing of what the picture shows; by attribute: share of the wanted objects whose cell has an object
    with that attribute right.
    """
    read = [shapes.read_picture(picture) for picture in pictures]
    exact = np.array([found.content() == scene.content() for scene, (found, _) in zip(scenes, read)])
    pairs = [(wanted, next((o for o in found.objects if o.cell == wanted.cell), None))
             for scene, (found, _) in zip(scenes, read) for wanted in scene.objects]
    return {"n": len(scenes),
            "objects": float(np.mean([found is not None and found[:4] == wanted[:4] for wanted, found in pairs])),
            "exact": float(exact.mean()),
            "exact_by_count": by_count(scenes, exact),
            "place": float(np.mean([found is not None for _, found in pairs]))} | {
            name: float(np.mean([found is not None and getattr(found, name) == getattr(wanted, name) for wanted, found in pairs]))
            for name in ("shape", "color", "size")} | {
            "background": float(np.mean([found.background == scene.background for scene, (found, _) in zip(scenes, read)])),
            "outline_error": float(np.mean([error for _, error in read]))}


def compare_captions(scenes: Sequence[Scene], captions: Sequence[str]) -> dict:
    """Share of captions that parse into exactly their scene."""
    parsed = [shapes.parse_caption(text) for text in captions]
    exact = np.array([found is not None and found.content() == scene.content() for scene, found in zip(scenes, parsed)])
    return {"n": len(scenes), "exact": float(exact.mean()), "exact_by_count": by_count(scenes, exact),
            "grammatical": float(np.mean([found is not None for found in parsed]))}


def in_chunks(function, n: int, size: int, label: str) -> list:
    """function(slice) over 0 .. n, `size` at a time, results joined."""
    return [x for i in tqdm(range(0, n, size), desc=label, unit="batch") for x in function(slice(i, i + size))]


def score_shapes(pipeline: Pipeline, examples: Sequence[Example], seed: int = 0,
                 chunk: int = 100) -> tuple[dict, np.ndarray, list[str]]:
    """Scores of every held-out example, with the generated pictures (n, 64, 64, 3) uint8 and the captions."""
    scenes = [shapes.parse_caption(e.caption) for e in examples]
    images = torch.stack([load_image(e.image, pipeline.settings.image_size) for e in examples])          # (n, 3, H, W)

    def reconstruct(part: slice) -> Tensor:
        with torch.no_grad():
            return pipeline.vae.decode(pipeline.encode_images(images[part])).float()                     # (b, 3, H, W)

    rebuilt = to_pictures(torch.stack(in_chunks(reconstruct, len(examples), chunk, "autoencoder alone")))
    drawn = to_pictures(torch.stack(in_chunks(lambda part: pipeline.draw([e.prompt for e in examples[part]], seed + part.start),
                                              len(examples), chunk, "drawing held-out captions")))
    captions = in_chunks(lambda part: pipeline.caption(images[part], seed), len(examples), chunk, "captioning held-out pictures")
    scorer, vae = compare_pictures(scenes, to_pictures(images)), compare_pictures(scenes, rebuilt)
    scores = {"text_to_image": compare_pictures(scenes, drawn), "captions": compare_captions(scenes, captions),
              "ceiling": {"scorer": scorer["exact"], "vae": vae["exact"], "vae_outline_error": vae["outline_error"]}}
    return scores, drawn, captions


# ---------------------------------------------------------------- pictures and the report

def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def samples_grid(examples: Sequence[Example], drawn: Sequence[np.ndarray], captions: Sequence[str], columns: int = 6) -> Image.Image:
    """A labelled sheet: above, prompts and the pictures drawn of them; below, pictures and the captions written of them."""
    tile, text_height, font = 128, 116, ImageFont.load_default(size=11)
    rows = -(-len(examples) // columns)
    sheet = Image.new("RGB", (columns * (tile + 12) + 12, 2 * (rows * (tile + text_height) + 30)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    originals = [np.asarray(Image.open(e.image)) for e in examples]
    for title, pictures, texts in (("prompt, and the picture drawn", drawn, [e.prompt for e in examples]),
                                   ("picture, and the caption written", originals, captions)):
        draw.text((12, top + 8), title, fill="black", font=ImageFont.load_default(size=15))
        top += 30
        for i, (picture, text) in enumerate(zip(pictures, texts)):
            x, y = 12 + (i % columns) * (tile + 12), top + (i // columns) * (tile + text_height)
            sheet.paste(Image.fromarray(picture).resize((tile, tile), Image.Resampling.NEAREST), (x, y))
            draw.rectangle((x - 1, y - 1, x + tile, y + tile), outline="gray")
            draw.multiline_text((x, y + tile + 4), _wrap(text, 23), fill="black", font=font, spacing=2)
        top += rows * (tile + text_height)
    return sheet


def curve_svg(title: str, steps: Sequence[float], values: Sequence[float], width: int = 420, height: int = 200) -> str:
    """One curve as inline SVG, values on a logarithmic axis."""
    logs = np.log10(np.maximum(values, 1e-6))
    low, high = logs.min(), max(logs.max(), logs.min() + 1e-3)
    x = 50 + (width - 60) * np.array(steps) / max(steps)
    y = 20 + (height - 45) * (high - logs) / (high - low)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    return (f'<svg width="{width}" height="{height}" font-family="sans-serif" font-size="11">'
            f'<text x="50" y="12">{html.escape(title)}</text>'
            f'<polyline points="{points}" fill="none" stroke="steelblue" stroke-width="1.5"/>'
            f'<text x="2" y="26">{10 ** high:.3g}</text><text x="2" y="{height - 25}">{10 ** low:.3g}</text>'
            f'<text x="{width - 80}" y="{height - 6}">step {max(steps):.0f}</text></svg>')


def table_rows(scores: dict) -> list[tuple[str, str]]:
    """The scores as (what, value) for the screen and the report."""
    t, c, ceiling = scores["text_to_image"], scores["captions"], scores["ceiling"]
    by_count = ", ".join(f"{k}: {v:.3f}" for k, v in t["exact_by_count"].items())
    return [("held-out scenes", str(t["n"])),
            ("generated objects all right", f"{t['objects']:.4f}"),
            ("  place / shape / colour / size", f"{t['place']:.4f} / {t['shape']:.4f} / {t['color']:.4f} / {t['size']:.4f}"),
            ("generated scenes exact", f"{t['exact']:.4f}   (by number of objects {by_count})"),
            ("captions exact", f"{c['exact']:.4f}"),
            ("outline error (0 to 255)", f"{t['outline_error']:.2f}   (autoencoder alone {ceiling['vae_outline_error']:.2f})"),
            ("ceiling: scorer on true pictures", f"{ceiling['scorer']:.4f}"),
            ("ceiling: autoencoder alone", f"{ceiling['vae']:.4f}"),
            ("seconds", ", ".join(f"{k} {v:.0f}" for k, v in scores["seconds"].items()))]


def report_html(scores: dict, metrics: Sequence[dict], grid: Image.Image) -> str:
    """A self-contained page: scores, loss curves, the sample sheet."""
    png = io.BytesIO()
    grid.save(png, "PNG", optimize=True)
    names = [name for name in ("loss", "flow_matching", "masked_token", "contrastive") if name in metrics[-1]]
    curves = "".join(curve_svg(name, [m["step"] for m in metrics], [m[name] for m in metrics]) for name in names)
    rows = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in table_rows(scores))
    return (f'<!doctype html><meta charset="utf-8"><title>UniAlignment on the shapes world</title>'
            f'<body style="font-family:sans-serif">'
            f'<h1>UniAlignment on the shapes world</h1><h2>Scores on held-out scenes</h2><table cellpadding="4">{rows}</table>'
            f'<h2>Training losses</h2>{curves}<h2>Samples</h2>'
            f'<img alt="samples" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"></body>\n')


def evaluate_run(run: Path, device: str | torch.device = "cpu") -> dict:
    """Score a shapes run's newest checkpoint on all its held-out scenes; writes scores.json, samples.png and report.html there."""
    start = time.time()
    pipeline = Pipeline.from_run(run, device=device)
    examples = read_jsonl(run / "data" / "test.jsonl")
    scores, drawn, captions = score_shapes(pipeline, examples)
    seconds = json.loads((run / "seconds.json").read_text()) | {"evaluation": round(time.time() - start, 1)}
    scores = {"seconds": {"total": round(sum(seconds.values()), 1)} | seconds} | scores
    shown = slice(0, 12)
    grid = samples_grid(examples[shown], drawn[shown], captions[shown])
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_atomically(run / "scores.json", lambda file: file.write_text(json.dumps(scores, indent=2) + "\n"))
    write_atomically(run / "samples.png", lambda file: grid.save(file, "PNG"))
    write_atomically(run / "report.html", lambda file: file.write_text(report_html(scores, metrics, grid)))
    return scores


def print_scores(scores: dict) -> None:
    print("\n".join(f"{what:36} {value}" for what, value in table_rows(scores)))


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("shapes",), help="what to evaluate")
    p.add_argument("--run", type=Path, default=Path("runs/tiny"), help="folder of a training run (default: %(default)s)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    a = p.parse_args(argv)
    try:
        print_scores(evaluate_run(a.run, a.device))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
