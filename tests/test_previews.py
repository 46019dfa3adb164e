"""previews.py: samples while a model trains, their strip, and that the training stays as it was."""
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LOOP, losses, metrics, part_options
from PIL import Image
from test_train import interrupt, torchrun

import previews
import train
from config import RunFiles, parts_of, read_config
from data import Tasks
from experiments import report
from previews import Request, in_turns, read_requests, requests_of, respond, write_samples
from records import Example
from run_folder import load_frozen, load_models, load_tasks
from sample import Pipeline

CPU = torch.device("cpu")


def world_of(run: Path) -> list[str]:
    return ["--data", str(run / "data"), *part_options(run)]


@pytest.fixture(scope="module")
def sampled(finished, tmp_path_factory) -> Path:
    """The quick run again, sampled every second step."""
    run = tmp_path_factory.mktemp("sampled") / "run"
    train.main([*LOOP, *world_of(finished), "--sample_every", "2", "--out", str(run)])
    return run


@pytest.fixture(scope="module")
def parts(finished):
    """Configuration, frozen parts, averaged weights and data of the quick run."""
    config = read_config(RunFiles(finished).config)
    places = parts_of(config, finished)
    frozen = load_frozen(config, places, CPU)
    average = load_models(config, 0, RunFiles(finished).newest_checkpoint(), CPU)[1]
    return config, places, frozen, average, load_tasks(config, places, frozen.tokenizer)


# ---------------------------------------------------------------- the run

def test_sampling_does_not_change_the_training(finished, sampled):
    assert losses(sampled) == losses(finished)
    assert not list(finished.glob("samples-*")) and not RunFiles(finished).progress.exists()


def test_the_strip_has_a_row_for_each_sampling(sampled):
    files = RunFiles(sampled)
    rows = [np.array(Image.open(files.samples_at(step))) for step in (2, 4, 6)]
    strip = np.array(Image.open(files.progress))
    assert files.sampled_until(6) == [files.samples_at(step) for step in (2, 4, 6)]
    assert files.sampled_until(5) == [files.samples_at(step) for step in (2, 4)]
    assert strip.shape == (sum(len(row) + 8 for row in rows), rows[0].shape[1], 3)
    assert (strip[:len(rows[0])] == rows[0]).all()
    assert (strip[-8 - len(rows[2]):-8] == rows[2]).all()
    assert (rows[0].shape != rows[2].shape) or (rows[0] != rows[2]).any()


def test_samples_of_the_training_are_not_in_the_report(sampled):
    files = RunFiles(sampled)
    assert files.samples() in files.all_samples()
    assert files.samples_at(2) not in files.all_samples()
    report.write_report(sampled)
    assert "samples-0" not in files.report.read_text()


def test_a_resumed_run_continues_the_strip(finished, sampled, tmp_path, monkeypatch):
    """The rows of a run that ended and went on are those of one that did not."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        train.main([*LOOP, *world_of(finished), "--sample_every", "2", "--out", str(run)])
    RunFiles(run).samples_at(4).write_bytes(b"of a later step, from before a kill")
    train.main(["--resume", "--out", str(run)])
    files, whole = RunFiles(run), RunFiles(sampled)
    assert losses(run) == losses(sampled)
    for step in (2, 4, 6):
        assert files.samples_at(step).read_bytes() == whole.samples_at(step).read_bytes()
    assert files.progress.read_bytes() == whole.progress.read_bytes()
    assert files.scored.read_text() == whole.scored.read_text()


def test_the_time_of_samples_is_no_time_of_training(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "write_samples", lambda *arguments: time.sleep(2))
    start, run = time.time(), tmp_path / "run"
    train.main([*LOOP, *world_of(finished), "--sample_every", "5", "--out", str(run)])
    total = time.time() - start
    assert metrics(run)[-1]["seconds"] < total - 2


def test_one_rank_draws(finished, tmp_path):
    run = tmp_path / "run"
    done = torchrun(tmp_path, *LOOP, *world_of(finished), "--sample_every", "3", "--out", str(run))
    assert done.returncode == 0, done.stderr[-3000:]
    files = RunFiles(run)
    assert files.sampled_until(9) == [files.samples_at(3), files.samples_at(6)]
    assert files.progress.exists()


# ---------------------------------------------------------------- scores of a few records

def test_each_sampling_is_scored(sampled):
    """A line for each sampling, with the scores of other records of every task."""
    lines = [json.loads(line) for line in RunFiles(sampled).scored.read_text().splitlines()]
    final = json.loads(RunFiles(sampled).scores.read_text())
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert set(line) == {"step"} | set(final) - {"seconds"}
        assert line["captions"]["n"] == line["edits"]["n"] == previews.FEW
    report.write_report(sampled)
    assert ">score<" in RunFiles(sampled).report.read_text()


def test_records_of_the_samplings(sampled, monkeypatch):
    """Each takes the next ones, from the start again after the last; later lines are dropped."""
    from experiments import evaluate
    taken, run = [], sampled
    fake = [example(Path(f"{i}"), task="edits", prompt="p", caption="c") for i in range(6)]
    fake += [example(Path("a"), prompt="p", caption="p"), example(Path("b"), prompt="p")]
    monkeypatch.setattr(evaluate, "held_out_examples", lambda run: fake)
    monkeypatch.setattr(evaluate, "score_shapes",
                        lambda pipeline, chosen, ceiling: (taken.append(chosen) or {"x": 1}, {}))
    before = RunFiles(run).scored.read_text()
    for sampling in (0, 1):
        previews.append_scores(run, 4, None, sampling)
    assert [[e.image.name for e in chosen] for chosen in taken] == [
        ["0", "1", "2", "3", "a", "b"], ["4", "5", "0", "1", "a", "b"]]
    lines = RunFiles(run).scored.read_text().splitlines()
    assert lines == [before.splitlines()[0], '{"step": 4, "x": 1}']
    RunFiles(run).scored.write_text(before)


# ---------------------------------------------------------------- what is sampled

def test_requests_of_the_world(parts):
    """One of each task before a second one of any; prompts, then edits, then texts."""
    config, places, _, _, dataset = parts
    requests = read_requests(config, places, dataset)
    assert len(requests) == previews.COLUMNS
    keys = [(r.writes, len(r.sources)) for r in requests]
    assert keys == sorted(keys) and {False, True} == {r.writes for r in requests}
    questions = {r.prompt for r in requests if r.writes}
    assert "" in questions and any(q.endswith("?") for q in questions)
    held_out = places.test.read_text()
    assert all(r.prompt in held_out for r in requests)
    assert all(s.shape == (3, 64, 64) for r in requests for s in r.sources)


def test_only_tasks_that_are_trained(parts):
    config, places, frozen, _, _ = parts
    config = replace(config, weights="text_to_image=1")
    dataset = load_tasks(config, places, frozen.tokenizer)
    requests = read_requests(config, places, dataset)
    assert {(r.writes, len(r.sources)) for r in requests} == {(False, 0), (True, 1)}
    assert len(requests) == previews.COLUMNS == 2 * sum(r.writes for r in requests)


def test_the_first_records_of_other_data(parts):
    config, places, _, _, dataset = parts
    requests = read_requests(config, places._replace(test=None), dataset)
    texts = places.data[0].read_text()
    assert len(requests) == previews.COLUMNS and all(r.prompt in texts for r in requests)


def example(picture: Path, **fields) -> Example:
    return Example("pairs", picture, (), None, "", "")._replace(**fields)


def test_what_an_example_asks_for(tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(picture)

    def kinds(**fields) -> list[tuple]:
        requests = requests_of(example(picture, **fields), 4, {"pairs"})
        return [(r.prompt, len(r.sources), r.writes) for r in requests]

    assert kinds(prompt="p", caption="c") == [("p", 0, False), ("", 1, True)]
    assert kinds(prompt="p", caption="c", task="other") == [("p", 0, False)]
    assert kinds(prompt="p", caption="c", sources=(picture, picture)) == [("p", 2, False)]
    assert kinds(question="q", caption="c", task="other") == [("q", 1, True)]
    with pytest.raises(ValueError, match="missing.png"):
        requests_of(example(tmp_path / "missing.png", caption="c"), 4, {"*"})


def test_in_turns():
    assert list(in_turns(["abc", "", "xy"])) == ["a", "x", "b", "y", "c"]
    assert list(in_turns([])) == []


def test_sample_prompts(parts, tmp_path):
    """A text file has prompts; JSONL has all that --data has."""
    config, places, _, _, dataset = parts
    text, records = tmp_path / "prompts.txt", tmp_path / "records.jsonl"
    text.write_text("a cat\n\na dog\n")
    requests = read_requests(replace(config, sample_prompts=str(text)), places, dataset)
    assert requests == [Request("a cat", (), False), Request("a dog", (), False)]
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    lines = [{"image": "a.png", "conversations": ["<image>\nwhat is it?", "red"]},
             {"image": ["a.png", "a.png"], "instruction": "make it blue", "conversations": [""]}]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    requests = read_requests(replace(config, sample_prompts=str(records)), places, dataset)
    assert [(r.prompt, r.writes) for r in requests] == \
        [("make it blue", False), ("what is it?", True)]


def test_sample_prompts_are_checked_at_the_start(finished, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}\n')
    arguments = [*LOOP, *world_of(finished), "--out", str(tmp_path / "run"), "--sample_prompts"]
    with pytest.raises(SystemExit, match="bad.jsonl, line 1"):
        train.main([*arguments, str(tmp_path / "bad.jsonl")])
    with pytest.raises(SystemExit):
        train.main([*arguments, str(tmp_path / "none.txt")])
    assert "none.txt: no such file" in capsys.readouterr().err


# ---------------------------------------------------------------- one sampling

def test_samples_are_those_of_the_pipeline(parts):
    """Each column is what sample.py gives for its seed, sources before the result."""
    config, places, frozen, average, dataset = parts
    pipeline = Pipeline(*frozen, average, config.sampling, "run")
    source = torch.full((3, 64, 64), 0.5)
    requests = [Request("a red circle", (), False), Request("make it blue", (source,), False),
                Request("what is it?", (source,), True), Request("a blue square", (), False)]
    cases = respond(pipeline, requests)
    for i in (0, 3):
        expected = previews.to_pictures(pipeline.draw([requests[i].prompt], seed=i))[0]
        [(picture, _)] = cases[i].pictures
        assert np.abs(picture.astype(int) - expected).max() <= 1 and cases[i].text == \
            requests[i].prompt
    expected = previews.to_pictures(pipeline.edit(["make it blue"], [source[None]], seed=1))[0]
    assert (cases[1].pictures[0][0] == 191).all()
    assert np.abs(cases[1].pictures[1][0].astype(int) - expected).max() <= 1
    assert cases[2].text.startswith("what is it?") and (cases[2].pictures[0][0] == 191).all()


def test_a_large_picture_is_shown_at_twice_the_tile(parts, tmp_path):
    for width, side in ((64, 128), (200, 200), (512, 256)):
        case = previews.Case([(np.zeros((width, width, 3), np.uint8), "")])
        assert (previews.case_picture(case)[:side + 2, :, 0] < 200).any(axis=0).sum() == side + 2
