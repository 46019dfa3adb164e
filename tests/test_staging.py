"""staging.py: models are loaded when they are used, and freed where the memory is short."""
import argparse
import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from release import write_release
from torch import nn

import sample
import staging
from arguments import add_model_options
from checkpoint import Checkpoint, save
from config import SampleSettings
from jobs import Job, draw_missing
from sample import Pipeline
from staging import Loaded, Part, free_memory, total_memory


class Weights(nn.Linear):
    def __init__(self, device):
        super().__init__(4, 4, bias=False, device=device)


class Owner:
    model = Loaded()


def test_a_part_is_loaded_when_it_is_asked_for():
    loads = []
    part = Part(lambda device: loads.append(str(device)) or Weights(device), "cpu")
    assert loads == ["meta"] and part.size == 64 and part.outline.weight.is_meta
    owner = Owner()
    owner.model = part
    assert loads == ["meta"]
    assert owner.model is owner.model and loads == ["meta", "cpu"]
    assert not owner.model.training and owner.model.weight.device.type == "cpu"
    module = weakref.ref(owner.model)
    part.free()
    assert module() is None and part.module is None
    assert owner.model.weight.shape == (4, 4) and loads == ["meta", "cpu", "cpu"]
    owner.model = given = Weights("cpu")                        # a model itself
    assert owner.model is given


def test_the_memory_of_this_machine():
    total, free = total_memory(), free_memory(torch.device("cpu"))
    assert 1e8 < free < total < 1e14


def test_the_memory_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_LIMIT", tmp_path / "memory.max")
    whole = total_memory()
    for text, expected in (("max\n", whole), ("1000000\n", 1_000_000)):
        (tmp_path / "memory.max").write_text(text)
        assert total_memory() == expected
    assert free_memory(torch.device("cpu")) < 1_000_000


# ---------------------------------------------------------------- a pipeline

@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    write_release(folder)
    return folder


class Watch:
    """Notes which models of a pipeline are in memory whenever one of them is used."""
    def __init__(self, monkeypatch):
        self.alive, self.seen, self.loads = {}, [], []
        for kind in (sample.T5Encoder, sample.MMDiT, sample.VAE):
            self._watch(kind, monkeypatch)

    def _watch(self, kind, monkeypatch):
        name, load = kind.__name__, kind.from_pretrained

        def from_pretrained(*args, **options):
            module = load(*args, **options)
            if not next(module.parameters()).is_meta:
                self.loads.append(name)
                self.alive[name] = weakref.ref(module)
                module.register_forward_pre_hook(lambda *_: self.note(name))
            return module
        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
        if kind is sample.VAE:
            decode = kind.decode
            monkeypatch.setattr(kind, "decode", lambda *a: self.note(name) or decode(*a))

    def in_memory(self):
        gc.collect()
        return {name for name, module in self.alive.items() if module() is not None}

    def note(self, user):
        use = user, frozenset(self.in_memory())
        if not self.seen or self.seen[-1] != use:
            self.seen.append(use)


def opened(release, **settings):
    return Pipeline.from_release(release / "UniAlignment", image_size=64, steps=1, text_steps=2,
                                 **settings)


@pytest.fixture(autouse=True)
def enough_memory(monkeypatch):
    monkeypatch.setattr(sample, "free_memory", lambda device: float("inf"))


def short_of_memory(monkeypatch):
    monkeypatch.setattr(sample, "free_memory", lambda device: 0)


def test_nothing_is_loaded_before_it_is_used(release, monkeypatch):
    watch = Watch(monkeypatch)
    pipeline = opened(release)
    assert pipeline.size > 100_000 and pipeline.device == torch.device("cpu")
    with pytest.raises(ValueError, match="expected multiples of 16"):
        pipeline.check_size((40, 64))
    assert not watch.loads and "Part" not in repr(pipeline.outline("model"))
    pipeline.encode_prompts(["a cat"])
    assert watch.loads == ["T5Encoder"]


def test_a_part_that_does_not_fit_is_refused_at_once(release, tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    folder = shutil.copytree(release / "UniAlignment", tmp_path / "model")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(ValueError, match="text_encoder: does not fit T5Encoder"):
        Pipeline.from_release(folder, image_size=64)
    assert not watch.loads


def test_models_share_the_memory_where_it_is_short(release, monkeypatch):
    expected = opened(release).draw(["a cat", "a dog"])
    short_of_memory(monkeypatch)
    watch = Watch(monkeypatch)
    pipeline = opened(release)
    assert torch.equal(pipeline.draw(["a cat", "a dog"]), expected)
    assert watch.seen == [("T5Encoder", {"T5Encoder"}), ("MMDiT", {"MMDiT"}),
                          ("VAE", {"MMDiT", "VAE"})]
    pipeline.draw(["a dog"])                                    # and again
    assert watch.seen[3] == ("T5Encoder", {"T5Encoder"}) and len(watch.seen) == 6


def test_models_stay_where_the_memory_is_not_short(release, monkeypatch):
    watch = Watch(monkeypatch)
    pipeline = opened(release)
    for _ in range(2):
        pipeline.draw(["a cat"])
    assert watch.loads == ["T5Encoder", "MMDiT", "VAE"]
    assert watch.in_memory() == {"T5Encoder", "MMDiT", "VAE"}


def test_captions_keep_all_models(release, monkeypatch):
    short_of_memory(monkeypatch)
    watch = Watch(monkeypatch)
    pipeline = opened(release)
    pipeline.caption(torch.zeros(1, 3, 64, 64))
    assert sorted(watch.loads) == ["MMDiT", "T5Encoder", "VAE"]


def test_all_prompts_of_many_pictures_are_encoded_first(release, tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    jobs = [Job(tmp_path / f"{i}.png", f"{i} cats", seed=i) for i in range(6)]
    jobs[3] = jobs[3]._replace(sources=(release / "pictures" / "square.png",))
    assert list(draw_missing(opened(release), jobs, 2, progress=False)) == jobs
    assert watch.loads == ["T5Encoder", "VAE", "MMDiT"] or \
        watch.loads == ["T5Encoder", "MMDiT", "VAE"]
    users = [user for user, _ in watch.seen]
    assert users.count("T5Encoder") == 1 and users[0] == "T5Encoder"
    assert all("T5Encoder" not in alive for _, alive in watch.seen[1:])
    # thousands in several rounds: the same pictures, and T5 is in memory with others if it fits
    monkeypatch.setattr("jobs.ENCODED", 2)
    again = [job._replace(path=tmp_path / f"again-{i}.png") for i, job in enumerate(jobs)]
    watch.loads.clear()
    assert list(draw_missing(opened(release), again, 2, progress=False)) == again
    for job, other in zip(jobs, again):
        assert job.path.read_bytes() == other.path.read_bytes()
    assert watch.loads.count("T5Encoder") == 1
    short_of_memory(monkeypatch)
    third = [job._replace(path=tmp_path / f"third-{i}.png") for i, job in enumerate(jobs)]
    watch.loads.clear(), watch.seen.clear()
    list(draw_missing(opened(release), third, 2, progress=False))
    assert all(job.path.read_bytes() == other.path.read_bytes() for job, other in zip(jobs, third))
    assert watch.loads.count("T5Encoder") > 1
    assert all("MMDiT" not in alive for user, alive in watch.seen if user == "T5Encoder")


def test_models_that_the_caller_gives_are_never_freed(release, monkeypatch):
    short_of_memory(monkeypatch)
    source = opened(release)
    pipeline = Pipeline(source.tokenizer, source.text_encoder, source.vae, source.model,
                        source.settings)
    models = pipeline.text_encoder, pipeline.vae, pipeline.model
    pipeline.draw(["a cat"])
    pipeline.release("text_encoder", "model")
    assert (pipeline.text_encoder, pipeline.vae, pipeline.model) == models


def test_a_tokenizer_of_another_text_encoder(release, tmp_path):
    folder = release / "UniAlignment"
    file = Checkpoint(folder / "text_encoder")
    weights = {name: file.read(name) for name in file.names()}
    weights["shared.weight"] = weights["shared.weight"][:300].clone()
    save(tmp_path / "t5.safetensors", weights)
    parts = folder, folder, tmp_path / "t5.safetensors", folder / "tokenizer"
    with pytest.raises(ValueError, match="has 300 tokens.*32100: they do not belong together"):
        Pipeline.from_parts(*parts, None, SampleSettings(image_size=64))


# ---------------------------------------------------------------- the command line

def from_options(*options):
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    return sample.load_pipeline(
        parser.parse_args([*options, "--image-size", "64", "--device", "cpu"]))


@pytest.mark.parametrize("gigabytes, options, expected", [
    (0.0001, [], torch.bfloat16), (100, [], torch.float32),
    (0.0001, ["--dtype", "float32"], torch.float32)])
def test_named_weights_that_do_not_fit_are_bfloat16(release, monkeypatch, capsys, gigabytes,
                                                    options, expected):
    sample.note.cache_clear()
    monkeypatch.setattr(sample, "WORKING_MEMORY", 0)
    monkeypatch.setattr(sample, "total_memory", lambda: gigabytes * 1e9)
    pipeline = from_options("--model", str(release / "UniAlignment"), *options)
    assert pipeline.outline("model").pos_embed.dtype == expected
    assert pipeline.outline("text_encoder").norm_out.weight.dtype == expected
    assert ("loaded as bfloat16" in capsys.readouterr().err) == (expected == torch.bfloat16)


def test_t5_in_fp8_on_the_command_line(release, tmp_path):
    command = ["a cat", "--model", str(release / "UniAlignment"), "--image-size", "64", "--device",
               "cpu", "--steps", "2"]
    out = {}
    for name in ("float8", "float32"):
        sample.main([*command, "--t5-dtype", name, "--out", str(tmp_path / f"{name}.png")])
        out[name] = Path(tmp_path / f"{name}.png").read_bytes()
    assert out["float8"] != out["float32"]
    pipeline = from_options("--model", str(release / "UniAlignment"), "--t5-dtype", "float8")
    matrix = pipeline.text_encoder.blocks[0].attention.out
    assert matrix.weight.dtype == torch.float8_e4m3fn
