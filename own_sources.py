"""Source pictures that the model has drawn itself, so that it learns to edit its own results.

A model that is trained on true pictures has not seen its own small errors, and fails on them when
it edits an edit. So late in a training the averaged weights redraw a share of the source pictures,
each by its own caption from its noisy state: the content stays, the errors are the model's. From
then on their cached latents are replaced, in sources and never in targets.

On the shapes world this has shown no gain yet (experiments/LOG.md), so it is off by default.
"""
import random
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from checkpoint import save
from config import RunFiles, TrainConfig
from data import Batch, Tasks
from model import MMDiT
from ranks import Ranks
from run_folder import Frozen
from sample import Pipeline

# Of the noisy state. On the shapes world 0.3 gives most of the model's ragged outlines, and 83 % of
# the objects keep their displacement. From 0.5 only 36 % do, and the targets show the true one.
SIGMA = 0.3
CHUNK = 64                                  # pictures that are drawn at once


class OwnSources:
    """Own versions of cached pictures.

    rows (n,): of the cached latents that they replace; latents (n, C, h, w); count: of all rows.
    """

    def __init__(self, rows: Tensor, latents: Tensor, count: int):
        self.latents = latents
        self.place = torch.full((count,), -1)                   # row -> place in latents, or -1
        self.place[rows] = torch.arange(len(rows))

    def put_into(self, batch: Batch) -> Batch:
        """Replace the sources of a batch, on the CPU, that have an own version."""
        if batch.sources is None or not batch.sources.numel():
            return batch
        place = self.place[batch.sources]                                           # (B, R)
        is_own = place >= 0                                                         # (B, R)
        latents = batch.latents.clone()                                     # (B, 1 + R, C, h, w)
        latents[:, 1:][is_own] = self.latents[place[is_own]].to(latents.dtype)
        return batch._replace(latents=latents)


def first_own_step(config: TrainConfig) -> int:
    """The first step whose batches have own sources."""
    return round(config.own_sources_after * config.steps)


def captioned_sources(dataset: Tasks) -> dict[int, str]:
    """The source pictures that a record describes: rows of the cached latents, with captions."""
    captions = {e.image: e.caption for e in dataset.records if e.caption and not e.question}
    sources = {path for e in dataset.records for path in e.sources}
    return {row: captions[path] for row, path in enumerate(dataset.paths)
            if path in sources and path in captions and path not in dataset.unreadable}


@torch.no_grad()
def redraw(pipeline: Pipeline, latents: Tensor, captions: list[str], seeds: list[int]) -> Tensor:
    """Redraw pictures by their captions; latents (B, C, h, w), as the next edit would see them."""
    images = pipeline.draw(captions, seeds, start=(latents, SIGMA))                 # (B, 3, H, W)
    return pipeline.encode_images(images).half().cpu()                              # (B, C, h, w)


def draw_own_sources(dataset: Tasks, pipeline: Pipeline, config: TrainConfig) -> dict[str, Tensor]:
    """Redraw a share of the captioned sources. Returns their rows (n,) and latents (n, C, h, w)."""
    captions, device = captioned_sources(dataset), pipeline.device
    count = round(config.own_sources * len(captions))
    rows = sorted(random.Random(config.seed).sample(sorted(captions), count))
    drawn = [dataset.latents[:0].half()]
    with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
        for start in tqdm(range(0, count, CHUNK), "drawing own sources", unit="batch", leave=False):
            chunk = rows[start:start + CHUNK]
            drawn.append(redraw(pipeline, dataset.latents[chunk], [captions[i] for i in chunk],
                                [config.seed + i for i in chunk]))
    return {"rows": torch.tensor(rows, dtype=torch.long), "latents": torch.cat(drawn)}


def make_own_sources(dataset: Tasks, frozen: Frozen, average: MMDiT | None, config: TrainConfig,
                     run: Path, ranks: Ranks) -> OwnSources:
    """Read own_sources.safetensors; the first rank draws it where it is missing or of other data.

    A run that was stopped after `first_own_step` finds it. Every rank must call it.
    """
    file = RunFiles(run).own_sources
    # a single entry: safetensors writes several in any order, and the bytes would differ
    origin = {"origin": f"step {first_own_step(config)}, data {dataset.records.digest}"}
    if ranks.first:
        before = None
        if file.exists():
            with safe_open(file, framework="pt") as opened:
                before = opened.metadata()
        if before != origin:
            pipeline = Pipeline(*frozen, average, config.sampling, str(run))
            drawn = draw_own_sources(dataset, pipeline, config)
            save(file, drawn, **origin)
            tqdm.write(f"own sources: {len(drawn['rows'])} source pictures are redrawn")
    ranks.wait("own-sources")
    with safe_open(file, framework="pt") as opened:
        return OwnSources(opened.get_tensor("rows"), opened.get_tensor("latents"),
                          len(dataset.paths))
