"""The report: sheets fit their texts, the table has every score, files of a run make a page."""
import html
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import report
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
    assert (wrong[..., 0] > wrong[..., 1] + 100).any()


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
    svg = report.loss_curves([
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
    assert "http" not in page and "grad_norm" not in page
    assert page.index(">loss<") < page.index(">edits.loss<")
    for title, value in report.table_rows(SCORES):
        assert html.escape(title) in page and html.escape(value) in page
    missing = run_report(tmp_path / "none")
    assert missing.returncode
    assert missing.stderr.startswith("error: ") and "none" in missing.stderr
