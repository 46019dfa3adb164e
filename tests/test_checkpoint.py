"""checkpoint.py: the layouts it reads, its error messages, and its atomic writes."""
import errno
import json
import os
import re
import struct
import zipfile
from pathlib import Path
from dataclasses import dataclass

import pytest
import torch
from conftest import write_shards
from safetensors.torch import save_file
from torch import nn

import checkpoint
from checkpoint import (Checkpoint, Source, identify, load, make_config, note, save,
                        write_atomically)


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


@pytest.mark.parametrize("content, words", [
    (b"", "an empty file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n", "git lfs pull"),
    (b"\xef\xbb\xbf\n <!DOCTYPE html>\n<html lang='de'>", "saved web page"),
    (b"<HTML><body>Access denied", "saved web page"),
    (b"PK\x03\x04\0\0archive/data.pkl", "PyTorch pickle"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "PyTorch pickle"),
    (b"GGUF\x03\0\0\0", "GGUF"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"\x08\x08\x12\x07pytorch\x1a\x05", "ONNX"),
    (b"\x81\xa6params\x82", "msgpack"),
    (b"\x1f\x8b\x08\0", "unpack it"),
    (b"\x89PNG\r\n\x1a\n", "a picture"),
    (b"\n\x0e\n\x05<pad>\x15\0\0\0\0\x18\x03", "sentencepiece model"),
    (b"Entry not found", "a text that begins 'Entry not found'"),
    (b'{"error":"Repository not found"}', "Repository not found"),
    (bytes(100), "begins with zeros"),
])
def test_what_is_no_safetensors_file_is_named(tmp_path, content, words):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with refuses(file, "not a whole safetensors file", words) as error:
        Checkpoint(file)
    assert not content or "truncated" not in str(error.value)
    assert "\n" not in str(error.value)
    assert words in identify(file)


def test_files_that_torch_saved_are_named_and_never_opened(tmp_path, monkeypatch):
    torch.save(tensors(), tmp_path / "x.ckpt")
    torch.save(tensors(), tmp_path / "y.ckpt", _use_new_zipfile_serialization=False)
    assert zipfile.is_zipfile(tmp_path / "x.ckpt") and not zipfile.is_zipfile(tmp_path / "y.ckpt")
    monkeypatch.setattr(torch, "load", None)
    for name in ("x.ckpt", "y.ckpt"):
        with refuses(tmp_path / name, "PyTorch pickle", "never opened", ".safetensors"):
            Checkpoint(tmp_path / name)


def test_a_truncated_file_says_how_much_is_missing(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(tensors(), file)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-9])
    with refuses(file, f"its header says {size} bytes, the file has {size - 9}, 9 are missing"):
        Checkpoint(file)
    save_file(tensors(), file)
    file.write_bytes(file.read_bytes() + b"abc")
    with refuses(file, f"its header says {size} bytes, the file has 3 more"):
        Checkpoint(file)


def test_a_link_to_nothing(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("../../blobs/0123")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with refuses(tmp_path / "model.safetensors", "a link to ../../blobs/0123"):
            Checkpoint(path)


def test_a_type_that_is_not_supported(tmp_path):
    header = b'{"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}'
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    with refuses(file, "type F4", "fp8"):
        Checkpoint(file).read("w")


# ---------------------------------------------------------------- folders

def test_hidden_files_of_a_mac_are_ignored(tmp_path):
    write_shards(tmp_path, tensors(), lambda path, part: save_file(part, path))
    for file in list(tmp_path.iterdir()):
        (tmp_path / f"._{file.name}").write_bytes(b"\0\x05\x16\x07")
    assert set(Checkpoint(tmp_path).names()) == set(tensors())


def test_the_full_weights_are_taken_before_a_variant(tmp_path):
    for number, name in enumerate(("x.safetensors", "x.fp16.safetensors", "x.non_ema.safetensors")):
        save_file({"w": torch.tensor([float(number)])}, tmp_path / name)
    assert Checkpoint(tmp_path).read("w") == 0
    (tmp_path / "x.safetensors").unlink()
    with refuses(tmp_path, "found 2", "x.fp16.safetensors, x.non_ema.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "x.non_ema.safetensors").unlink()
    assert Checkpoint(tmp_path).read("w") == 1


@pytest.mark.parametrize("index", [
    "model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"])
def test_shards_of_a_variant(tmp_path, index):
    for shard in write_shards(tmp_path, tensors(), lambda path, part: save_file(part, path)):
        shard.rename(tmp_path / shard.name.replace("model-", "model.fp16-"))
    text = (tmp_path / "model.safetensors.index.json").read_text().replace("model-", "model.fp16-")
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / index).write_text(text)
    for path in (tmp_path, tmp_path / index):
        assert set(Checkpoint(path).names()) == set(tensors())
    write_shards(tmp_path, {"full": torch.zeros(1)}, lambda path, part: save_file(part, path), 1)
    assert Checkpoint(tmp_path).names() == ["full"]


def test_several_candidates_are_named(tmp_path):
    for name in ("sd3_medium", "sd3.5_large"):
        save_file(tensors(), tmp_path / f"{name}.safetensors")
    with refuses("found 2", "sd3.5_large.safetensors, sd3_medium.safetensors"):
        Checkpoint(tmp_path)


def test_a_folder_without_safetensors_says_what_it_has(tmp_path):
    save(tmp_path / "snapshots" / "0123" / "vae" / "x.safetensors", tensors())
    with refuses("found 0", "there are some in snapshots/0123/vae"):
        Checkpoint(tmp_path)
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    with refuses("found 0", "pytorch_model.bin is a PyTorch pickle"):
        Checkpoint(tmp_path)


def test_config_beside_a_file_of_a_known_name(tmp_path):
    (tmp_path / "config.json").write_text('{"width": 4}')
    for name, config in (("diffusion_pytorch_model.fp16", {"width": 4}), ("model", {"width": 4}),
                         ("other", {})):
        save_file(tensors(), tmp_path / f"{name}.safetensors")
        assert Checkpoint(tmp_path / f"{name}.safetensors").config == config
    save(tmp_path / "model.safetensors", tensors(), Config(3))
    assert Checkpoint(tmp_path / "model.safetensors").config["width"] == 3


# ---------------------------------------------------------------- scaled fp8

@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5]),
                                   torch.tensor([0.5, 2, 4]), torch.tensor([[0.5], [2], [4]])])
def test_scaled_fp8(tmp_path, name, scale):
    stored = torch.randn(3, 5).to(torch.float8_e4m3fn)
    save_file({"p.a.weight": stored, f"p.a.{name}": scale, "p.a.scale_input": torch.ones(1),
               "p.a.bias": torch.ones(3), "p.scaled_fp8": torch.empty(0).to(stored.dtype)},
              tmp_path / "x.safetensors")
    file = Checkpoint(tmp_path).under("p.")
    assert sorted(file.names()) == ["a.bias", "a.weight"] and file.shape("a.weight") == (3, 5)
    expected = stored.float() * scale.reshape(-1, 1)
    assert torch.equal(file.read("a.weight"), expected)
    assert torch.equal(file.read("a.weight", torch.bfloat16), expected.bfloat16())
    assert torch.equal(file.read("a.bias"), torch.ones(3))


@pytest.mark.parametrize("shape", [(2, 2), (0,), (5,)])
def test_scales_of_another_form(tmp_path, shape):
    save_file({"a.weight": torch.zeros(3, 5), "a.scale_weight": torch.ones(shape)},
              tmp_path / "x.safetensors")
    with refuses(tmp_path, f"a.scale_weight {shape}", "a.weight (3, 5)"):
        Checkpoint(tmp_path)


# ---------------------------------------------------------------- files are not kept open

def test_a_checkpoint_that_was_read_can_be_replaced_and_removed(tmp_path):
    """NFS and Windows refuse to remove or replace a file that is open or mapped."""
    values = tensors() | {"scalar": torch.tensor(3), "none": torch.empty(0, 2),
                          "flag": torch.tensor([True, False]),
                          "double": torch.tensor([0.1], dtype=torch.float64)}
    save(tmp_path / "x.safetensors", values)
    file = Checkpoint(tmp_path)
    read = {name: file.read(name, tensor.dtype) for name, tensor in values.items()}
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
             if os.path.islink(f"/proc/self/fd/{fd}")]
    for used in (Path("/proc/self/maps").read_text(), str(links)):
        assert str(tmp_path) not in used
    save(tmp_path / "x.safetensors", {"other": torch.zeros(9)})
    assert all(torch.equal(read[name], tensor) for name, tensor in values.items())


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_load_refuses_values_that_are_not_finite(tmp_path, value):
    with refuses(tmp_path, "top or bottom holds NaN or infinity"):
        loaded(tmp_path, GOOD | {"bottom": torch.tensor([[1, value, 1]])})


def test_load_refuses_integers(tmp_path):
    with refuses(tmp_path, "wrong type: bias I64, expected floats"):
        loaded(tmp_path, GOOD | {"bias": torch.tensor([1, 2])})


def test_load_ignores_prefixes(tmp_path):
    loaded(tmp_path, GOOD | {"decoder.x": torch.zeros(1)}, ignored=("decoder.",))


@pytest.mark.parametrize("name, words", [
    ("lora_unet_joint_blocks_0.lora_down.weight", "a LoRA"),
    ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA"),
    ("top.absmax", "a quantised model"),
    ("top.qweight", "a quantised model"),
    ("top.weight_scale_inv", "block-wise scaled fp8"),
    ("controlnet_blocks.0.weight", "a ControlNet"),
    ("double_blocks.0.img_attn.qkv.weight", "a Flux transformer"),
    ("joint_blocks.0.x_block.attn.ln_q.weight", "Stable Diffusion 3.5"),
    ("joint_blocks.0.x_block.attn2.qkv.weight", "Stable Diffusion 3.5"),
    ("transformer_blocks.0.attn.norm_added_q.weight", "Stable Diffusion 3.5"),
    ("input_blocks.0.0.weight", "U-Net"),
    ("encoder.layers.0.weight", "TAESD"),
])
def test_load_names_a_foreign_model(tmp_path, name, words):
    with refuses(tmp_path, "this is", words) as error:
        loaded(tmp_path, GOOD | {name: torch.zeros(1)})
    assert "\n" not in str(error.value) and "superfluous" not in str(error.value)


def test_a_note_is_printed_once(capsys):
    for _ in range(2):
        note("a test of notes")
    output = capsys.readouterr()
    assert output.err == "note: a test of notes\n" and not output.out


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


def test_files_are_synced_by_a_handle_that_writes(tmp_path, monkeypatch):
    """Windows refuses to sync a file that was opened for reading."""
    synced = []

    def sync(descriptor):
        os.write(descriptor, b"")                               # fails for a read-only descriptor
        synced.append(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", sync)
    save(tmp_path / "x.safetensors", tensors())
    assert len(synced) == 1 and set(Checkpoint(tmp_path).names()) == set(tensors())


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path):
    """A limit on the size of files fails in safetensors' own writing, as a full disk does."""
    import resource

    file = tmp_path / "x.safetensors"
    save(file, {"w": torch.ones(2)})
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{file}: cannot be written .*too large") as error:
            save(file, {"w": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"),
                                     PermissionError(errno.EACCES, "in use"), KeyboardInterrupt()])
def test_whatever_fails_nothing_temporary_stays(tmp_path, monkeypatch, step, failure):
    file = tmp_path / "x.txt"
    write_atomically(file, lambda path: path.write_text("old"))

    def fail(*_):
        raise failure

    monkeypatch.setattr(checkpoint.os, step, fail)
    with pytest.raises((OSError, KeyboardInterrupt)) as error:
        write_atomically(file, lambda path: path.write_text("new"))
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    if isinstance(failure, OSError):
        assert error.value.errno == failure.errno
        assert str(error.value) == (f"{file}: cannot be written ({failure.strerror}); "
                                    "the old file stays as it was")
