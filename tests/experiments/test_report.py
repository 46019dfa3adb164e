"""The report: sheets fit their texts, the table has every score, files of a run make a page."""
import html
import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import without_bytes
from PIL import Image

from config import PRESETS, RunFiles, parse_arguments, read_config, write_config
from experiments import report
from experiments.curves import smooth
from experiments.report import Case

PICTURE = np.full((64, 64, 3), (220, 40, 40), np.uint8)
SCORES = {
    "seconds": {"total": 3.5, "world": 1.0},
    "text_to_image": {"n": 2, "exact": 0.123456, "exact_by_count": {"1": 1.0, "2": 0.0},
                      "outline_error": None},
    "edits": {"n": 1, "exact": 0.5, "multi_turn": {"n": 1, "exact": {"1": 1.0, "2": 0.25}}},
    "edges": {"n": 3, "iou": 0.75},
}


def test_a_sheet_grows_with_its_texts():
    small, large = (
        report.sheet([("title", [Case([(PICTURE, "a"), (PICTURE, "b")], text)] * 4)])
        for text in ("x", "many words " * 30))
    assert small.width == large.width >= report.GRID * report.TILE
    assert small.height < large.height


def test_text_is_broken_and_nothing_cut_off():
    text = "a large red circle at the top left and a small blue square at the center"
    narrow, wide = report.text_picture(text, 130), report.text_picture(text, 900)
    assert narrow.shape == (64, 130, 3) and wide.shape == (16, 900, 3)
    assert report.text_picture("", 130).shape == (0, 130, 3)
    assert (255.0 - narrow).sum() == pytest.approx((255.0 - wide).sum(), rel=0.03)


def test_wrong_cases_are_red():
    right, wrong = (
        np.asarray(report.sheet([("t", [Case([(PICTURE * 0, "")], "x", wrong)])])).astype(int)
        for wrong in (False, True))
    assert (right[..., 0] == right[..., 1]).all()
    is_red = wrong[..., 0] > wrong[..., 1] + 100
    assert is_red.any() and is_red.any(axis=1).sum() > report.TILE      # the frame, and the text


@pytest.mark.parametrize("pictures, shown", [(1, 12), (2, 12), (3, 12), (4, 6), (7, 6)])
def test_number_of_cases_shown(pictures, shown):
    image = report.sheet([("t", [Case([(PICTURE, "")] * pictures)] * 20), ("empty", [])])
    is_picture = (np.asarray(image) == PICTURE[0, 0]).all(-1)
    assert is_picture.sum() == shown * pictures * report.TILE ** 2


def test_table():
    assert report.table_rows(SCORES) == [
        ("seconds", "total: 3.5, world: 1.0"),
        ("generated scenes held out", "2"),
        ("generated scenes exact", "0.1235"),
        ("generated scenes exact by number of objects", "1: 1.0, 2: 0.0"),
        ("generated scenes outline error (0 to 255)", "-"),
        ("edits held out", "1"),
        ("edits exact", "0.5"),
        ("edits one after another held out", "1"),
        ("edits one after another exact", "1: 1.0, 2: 0.25"),
        ("edges", "held out: 3, intersection over union: 0.75")]


def test_curves_of_losses_that_fall_below_zero():
    svg = report.curves([
        {"step": 1, "intrinsic": 1.0, "seconds": 2.0},
        {"step": 2, "intrinsic": -1.0},
        {"step": 4, "intrinsic": 0.0}])
    assert svg.count("<svg") == 1 and "nan" not in svg
    assert 'points="140.0,20.0 230.0,175.0 410.0,97.5"' in svg
    assert 'points="410.0,20.0"' in report.curve_svg("loss", [(5, 2.0)])


def run_report(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.report", folder]
    root = Path(report.__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_a_page_from_the_files_of_a_run(tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    lines = [
        {"step": 1, "loss": 2.0, "grad_norm": 1.0},
        {"step": 2, "loss": 1.0, "edits.loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("samples_edits.png", "samples.png", "other.png"):
        Image.fromarray(PICTURE).save(tmp_path / name)
    assert run_report(tmp_path).returncode == 0
    page = (tmp_path / "report.html").read_text()
    assert page.index('alt="samples"') < page.index('alt="samples_edits"')
    assert page.count("<img") == 2 == page.count("<svg")
    assert "http" not in without_bytes(page) and "grad_norm" not in page
    assert page.index(">loss<") < page.index(">edits.loss<")
    for title, value in report.table_rows(SCORES):
        assert html.escape(title) in page and html.escape(value) in page
    missing = run_report(tmp_path / "none")
    assert missing.returncode
    assert missing.stderr.startswith("error: ") and "none" in missing.stderr


# ---------------------------------------------------------------- one line for each task

PARTIAL = {
    "n": 357, "categories_n": {"colors": 306, "negation": 51, "overall": 306},
    "direct": {"strict": {"colors": 0.25, "negation": 0.5, "overall": 0.25},
               "geneval": {"overall": 0.5}},
    "stochastic": {"strict": {"colors": 0.4, "overall": 0.4}},
    "planned": {"strict": {"overall": 0.9}, "geneval": {"overall": 0.95}, "different": 0.98}}


def rows_of(scores: dict) -> dict[str, tuple]:
    """What the page shows of each task: {words: (width of the bar, ceiling's place, figures)}."""
    rows = {}
    for row in re.findall("<tr>(.*?)</tr>", report.scores_part(scores).split("<details>")[0])[1:]:
        [words] = re.findall("<th>(.*?)</th>", row)
        [width] = re.findall('<i style="width:(.*?)%"', row)
        ceiling = re.findall('<u style="left:(.*?)%"', row)
        rows[words] = (float(width), *map(float, ceiling), *re.findall(">([^<>]+)</(?:b|td)>", row))
    return rows


def test_a_line_for_each_task():
    rows = rows_of({
        "text_to_image": {"n": 100, "exact": 0.9}, "partial": PARTIAL,
        "edits": {"n": 25, "exact": 0.5,
                  "multi_turn": {"n": 300, "exact": {"1": 1.0, "2": 0.9, "3": 0.75}}},
        "depth": {"n": 4, "error": 0.02}, "new_task": {"n": 16, "exact": 0.5},
        "ceiling": {"vae": 1.0, "vae_depth_error": 0.005}})
    assert list(rows.values()) == [
        (90, 100, "0.900", "± 0.030", "100", "1.000"),
        (25, "0.250", "± 0.025", "306", "–"), (50, "0.500", "± 0.029", "306", "–"),
        (50, "0.500", "± 0.070", "51", "–"), (40, "0.400", "± 0.028", "306", "–"),
        (90, "0.900", "± 0.017", "306", "–"), (95, "0.950", "± 0.012", "306", "–"),
        (50, "0.500", "± 0.100", "25", "–"), (75, "0.750", "± 0.025", "300", "–"),
        (2, 0.5, "0.020", "–", "4", "0.005"), (50, "0.500", "± 0.125", "16", "–")]
    words = list(rows)
    assert words[0].startswith("draws a full caption") and "negation" in words[3]
    assert words[4].startswith("draws an open prompt with new noise") and "third" in words[8]
    assert words[5].startswith("plans") and "less is better" in words[9]
    assert words[-1] == "new task"


def test_a_task_without_cases_has_no_line():
    assert rows_of({"seconds": {"total": 1.0}, "captions": {"n": 0, "exact": None}}) == {}


def test_standard_error():
    assert report.standard_error(0.2, 100) == pytest.approx(0.04)
    assert report.standard_error(1.0, 5) == 0


def test_titles_name_nothing_twice():
    titles = [title for title, _ in report.table_rows({"partial": PARTIAL})]
    assert len(set(titles)) == len(titles) == 8
    assert "open prompts planned in words first and nothing else" in titles


# ---------------------------------------------------------------- curves

def test_smoothed_values():
    assert smooth([1, 2, 6, 3, 8, 4], 0) == [1, 2, 6, 3, 8, 4]
    assert smooth([1, 2, 6, 3, 9, 4], 1) == pytest.approx([1, 3, 11 / 3, 6, 16 / 3, 6.5])
    assert smooth([0, 2, 6, 4, 8, 4], 9) == pytest.approx([0, 8 / 3, 4, 4, 4, 4])
    line = np.arange(50.0)
    assert smooth(line, 7)[:43] == pytest.approx(line[:43])     # a mean shifts nothing


def lines_in(svg: str) -> list[np.ndarray]:
    """The points (n, 2) of the raw and of the smoothed curve."""
    return [np.array([point.split(",") for point in points.split()], float)
            for points in re.findall('points="(.*?)"', svg)]


def test_axes_and_scale_of_a_loss():
    """Values on a logarithmic axis: equal ratios have equal heights; all inside of the axes."""
    svg = report.curve_svg("edits.loss", [(100, 4.0), (200, 2.0), (300, 0.5), (400, 1.0)], reach=1)
    raw, means = lines_in(svg)
    assert raw[:, 0].tolist() == [140, 230, 320, 410]
    assert raw[:, 1] == pytest.approx([20, 20 + 155 / 3, 175, 20 + 310 / 3], abs=0.1)
    assert means[1, 1] == pytest.approx(20 + 155 * math.log(4 / (6.5 / 3)) / math.log(8), abs=0.1)
    texts = re.findall("<text[^>]*>(.*?)</text>", svg)
    assert texts == ["edits.loss", "4", "0", "1.41", "200", "0.5", "400", "step",
                     "loss (logarithmic)"]


def test_a_score_has_an_axis_from_0_to_1():
    svg = report.curve_svg("right", [(1, 0.5), (2, 0.75)], "score")
    assert lines_in(svg)[0][:, 1] == pytest.approx([97.5, 58.75], abs=0.1)
    assert re.findall("<text[^>]*>(.*?)</text>", svg)[1:] == [
        "1", "0", "0.5", "1", "0", "2", "step", "score"]


def test_curves_are_grouped_by_task():
    metrics = [{"step": 1, "edits.flow_matching": 2.0, "flow_matching": 2.0, "loss": 1.0,
                "seconds": 1.0}]
    scored = [{"step": step, "edits": {"n": 4, "exact": step / 4}, "ceiling": {"vae": 1.0}}
              for step in (1, 2)] + [{"step": 3, "captions": {"n": 4, "exact": None}}]
    page = report.curves(metrics, scored)
    texts = re.findall("<h3>(.*?)</h3>|<title>(.*?)</title>", page)
    assert ["".join(text) for text in texts] == [
        "All tasks", "loss", "flow_matching", "Edits",
        "edits a picture as told and leaves the rest", "edits.flow_matching"]
    svg = page.split("<svg")[3]
    assert lines_in(svg)[0].tolist() == [[230, 136.2], [410, 97.5]]


# ---------------------------------------------------------------- samples, films, the command

class Tags(HTMLParser):
    """Checks that every tag is closed in its order; counts the tags."""
    VOID = ("meta", "img")

    def __init__(self, page: str):
        super().__init__()
        self.stack, self.count, self.text = [], {}, ""
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def whole_run(tmp_path) -> Path:
    """A folder with every file that the report reads."""
    write_config(replace(PRESETS["mini"], data="<&>", keep=(1, 2)), tmp_path)
    scores = SCORES | {"a<b>": {"n": 4, "exact": 0.5}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    (tmp_path / "scores.jsonl").write_text('{"step": 5, "edits": {"n": 1, "exact": 1.0}}\n')
    for name in ("film-picture.gif", "film-text.gif", "film.gif"):
        frames = [Image.fromarray(PICTURE + i) for i in range(2)]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    cases = [Case([(PICTURE, "a <i>label</i>")], "text", wrong) for wrong in (True, False, True)]
    report.write_cases(tmp_path, {
        "text_to_image": [("drawn", cases), ("none", [])],
        "edges": [("not judged", [Case([(PICTURE, ""), (np.tile(PICTURE, (2, 2, 1)), "")])] * 20)]})
    report.write_report(tmp_path)
    return tmp_path


def test_every_part_in_its_order(whole_run):
    page = RunFiles(whole_run).report.read_text()
    tags = Tags(page)
    headings = re.findall("<h2.*?>(.*?)</h2>", page)
    assert headings == ["Scores on held-out scenes", "Samples", "Films", "Curves", "The run"]
    assert re.findall('<a href="#(.*?)"', page) == re.findall('<h2 id="(.*?)"', page)
    assert tags.count["svg"] == 2 and tags.count["img"] == 3 + 2 * report.SHOWN + 2
    assert "<i>label" not in page and "a <i>label</i>" in tags.text and "a<b>" in tags.text
    assert '"data": "' in tags.text and "<&>" in tags.text
    for part in ('name="viewport"', "@media (prefers-color-scheme: dark)", "@media (max-width"):
        assert part in page
    assert "<script" not in page and "http" not in without_bytes(page) and "url(" not in page


def test_wrong_samples_are_marked_and_counted(whole_run):
    page = RunFiles(whole_run).report.read_text()
    assert "<h3>drawn: 2 of the first 3 wrong</h3>" in page and "<h3>not judged</h3>" in page
    assert page.count('class="card wrong"') == 2 == page.count("✗ wrong</strong>")
    assert page.count('class="small"') == 3 + report.SHOWN      # 64 pixels stay sharp, 128 do not
    assert "none" not in json.loads(RunFiles(whole_run).cases.read_text())


def test_films_are_embedded_whole(whole_run):
    page = RunFiles(whole_run).report.read_text()
    films = re.findall('alt="(film.*?)" src="data:image/gif;base64,(.*?)"', page)
    assert [name for name, _ in films] == ["film-picture", "film-text"]
    expected = (whole_run / "film-text.gif").read_bytes()
    assert report.base64.b64decode(films[1][1]) == expected


@pytest.mark.parametrize("part", ["run.json", "scores.json", "scores.jsonl", "metrics.jsonl",
                                  "samples.json", "film-text.gif"])
def test_a_part_may_be_missing(whole_run, part):
    (whole_run / part).unlink()
    report.write_report(whole_run)
    Tags(RunFiles(whole_run).report.read_text())


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="run.json"):
        report.write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_repeats_the_run(finished):
    python, script, *arguments = shlex.split(report.repeating_command(finished))
    assert (python, script) == ("python", "train.py")
    assert parse_arguments(arguments) == replace(
        read_config(RunFiles(finished).config), out=f"{finished.name}-again")
    assert arguments[:2] == ["--preset", "mini"] and "--steps=6" in arguments
    assert len(arguments) < 20                                  # what the preset says is left out


def test_the_run_of_another_version(whole_run):
    """Its configuration is shown as it is, and no command."""
    files = RunFiles(whole_run)
    values = json.loads(files.config.read_text()) | {"gone": "<1>"}
    files.config.write_text(json.dumps(values))
    report.write_report(whole_run)
    tags = Tags(files.report.read_text())
    assert '"gone": "<1>"' in tags.text and "unknown: " in tags.text
    assert "unknown field 'gone'" in tags.text
