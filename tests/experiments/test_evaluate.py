"""The scores: perfect results score 1, and each kind of mistake lowers exactly its own figures."""
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from config import PRESETS, SampleSettings, write_config
from data import load_image, read_jsonl, to_images, to_pictures
from experiments import dataset, evaluate, language, report, world
from experiments.evaluate import Trial
from experiments.world import Object, Scene

SCENE = Scene((Object("large", "red", "circle", 0), Object("small", "blue", "square", 4)), "gray")


def drawing(target: Scene, picture: np.ndarray) -> Trial:
    return Trial(language.caption(target), (), world.render(target), picture)


def description(target: Scene, text: str) -> Trial:
    return Trial("", (world.render(target),), language.caption(target), text)


def score(target: Scene, shown: Scene) -> dict:
    return evaluate.score(evaluate.judge_drawing, [drawing(target, world.render(shown))])


def test_perfect_pictures_and_captions():
    rng = random.Random(0)
    scenes = [world.random_scene(rng, 1 + i % 3) for i in range(60)]
    drawings = [drawing(scene, world.render(scene)) for scene in scenes]
    pictures = evaluate.score(evaluate.judge_drawing, drawings)
    assert pictures["exact"] == pictures["objects"] == 1
    assert pictures["outline_error"] < 0.5 and pictures["n"] == 60
    assert pictures["exact_by_count"] == {"1": 1.0, "2": 1.0, "3": 1.0}
    descriptions = [description(scene, language.caption(scene)) for scene in scenes]
    captions = evaluate.score(evaluate.judge_caption, descriptions)
    assert captions == {
        "n": 60, "exact": 1.0, "exact_by_count": {"1": 1.0, "2": 1.0, "3": 1.0}, "grammatical": 1.0}


@pytest.mark.parametrize("change, wrong", [
    ({"color": "green"}, "color"),
    ({"size": "small"}, "size"),
    ({"shape": "triangle"}, "shape"),
    ({"cell": 2}, "place")])
def test_a_wrong_attribute(change, wrong):
    shown = SCENE._replace(objects=(SCENE.objects[0]._replace(**change), SCENE.objects[1]))
    scores = score(SCENE, shown)
    assert scores["exact"] == 0 and scores["objects"] == 0.5 and scores[wrong] == 0.5
    if wrong != "place":
        others = {"place", "shape", "color", "size"} - {wrong}
        assert all(scores[name] == 1 for name in others)


def test_something_more_and_another_background():
    more = SCENE._replace(objects=(*SCENE.objects, Object("small", "red", "circle", 8)))
    assert score(SCENE, more)["objects"] == 1 and score(SCENE, more)["exact"] == 0
    other = score(SCENE, SCENE._replace(background="white"))
    assert other["objects"] == 1 and other["background"] == 0 and other["exact"] == 0


def test_displacement_does_not_count():
    moved = SCENE._replace(objects=tuple(o._replace(shift=(1, -1)) for o in SCENE.objects))
    assert score(SCENE, moved)["exact"] == 1


def test_blur_shows_in_the_outline_error():
    sharp = Image.fromarray(world.render(SCENE))
    half = sharp.resize((32, 32), Image.Resampling.BILINEAR)
    blurred = np.asarray(half.resize((64, 64), Image.Resampling.BILINEAR))
    assert evaluate.judge_drawing(drawing(SCENE, blurred))["outline_error"] > 3


@pytest.mark.parametrize("text", [
    "",
    "a large red circle",
    "a large red circle at the top left on a gray background",
    "a small blue square at the top left and a large red circle at the center "
    "on a gray background"])
def test_wrong_captions(text):
    assert not evaluate.judge_caption(description(SCENE, text))["exact"]


# ---------------------------------------------------------------- every task, with perfect results

def pixels_of(path) -> bytes:
    return np.asarray(Image.open(path)).tobytes()


def drawn_from(text: str) -> torch.Tensor:
    """The image (3, H, W) of a full caption."""
    return to_images([world.render(language.parse_caption(text))])[0]


class Perfect:
    """A Pipeline that returns the target of every prompt and its sources, and the right texts."""
    settings = SampleSettings(image_size=64)
    vae = SimpleNamespace(decode=lambda latents: latents)

    def __init__(self, examples, monkeypatch):
        self.targets, self.texts = {}, {}
        for e in examples:
            if e.image is None:
                self.targets.setdefault((e.caption,), drawn_from(e.caption))
                self.texts[e.question] = e.caption
                continue
            self.targets[(e.prompt, *map(pixels_of, e.sources))] = load_image(e.image, 64)
            if not e.sources:
                self.texts[e.question, pixels_of(e.image)] = e.caption
        self.batches = []
        random_edits = language.random_edits

        def remembered(rng, scene, count):
            texts, scenes = random_edits(rng, scene, count)
            for text, before, after in zip(texts, [scene, *scenes], scenes):
                source = world.render(before).tobytes()
                self.targets[text, source] = to_images([world.render(after)])[0]
            return texts, scenes
        monkeypatch.setattr(language, "random_edits", remembered)

    def edit(self, prompts, sources, seed=0):
        self.batches.append((len(prompts), len(sources), seed))
        results = []
        for i, prompt in enumerate(prompts):
            pixels = [to_pictures(images[i:i + 1])[0].tobytes() for images in sources]
            results.append(self.targets[prompt, *pixels])
        return torch.stack(results)

    def encode_images(self, images):
        return images

    def plan(self, prompts, seed=0):
        return [self.texts[prompt] for prompt in prompts]

    def caption(self, images, seed=0, questions=None):
        return [self.texts[q, p.tobytes()] for q, p in zip(questions, to_pictures(images))]


class Wrong(Perfect):
    """A Pipeline that draws black for every prompt, leaves sources as they are and says nothing."""

    def edit(self, prompts, sources, seed=0):
        return sources[0] if sources else torch.full((len(prompts), 3, 64, 64), -1.0)

    def encode_images(self, images):
        return -images

    def plan(self, prompts, seed=0):
        return ["a circle"] * len(prompts)

    def caption(self, images, seed=0, questions=None):
        return [""] * len(images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A shapes world."""
    folder = tmp_path_factory.mktemp("world")
    dataset.make_world(folder, train=1, test=14)
    return folder


@pytest.fixture
def examples(folder):
    return read_jsonl(folder / "test.jsonl")


def test_perfect_results_have_perfect_scores(examples, monkeypatch):
    pipeline = Perfect(examples, monkeypatch)
    scores, samples = evaluate.score_shapes(pipeline, examples, seed=5, chunk=4)
    assert list(scores) == ["text_to_image", "captions", "partial", *evaluate.TASKS, "ceiling"]
    drawings, edits, questions = scores["text_to_image"], scores["edits"], scores["questions"]
    assert scores["captions"]["exact"] == drawings["exact"] == questions["exact"] == 1
    partial, all_right = scores["partial"], dict.fromkeys((*language.CATEGORIES, "overall"), 1.0)
    assert partial["direct"] == {"strict": all_right, "geneval": all_right}
    assert partial["stochastic"] == partial["direct"]
    assert partial["planned"] == partial["direct"] | {"different": 1.0, "parsed": 1.0}
    counts = partial["categories_n"]
    assert sum(n for name, n in counts.items() if name != "overall") == edits["n"]
    assert counts["overall"] == edits["n"] - counts["negation"]
    assert set(questions["by_kind"]) == set(language.QUESTIONS)
    assert edits["exact"] == 1 and edits["untouched"] == 0 and "several" in edits["by_kind"]
    turns = {"1": 1.0, "2": 1.0, "3": 1.0}
    assert edits["multi_turn"] == {                             # pictures of the 14 pairs
        "n": 14, "exact": turns, "standard_error": dict.fromkeys(turns, 0.0)}
    assert scores["edges"]["iou"] == 1
    assert scores["depth"]["error"] == scores["depth"]["error_on_objects"] == 0
    pose = scores["pose"]
    assert pose == {"n": pose["n"], "exact": 1.0, "arrows": 1.0, "keypoint_error": 0.0}
    assert scores["personalisation"]["objects"] == scores["personalisation"]["exact"] == 1
    assert scores["personalisation"]["by_references"] == {"1": 1.0, "2": 1.0, "3": 1.0}
    assert scores["ceiling"] == {
        "scorer": 1.0, "vae": 1.0, "vae_outline_error": 0.0, "vae_edges_iou": 1.0,
        "vae_depth_error": 0.0, "vae_pose_exact": 1.0}
    assert list(samples) == [
        "text_to_image", "partial", "edits", "multi_turn", *list(evaluate.TASKS)[1:]]
    assert pipeline.batches[:2] == [(4, 0, 5), (4, 0, 9)]
    assert max(size for size, _, _ in pipeline.batches) == 4
    assert {sources for _, sources, _ in pipeline.batches} == {0, 1, 2, 3}
    for name, sections in samples.items():
        expected = None if name in ("edges", "depth") else False        # not judged, or right
        assert all(case.wrong is expected for _, cases in sections for case in cases), name


def test_pictures_to_edit_are_sources_first_and_each_once(examples, monkeypatch):
    sources = {pixels_of(e.sources[0]) for e in examples if e.task == "edits"}
    pictures = [p.tobytes() for p in evaluate.pictures_to_edit(examples, 64)]
    assert len(pictures) == len(set(pictures)) == 14 > len(sources)
    assert set(pictures[:len(sources)]) == sources
    monkeypatch.setattr(evaluate, "CHAINS", 3)
    assert [p.tobytes() for p in evaluate.pictures_to_edit(examples, 64)] == pictures[:3]


def test_the_standard_error_of_turns(examples, monkeypatch):
    """Half of the results of a turn are right: sqrt(0.5 * 0.5 / 14)."""
    pictures = evaluate.pictures_to_edit(examples, 64)
    monkeypatch.setattr(evaluate, "score", lambda judge, trials: {"exact": 0.5})
    scores, _ = evaluate.score_turns(Perfect(examples, monkeypatch), pictures, 0, 5)
    assert scores["n"] == 14 and scores["exact"] == dict.fromkeys("123", 0.5)
    assert scores["standard_error"] == dict.fromkeys("123", pytest.approx(0.133631, abs=1e-6))


def test_wrong_results_have_low_scores(examples, monkeypatch):
    scores, samples = evaluate.score_shapes(Wrong(examples, monkeypatch), examples)
    drawings, edits = scores["text_to_image"], scores["edits"]
    assert scores["captions"]["exact"] == drawings["exact"] == scores["questions"]["exact"] == 0
    partial, all_wrong = scores["partial"], dict.fromkeys((*language.CATEGORIES, "overall"), 0.0)
    assert partial["direct"] == {"strict": all_wrong, "geneval": all_wrong}
    assert partial["planned"]["strict"] == all_wrong
    assert partial["planned"]["parsed"] == 0 and partial["planned"]["different"] == 1 / partial["n"]
    assert edits["exact"] == edits["untouched"] == edits["multi_turn"]["exact"]["3"] == 0
    assert scores["edges"]["iou"] < 0.7
    assert scores["depth"]["error"] > 0.2 and scores["pose"]["exact"] == 0
    ceiling = scores["ceiling"]
    assert ceiling["vae"] == 0
    assert ceiling["vae_edges_iou"] < 0.5 and ceiling["vae_depth_error"] > 0.5
    for _, cases in samples["questions"]:
        assert all(case.wrong and "expected: " in case.text for case in cases)
    for task in ("edits", "pose", "personalisation", "questions"):      # marked as scored
        [(_, cases)] = samples[task]
        assert [case.wrong for case in cases].count(False) == round(
            scores[task]["exact"] * scores[task]["n"]), task
    for name in ("text_to_image", "multi_turn"):
        assert all(case.wrong is True for _, cases in samples[name] for case in cases), name
    json.dumps(scores, allow_nan=False)


def test_only_the_tasks_that_occur(examples, monkeypatch):
    pairs = [e for e in examples if e.task == "text_to_image"]
    questions = [e for e in examples if e.task == "questions"]
    pipeline = Perfect(examples, monkeypatch)
    scores, samples = evaluate.score_shapes(pipeline, pairs)
    assert list(scores) == ["text_to_image", "captions", "ceiling"]
    assert list(samples) == ["text_to_image"]
    pipeline.encode_images = None                               # the ceiling alone needs it
    alone, _ = evaluate.score_pairs(pipeline, pairs, ceiling=False)
    assert alone == {name: scores[name] for name in ("text_to_image", "captions")}
    assert alone["captions"]["n"] == len(pairs)
    scores, _ = evaluate.score_shapes(pipeline, questions)
    assert list(scores) == ["questions", "ceiling"]


# ---------------------------------------------------------------- mistakes in the other tasks

def score_one(judge, prompt: str, sources, result, target) -> dict:
    pictures = [world.render(scene) for scene in sources]
    return evaluate.score(judge, [Trial(prompt, pictures, target, result)])


def test_partial_prompts():
    prompts = ["a red circle", "a red circle and a blue square", "a green triangle"]
    trials = [Trial(prompt, (), None, world.render(SCENE)) for prompt in prompts]
    assert evaluate.score_prompts(trials) == {      # the picture shows both objects, no triangle
        "strict": {"colors": 0.0, "color_attribution": 1.0, "overall": 0.5},
        "geneval": {"colors": 0.5, "color_attribution": 1.0, "overall": 0.75}}
    counts = evaluate.count_prompts([*prompts, "one object and no circle"])
    assert counts == {"colors": 2, "color_attribution": 1, "negation": 1, "overall": 3}
    negation = Trial("one object and no circle", (), None, world.render(SCENE))
    assert evaluate.score_prompts([negation])["geneval"] == {"negation": 0.0, "overall": None}


def test_edits_that_touch_something_else():
    circle, square = SCENE.objects
    target = SCENE._replace(objects=(circle._replace(color="green"), square))
    more = target._replace(objects=(target.objects[0], square._replace(color="yellow")))
    brighter = world.render(target)
    brighter[2:22, 22:42] += 8                      # an empty cell, one of eight untouched

    def score_edit(result: np.ndarray) -> dict:
        return score_one(evaluate.judge_edit, "make the red circle green", [SCENE], result,
                         world.render(target))
    scores = [score_edit(world.render(scene)) for scene in (target, SCENE, more)]
    scores.append(score_edit(brighter))
    assert [s["exact"] for s in scores] == [1, 0, 0, 1]
    assert [s["untouched"] == 0 for s in scores] == [True, True, False, False]
    assert scores[3]["untouched"] == 1 and scores[0]["by_kind"] == {"recolor": 1}
    new = world.render(SCENE._replace(background="white"))
    everywhere = score_one(evaluate.judge_edit, "make the background white", [SCENE], new, new)
    assert everywhere["untouched"] is None


def test_edges_and_depth():
    def score_half(judge, draw) -> dict:
        half = SCENE._replace(objects=SCENE.objects[:1])
        return score_one(judge, "", [SCENE], draw(half), draw(SCENE))
    iou = score_half(evaluate.judge_edges, world.edge_map)["iou"]
    assert 0.5 < iou < 0.65                                     # the small outline is missing
    depth = score_half(evaluate.judge_depth, world.depth_map)
    assert 0 < depth["error"] < 0.05 and 0.1 < depth["error_on_objects"] < 0.5
    gray, empty = np.full((64, 64, 3), 51, np.uint8), world.depth_map(Scene((), "gray"))
    depth = score_one(evaluate.judge_depth, "", [SCENE], gray, empty)
    assert depth == {"n": 1, "error": pytest.approx(0.2), "error_on_objects": None}


def test_poses():
    first = Object("large", "red", "up arrow", 0)
    second = Object("large", "red", "left arrow", 4)
    arrows = Scene((first, second), "black")

    def score_pose(*objects: Object) -> dict:
        result = world.pose_map(Scene(objects, "black"))
        return score_one(evaluate.judge_pose, "", [arrows], result, world.pose_map(arrows))
    assert score_pose(first, second) == {"n": 1, "exact": 1, "arrows": 1, "keypoint_error": 0}
    turned = score_pose(first, second._replace(shape="right arrow"))
    assert turned["exact"] == 0 and turned["arrows"] == 0.5
    assert turned["keypoint_error"] == 7                        # 14 for one of two
    shifted = score_pose(first, second._replace(shift=(0, 1)))
    assert shifted["exact"] == 1 and shifted["keypoint_error"] == 0.5
    assert score_pose(first, second, first._replace(cell=8))["exact"] == 0
    assert score_pose() == {"n": 1, "exact": 0, "arrows": 0, "keypoint_error": None}


def test_compositions():
    references = [Scene((o._replace(cell=4),), "white") for o in SCENE.objects]
    text = ("put the object of picture 1 at the top left and that of picture 2 at the center "
            "on a gray background")

    def score_composition(scene: Scene) -> tuple:
        scores = score_one(evaluate.judge_composition, text, references, world.render(scene),
                           world.render(SCENE))
        return scores["objects"], scores["exact"], scores["by_references"]
    less = SCENE._replace(objects=SCENE.objects[:1])
    more = SCENE._replace(objects=(*SCENE.objects, Object("small", "red", "circle", 8)))
    assert score_composition(SCENE) == (1, 1, {"2": 1})
    assert score_composition(SCENE._replace(background="white")) == (1, 0, {"2": 0})
    assert score_composition(less) == (0.5, 0, {"2": 0})
    assert score_composition(more) == (1, 0, {"2": 0})


def test_answers():
    answers = [
        Trial("what color is the background?", (), "gray", "gray"),
        Trial("is there a red circle?", (), "no", "yes at the center"),
        Trial("where is the red circle?", (), "at the center", "at the top left"),
        Trial("how many circles are there?", (), "one at the center", "one at the top left")]
    assert evaluate.score(evaluate.judge_answer, answers) == {
        "n": 4, "exact": 0.25, "without_places": 0.5,
        "by_kind": {"background": 1, "count": 0, "exists": 0, "where": 0}}


def test_means_are_over_all_values_and_not_over_trials():
    judgements = iter([
        {"exact": True, "parts": [1, 1, 1], "by_kind": "a"},
        {"exact": False, "parts": np.zeros(1), "by_kind": "b"},
        {"exact": False, "parts": [], "by_kind": "a"}])
    assert evaluate.score(lambda trial: next(judgements), [None] * 3) == {
        "n": 3, "exact": pytest.approx(1 / 3), "parts": 0.75, "by_kind": {"a": 0.5, "b": 0.0}}


# ---------------------------------------------------------------- a run

def write_run(run, **values) -> None:
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"sampling": {}} | values))
    (run / "seconds.json").write_text('{"world": 1.0}')
    metrics = [
        {"step": 1, "loss": 2.0, "flow_matching": 1.0, "edits.flow_matching": 1.0,
         "grad_norm": 1.0},
        {"step": 2, "loss": 1.0, "flow_matching": 0.5, "questions.masked_token": 0.7,
         "seconds": 3.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))


def use_pipeline(pipeline, monkeypatch) -> None:
    """Let every run have this pipeline."""
    monkeypatch.setattr(evaluate.Pipeline, "from_run", lambda run, device: pipeline)
    monkeypatch.setattr(evaluate, "make_films", lambda *_: None)


def test_a_run_with_every_task(folder, examples, tmp_path, monkeypatch, capsys):
    use_pipeline(Wrong(examples, monkeypatch), monkeypatch)
    run = tmp_path / "run"
    write_run(run, data=str(folder), weights="*=1")
    evaluate.main(["--run", str(run), "--device", "cpu"])
    page, screen = (run / "report.html").read_text(), capsys.readouterr().out
    sheets = json.loads((run / "samples.json").read_text())
    cases = [case for sections in sheets.values() for s in sections for case in s["cases"]]
    assert page.count("<svg") == 4
    assert page.count("<img") == sum(len(case["pictures"]) for case in cases) > 100
    assert page.count("wrong</strong>") == sum(case["wrong"] is True for case in cases) > 50
    for task in ("partial", "edits", "multi_turn", "edges", "depth", "pose",
                 "personalisation", "questions"):
        assert Image.open(run / f"samples_{task}.png").width > 700
        assert f'id="samples_{task}"' in page and sheets[task][0]["cases"]
    assert Image.open(run / "samples.png").width > 700
    for title, value in report.table_rows(json.loads((run / "scores.json").read_text())):
        assert title in screen and value in screen


@pytest.mark.parametrize("weights, tasks, sheets, timed", [
    ("text_to_image=1", {"text_to_image", "captions"}, 0, True),
    ("edges=2,depth=0", {"edges"}, 1, False),
    ("*=1,text_to_image=0,questions=0", {"partial", *evaluate.TASKS} - {"questions"}, 7,
     True)])
def test_only_tasks_with_weight_are_scored(folder, examples, tmp_path, monkeypatch, weights, tasks,
                                           sheets, timed):
    """Without `timed`, no phase has ended, as in a run that still trains with parts of another."""
    use_pipeline(Perfect(examples, monkeypatch), monkeypatch)
    run = tmp_path / "run"
    write_run(run, data=str(folder), weights=weights)
    if not timed:
        (run / "seconds.json").unlink()
    scores = evaluate.evaluate_run(run)
    assert set(scores["seconds"]) == {"total", "evaluation"} | ({"world"} if timed else set())
    assert set(scores) == tasks | {"seconds", "ceiling"}
    assert (run / "samples.png").is_file() == ("text_to_image" in tasks)
    assert len(list(run.glob("samples_*.png"))) == sheets


@pytest.mark.parametrize("data", ["pairs.jsonl,more.jsonl", "FOLDER", ""])
def test_data_that_is_no_shapes_world(tmp_path, examples, monkeypatch, data):
    use_pipeline(Perfect(examples, monkeypatch), monkeypatch)
    data = data.replace("FOLDER", str(tmp_path))
    run = tmp_path / "run"
    write_run(run, data=data, weights="*=1")
    with pytest.raises(ValueError, match="test.jsonl") as raised:
        evaluate.evaluate_run(run)
    assert (data or str(run / "data")) in str(raised.value)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--run", str(tmp_path)])
    assert str(tmp_path) in str(stopped.value.code)


def test_next_steps(tmp_path, capsys):
    folder = tmp_path / "world"
    folder.mkdir()
    write_config(replace(PRESETS["mini"], data=str(folder)), tmp_path)
    evaluate.print_next_steps(tmp_path)
    screen = capsys.readouterr().out
    assert f"{tmp_path}/report.html" in screen and f"{tmp_path}/samples.png" in screen
    commands = [line for line in screen.splitlines() if line.startswith("  python sample.py")]
    assert len(commands) == 2 and all(f"--run {tmp_path}" in command for command in commands)
    assert commands[1].endswith(f"--describe {folder}/images/test/000002.png")
