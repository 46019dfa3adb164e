"""The scores: perfect pictures and captions score 1, and each kind of mistake lowers exactly what it should."""
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import report
import shapes
from data import load_image, read_jsonl, to_pictures
from evaluate import Output
from shapes import Object, Scene

SCENE = Scene((Object("large", "red", "circle", 0), Object("small", "blue", "square", 4)), "gray")


def drawn(wanted: Scene, picture: np.ndarray) -> Output:
    return Output(shapes.caption(wanted), (), shapes.render(wanted), picture)


def written(wanted: Scene, text: str) -> Output:
    return Output("", (shapes.render(wanted),), shapes.caption(wanted), text)


def score(wanted: Scene, shown: Scene) -> dict:
    return evaluate.score(evaluate.judge_drawing, [drawn(wanted, shapes.render(shown))])


def test_perfect_pictures_and_captions():
    rng = random.Random(0)
    scenes = [shapes.random_scene(rng, 1 + i % 3) for i in range(60)]
    pictures = evaluate.score(evaluate.judge_drawing, [drawn(s, shapes.render(s)) for s in scenes])
    assert pictures["exact"] == pictures["objects"] == 1 and pictures["outline_error"] < 0.5 and pictures["n"] == 60
    assert pictures["exact_by_count"] == {"1": 1.0, "2": 1.0, "3": 1.0}
    captions = evaluate.score(evaluate.judge_caption, [written(s, shapes.caption(s)) for s in scenes])
    assert captions == {"n": 60, "exact": 1.0, "exact_by_count": {"1": 1.0, "2": 1.0, "3": 1.0}, "grammatical": 1.0}


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
    assert evaluate.judge_drawing(drawn(SCENE, blurred))["outline_error"] > 3


@pytest.mark.parametrize("text", ["", "a large red circle", "a large red circle at the top left on a gray background",
                                  "a small blue square at the top left and a large red circle at the center on a gray background"])
def test_wrong_captions(text):
    assert not evaluate.judge_caption(written(SCENE, text))["exact"]


# ---------------------------------------------------------------- every task, with a pipeline that knows the right pictures

def pixels_of(path) -> bytes:
    return np.asarray(Image.open(path)).tobytes()


class Perfect:
    """Stands in for a Pipeline: returns the target of every prompt and its sources, and the right texts."""
    settings = SimpleNamespace(image_size=64)
    vae = SimpleNamespace(decode=lambda latents: latents)

    def __init__(self, examples, monkeypatch):
        self.right = {(e.prompt, *map(pixels_of, e.sources)): load_image(e.image, 64) for e in examples}
        self.texts = {(e.question, pixels_of(e.image)): e.caption for e in examples if not e.sources}
        self.batches = []
        random_edits = shapes.random_edits

        def remembered(rng, scene, count):
            texts, scenes = random_edits(rng, scene, count)
            for text, before, after in zip(texts, [scene, *scenes], scenes):
                self.right[text, shapes.render(before).tobytes()] = evaluate.to_images([shapes.render(after)])[0]
            return texts, scenes
        monkeypatch.setattr(shapes, "random_edits", remembered)

    def edit(self, prompts, sources, seed=0):
        self.batches.append((len(prompts), len(sources), seed))
        keys = [[to_pictures(images[i:i + 1])[0].tobytes() for images in sources] for i in range(len(prompts))]
        return torch.stack([self.right[prompt, *key] for prompt, key in zip(prompts, keys)])

    def encode_images(self, images):
        return images

    def caption(self, images, seed=0, questions=None):
        return [self.texts[q, p.tobytes()] for q, p in zip(questions, to_pictures(images))]


class Wrong(Perfect):
    """Draws a black picture for every prompt, leaves every source picture as it is and says nothing."""

    def edit(self, prompts, sources, seed=0):
        return sources[0] if sources else torch.full((len(prompts), 3, 64, 64), -1.0)

    def encode_images(self, images):
        return -images

    def caption(self, images, seed=0, questions=None):
        return [""] * len(images)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shapes.make_world(folder, train=1, test=14)
    return folder


@pytest.fixture
def examples(world):
    return read_jsonl(world / "test.jsonl")


def test_perfect_results_have_perfect_scores(examples, monkeypatch):
    pipeline = Perfect(examples, monkeypatch)
    scores, samples = evaluate.score_shapes(pipeline, examples, seed=5, chunk=4)
    assert list(scores) == ["text_to_image", "captions", *evaluate.TASKS, "ceiling"]
    assert scores["captions"]["exact"] == scores["text_to_image"]["exact"] == scores["questions"]["exact"] == 1
    assert scores["text_to_image"]["categories"] == dict.fromkeys((*shapes.CATEGORIES, "overall"), 1.0)
    assert sum(n for name, n in scores["text_to_image"]["categories_n"].items() if name != "overall") == scores["edits"]["n"]
    assert set(scores["questions"]["by_kind"]) == set(shapes.QUESTIONS)
    assert scores["edits"]["exact"] == 1 and scores["edits"]["untouched"] == 0 and "several" in scores["edits"]["by_kind"]
    edited = {e.sources[0] for e in examples if e.task == "edits"}
    assert scores["edits"]["multi_turn"] == {"n": len(edited), "exact": {"1": 1.0, "2": 1.0, "3": 1.0}}
    assert scores["edges"]["iou"] == 1 and scores["depth"]["error"] == scores["depth"]["error_on_objects"] == 0
    assert scores["pose"] == {"n": scores["pose"]["n"], "exact": 1.0, "arrows": 1.0, "keypoint_error": 0.0}
    assert scores["personalisation"]["objects"] == scores["personalisation"]["exact"] == 1
    assert scores["personalisation"]["by_references"] == {"1": 1.0, "2": 1.0, "3": 1.0}
    assert scores["ceiling"] == {"scorer": 1.0, "vae": 1.0, "vae_outline_error": 0.0, "vae_edges_iou": 1.0,
                                 "vae_depth_error": 0.0, "vae_pose_exact": 1.0}
    assert list(samples) == ["text_to_image", "edits", "multi_turn", *list(evaluate.TASKS)[1:]]
    assert pipeline.batches[:2] == [(4, 0, 5), (4, 0, 9)] and max(size for size, _, _ in pipeline.batches) == 4
    assert {sources for _, sources, _ in pipeline.batches} == {0, 1, 2, 3}
    assert not any(case.wrong for _, cases in samples["questions"] for case in cases)


def test_wrong_results_have_low_scores(examples, monkeypatch):
    scores, samples = evaluate.score_shapes(Wrong(examples, monkeypatch), examples)
    assert scores["captions"]["exact"] == scores["text_to_image"]["exact"] == scores["questions"]["exact"] == 0
    assert scores["text_to_image"]["categories"] == dict.fromkeys((*shapes.CATEGORIES, "overall"), 0.0)
    assert scores["edits"]["exact"] == scores["edits"]["untouched"] == scores["edits"]["multi_turn"]["exact"]["3"] == 0
    assert scores["edges"]["iou"] < 0.7 and scores["depth"]["error"] > 0.2 and scores["pose"]["exact"] == 0
    ceiling = scores["ceiling"]
    assert ceiling["vae"] == 0 and ceiling["vae_edges_iou"] < 0.5 and ceiling["vae_depth_error"] > 0.5
    assert all(case.wrong and "WRONG" in case.text for _, cases in samples["questions"] for case in cases)
    json.dumps(scores, allow_nan=False)


def test_only_the_tasks_that_occur(examples, monkeypatch):
    pairs = [e for e in examples if e.task == "text_to_image" and e.prompt == e.caption]
    pipeline = Perfect(examples, monkeypatch)
    scores, samples = evaluate.score_shapes(pipeline, pairs)
    assert list(scores) == ["text_to_image", "captions", "ceiling"] and list(samples) == ["text_to_image"]
    assert "categories" not in scores["text_to_image"]
    pipeline.encode_images = None                                                             # not needed without the ceiling
    alone = evaluate.score_pairs(pipeline, pairs, ceiling=False)[0]
    assert alone == {name: scores[name] for name in ("text_to_image", "captions")} and alone["captions"]["n"] == len(pairs)
    assert list(evaluate.score_shapes(pipeline, [e for e in examples if e.task == "questions"])[0]) == ["questions", "ceiling"]


# ---------------------------------------------------------------- each kind of mistake, in the other tasks

def score_one(judge, prompt: str, sources, made, wanted) -> dict:
    return evaluate.score(judge, [Output(prompt, [shapes.render(s) for s in sources], wanted, made)])


def test_partial_prompts():
    prompts = ["a red circle", "a red circle and a blue square", "a green triangle"]
    found = evaluate.score_prompts([Output(prompt, (), None, shapes.render(SCENE)) for prompt in prompts])
    assert found == {"categories": {"colors": 0.0, "color_attribution": 1.0, "overall": 0.5},
                     "categories_n": {"colors": 2, "color_attribution": 1, "overall": 3}}
    negation = Output("one object and no circle", (), None, shapes.render(SCENE))
    assert evaluate.score_prompts([negation])["categories"]["overall"] is None


def test_edits_that_touch_something_else():
    source, target = SCENE, SCENE._replace(objects=(SCENE.objects[0]._replace(color="green"), SCENE.objects[1]))
    more = target._replace(objects=(target.objects[0], target.objects[1]._replace(color="yellow")))
    brighter = shapes.render(target)
    brighter[2:22, 22:42] += 8                      # an empty cell, one of eight untouched
    found = [score_one(evaluate.judge_edit, "make the red circle green", [source], result, shapes.render(target))
             for result in (shapes.render(target), shapes.render(source), shapes.render(more), brighter)]
    assert [f["exact"] for f in found] == [1, 0, 0, 1] and [f["untouched"] == 0 for f in found] == [True, True, False, False]
    assert found[3]["untouched"] == 1 and found[0]["by_kind"] == {"recolor": 1}
    new = shapes.render(SCENE._replace(background="white"))
    assert score_one(evaluate.judge_edit, "make the background white", [source], new, new)["untouched"] is None


def test_edges_and_depth():
    def half(judge, draw) -> dict:
        return score_one(judge, "", [SCENE], draw(SCENE._replace(objects=SCENE.objects[:1])), draw(SCENE))
    assert 0.5 < half(evaluate.judge_edges, shapes.edge_map)["iou"] < 0.65                    # the small outline is missing
    found = half(evaluate.judge_depth, shapes.depth_map)
    assert 0 < found["error"] < 0.05 and 0.1 < found["error_on_objects"] < 0.5
    grey = score_one(evaluate.judge_depth, "", [SCENE], np.full((64, 64, 3), 51, np.uint8), shapes.depth_map(Scene((), "gray")))
    assert grey == {"n": 1, "error": pytest.approx(0.2), "error_on_objects": None}


def test_poses():
    arrows = Scene((Object("large", "red", "up arrow", 0), Object("large", "red", "left arrow", 4)), "black")

    def score_pose(*objects: Object) -> dict:
        return score_one(evaluate.judge_pose, "", [arrows], shapes.pose_map(Scene(objects, "black")), shapes.pose_map(arrows))
    first, second = arrows.objects
    assert score_pose(first, second) == {"n": 1, "exact": 1, "arrows": 1, "keypoint_error": 0}
    turned = score_pose(first, second._replace(shape="right arrow"))
    assert turned["exact"] == 0 and turned["arrows"] == 0.5 and turned["keypoint_error"] == 7      # 14 for one of two
    shifted = score_pose(first, second._replace(shift=(0, 1)))
    assert shifted["exact"] == 1 and shifted["keypoint_error"] == 0.5
    assert score_pose(first, second, first._replace(cell=8))["exact"] == 0
    assert score_pose() == {"n": 1, "exact": 0, "arrows": 0, "keypoint_error": None}


def test_compositions():
    references = [Scene((o._replace(cell=4),), "white") for o in SCENE.objects]
    text = "put the object of picture 1 at the top left and that of picture 2 at the center on a gray background"

    def score_composition(scene: Scene) -> dict:
        found = score_one(evaluate.judge_composition, text, references, shapes.render(scene), shapes.render(SCENE))
        return found["objects"], found["exact"], found["by_references"]
    assert score_composition(SCENE) == (1, 1, {"2": 1})
    assert score_composition(SCENE._replace(background="white")) == (1, 0, {"2": 0})
    assert score_composition(SCENE._replace(objects=SCENE.objects[:1])) == (0.5, 0, {"2": 0})
    assert score_composition(SCENE._replace(objects=(*SCENE.objects, Object("small", "red", "circle", 8)))) == (1, 0, {"2": 0})


def test_answers():
    answers = [Output("what color is the background?", (), "gray", "gray"), Output("is there a red circle?", (), "no", "yes at the center"),
               Output("where is the red circle?", (), "at the center", "at the top left"),
               Output("how many circles are there?", (), "one at the center", "one at the top left")]
    assert evaluate.score(evaluate.judge_answer, answers) == {
        "n": 4, "exact": 0.25, "without_places": 0.5, "by_kind": {"background": 1, "count": 0, "exists": 0, "where": 0}}


def test_means_are_over_all_values_and_not_over_outputs():
    judged = iter([{"exact": True, "parts": [1, 1, 1], "by_kind": "a"}, {"exact": False, "parts": np.zeros(1), "by_kind": "b"},
                   {"exact": False, "parts": [], "by_kind": "a"}])
    assert evaluate.score(lambda o: next(judged), [None] * 3) == {"n": 3, "exact": pytest.approx(1 / 3), "parts": 0.75,
                                                                   "by_kind": {"a": 0.5, "b": 0.0}}


# ---------------------------------------------------------------- a run

def write_run(run, **values) -> None:
    run.mkdir()
    (run / "run.json").write_text(json.dumps(values))
    (run / "seconds.json").write_text('{"world": 1.0}')
    metrics = [{"step": 1, "loss": 2.0, "flow_matching": 1.0, "edits.flow_matching": 1.0, "grad_norm": 1.0},
               {"step": 2, "loss": 1.0, "flow_matching": 0.5, "questions.masked_token": 0.7, "seconds": 3.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))


def test_a_run_with_every_task(world, examples, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.Pipeline, "from_run", lambda run, device: Wrong(examples, monkeypatch))
    write_run(tmp_path / "run", data=str(world), weights="*=1")
    evaluate.main(["shapes", "--run", str(tmp_path / "run"), "--device", "cpu"])
    page, shown = (tmp_path / "run" / "report.html").read_text(), capsys.readouterr().out
    assert page.count("<svg") == 4 and page.count("<img") == 8
    for task in ("edits", "multi_turn", "edges", "depth", "pose", "personalisation", "questions"):
        assert Image.open(tmp_path / "run" / f"samples_{task}.png").width > 700 and f'alt="samples_{task}"' in page
    assert Image.open(tmp_path / "run" / "samples.png").width > 700
    for what, value in report.table_rows(json.loads((tmp_path / "run" / "scores.json").read_text())):
        assert what in shown and value in shown


def test_only_tasks_with_weight_are_scored(world, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.Pipeline, "from_run", lambda run, device: Perfect(examples, monkeypatch))
    for name, weights, tasks in (("a", "text_to_image=1", {"text_to_image", "captions"}), ("b", "edges=2,depth=0", {"edges"}),
                                 ("c", "*=1,text_to_image=0,questions=0", set(evaluate.TASKS) - {"questions"})):
        write_run(tmp_path / name, data=str(world), weights=weights)
        if name == "b":                                         # as of a run that is still training, with the parts of another
            (tmp_path / name / "seconds.json").unlink()
        scores = evaluate.evaluate_run(tmp_path / name)
        assert set(scores["seconds"]) == {"total", "evaluation"} | ({"world"} if name != "b" else set())
        assert set(scores) == tasks | {"seconds", "ceiling"}
        assert (tmp_path / name / "samples.png").is_file() == (name == "a")
        assert len(list((tmp_path / name).glob("samples_*.png"))) == {"a": 0, "b": 1, "c": 6}[name]


def test_data_that_is_no_shapes_world(tmp_path, examples, monkeypatch):
    monkeypatch.setattr(evaluate.Pipeline, "from_run", lambda run, device: Perfect(examples, monkeypatch))
    for name, data in (("a", "pairs.jsonl,more.jsonl"), ("b", str(tmp_path)), ("c", "")):
        write_run(tmp_path / name, data=data, weights="*=1")
        with pytest.raises(ValueError, match="test.jsonl") as raised:
            evaluate.evaluate_run(tmp_path / name)
        assert (data or str(tmp_path / name / "data")) in str(raised.value)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["shapes", "--run", str(tmp_path)])
    assert str(tmp_path) in str(stopped.value.code)
