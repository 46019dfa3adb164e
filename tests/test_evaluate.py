"""The scores: perfect pictures and captions score 1, and each kind of mistake lowers exactly what it should."""
import random

import numpy as np
import pytest
from PIL import Image

import evaluate
import shapes
from data import Example
from shapes import Object, Scene

SCENE = Scene((Object("large", "red", "circle", 0), Object("small", "blue", "square", 4)), "gray")


def score(wanted: Scene, shown: Scene) -> dict:
    return evaluate.compare_pictures([wanted], [shapes.render(shown)])


def test_perfect_pictures_and_captions():
    rng = random.Random(0)
    scenes = [shapes.random_scene(rng, 1 + i % 3) for i in range(60)]
    pictures = evaluate.compare_pictures(scenes, [shapes.render(s) for s in scenes])
    assert pictures["exact"] == pictures["objects"] == 1 and pictures["outline_error"] < 0.5 and pictures["n"] == 60
    assert pictures["exact_by_count"] == {"1": 1.0, "2": 1.0, "3": 1.0}
    assert evaluate.compare_captions(scenes, [shapes.caption(s) for s in scenes])["exact"] == 1


@pytest.mark.parametrize("change, wrong", [({"color": "green"}, "color"), ({"size": "small"}, "size"), ({"shape": "triangle"}, "shape"),
                                           ({"cell": 2}, "place")])
def test_a_wrong_attribute(change, wrong):
    shown = SCENE._replace(objects=(SCENE.objects[0]._replace(**change), SCENE.objects[1]))
    found = score(SCENE, shown)
    assert found["exact"] == 0 and found["objects"] == 0.5 and found[wrong] == 0.5
    if wrong != "place":
        assert all(found[name] == 1 for name in ("place", "shape", "color", "size") if name != wrong)


def test_something_more_and_another_background():
    more = SCENE._replace(objects=(*SCENE.objects, Object("small", "red", "circle", 8)))
    assert score(SCENE, more)["objects"] == 1 and score(SCENE, more)["exact"] == 0
    other = score(SCENE, SCENE._replace(background="white"))
    assert other["objects"] == 1 and other["background"] == 0 and other["exact"] == 0


def test_displacement_does_not_count():
    moved = SCENE._replace(objects=tuple(o._replace(shift=(1, -1)) for o in SCENE.objects))
    assert score(SCENE, moved)["exact"] == 1


def test_blur_shows_in_the_outline_error():
    sharp = shapes.render(SCENE)
    blurred = np.asarray(Image.fromarray(sharp).resize((32, 32), Image.Resampling.BILINEAR).resize((64, 64), Image.Resampling.BILINEAR))
    assert evaluate.compare_pictures([SCENE], [blurred])["outline_error"] > 3


@pytest.mark.parametrize("text", ["", "a large red circle", "a large red circle at the top left on a gray background",
                                  "a small blue square at the top left and a large red circle at the center on a gray background"])
def test_wrong_captions(text):
    assert evaluate.compare_captions([SCENE], [text])["exact"] == 0


def test_sheet_and_page(tmp_path):
    Image.fromarray(shapes.render(SCENE)).save(tmp_path / "a.png")
    text = shapes.caption(SCENE)
    examples = [Example("text_to_image", tmp_path / "a.png", (), text, text)] * 8
    sheet = evaluate.samples_grid(examples, [shapes.render(SCENE)] * 8, ["<b>"] * 8)
    assert np.asarray(sheet).std() > 10
    found = evaluate.compare_pictures([SCENE], [shapes.render(SCENE)])
    scores = {"seconds": {"total": 1.0}, "text_to_image": found, "captions": {"n": 1, "exact": 0.5},
              "ceiling": {"scorer": 1.0, "vae": 1.0, "vae_outline_error": 0.1}}
    metrics = [{"step": s, "loss": 1 / s, "flow_matching": 1 / s, "masked_token": 1.0} for s in (1, 2, 3)]
    page = evaluate.report_html(scores, metrics, sheet)
    assert page.count("<svg") == 3 and page.count("<img") == 1 and "http" not in page
    assert "0.5000" in page


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["shapes", "--run", str(tmp_path)])
    assert str(tmp_path) in str(stopped.value.code)
