"""Read and write safetensors: one file, shards with an index, a part of a larger file, fp8.

Every model of this project loads the released files directly. A model lists the origin of its
tensors in a dictionary own name -> `Source`. Before it reads any weights, `load` checks the names
and shapes of *all* tensors. It refuses a file in which a tensor is missing, superfluous or has the
wrong shape.

Run alone to list the tensors of a checkpoint:   python checkpoint.py PATH [PREFIX]
"""
import copy
import dataclasses
import json
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
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

def _concatenate(*tensors: Tensor) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def read_json(text: bytes | str, origin: str) -> dict:
    """Parse a JSON object. Raises ValueError naming `origin` for anything else."""
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{origin}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{origin}: expected a JSON object, found {content!r:.80}")
    return content


class Source(typing.NamedTuple):
    """Origin of one tensor of a model.

    names:   tensors in the file
    combine: makes one tensor of them; by default it concatenates them along dim 0
    """
    names: tuple[str, ...]
    combine: Callable[..., Tensor] = _concatenate


class Checkpoint:
    """The tensors of a checkpoint by name, each read on request.

    path:       a .safetensors file; or a folder with *.safetensors.index.json and its shards;
                or a folder with one .safetensors file
    subfolders: names tried below a folder, so that the root of a released repository works as well
                ("transformer", "vae")
    wanted:     prefixes of the names to open in a sharded checkpoint; other shards may be absent
    config:     config.json beside the weights, else the "config" entry of the file's metadata,
                else {}
    Raises ValueError naming the file for anything that is missing or unreadable.
    """

    def __init__(self, path: str | Path, subfolders: Iterable[str] = (),
                 wanted: Iterable[str] = ("",)):
        self.path = Path(path)
        for name in subfolders:
            if (self.path / name).is_dir():
                self.path = self.path / name
        self._handles = {}                                       # name -> (open file, name in it)
        self.metadata: dict[str, str] = {}
        for file, expected in self._files(tuple(wanted)).items():
            handle = self._open(file)
            self.metadata |= handle.metadata() or {}
            names = list(handle.keys())
            if absent := set(expected or ()) - set(names):
                raise ValueError(f"{file}: the index puts {sorted(absent)[0]!r} here, "
                                 "but it is not in this shard")
            self._handles |= {name: (handle, name) for name in (expected or names)}
        self.config = self._read_config()

    def _files(self, wanted: tuple[str, ...]) -> dict[Path, list[str] | None]:
        """The files to open, each with the names that the index expects in it (None: no index)."""
        if self.path.is_file():
            return {self.path: None}
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such file or folder; "
                             "expected a .safetensors file or a folder that holds one")
        indexes = sorted(self.path.glob("*.safetensors.index.json"))
        files = sorted(self.path.glob("*.safetensors"))
        if len(indexes) == 1:
            return self._shards(indexes[0], wanted)
        if len(files) != 1:
            raise ValueError(f"{self.path}: found {len(files)} .safetensors files and "
                             f"{len(indexes)} indexes, expected one file or one index with its "
                             "shards; give the path of the file itself")
        return {files[0]: None}

    def _shards(self, index: Path, wanted: tuple[str, ...]) -> dict[Path, list[str]]:
        weight_map = read_json(index.read_bytes(), str(index)).get("weight_map")
        if not (isinstance(weight_map, dict)
                and all(isinstance(file, str) for file in weight_map.values())):
            raise ValueError(
                f"{index}: no 'weight_map'; expected the index of a sharded checkpoint")
        shards = {}
        for name, file in weight_map.items():
            if name.startswith(wanted):
                shards.setdefault(self.path / file, []).append(name)
        if not shards:
            raise ValueError(
                f"{index}: no tensor in its 'weight_map' starts with {' or '.join(wanted)}")
        if absent := [file for file in shards if not file.is_file()]:
            raise ValueError(f"{absent[0]}: this shard is missing, {index.name} names it; "
                             "download it again")
        return shards

    @staticmethod
    def _open(file: Path):
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error}; "
                             f"{file.stat().st_size} bytes on disk); it may be truncated: "
                             "download or write it again") from error

    def _read_config(self) -> dict:
        beside = self.path / "config.json"
        if beside.is_file():
            return read_json(beside.read_bytes(), str(beside))
        if "config" in self.metadata:
            origin = f"{self.path}: the 'config' in its metadata"
            return read_json(self.metadata["config"], origin)
        return {}

    def under(self, *prefixes: str) -> "Checkpoint":
        """The part below the first prefix that occurs, its names without the prefix; else all."""
        for prefix in prefixes:
            part = {name.removeprefix(prefix): handle for name, handle in self._handles.items()
                    if name.startswith(prefix)}
            if part:
                view = copy.copy(self)
                view._handles = part
                return view
        return self

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def names(self) -> list[str]:
        return list(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self:
            raise ValueError(f"{self.path}: no tensor {name!r}; "
                             f"the file starts with {', '.join(self.names()[:4])}")
        handle, full_name = self._handles[name]
        return tuple(handle.get_slice(full_name).get_shape())

    def read(self, name: str, dtype: torch.dtype = torch.float32,
             device: str | torch.device = "cpu") -> Tensor:
        """Read one tensor and convert it to `dtype`; the meta device reads only the shape."""
        if str(device) == "meta":
            return torch.empty(self.shape(name), dtype=dtype, device="meta")
        handle, full_name = self._handles[name]
        return handle.get_tensor(full_name).to(device=device, dtype=dtype)

    def count(self, pattern: str) -> int:
        """Count the blocks of a stack: pattern.format(0), pattern.format(1), ... begin names."""
        depth = 0
        while any(name.startswith(pattern.format(depth)) for name in self._handles):
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
    return ""


def load(module: nn.Module, checkpoint: Checkpoint, sources: Mapping[str, Source],
         initialise: Callable[[str, Tensor], None] | None = None,
         dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """Fill every parameter and buffer of `module`, built on the meta device, from `checkpoint`.

    sources:    own name -> Source
    initialise: initialise(name, tensor) fills each tensor of the module that has no source
    Raises ValueError listing all tensors that are missing, superfluous or wrongly shaped, before
    any weights are read.
    """
    own, used, problems = module.state_dict(), set(), []
    for name, target in own.items():
        if name in sources:
            used.update(sources[name].names)
            if misfit := _misfit(name, target, sources[name], checkpoint):
                problems.append(misfit)
        elif initialise is None:
            problems.append(f"missing: nothing in the file for {name} {tuple(target.shape)}")
    for name in checkpoint.names():
        if name not in used and not name.startswith(tuple(UNUSED)):
            problems.append(f"superfluous: {name} {checkpoint.shape(name)}")
    if problems:
        shown = problems[:12]
        if len(problems) > 12:
            shown.append(f"and {len(problems) - 12} more")
        raise ValueError(f"{checkpoint.path}: does not fit {type(module).__name__}:\n  "
                         + "\n  ".join(shown))

    tensors = {}
    for name, target in own.items():
        if name in sources:
            names, combine = sources[name]
            # Sums and products are formed in float32 and rounded once.
            read_dtype = dtype if combine is _concatenate else torch.float32
            parts = [checkpoint.read(n, read_dtype, device) for n in names]
            tensors[name] = combine(*parts).to(dtype).contiguous()
        else:
            tensors[name] = torch.empty(target.shape, dtype=dtype, device=device)
            initialise(name, tensors[name])
    module.load_state_dict(tensors, strict=True, assign=True)
    return module


# ---------------------------------------------------------------- writing

def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all: a kill at any moment leaves the old file or the new one.

    write: writes the content to the temporary path that it is called with
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: str | Path, tensors: Mapping[str, Tensor], config=None, **metadata: str) -> None:
    """Write tensors atomically, with a configuration (a dataclass) as JSON in the metadata."""
    if config is not None:
        metadata["config"] = json.dumps(dataclasses.asdict(config))
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda file: save_file(tensors, file, metadata or None))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    listed = Checkpoint(sys.argv[1]).under(*sys.argv[2:])
    for tensor_name in listed.names():
        print(f"{tensor_name:80} {list(listed.shape(tensor_name))}")
    configuration = listed.config or "none, it is inferred from the shapes"
    print(f"{len(listed.names())} tensors; configuration: {configuration}")
