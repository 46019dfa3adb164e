"""own_sources.py: which pictures are redrawn, which latents of a batch are replaced, and resume."""
from dataclasses import replace

import pytest
import torch
from conftest import LOOP, part_options
from safetensors.torch import load_file

import own_sources
import train
from config import RunFiles, parse_arguments, parts_of, read_config
from data import Batch, load_cropped
from experiments import language, world
from own_sources import (OwnSources, captioned_sources, draw_own_sources, first_own_step,
                         make_own_sources)
from ranks import Ranks
from run_folder import load_frozen, load_models, load_tasks

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


@pytest.fixture(scope="module")
def config(finished):
    return read_config(RunFiles(finished).config)


@pytest.fixture(scope="module")
def frozen(finished, config):
    return load_frozen(config, parts_of(config, finished), CPU)


@pytest.fixture(scope="module")
def average(finished, config):
    return load_models(config, 0, RunFiles(finished).newest_checkpoint(), CPU)[1]


@pytest.fixture
def dataset(finished, config, frozen):
    """The training records of a small shapes world; a latent holds the number of its row."""
    dataset = load_tasks(config, parts_of(config, finished), frozen.tokenizer)
    numbers = torch.arange(float(len(dataset.paths)))
    dataset.latents = numbers.view(-1, 1, 1, 1).expand(-1, 16, 8, 8).contiguous()
    return dataset


@pytest.fixture
def calls(monkeypatch):
    """Redrawing is adding 0.5; the captions and seeds of all calls."""
    calls = []

    def redraw(pipeline, latents, captions, seeds):
        calls.extend(zip(captions, seeds))
        return (latents + 0.5).half()
    monkeypatch.setattr(own_sources, "redraw", redraw)
    return calls


PIPELINE = type("Pipeline", (), {"device": CPU})


# ---------------------------------------------------------------- what is redrawn

def test_captions_are_those_of_the_pictures(dataset):
    """Sources of edits and maps have a caption of a pair; those of poses and compositions none."""
    captions = captioned_sources(dataset)
    by_task = {task: {path for e in dataset.records if e.task == task for path in e.sources}
               for task in ("edits", "edges", "depth", "pose", "personalisation")}
    redrawn = {dataset.paths[row] for row in captions}
    assert redrawn == by_task["edits"] | by_task["edges"] | by_task["depth"]
    assert by_task["pose"] and by_task["personalisation"]
    for row, text in captions.items():
        scene, _ = world.read_picture(load_cropped(dataset.paths[row], (64, 64)))
        assert language.parse_caption(text).content() == scene.content()


def test_unreadable_pictures_are_not_redrawn(dataset):
    rows = list(captioned_sources(dataset))
    dataset.unreadable[dataset.paths[rows[0]]] = "broken"
    assert list(captioned_sources(dataset)) == rows[1:]


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_share_of_the_sources_that_are_redrawn(dataset, config, calls, share):
    captions = captioned_sources(dataset)
    chosen = replace(config, own_sources=share, seed=3)
    drawn = draw_own_sources(dataset, PIPELINE, chosen)
    rows = drawn["rows"].tolist()
    assert len(set(rows)) == len(rows) == round(share * len(captions)) > own_sources.CHUNK / 4
    assert calls == [(captions[row], 3 + row) for row in rows]
    assert torch.equal(drawn["latents"], (dataset.latents[rows] + 0.5).half())
    again = draw_own_sources(dataset, PIPELINE, chosen)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    other = draw_own_sources(dataset, PIPELINE, replace(chosen, seed=4))["rows"].tolist()
    assert (other != rows) == (share < 1)


def test_no_caption_no_own_source(dataset, config, calls):
    dataset.records = [e for e in dataset.records if e.task == "pose"]
    drawn = draw_own_sources(dataset, PIPELINE, config)
    assert not calls and len(drawn["rows"]) == len(drawn["latents"]) == 0
    batch = dataset_batch(torch.zeros(2, 2, 16, 8, 8), [[0], [1]])
    assert torch.equal(OwnSources(**drawn, count=4).put_into(batch).latents, batch.latents)


def test_redrawing_is_seeded(config, frozen, average):
    """Each picture by its own seed, whatever else is in the batch."""
    pipeline = own_sources.Pipeline(*frozen, average, config.sampling)
    texts, latents = ["a red circle", "a red circle"], torch.zeros(2, 16, 16, 16)
    one, two = own_sources.redraw(pipeline, latents, texts, [1, 2])
    assert one.shape == (16, 16, 16) and one.dtype == torch.float16 and not torch.equal(one, two)
    assert torch.equal(own_sources.redraw(pipeline, latents, texts, [2, 1])[1], one)


# ---------------------------------------------------------------- what a batch gets

def dataset_batch(latents, sources):
    return Batch("edits", None, latents, None, None, None, None,
                 sources=torch.tensor(sources, dtype=torch.long))


def test_own_versions_replace_sources_and_never_targets():
    own = OwnSources(torch.tensor([2, 5]), torch.tensor([20.0, 50.0]).view(2, 1, 1, 1), 8)
    latents = torch.tensor([[2.0, 5.0, 3.0], [5.0, 7.0, 2.0]]).view(2, 3, 1, 1, 1)
    batch = dataset_batch(latents, [[5, 3], [7, 2]])
    replaced = own.put_into(batch)
    assert replaced.latents.flatten(1).tolist() == [[2, 50, 3], [5, 7, 20]]
    assert batch.latents.flatten(1).tolist() == [[2, 5, 3], [5, 7, 2]]
    alone = dataset_batch(latents[:, :1], [[], []])
    assert torch.equal(own.put_into(alone).latents, alone.latents)


def test_batches_of_the_data_have_own_sources(dataset, config, calls):
    """With a share of 1 every source of an edit, and nothing else."""
    drawn = draw_own_sources(dataset, PIPELINE, replace(config, own_sources=1.0))
    own = OwnSources(**drawn, count=len(dataset.paths))
    seen = set()
    for group in dataset.groups:
        batch = dataset.__getitems__([int(i) for i in group.indices[:4]])
        if batch.task == "plan":                                # a text without pictures
            assert own.put_into(batch) is batch
            continue
        change = own.put_into(batch).latents - batch.latents                # (B, 1 + R, C, h, w)
        edits = batch.task in ("edits", "edges", "depth")
        assert (change[:, 0] == 0).all() and (change[:, 1:] == 0.5 * edits).all()
        assert torch.equal(batch.latents[:, 1:, 0, 0, 0].long(), batch.sources)
        seen.add(batch.task)
    assert {"text_to_image", "edits", "pose", "personalisation", "questions"} <= seen


# ---------------------------------------------------------------- the file, and a training

def test_the_file_is_read_again(dataset, config, frozen, average, tmp_path, calls):
    """It is drawn anew for other data, and where the steps after which it is used have changed."""
    make = [dataset, frozen, average]
    first = make_own_sources(*make, config, tmp_path, ALONE)
    count = len(calls)
    before = RunFiles(tmp_path).own_sources.read_bytes()
    again = make_own_sources(*make, config, tmp_path, ALONE)
    assert len(calls) == count > 0 and RunFiles(tmp_path).own_sources.read_bytes() == before
    assert torch.equal(again.latents, first.latents) and torch.equal(again.place, first.place)
    longer = replace(config, steps=10 * config.steps)
    make_own_sources(*make, longer, tmp_path, ALONE)
    assert len(calls) == 2 * count
    dataset.records = dataset.records.select(torch.arange(len(dataset)).numpy())
    dataset.records.parts[0].header["digest"] = "other"
    make_own_sources(*make, longer, tmp_path, ALONE)
    assert len(calls) == 3 * count


def test_a_training_uses_them_late(finished, config, tmp_path, monkeypatch, capsys):
    """From the first step with own sources on, every source of an edit is one; no target is."""
    first, real, seen = first_own_step(config), train.corrupt, []
    assert config.own_sources == 0.5 and config.steps == 6 and first == 4
    monkeypatch.setattr(train, "corrupt", lambda batch, latents, *others: (
        seen.append((batch.task, latents)) or real(batch, latents, *others)))
    runs = [tmp_path / name for name in ("without", "with")]
    for run, share in zip(runs, ("0", "1")):
        train.main([*LOOP, *part_options(finished), "--data", str(finished / "data/train.jsonl"),
                    "--weights", "edits=1,text_to_image=0.001", "--captioned", "",
                    "--intrinsic_weight", "0", "--own_sources", share, "--out", str(run)])
    assert len(seen) == 12 and {task for task, _ in seen} == {"edits"}
    for step, ((_, without), (_, own)) in enumerate(zip(seen[:6], seen[6:])):
        assert torch.equal(own[:, 0], without[:, 0])                        # (B, C, h, w)
        change = (own[:, 1] - without[:, 1]).flatten(1).abs().amax(dim=1)   # (B,)
        assert (change > 0).all() if step >= first else (change == 0).all()
    assert "source pictures are redrawn" in capsys.readouterr().out
    files = [RunFiles(run).own_sources for run in (finished, *runs)]
    assert [file.exists() for file in files] == [True, False, True]
    half, every = len(load_file(files[0])["rows"]), len(load_file(files[2])["rows"])
    assert 0 < half < every


# ---------------------------------------------------------------- options

def test_own_sources_need_cached_latents(tmp_path, capsys):
    out = ["--out", str(tmp_path / "new")]
    assert parse_arguments(["--preset", "mini", "--cache_latents", "false", *out]).own_sources == 0
    with pytest.raises(SystemExit):
        parse_arguments(["--preset", "mini", "--cache_latents", "false", "--own_sources", "0.5",
                         *out])
    message = capsys.readouterr().err
    assert "--own_sources 0.5" in message and "add --cache_latents true" in message
    with pytest.raises(SystemExit):
        parse_arguments(["--own_sources", "0", "--own_sources_after", "0.5", *out])
    assert "--own_sources_after has no effect" in capsys.readouterr().err
