"""Shared by the tests: reference outputs, sparse checkpoints of full size, and a quick run."""
import base64
import html.parser
import io
import json
import math
import os
import re
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from torch import Tensor

os.environ["CUDA_VISIBLE_DEVICES"] = ""         # tests compare bit for bit: CPU only
signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored in a shell's background jobs

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict]:
    """Read tests/golden/<name>.safetensors: weights, inputs and outputs by name; configuration."""
    parts = {"weights": {}, "in": {}, "out": {}}
    with safe_open(TESTS / "golden" / f"{name}.safetensors", framework="pt") as file:
        for full in file.keys():
            part, tensor_name = full.split("/", 1)
            parts[part][tensor_name] = file.get_tensor(full)
        return *parts.values(), json.loads((file.metadata() or {}).get("config", "{}"))


def manifest(name: str) -> dict:
    """Describe a full-size release: "tensors" {name: shape}, "parameters" (count), "config"."""
    return json.loads((TESTS / "manifests" / f"{name}.json").read_text())


def write_sparse(path: Path, shapes: dict[str, list[int]],
                 metadata: dict[str, str] | None = None) -> None:
    """Write a float16 safetensors file of zeros: a header, then a hole in place of the weights."""
    header = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_shards(folder: Path, tensors: dict, write, count: int = 2) -> list[Path]:
    """Spread `tensors` over `count` files with write(path, part); write their index."""
    names, weight_map, paths = list(tensors), {}, []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        write(path, part)
        weight_map |= dict.fromkeys(part, path.name)
        paths.append(path)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return paths


def parameter_count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------- a quick run

STEPS = ("--preset mini --train_scenes 120 --test_scenes 6 --vae_steps 2 --teacher_steps 2 "
         "--steps 6 --log_every 1 --save_every 3 --batch_size 4").split()
LOOP = STEPS + ("--model.width 32 --model.depth 2 --model.num_heads 2 --model.text_dim 32 "
                "--sampling.steps 2 --sampling.text_steps 2").split()
QUICK = LOOP + "--vae.block_channels 16 --text_encoder.dim 32".split()


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(arguments, capsys) -> str:
    """The message with which sample.py refuses its command line, before any model is loaded."""
    from sample import main

    with pytest.raises(SystemExit) as exit:
        main([*map(str, arguments)])
    assert exit.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A quick run from scratch to its report. Read only: several files of tests share it."""
    import train

    run = tmp_path_factory.mktemp("runs") / "whole"
    train.main([*QUICK, "--out", str(run)])
    return run


def part_options(run: Path) -> list[str]:
    """The options that take the frozen parts of another run."""
    return ["--vae_path", str(run / "vae.safetensors"),
            "--t5_path", str(run / "text_encoder.safetensors"),
            "--tokenizer_path", str(run / "tokenizer.model"),
            "--teacher_path", str(run / "teacher")]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[dict]:
    """The metrics except the time, which differs from run to run."""
    lines = metrics(run)
    for line in lines:
        line.pop("seconds")
    return lines


# ---------------------------------------------------------------- pages

def without_bytes(page: str) -> str:
    """A page of HTML without the bytes of its pictures, where any four letters occur by chance."""
    return re.sub("(?<=;base64,)[A-Za-z0-9+/=]+", "", page)


class ParsedPage(html.parser.HTMLParser):
    """A page of HTML: its text, its images, and the tags that are still open at its end."""
    def __init__(self, page: str):
        super().__init__()
        self.open, self.images, self.text = [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def pictures(self) -> list[np.ndarray]:
        """The images, all of which are PNG files inside of the page."""
        starts = [image["src"].partition(",") for image in self.images]
        assert all(start == "data:image/png;base64" for start, _, _ in starts)
        files = [io.BytesIO(base64.b64decode(data)) for _, _, data in starts]
        return [np.asarray(Image.open(file)) for file in files]
