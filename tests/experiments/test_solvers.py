"""experiments/solvers.py: passes, distances and scores of drawing with a known velocity."""
from types import SimpleNamespace

import pytest
import torch

from config import SampleSettings
from experiments import language, solvers, world
from experiments.evaluate import Trial
from experiments.world import Object, Scene

SCENE = Scene((Object("large", "red", "circle", 4),), "gray")


def test_passes_count_the_guided_steps():
    assert solvers.passes(4, 1.0, (0.0, 1.0), 2) == 8           # sigmas 1, 0.667, 0.334, 0.001
    assert solvers.passes(4, 1.0, (0.5, 0.9), 2) == 5
    assert solvers.passes(4, 1.0, (0.3, 0.9), 3) == 8
    assert solvers.passes(4, 1.0, (0.0, 0.0), 2) == 4


class Drawer:
    """A pipeline that draws the scene right with ab2, or in 500 steps; else nothing but noise.

    Its latents are 1 / steps.
    """
    def __init__(self):
        self.settings = SampleSettings(image_size=world.SIZE, image_guidance=1.5)
        self.vae = SimpleNamespace(decode=self.decode)

    def decode(self, latents):
        picture = torch.from_numpy(world.render(SCENE)).permute(2, 0, 1) / 127.5 - 1
        noise = torch.rand(picture.shape, generator=torch.Generator().manual_seed(0))
        right = self.settings.solver == "ab2" or self.settings.steps == solvers.REFERENCE
        return torch.stack([picture if right else noise] * len(latents))

    def edit(self, prompts, sources, seed):
        return self.vae.decode(torch.full((len(prompts), 1, 2, 2), 1 / self.settings.steps))


def test_table(monkeypatch, capsys, tmp_path):
    picture, prompt = world.render(SCENE), language.caption(SCENE)
    trials = {"text_to_image": [Trial(prompt, [], picture)] * 2,
              "edits": [Trial("make the red circle blue", [picture], picture)]}
    monkeypatch.setattr(solvers, "cases", lambda run, size, count: trials)
    monkeypatch.setattr(solvers.Pipeline, "from_run", lambda run: Drawer())
    solvers.table(tmp_path, 2, [4, 5])
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["task", "interval", "solver", "steps", "passes", "distance", "exact", "pixels",
                    "seconds"]
    assert len(rows) == 2 * len(solvers.INTERVALS) * (1 + len(solvers.SOLVERS) * 2)
    for task, low, high, solver, steps, passes, distance, exact, *_ in rows:
        assert float(distance) == pytest.approx(1 / int(steps) - 1 / 500, abs=1e-4)
        assert float(exact) == (solver == "ab2" or steps == "500")
        if (low, high) == ("0.0", "1.0"):
            assert int(passes) == int(steps) * (3 if task == "edits" else 2)
