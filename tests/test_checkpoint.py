"""checkpoint.py: the layouts it reads, its error messages, and its atomic writes."""
import json
import re
import struct
from dataclasses import dataclass

import pytest
import torch
from conftest import write_shards
from safetensors.torch import save_file
from torch import nn

import checkpoint
from checkpoint import Checkpoint, Source, load, make_config, save


@dataclass
class Config:
    width: int
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    name: str | None = None
    flag: bool = False


def tensors():
    return {
        "a.weight": torch.arange(6.).reshape(2, 3),
        "a.bias": torch.tensor([7., 8.]),
        "b.weight": torch.ones(4).half(),
    }


def refuses(*words):
    """Expect a ValueError whose text has all of these words."""
    patterns = [f"(?=.*{re.escape(str(word))})" for word in words]
    return pytest.raises(ValueError, match="(?s)" + "".join(patterns))


# ---------------------------------------------------------------- reading

def test_single_file(tmp_path):
    save_file(tensors(), tmp_path / "x.safetensors", {"config": '{"width": 3}'})
    for path in (tmp_path / "x.safetensors", str(tmp_path)):
        file = Checkpoint(path)
        assert set(file.names()) == set(tensors()) and file.config == {"width": 3}
        assert file.shape("a.weight") == (2, 3) and "a.bias" in file and "c" not in file
        assert torch.equal(file.read("a.weight"), tensors()["a.weight"])
        assert file.read("b.weight").dtype == torch.float32
        assert file.read("b.weight", torch.bfloat16).dtype == torch.bfloat16
        assert file.read("a.weight", device="meta").is_meta


def test_config_beside_the_weights_wins(tmp_path):
    save_file(tensors(), tmp_path / "x.safetensors", {"config": '{"width": 3}'})
    (tmp_path / "config.json").write_text('{"width": 4}')
    assert Checkpoint(tmp_path).config == {"width": 4}


def test_shards_and_subfolder(tmp_path):
    write_shards(tmp_path / "vae", tensors(), lambda path, part: save_file(part, path))
    shards = Checkpoint(tmp_path, subfolders=("vae",))
    assert set(shards.names()) == set(tensors())
    assert all(torch.equal(shards.read(n, t.dtype), t) for n, t in tensors().items())


def test_under_takes_the_first_prefix_that_occurs(tmp_path):
    save_file(tensors(), tmp_path / "x.safetensors")
    file = Checkpoint(tmp_path)
    assert set(file.under("none.", "a.").names()) == {"weight", "bias"}
    assert set(file.under("none.").names()) == set(tensors())
    assert torch.equal(file.under("a.").read("bias"), tensors()["a.bias"])


def test_count(tmp_path):
    save_file({f"block.{i}.w": torch.zeros(1) for i in range(11)}, tmp_path / "x.safetensors")
    assert Checkpoint(tmp_path).count("block.{}.") == 11
    assert Checkpoint(tmp_path).count("layer.{}.") == 0


def test_fp8_is_upcast_exactly(tmp_path):
    weights = torch.randn(64).to(torch.float8_e4m3fn)
    save_file({"w": weights}, tmp_path / "x.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(Checkpoint(tmp_path).read("w", dtype), weights.to(dtype))


# ---------------------------------------------------------------- broken files

def test_nonexistent_path(tmp_path):
    with refuses(tmp_path / "nothing", "no such file or folder"):
        Checkpoint(tmp_path / "nothing")


def test_folder_without_and_with_two_files(tmp_path):
    with refuses(tmp_path, "found 0 .safetensors files"):
        Checkpoint(tmp_path)
    for name in ("x", "y"):
        save_file(tensors(), tmp_path / f"{name}.safetensors")
    with refuses(tmp_path, "found 2 .safetensors files", "path of the file itself"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 40, -1])
def test_truncated_file(tmp_path, kept):
    file = tmp_path / "x.safetensors"
    save_file(tensors(), file)
    file.write_bytes(file.read_bytes()[:kept])
    with refuses(file, "not a whole safetensors file", "truncated"):
        Checkpoint(file)


@pytest.mark.parametrize("header", [
    b"\xff\xfenot a header",
    b"[]",
    b'{"a": NaN}',
    b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}',
    b'{"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
])
def test_garbage_header(tmp_path, header):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with refuses(file, "not a whole safetensors file"):
        Checkpoint(file)


def test_header_length_beyond_the_file(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"PK\x03\x04 this is a zip archive, not safetensors")
    with refuses(file, "not a whole safetensors file"):
        Checkpoint(file)


def test_missing_shard(tmp_path):
    shards = write_shards(tmp_path, tensors(), lambda path, part: save_file(part, path))
    shards[1].unlink()
    with refuses(shards[1], "this shard is missing"):
        Checkpoint(tmp_path)


def test_truncated_shard(tmp_path):
    shards = write_shards(tmp_path, tensors(), lambda path, part: save_file(part, path))
    shards[1].write_bytes(shards[1].read_bytes()[:-2])
    with refuses(shards[1], "not a whole safetensors file"):
        Checkpoint(tmp_path)


def test_tensor_missing_from_its_shard(tmp_path):
    shards = write_shards(tmp_path, tensors(), lambda path, part: save_file(part, path))
    save_file({"a.weight": tensors()["a.weight"]}, shards[0])
    with refuses(shards[0], "'b.weight'", "not in this shard"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", [
    "{", "", "\xff", "[1]", '{"metadata": {}}',
    '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}',
])
def test_invalid_index(tmp_path, text):
    write_shards(tmp_path, tensors(), lambda path, part: save_file(part, path))
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    with refuses(index):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "nothing"])
def test_invalid_config_json(tmp_path, text):
    save_file(tensors(), tmp_path / "x.safetensors", {"config": text})
    with refuses(tmp_path / "x.safetensors", "config"):
        Checkpoint(tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(text)
    with refuses(tmp_path / "config.json"):
        Checkpoint(tmp_path)


def test_shape_of_an_absent_tensor(tmp_path):
    save_file(tensors(), tmp_path / "x.safetensors")
    with refuses(tmp_path, "no tensor 'c'"):
        Checkpoint(tmp_path).shape("c")


# ---------------------------------------------------------------- load

SOURCES = {"weight": Source(("top", "bottom")), "bias": Source(("bias",), lambda b: 2 * b)}


def loaded(tmp_path, weights, sources=SOURCES, **options):
    save_file(weights, tmp_path / "x.safetensors")
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    return load(module, Checkpoint(tmp_path), sources, **options)


GOOD = {"top": torch.zeros(1, 3), "bottom": torch.ones(1, 3), "bias": torch.tensor([1., 2.])}


def test_load_combines_and_ignores_the_known_rest(tmp_path):
    unused = {"text_encoders.clip_l.x": torch.zeros(1)}
    module = loaded(tmp_path, GOOD | unused, dtype=torch.bfloat16)
    assert module.weight.tolist() == [[0, 0, 0], [1, 1, 1]] and module.bias.tolist() == [2, 4]
    assert module.weight.dtype == module.bias.dtype == torch.bfloat16


def test_load_lists_everything_that_does_not_fit(tmp_path):
    weights = {"top": GOOD["top"], "bias": torch.zeros(3), "extra": torch.zeros(5)}
    with refuses(tmp_path, "missing: bottom (needed for weight)",
                 "wrong shape: bias (3,), expected (2,) for bias", "superfluous: extra (5,)"):
        loaded(tmp_path, weights)


def test_load_names_parts_that_do_not_fit_together(tmp_path):
    with refuses("wrong shape: top (1, 3), bottom (1, 4), expected (2, 3) for weight"):
        loaded(tmp_path, GOOD | {"bottom": torch.zeros(1, 4)})


def test_load_initialises_only_what_it_may(tmp_path):
    sources = {"weight": Source(("top", "bottom"))}
    weights = {name: GOOD[name] for name in ("top", "bottom")}
    with refuses("missing: nothing in the file for bias (2,)"):
        loaded(tmp_path, weights, sources)
    module = loaded(tmp_path, weights, sources, initialise=lambda name, tensor: tensor.fill_(5))
    assert module.bias.tolist() == [5, 5]


# ---------------------------------------------------------------- make_config

def test_make_config():
    config = make_config(Config, {"width": 3, "rate": 1, "sizes": [4, 5], "name": "x"}, "here")
    assert config == Config(3, 1, (4, 5), "x") and isinstance(config.sizes, tuple)


@pytest.mark.parametrize("values, words", [
    ({"width": 3, "height": 4}, ["unknown field 'height'", "width, rate"]),
    ({}, ["needs width"]),
    ({"width": "3"}, ["width = '3'", "expected int"]),
    ({"width": True}, ["width = True", "expected int"]),
    ({"width": 3.0}, ["width = 3.0", "expected int"]),
    ({"width": None}, ["width = None", "expected int"]),
    ({"width": 3, "rate": "fast"}, ["rate = 'fast'", "expected float"]),
    ({"width": 3, "rate": float("nan")}, ["rate = nan", "expected float"]),
    ({"width": 3, "rate": float("inf")}, ["rate = inf", "expected float"]),
    ({"width": 3, "sizes": [1, "2"]}, ["sizes = [1, '2']", "tuple[int, ...]"]),
    ({"width": 3, "name": 4}, ["name = 4", "str | None"]),
    ({"width": 3, "flag": 1}, ["flag = 1", "expected bool"]),
])
def test_make_config_refuses(values, words):
    with refuses("here", *words):
        make_config(Config, values, "here")


def test_make_config_names_the_origin_of_refused_values():
    @dataclass
    class Picky:
        width: int

        def __post_init__(self):
            raise ValueError("too wide")

    with refuses("here: too wide"):
        make_config(Picky, {"width": 1}, "here")


# ---------------------------------------------------------------- save

def test_save_and_read_back(tmp_path):
    file = tmp_path / "new" / "folder" / "x.safetensors"
    transposed = {"slice": torch.arange(6).reshape(2, 3).T}
    save(file, tensors() | transposed, Config(3, sizes=(4,)), step="12")
    saved = Checkpoint(file)
    assert make_config(Config, saved.config, "x") == Config(3, sizes=(4,))
    assert saved.metadata["step"] == "12"
    assert saved.read("slice", torch.int64).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert [path.name for path in file.parent.iterdir()] == ["x.safetensors"]


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    save(file, {"w": torch.ones(2)})
    before = file.read_bytes()

    def half_a_file(content, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", half_a_file)
    with pytest.raises(OSError, match="disk full"):
        save(file, {"w": torch.zeros(2)})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_save_keeps_the_configuration_as_json(tmp_path):
    save(tmp_path / "x.safetensors", {}, Config(3))
    assert json.loads(Checkpoint(tmp_path).metadata["config"])["width"] == 3
