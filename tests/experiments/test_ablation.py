"""The ablation: equal data and steps for every arm, runs that continue, and honest tables."""
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from checkpoint import Checkpoint
from config import PRESETS
from experiments import ablation
from model import MMDiTConfig

MINI = PRESETS["mini"]
BASE = replace(
    MINI, train_scenes=40, test_scenes=6, vae_steps=1, teacher_steps=1, steps=4, keep=(2, 4),
    batch_size=4, log_every=3, weights="text_to_image=1",
    vae=replace(MINI.vae, block_channels=(16,)),
    sampling=replace(MINI.sampling, steps=2, text_steps=2),
    model=MMDiTConfig(
        width=32, depth=2, num_heads=2, text_dim=128, position_table=16, qk_norm=True,
        text_positions=48, number_references=True, align_dims=(32, 128), align_silu=False))


def run_one(arm: str, out) -> bool:
    return ablation.run_one(arm, 0, out, BASE, torch.get_num_threads(), scenes=3)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two arms with one seed."""
    out = tmp_path_factory.mktemp("ablation")
    ablation.prepare_all(BASE, out / "parts")
    assert all(run_one(arm, out) for arm in ("neither", "both"))
    return out


def test_arms_differ_in_their_losses_alone(out):
    arms = ("neither", "both")
    settings = {arm: json.loads((out / f"{arm}-0" / "run.json").read_text()) for arm in arms}
    both, neither = settings["both"], settings["neither"]
    different = {name for name in both if both[name] != neither[name]}
    assert different == {"out", "cross_weight", "intrinsic_weight"}
    metrics = {}
    for arm in arms:
        text = (out / f"{arm}-0" / "metrics.jsonl").read_text()
        metrics[arm] = [json.loads(line) for line in text.splitlines()]
    assert "contrastive" in metrics["both"][0] and "intrinsic" in metrics["both"][0]
    assert not {"contrastive", "intrinsic"} & set(metrics["neither"][0])
    # a line at each scored step, besides the usual ones
    assert [line["step"] for line in metrics["both"]] == [2, 3, 4]
    for arm in arms:
        kept = {file.name for file in (out / f"{arm}-0").glob("kept-*")}
        assert kept == {"kept-00000002.safetensors", "kept-00000004.safetensors"}


def test_results_of_a_run(out):
    text = (out / "both-0" / "results.jsonl").read_text()
    results = [json.loads(line) for line in text.splitlines()]
    runs = [(r["arm"], r["seed"], r["step"], r["n"]) for r in results]
    assert runs == [("both", 0, 2, 3), ("both", 0, 4, 3)]
    assert all(0 <= r[name] <= 1 for r in results for name in ablation.FIGURES)
    collected = ablation.collect(out, ["neither", "both"])
    minutes = {r["arm"]: r["minutes"] for r in collected if r["step"] == 4}
    seconds = json.loads((out / "parts" / "seconds.json").read_text())
    assert minutes["both"] * 60 >= seconds["teacher"] + seconds["features"] > 0


def test_an_interrupted_run_continues(out, monkeypatch):
    """A signal saves and leaves no results; the same call then ends as if it had never stopped."""
    real = train.update_average

    def interrupted(average, model, step, *settings):
        real(average, model, step, *settings)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    (out / "neither-0").rename(out / "whole")
    whole = Checkpoint(out / "whole" / "kept-00000004.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(train, "update_average", interrupted)
        assert not run_one("neither", out)
    assert not (out / "neither-0" / "results.jsonl").exists()
    assert run_one("neither", out)
    again = Checkpoint(out / "neither-0" / "kept-00000004.safetensors")
    assert all(torch.equal(again.read(name), whole.read(name)) for name in whole.names())


def example_results() -> list[dict]:
    """Two arms, two seeds, two scores; the first arm takes twice the time."""
    results = []
    for arm, minutes_per_step, base in (("neither", 2, 0.1), ("both", 1, 0.2)):
        for seed in (0, 1):
            for step in (1, 4):
                results.append({
                    "arm": arm, "seed": seed, "step": step, "n": 9,
                    "minutes": step * minutes_per_step,
                    "objects": base + 0.1 * seed + step / 10, "scenes": 0.5, "captions": 0.0})
    return results


def test_equal_time_is_not_equal_steps():
    def objects(arm: str, minutes: float) -> np.ndarray:
        return ablation.at_time(example_results(), arm, "objects", minutes)

    np.testing.assert_allclose(objects("neither", 2), [0.2, 0.3])
    np.testing.assert_allclose(objects("both", 2), [0.45, 0.55])    # half way in the logarithm
    assert np.isnan(objects("neither", 1)).all()
    assert np.isnan(objects("both", 8)).all()


def test_tables_and_curves():
    text = ablation.tables(example_results(), ["neither", "both", "cross"])
    assert "| neither | 0.250 ± 0.071 | 0.550 ± 0.071 |" in text
    assert "| both | 0.350 ± 0.071 | 0.650 ± 0.071 |" in text
    assert "Held-out scenes: 9. Seeds: neither 2, both 2." in text and "cross" not in text
    svg = ablation.curves_svg(example_results(), ["neither", "both"])
    assert svg.count("<polyline") == 2 * len(ablation.FIGURES)
    assert "both" in svg and svg.startswith("<svg xmlns")
    both = [r for r in example_results() if r["arm"] == "both"]
    every = [{**r, "arm": arm} for arm in ablation.ARMS for r in both]
    svg = ablation.curves_svg(every, list(ablation.ARMS))
    assert svg.count("<polyline") == len(ablation.ARMS) * len(ablation.FIGURES)


def test_other_settings_need_another_folder(tmp_path, capsys):
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 7}))
    with pytest.raises(SystemExit):
        ablation.main(["--out", str(tmp_path), "--steps", "8"])
    assert "other settings" in capsys.readouterr().err
