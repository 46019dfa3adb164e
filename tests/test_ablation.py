"""The ablation: equal data and steps for every arm, runs that continue, and honest tables."""
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import ablation
import train
from model import MMDiTConfig

BASE = replace(train.PRESETS["mini"], train_scenes=40, test_scenes=6, vae_steps=1, teacher_steps=1, steps=4, keep=(2, 4), batch_size=4,
               log_every=3, weights="text_to_image=1",
               vae=replace(train.PRESETS["mini"].vae, block_channels=(16,)), sampling=replace(train.PRESETS["mini"].sampling, steps=2, text_steps=2),
               model=MMDiTConfig(width=32, depth=2, num_heads=2, text_dim=128, position_table=16, qk_norm=True, text_positions=32,
                                 number_references=True, align_dims=(32, 128), align_silu=False))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two arms with one seed."""
    out = tmp_path_factory.mktemp("ablation")
    (out / "parts").mkdir()
    ablation.prepare_all(BASE, out / "parts")
    threads = torch.get_num_threads()
    assert all(ablation.run_one((arm, 0, out, BASE, threads, 3)) for arm in ("neither", "both"))
    return out


def test_arms_differ_in_their_losses_alone(out):
    settings = {arm: json.loads((out / f"{arm}-0" / "run.json").read_text()) for arm in ("neither", "both")}
    different = {name for name in settings["both"] if settings["both"][name] != settings["neither"][name]}
    assert different == {"out", "cross_weight", "intrinsic_weight"}
    lines = {arm: [json.loads(x) for x in (out / f"{arm}-0" / "metrics.jsonl").read_text().splitlines()] for arm in settings}
    assert "contrastive" in lines["both"][0] and "intrinsic" in lines["both"][0]
    assert not {"contrastive", "intrinsic"} & set(lines["neither"][0])
    assert [m["step"] for m in lines["both"]] == [2, 3, 4]      # a line where a score is, besides the usual ones
    for arm in settings:
        assert {f.name for f in (out / f"{arm}-0").glob("kept-*")} == {"kept-00000002.safetensors", "kept-00000004.safetensors"}


def test_what_a_run_finds(out):
    results = [json.loads(line) for line in (out / "both-0" / "results.jsonl").read_text().splitlines()]
    assert [(r["arm"], r["seed"], r["step"], r["n"]) for r in results] == [("both", 0, 2, 3), ("both", 0, 4, 3)]
    assert all(0 <= r[name] <= 1 for r in results for name in ablation.FIGURES)
    minutes = {r["arm"]: r["minutes"] for r in ablation.collect(out, ["neither", "both"]) if r["step"] == 4}
    seconds = json.loads((out / "parts" / "seconds.json").read_text())
    assert minutes["both"] * 60 >= seconds["teacher"] + seconds["features"] > 0


def test_an_interrupted_run_continues(out, monkeypatch):
    """A signal saves and leaves no results; the same call then ends with the averages of a run that was never stopped."""
    real = train.update_average

    def interrupted(average, model, step, *settings):
        real(average, model, step, *settings)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    (out / "neither-0").rename(out / "whole")
    whole = train.Checkpoint(out / "whole" / "kept-00000004.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(train, "update_average", interrupted)
        assert not ablation.run_one(("neither", 0, out, BASE, torch.get_num_threads(), 3))
    assert not (out / "neither-0" / "results.jsonl").exists()
    assert ablation.run_one(("neither", 0, out, BASE, torch.get_num_threads(), 3))
    again = train.Checkpoint(out / "neither-0" / "kept-00000004.safetensors")
    assert all(torch.equal(again.read(name), whole.read(name)) for name in whole.names())


def results() -> list[dict]:
    """Two arms, two seeds, two scores; the first arm twice as slow."""
    return [{"arm": arm, "seed": seed, "step": step, "n": 9, "minutes": step * slow, "objects": base + 0.1 * seed + step / 10, "scenes": 0.5,
             "captions": 0.0} for arm, slow, base in (("neither", 2, 0.1), ("both", 1, 0.2)) for seed in (0, 1) for step in (1, 4)]


def test_equal_time_is_not_equal_steps():
    found = results()
    np.testing.assert_allclose(ablation.at_time(found, "neither", "objects", 2), [0.2, 0.3])
    np.testing.assert_allclose(ablation.at_time(found, "both", "objects", 2), [0.45, 0.55])     # half way in the logarithm
    assert np.isnan(ablation.at_time(found, "neither", "objects", 1)).all() and np.isnan(ablation.at_time(found, "both", "objects", 8)).all()


def test_tables_and_curves():
    text = ablation.tables(results(), ["neither", "both", "cross"])
    assert "| neither | 0.250 ± 0.071 | 0.550 ± 0.071 |" in text and "| both | 0.350 ± 0.071 | 0.650 ± 0.071 |" in text
    assert "Held-out scenes: 9. Seeds: neither 2, both 2." in text and "cross" not in text
    svg = ablation.curves_svg(results(), ["neither", "both"])
    assert svg.count("<polyline") == 2 * len(ablation.FIGURES) and "both" in svg and svg.startswith("<svg xmlns")
    every = [{**r, "arm": arm} for arm in ablation.ARMS for r in results() if r["arm"] == "both"]
    assert ablation.curves_svg(every, list(ablation.ARMS)).count("<polyline") == len(ablation.ARMS) * len(ablation.FIGURES)


def test_other_settings_need_another_folder(tmp_path, capsys):
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 7}))
    with pytest.raises(SystemExit):
        ablation.main(["--out", str(tmp_path), "--steps", "8"])
    assert "other settings" in capsys.readouterr().err
