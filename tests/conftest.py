"""What the tests share: the reference outputs, and checkpoints of full size that take no room on the disk."""
import json
import math
import os
import struct
import sys
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

os.environ["CUDA_VISIBLE_DEVICES"] = ""         # the tests compare bit for bit, which holds on the CPU only

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict]:
    """weights, inputs, outputs (dictionaries of tensors) and the configuration of tests/golden/<name>.safetensors."""
    parts = {"weights": {}, "in": {}, "out": {}}
    with safe_open(TESTS / "golden" / f"{name}.safetensors", framework="pt") as file:
        for full in file.keys():
            part, tensor_name = full.split("/", 1)
            parts[part][tensor_name] = file.get_tensor(full)
        return *parts.values(), json.loads((file.metadata() or {}).get("config", "{}"))


def manifest(name: str) -> dict:
    """A full-size released checkpoint: "tensors" {name: shape}, "parameters" (their number), "config"."""
    return json.loads((TESTS / "manifests" / f"{name}.json").read_text())


def write_sparse(path: Path, shapes: dict[str, list[int]], metadata: dict[str, str] | None = None) -> None:
    """A float16 safetensors file of these shapes, all zeros: a header, then a hole where the weights would be."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_shards(folder: Path, tensors: dict, write, count: int = 2) -> list[Path]:
    """`tensors` spread over `count` files by write(path, part), with the index that names them."""
    names, weight_map, paths = list(tensors), {}, []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        write(path, part)
        weight_map |= dict.fromkeys(part, path.name)
        paths.append(path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


def parameter_count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
