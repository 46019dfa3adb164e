"""Read and write safetensors: one file, shards with an index, a part of a larger file, fp8.

Every model of this project loads the released files directly. A model lists the origin of its
tensors in a dictionary own name -> `Source`. Before it reads any weights, `load` checks the names
and shapes of *all* tensors. It refuses a file in which a tensor is missing, superfluous or has the
wrong shape.

Run alone to list the tensors of a checkpoint:   python checkpoint.py PATH [PREFIX]
"""
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import json
import math
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

# Tensors of the released files that this project does not use: {prefix of their names: reason}.
UNUSED = {
    "text_encoders.clip_l.":
        "CLIP-L tower; the dual model does not take its pooled vector",
    "text_encoders.clip_g.":
        "CLIP-G tower; the dual model does not take its pooled vector",
    "y_embedder.mlp.0.weight":
        "input matrix of the pooled text MLP; its input is always zero, so it contributes nothing",
    "time_text_embed.text_embedder.linear_1.weight":
        "the same matrix in the diffusers layout",
    "lm_head.": "language model head of Qwen2.5-VL",
    "model.layers.": "language model of Qwen2.5-VL",
    "model.norm.": "language model of Qwen2.5-VL",
}


# ---------------------------------------------------------------- typed configurations

def _is_a(value, kind) -> bool:
    """Whether `value` has the annotated type: int, float, bool, str, Path, tuple[T, ...], T | None.

    Lists pass for tuples, ints for floats. A float must be finite. A bool is no number.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, argument) for argument in arguments)
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(_is_a(v, arguments[0]) for v in value)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) < float("inf")
    return isinstance(value, kind)


def option(default, help: str, *, above: float | None = None, least: float | None = None,
           below: float | None = None, most: float | None = None):
    """A dataclass field with a default, the help text that `--help` shows, and its range.

    The range is above < value, least <= value, value < below, value <= most; see `check_ranges`.
    """
    limits = {"above": above, "at least": least, "below": below, "at most": most}
    limits = {words: limit for words, limit in limits.items() if limit is not None}
    return dataclasses.field(default=default, metadata={"help": help, "range": limits})


_IN_RANGE = {"above": operator.gt, "at least": operator.ge,
             "below": operator.lt, "at most": operator.le}


def check_ranges(config, prefix: str = "--") -> None:
    """Raise ValueError for a field of a dataclass, nested ones included, outside of its range."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{prefix}{f.name}.")
            continue
        limits = f.metadata.get("range", {})
        # NaN compares false, so it is in no range
        if not all(_IN_RANGE[words](value, limit) for words, limit in limits.items()):
            expected = " and ".join(f"{words} {limit}" for words, limit in limits.items())
            raise ValueError(f"{prefix}{f.name} {value}: expected {expected}")


def make_config(kind, values: Mapping, origin: str):
    """Build the dataclass `kind` from `values`; lists become tuples.

    origin: the file or option that holds the values, for error messages.
    Raises ValueError for an unknown field, a wrong type or a missing required field.
    """
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{origin}: unknown field {name!r} of {kind.__name__}; "
                             f"the fields are {', '.join(hints)}")
        hint = hints[name]
        if not _is_a(value, hint):
            expected = hint if typing.get_args(hint) else hint.__name__
            raise ValueError(
                f"{origin}: {kind.__name__}.{name} = {value!r}, expected {expected}")
    required = [field.name for field in dataclasses.fields(kind)
                if field.default is field.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{origin}: {kind.__name__} needs {', '.join(missing)}")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


# ---------------------------------------------------------------- reading

def concatenate(*tensors: Tensor) -> Tensor:
    """Join tensors along their first dimension."""
    if len(tensors) == 1 or not tensors[0].is_meta:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    # By hand: on the meta device torch.cat imports torch's compiler first, which takes a second.
    [rest] = {tensor.shape[1:] for tensor in tensors}           # ValueError if they do not fit
    return torch.empty(sum(map(len, tensors)), *rest, device="meta")


def read_json(text: bytes | str, origin: str) -> dict:
    """Parse a JSON object. Raises ValueError naming `origin` for anything else."""
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{origin}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{origin}: expected a JSON object, found {content!r:.80}")
    return content


# What a file is by its first bytes: (regular expression, description and advice).
_FORMATS = (
    (rb"\Z", "an empty file: download it again"),
    (rb"version https://git-lfs", "a Git LFS pointer, which only stands for the file: run "
     "`git lfs pull` in the cloned repository, or download the file itself"),
    (rb"(?i)\W*<(!doctype|html|head|\?xml)", "a saved web page (HTML): download the file itself, "
     "which may need a login"),
    (rb".{4}\x00{4}\{", "a safetensors file"),
    (rb"PK\x03\x04|\x80[\x02-\x05]", "a PyTorch pickle (.ckpt, .pt, .bin), which could run any "
     "program and is never opened: get the .safetensors file of the same model"),
    (rb"GGUF|lmgg|tjgg", "a GGUF or GGML file, quantised for other programs: get the .safetensors "
     "file of the same model"),
    (rb"\x89HDF", "an HDF5 file (Keras): get the .safetensors file of the same model"),
    (rb"\x08[\x01-\x1f]\x12", "an ONNX file: get the .safetensors file of the same model"),
    (rb"\n.{1,2}\n\x05<pad>", "a sentencepiece model, which is a tokenizer"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "an archive: unpack it"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF", "a picture"),
    (rb"\x00{8}", "a file that begins with zeros, as an unfinished download does: "
     "download it again"),
    (rb"[\x80-\x8f\xde\xdf][\xa0-\xbf\xd9]", "a msgpack file (Flax): get the .safetensors file of "
     "the same model"),
)

# Other files than weights in safetensors, by the ends of their names.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx",
                  ".part", ".incomplete", ".crdownload", ".aria2")

# What no model of this project reads, by a tensor's name: (regular expression, description).
_FOREIGN = (
    (r"lora_|\.lora\.|\.lokr_|\.hada_", "a LoRA, the change of a model without the model: merge it "
     "into its model and save that"),
    (r"\.absmax$|\.quant_map$|\.quant_state\.|\.SCB$|\.qweight$|\.qzeros$|\.wscales$",
     "a quantised model (bitsandbytes, GPTQ, AWQ or SVDQuant): get the weights in float16, "
     "bfloat16 or fp8"),
    (r"weight_scale_inv$", "a model in block-wise scaled fp8: get the weights in float16, bfloat16 "
     "or fp8"),
    (r"controlnet|control_net|pos_embed_input\.", "a ControlNet, an addition to a model: expected "
     "the model itself"),
    (r"(^|\.)double_blocks\.|(^|\.)single_transformer_blocks\.", "a Flux transformer: expected "
     "Stable Diffusion 3 medium or UniAlignment"),
    (r"attn\.ln_q\.|\.norm_added_q\.|x_block\.attn2\.|^transformer_blocks\.\d+\.attn2\.",
     "a transformer with norms on queries and keys or a second attention (Stable Diffusion 3.5 or "
     "a relative), which is not supported: expected Stable Diffusion 3 medium"),
    (r"(^|\.)input_blocks\.|down_blocks\.\d+\.attentions\.|cond_stage_model\.|conditioner\.",
     "a model with a U-Net (Stable Diffusion 1, 2 or XL): expected Stable Diffusion 3 medium"),
    (r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias",
     "a UMT5 encoder: expected T5 v1.1"),
    (r"DenseReluDense\.wi\.weight$", "the first version of T5 (t5-small to t5-11b), without gates: "
     "expected T5 v1.1"),
    (r"^(taesd_)?(en|de)coder\.(layers\.)?\d+\.", "a tiny autoencoder (TAESD): expected the "
     "autoencoder of Stable Diffusion 3"),
    (r"^bn\.running_mean$", "the autoencoder of Flux 2: expected that of Stable Diffusion 3"),
    (r"deepstack_merger_list|^blocks\.0\.norm1\.bias$", "the vision encoder of Qwen2-VL or "
     "Qwen3-VL: expected Qwen2.5-VL"),
)

# What one model reads and another one is given, by a tensor's name.
_KNOWN = (
    (r"(^|\.)(joint_blocks|transformer_blocks)\.0\.", "an MM-DiT"),
    (r"encoder\.block\.0\.layer\.0\.SelfAttention\.", "a T5 text encoder"),
    (r"text_model\.encoder\.layers|transformer\.resblocks", "a CLIP text encoder"),
    (r"(^|\.)encoder\.down(_blocks)?\.0\.", "an autoencoder"),
    (r"(^|\.)model\.layers\.0\.|^visual\.", "a language model"),
    (r"^\d+\.\d+\.\w+$", "an optimizer's state"),
)

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}
# The marks of diffusers and transformers for copies of the full weights.
_VARIANT = re.compile(r"\.(fp\d+|bf16|(non|no)_ema)\b")


@functools.cache                                                 # each note once
def note(text: str) -> None:
    """Tell the user about a guess, in one line on stderr."""
    print(f"note: {text}", file=sys.stderr)


def identify(path: str | Path) -> str:
    """Say what a file is by its first bytes, with advice; "" if they do not show it."""
    with open(path, "rb") as file:
        head = file.read(256)
    for pattern, description in _FORMATS:
        if re.match(pattern, head, re.DOTALL):
            return description
    try:
        words = head.decode().split()
    except UnicodeDecodeError:
        return ""
    is_text = words and all(word.isprintable() for word in words)
    return f"a text that begins {' '.join(words)[:60]!r}" if is_text else ""


def _is_index(file: Path) -> bool:
    """Whether it lists the shards of a checkpoint, or of its fp16 variant."""
    return ".safetensors." in file.name and ".index." in file.name and file.suffix == ".json"


# Values that are read at a time. From 32,768 on torch divides an operation among threads, which
# costs more than it saves here: `load` has threads of its own.
_CHUNK = 32_512


class _Entry(typing.NamedTuple):
    """Where the values of a tensor are. Nothing stays open or mapped, so files can be replaced."""
    file: Path
    dtype: str                                                   # as safetensors writes it
    shape: tuple[int, ...]
    start: int                                                   # first byte
    size: int                                                    # in bytes
    scale: "_Entry | None" = None                                # factor of scaled fp8 weights

    def fill(self, target: Tensor) -> float:
        """Read the values into `target` of the same size, of any type, on any device.

        Returns their sum, which is finite only if all of them are.
        """
        # Plain reads, chunk by chunk through a small buffer. A mapped file would save one copy out
        # of the page cache, but could not be replaced meanwhile, and would count as memory in use.
        # The buffer stays in the processor's cache, so conversion and sum cost little, and no
        # tensor is in memory twice.
        flat = target.view(-1)                                   # (n,)
        buffer = torch.empty(min(len(flat), _CHUNK), dtype=_type_of(self), device="cpu")
        memory = memoryview(buffer.view(torch.uint8).numpy())
        factors = None
        if self.scale is not None:                               # one factor, or one for each row
            factors = torch.empty(self.scale.shape, device="cpu")
            self.scale.fill(factors)
            factors = factors.view(-1)                           # (1,) or (rows,)
        total, row = 0.0, len(flat) // max(1, self.shape[0]) if self.shape else 1
        with open(self.file, "rb") as file:
            file.seek(self.start)
            for start in range(0, len(flat), _CHUNK):
                place = flat[start:start + _CHUNK]               # (c,)
                values = buffer[:len(place)]                     # (c,)
                if file.readinto(memory[:values.nbytes]) != values.nbytes:
                    raise ValueError(f"{self.file}: became shorter while it was read")
                # By way of float32, as torch's conversion of float16 to bfloat16 is slow.
                if values.dtype.itemsize <= 2 and values.is_floating_point():
                    values = values.float()
                if factors is not None:
                    index = torch.arange(start, start + len(place)) // row
                    values = values * (factors[index] if len(factors) > 1 else factors)
                total += values.sum().item()
                # The type first: Apple's GPUs have neither float64 nor fp8.
                place.copy_(values if place.is_cpu else values.to(place.dtype))
        return total


def _type_of(entry: _Entry) -> torch.dtype:
    if entry.dtype not in _TYPES:
        raise ValueError(f"{entry.file}: a tensor of type {entry.dtype}, which is not supported: "
                         "get the weights in float16, bfloat16 or fp8")
    return _TYPES[entry.dtype]


def _read_header(file: Path) -> tuple[dict[str, str], dict[str, _Entry]]:
    """Metadata and tensors of a safetensors file. Raises ValueError if it is no whole one."""
    broken = f"{file}: not a whole safetensors file"
    try:
        size = file.stat().st_size
        kind = identify(file)
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            text = opened.read(length) if length <= size - 8 else b""
    except OSError as error:
        if file.is_symlink() and not file.exists():
            raise ValueError(f"{file}: a link to {os.readlink(file)}, which does not exist; "
                             "the download may be unfinished: download it again") from error
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    if kind not in ("", "a safetensors file"):
        cut = " (truncated to 0 bytes)" if not size else ""
        raise ValueError(f"{broken}{cut}, but {kind}")
    if size < 8 + length and (kind or size <= 8):
        raise ValueError(f"{broken}: truncated inside its header, {size} bytes on disk: "
                         "download or write it again")
    try:
        header = json.loads(text)
        metadata, entries = dict(header.pop("__metadata__", {})), {}
        for name, info in header.items():
            start, end = info["data_offsets"]
            shape = tuple(map(operator.index, info["shape"]))
            entries[name] = _Entry(file, info["dtype"], shape, 8 + length + start, end - start)
            dtype = _TYPES.get(info["dtype"])
            fits = not dtype or math.prod(shape) * dtype.itemsize == end - start
            if not fits or min(start, *shape, end - start) < 0:
                raise ValueError(f"{name} {shape} from byte {start} to {end}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{broken}: its header is damaged ({error}); it is something else, or "
                         "its download failed: download or write it again") from error
    end = max((entry.start + entry.size for entry in entries.values()), default=8 + length)
    if size < end:
        raise ValueError(f"{broken}: truncated, its header says {end} bytes, the file has {size}, "
                         f"{end - size} are missing: download or write it again")
    if size > end:
        raise ValueError(f"{broken}: its header says {end} bytes, the file has {size - end} more: "
                         "download or write it again")
    return metadata, entries


def _attach_scales(entries: dict[str, _Entry], origin: Path) -> dict[str, _Entry]:
    """Attach the factors of scaled fp8 to the weights that they multiply.

    ComfyUI writes X.scale_weight beside X.weight, others X.weight_scale. The factors of
    activations (scale_input) and the markers (scaled_fp8) change no weight.
    """
    entries = dict(entries)
    for name in list(entries):
        module, dot, kind = name.rpartition(".")
        weight = f"{module}{dot}weight"
        if kind in ("scale_weight", "weight_scale") and weight in entries:
            scale = entries.pop(name)
            count, rows = math.prod(scale.shape), entries[weight].shape[:1]
            if count != 1 and (count,) != rows:
                raise ValueError(f"{origin}: {name} {scale.shape}, expected one factor or one for "
                                 f"each row of {weight} {entries[weight].shape}")
            entries[weight] = entries[weight]._replace(scale=scale)
        elif kind in ("scale_input", "input_scale", "scaled_fp8", "comfy_quant"):
            del entries[name]
    return entries


class Source(typing.NamedTuple):
    """Origin of one tensor of a model.

    names:   tensors in the file
    combine: makes one tensor of them; by default it concatenates them along dim 0
    """
    names: tuple[str, ...]
    combine: Callable[..., Tensor] = concatenate


class Checkpoint:
    """The tensors of a checkpoint by name, each read on request. No file stays open.

    path:       a .safetensors file; or a folder with one; or a folder with
                *.safetensors.index.json and its shards; or that index. Of several variants
                (x.fp16.safetensors beside x.safetensors) the full one is taken.
    subfolders: names tried below a folder, so that the root of a released repository works as well
                ("transformer", "vae")
    wanted:     prefixes of the names to open in a sharded checkpoint; other shards may be absent
    config:     config.json beside the weights, else the "config" entry of the file's metadata,
                else {}. A file that is given itself has the former only under a name by which
                diffusers and transformers keep the two together.
    Scaled fp8 weights are multiplied by their factors.
    Raises ValueError naming the file for anything that is missing or unreadable.
    """

    def __init__(self, path: str | Path, subfolders: Iterable[str] = (),
                 wanted: Iterable[str] = ("",)):
        self.path = Path(path)
        for name in subfolders:
            if (self.path / name).is_dir():
                self.path = self.path / name
        self._entries: dict[str, _Entry] = {}
        self.metadata: dict[str, str] = {}
        for file, expected in self._files(tuple(wanted)).items():
            metadata, entries = _read_header(file)
            self.metadata |= metadata
            if absent := set(expected or ()) - set(entries):
                raise ValueError(f"{file}: the index puts {sorted(absent)[0]!r} here, "
                                 "but it is not in this shard")
            self._entries |= {name: entries[name] for name in (expected or entries)}
        self._entries = _attach_scales(self._entries, self.path)
        self.config = self._read_config()

    def _files(self, wanted: tuple[str, ...]) -> dict[Path, list[str] | None]:
        """The files to open, each with the names that the index expects in it (None: no index)."""
        if self.path.is_file() or self.path.is_symlink() and not self.path.exists():
            return self._shards(self.path, wanted) if _is_index(self.path) else {self.path: None}
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such file or folder; expected a .safetensors file "
                             "or a folder that holds one (nothing is downloaded)")
        # A Mac writes a hidden ._x beside every x.
        visible = sorted(f for f in self.path.iterdir() if not f.name.startswith("."))
        indexes = [file for file in visible if _is_index(file)]
        files = [file for file in visible if file.suffix == ".safetensors"]
        candidates = indexes + [f for f in files if not re.search(r"-\d+-of-\d+\.", f.name)]
        full = [file for file in candidates if not _VARIANT.search(file.name)] or candidates
        chosen = [file for file in full if file in indexes] or full
        if len(chosen) == 1:
            is_index = chosen[0] in indexes
            return self._shards(chosen[0], wanted) if is_index else {chosen[0]: None}
        raise ValueError(f"{self.path}: found {len(files)} .safetensors files and {len(indexes)} "
                         "indexes, expected one file or one index with its shards; give the path "
                         f"of the file itself{self._hint(visible, indexes + files)}")

    def _hint(self, visible: list[Path], candidates: list[Path]) -> str:
        """What a folder without one clear checkpoint holds, for an error message."""
        if candidates:
            return ": " + ", ".join(file.name for file in candidates[:8])
        for file in visible:
            if file.name.endswith(_OTHER_WEIGHTS) and file.is_file():
                return f"; {file.name} is {identify(file) or 'no safetensors file'}"
        found = (f for depth in range(1, 4) for f in self.path.glob("*/" * depth + "*.safetensors"))
        folders = sorted({str(file.parent.relative_to(self.path)) for file in found})
        return f"; there are some in {', '.join(folders[:8])}" if folders else ""

    def _shards(self, index: Path, wanted: tuple[str, ...]) -> dict[Path, list[str]]:
        weight_map = read_json(index.read_bytes(), str(index)).get("weight_map")
        if not (isinstance(weight_map, dict)
                and all(isinstance(file, str) for file in weight_map.values())):
            raise ValueError(
                f"{index}: no 'weight_map'; expected the index of a sharded checkpoint")
        shards = {}
        for name, file in weight_map.items():
            if name.startswith(wanted):
                shards.setdefault(index.parent / file, []).append(name)
        if not shards:
            raise ValueError(
                f"{index}: no tensor in its 'weight_map' starts with {' or '.join(wanted)}")
        if absent := [file for file in shards if not file.is_file()]:
            raise ValueError(f"{absent[0]}: this shard is missing, {index.name} names it; "
                             "download it again")
        return shards

    def _read_config(self) -> dict:
        folder = self.path
        if folder.is_file():
            keeps_both = re.match(r"(diffusion_pytorch_)?model[.-]", folder.name)
            folder = folder.parent if keeps_both and "config" not in self.metadata else folder
        beside = folder / "config.json"
        if beside.is_file():
            return read_json(beside.read_bytes(), str(beside))
        if "config" in self.metadata:
            origin = f"{self.path}: the 'config' in its metadata"
            return read_json(self.metadata["config"], origin)
        return {}

    def under(self, *prefixes: str) -> "Checkpoint":
        """The part below the first prefix that occurs, its names without the prefix; else all."""
        for prefix in prefixes:
            part = {name.removeprefix(prefix): entry for name, entry in self._entries.items()
                    if name.startswith(prefix)}
            if part:
                view = copy.copy(self)
                view._entries = part
                return view
        return self

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return list(self._entries)

    def matches(self, pattern: str) -> bool:
        """Whether a regular expression occurs in a name."""
        return any(re.search(pattern, name) for name in self._entries)

    def foreign(self) -> str:
        """Say what it is by its names, if no model of this project reads it; else ""."""
        return next((text for pattern, text in _FOREIGN if self.matches(pattern)), "")

    def unlike(self, expected: str, complaint: str) -> ValueError:
        """The error for a file in no layout of the `expected` model: what it is, if names show it.

        complaint: is said of a file whose names show nothing
        """
        known = (text for pattern, text in _KNOWN if self.matches(pattern))
        if kind := self.foreign():
            return ValueError(f"{self.path}: this is {kind}")
        if kind := next(known, ""):
            return ValueError(f"{self.path}: this is {kind}, expected {expected}")
        found = ", ".join(self.names()[:4]) or "no tensor"
        return ValueError(f"{self.path}: {complaint}, found {found}")

    def _entry(self, name: str) -> _Entry:
        if name not in self:
            if kind := self.foreign():
                raise ValueError(f"{self.path}: this is {kind}")
            raise ValueError(f"{self.path}: no tensor {name!r}; "
                             f"the file starts with {', '.join(self.names()[:4])}")
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """The type of a tensor as safetensors writes it: F32, BF16, I64, ..."""
        return self._entry(name).dtype

    def read(self, name: str, dtype: torch.dtype = torch.float32,
             device: str | torch.device = "cpu") -> Tensor:
        """Read one tensor and convert it to `dtype`; the meta device reads only the shape."""
        if str(device) == "meta":
            return torch.empty(self.shape(name), dtype=dtype, device="meta")
        tensor = torch.empty(self.shape(name), dtype=dtype, device=device)
        self._entry(name).fill(tensor)
        return tensor

    def fill(self, target: Tensor, name: str) -> float:
        """Read one tensor into `target` of the same size; see `_Entry.fill`."""
        return self._entry(name).fill(target)

    def fill_float8(self, target: Tensor, factors: Tensor, name: str) -> float:
        """Read a matrix into `target`, e4m3 (rows, columns), and the `factors` (rows,) of its rows.

        e4m3 stays as it is stored. Other weights are divided by factors with which the largest
        value of each row is the largest of e4m3. Returns what is finite only if all values are.
        """
        entry = self._entry(name)
        if entry.dtype == "F8_E4M3":
            factors.fill_(1)
            if entry.scale is not None:
                scale = torch.empty(entry.scale.shape)           # one factor, or one for each row
                entry.scale.fill(scale)
                factors.copy_(scale.view(-1).expand(len(factors)))
            return entry._replace(scale=None).fill(target) + factors.sum().item()
        matrix = torch.empty(entry.shape)                        # (rows, columns), on the CPU
        total = entry.fill(matrix)
        low, high = matrix.aminmax(dim=1)                        # (rows,) each
        largest = torch.maximum(-low, high)
        scale = (largest / torch.finfo(target.dtype).max).clamp_min(torch.finfo(torch.float32).tiny)
        factors.copy_(scale)
        target.copy_(matrix.div_(scale[:, None]).to(target.dtype))
        return total

    def count(self, pattern: str) -> int:
        """Count the blocks of a stack: pattern.format(0), pattern.format(1), ... begin names."""
        depth = 0
        while any(name.startswith(pattern.format(depth)) for name in self._entries):
            depth += 1
        return depth


def _misfit(name: str, target: Tensor, source: Source, checkpoint: Checkpoint) -> str:
    """Describe why `source` cannot fill the tensor `name`; empty if it can."""
    if absent := [n for n in source.names if n not in checkpoint]:
        return f"missing: {', '.join(absent)} (needed for {name})"
    shapes = [checkpoint.shape(n) for n in source.names]
    parts = [torch.empty(shape, device="meta") for shape in shapes]
    try:
        combined = source.combine(*parts).shape
    except (RuntimeError, ValueError):                           # the parts do not fit together
        combined = None
    if combined != target.shape:
        listed = ", ".join(f"{n} {shape}" for n, shape in zip(source.names, shapes))
        return f"wrong shape: {listed}, expected {tuple(target.shape)} for {name}"
    if integers := [n for n in source.names if not checkpoint.dtype(n).startswith(("F", "BF"))]:
        return f"wrong type: {integers[0]} {checkpoint.dtype(integers[0])}, expected floats"
    return ""


def load(module: nn.Module, checkpoint: Checkpoint, sources: Mapping[str, Source],
         initialise: Callable[[str, Tensor], None] | None = None,
         dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
         ignored: tuple[str, ...] = ()) -> nn.Module:
    """Fill every parameter and buffer of `module`, built on the meta device, from `checkpoint`.

    sources:    own name -> Source
    dtype:      of all tensors, except for weights that the module has in fp8 (e4m3). These stay
                so, and the module has the factors of their rows, float32, as "scale" beside them.
    initialise: initialise(name, tensor) fills each tensor of the module that has no source
    ignored:    prefixes of further names that may be in the file
    Raises ValueError listing all tensors that are missing, superfluous or wrongly shaped, before
    any weights are read; or naming the model that the file holds in place of the expected one; or
    a tensor that is not finite.
    """
    own, used, problems = module.state_dict(), set(), []
    scales = {name: f"{name.removesuffix('weight')}scale" for name, target in own.items()
              if target.dtype == torch.float8_e4m3fn}
    for name, target in own.items():
        if name in sources:
            used.update(sources[name].names)
            if misfit := _misfit(name, target, sources[name], checkpoint):
                problems.append(misfit)
        elif initialise is None and name not in scales.values():
            problems.append(f"missing: nothing in the file for {name} {tuple(target.shape)}")
    for name in checkpoint.names():
        if name not in used and not name.startswith((*UNUSED, *ignored)):
            problems.append(f"superfluous: {name} {checkpoint.shape(name)}")
    if problems:
        if kind := checkpoint.foreign():
            raise ValueError(f"{checkpoint.path}: this is {kind}")
        shown = problems[:12]
        if len(problems) > 12:
            shown.append(f"and {len(problems) - 12} more")
        raise ValueError(f"{checkpoint.path}: does not fit {type(module).__name__}:\n  "
                         + "\n  ".join(shown))

    def read(name: str) -> dict[str, Tensor]:
        names, combine = sources[name]
        shapes = [checkpoint.shape(n) for n in names]
        result = {}
        if name in scales:
            result = {n: torch.empty_like(own[n], device=device) for n in (name, scales[name])}
            rows = [shape[0] for shape in shapes]
            weights, factors = (tensor.split(rows) for tensor in result.values())
            sums = [checkpoint.fill_float8(*part) for part in zip(weights, factors, names)]
        elif combine is concatenate:         # straight to its place, without a second copy
            result = {name: torch.empty(own[name].shape, dtype=dtype, device=device)}
            parts = result[name].view(-1).split([math.prod(shape) for shape in shapes])
            sums = [checkpoint.fill(part, n) for part, n in zip(parts, names)]
        else:                               # sums and products in float32, rounded once
            parts = [torch.empty(shape, device=device) for shape in shapes]
            sums = [checkpoint.fill(part, n) for part, n in zip(parts, names)]
            result = {name: combine(*parts).to(dtype).contiguous()}
        if not all(map(math.isfinite, sums)):
            raise ValueError(f"{checkpoint.path}: {' or '.join(names)} holds NaN or infinity: "
                             "download or write it again")
        return result

    in_file = [name for name in own if name in sources]
    as_they_are = {*scales, *scales.values()}
    if torch.device(device).type == "meta":
        tensors = {name: target if name in as_they_are else target.to(dtype)
                   for name, target in own.items()}
    else:
        # Two threads: one reads while the other converts, or waits for memory.
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            read_tensors = list(threads.map(read, in_file))
        tensors = {name: tensor for part in read_tensors for name, tensor in part.items()}
        for name, target in own.items():
            if name not in tensors:
                tensors[name] = torch.empty(target.shape, dtype=dtype, device=device)
                initialise(name, tensors[name])
    module.load_state_dict(tensors, strict=True, assign=True)
    return module


# ---------------------------------------------------------------- writing

def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all: a kill at any moment leaves the old file or the new one.

    write: writes the content to the temporary path that it is called with
    Raises OSError naming the file if it cannot be written; nothing temporary stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "r+b") as file:                     # Windows syncs no read-only file
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        failure = OSError(f"{path}: cannot be written ({reason}); the old file stays as it was")
        number = re.search(r"os error (\d+)", str(error))        # safetensors' own words
        failure.errno = int(number[1]) if number else getattr(error, "errno", None)
        raise failure from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save(path: str | Path, tensors: Mapping[str, Tensor], config=None, **metadata: str) -> None:
    """Write tensors atomically, with a configuration (a dataclass) as JSON in the metadata.

    Raises OSError naming the file if it cannot be written, as on a full disk.
    """
    if config is not None:
        metadata["config"] = json.dumps(dataclasses.asdict(config))
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda file: save_file(tensors, file, metadata or None))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        listed = Checkpoint(sys.argv[1]).under(*sys.argv[2:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    for tensor_name in listed.names():
        print(f"{tensor_name:80} {list(listed.shape(tensor_name))}")
    configuration = listed.config or "none, it is inferred from the shapes"
    print(f"{len(listed.names())} tensors; configuration: {configuration}")
