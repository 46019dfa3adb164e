"""Reading and writing safetensors: one file, shards with an index, a part of a bigger file, fp8.

Every model of this project loads the released files directly. A model says where each of its tensors comes from
(a dictionary own name -> `Source`), and `load` does the rest: it checks names and shapes of *all* tensors before the
first byte of weights is read, and refuses a file in which a tensor is missing, superfluous or has the wrong shape.

Run alone to list what a checkpoint holds:   python checkpoint.py PATH [PREFIX]
"""
import dataclasses
import json
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

# What the released files hold and this project does not use, as prefixes of names: {prefix: what it is}. One list for all loaders.
UNUSED = {
    "text_encoders.clip_l.": "CLIP-L tower (its pooled vector is not an input of the dual model)",
    "text_encoders.clip_g.": "CLIP-G tower (the same)",
    "y_embedder.mlp.0.weight": "pooled text MLP, input side: an all-zero vector goes in, so this matrix contributes nothing",
    "time_text_embed.text_embedder.linear_1.weight": "the same in the diffusers layout",
    "lm_head.": "Qwen2.5-VL's language model head",
    "model.layers.": "Qwen2.5-VL's language model",
    "model.norm.": "Qwen2.5-VL's language model",
}


# ---------------------------------------------------------------- typed configurations

def _is_a(value, kind) -> bool:
    """Whether `value` is of the annotated type `kind` (int, float, bool, str, tuple[T, ...], Path, T | None)."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, k) for k in inner)
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(_is_a(v, inner[0]) for v in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def make_config(kind, values: Mapping, origin: str):
    """The dataclass `kind` with its fields set from `values`; lists become tuples.

    Raises ValueError, naming `origin` (a file or option), for an unknown field, a wrong type or a missing required field.
    """
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{origin}: unknown field {name!r} of {kind.__name__}; the fields are {', '.join(hints)}")
        if not _is_a(value, hints[name]):
            wanted = getattr(hints[name], "__name__", "") if not typing.get_args(hints[name]) else str(hints[name])
            raise ValueError(f"{origin}: {kind.__name__}.{name} = {value!r}, expected {wanted}")
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{origin}: {kind.__name__} needs {', '.join(missing)}")
    try:
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


# ---------------------------------------------------------------- reading

def _concatenate(*tensors: Tensor) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def read_json(text: bytes | str, origin: str) -> dict:
    """The JSON object in `text`. Raises ValueError naming `origin` for anything else."""
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{origin}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{origin}: expected a JSON object, found {content!r:.80}")
    return content


class Source(typing.NamedTuple):
    """Where one tensor of a model comes from: names in the file, and how they become one (default: stacked along dim 0)."""
    names: tuple[str, ...]
    combine: Callable[..., Tensor] = _concatenate


class Checkpoint:
    """The tensors of a checkpoint by name, each read only when asked for.

    path:       a .safetensors file; or a folder with *.safetensors.index.json and its shards; or a folder with one .safetensors file
    subfolders: names tried below a folder, so that the root of a released repository works as well ("transformer", "vae")
    wanted:     prefixes; only names of the index that start with one are opened, and a shard that holds none may be absent
    config:     config.json beside the weights, else the "config" entry of the file's metadata, else {}
    Raises ValueError naming the file for anything that is not there or cannot be read.
    """

    def __init__(self, path: str | Path, subfolders: Iterable[str] = (), wanted: Iterable[str] = ("",)):
        self.path = Path(path)
        for name in subfolders:
            if (self.path / name).is_dir():
                self.path = self.path / name
        self._handle = {}                                        # tensor name -> (open file, name in that file)
        self.metadata: dict[str, str] = {}
        for file, expected in self._files(tuple(wanted)).items():
            handle = self._open(file)
            self.metadata |= handle.metadata() or {}
            names = list(handle.keys())
            if absent := set(expected or ()) - set(names):
                raise ValueError(f"{file}: the index puts {sorted(absent)[0]!r} here, but it is not in this shard")
            self._handle |= {name: (handle, name) for name in (expected or names)}
        self.config = self._read_config()

    def _files(self, wanted: tuple[str, ...]) -> dict[Path, list[str] | None]:
        """The files to open, each with the names that the index expects in it (None: whatever it holds)."""
        if self.path.is_file():
            return {self.path: None}
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such file or folder; expected a .safetensors file or a folder that holds one")
        indexes, files = sorted(self.path.glob("*.safetensors.index.json")), sorted(self.path.glob("*.safetensors"))
        if len(indexes) == 1:
            weight_map = read_json(indexes[0].read_bytes(), str(indexes[0])).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise ValueError(f"{indexes[0]}: no 'weight_map'; expected the index of a sharded checkpoint")
            shards = {}
            for name, file in weight_map.items():
                if name.startswith(wanted):
                    shards.setdefault(self.path / file, []).append(name)
            if not shards:
                raise ValueError(f"{indexes[0]}: no tensor in its 'weight_map' starts with {' or '.join(wanted)}")
            if absent := [f for f in shards if not f.is_file()]:
                raise ValueError(f"{absent[0]}: this shard is missing, {indexes[0].name} names it; download it again")
            return shards
        if len(files) != 1:
            raise ValueError(f"{self.path}: found {len(files)} .safetensors files and {len(indexes)} indexes, expected one file "
                             "or one index with its shards; give the path of the file itself")
        return {files[0]: None}

    @staticmethod
    def _open(file: Path):
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error}; {file.stat().st_size} bytes on disk); "
                             "it may be truncated: download or write it again") from error

    def _read_config(self) -> dict:
        beside = self.path / "config.json"
        if beside.is_file():
            return read_json(beside.read_bytes(), str(beside))
        if "config" in self.metadata:
            return read_json(self.metadata["config"], f"{self.path}: the 'config' in its metadata")
        return {}

    def under(self, *prefixes: str) -> "Checkpoint":
        """The part whose names start with the first of `prefixes` that occurs, names without it; all of it if none occurs."""
        for prefix in prefixes:
            part = {n.removeprefix(prefix): h for n, h in self._handle.items() if n.startswith(prefix)}
            if part:
                view = object.__new__(Checkpoint)
                view.path, view.metadata, view.config, view._handle = self.path, self.metadata, self.config, part
                return view
        return self

    def __contains__(self, name: str) -> bool:
        return name in self._handle

    def names(self) -> list[str]:
        return list(self._handle)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self:
            raise ValueError(f"{self.path}: no tensor {name!r}; the file starts with {', '.join(self.names()[:4])}")
        handle, full = self._handle[name]
        return tuple(handle.get_slice(full).get_shape())

    def read(self, name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
        """One tensor in `dtype` (fp8 and fp16 are upcast); on the meta device nothing is read."""
        if str(device) == "meta":
            return torch.empty(self.shape(name), dtype=dtype, device="meta")
        handle, full = self._handle[name]
        return handle.get_tensor(full).to(device=device, dtype=dtype)

    def count(self, pattern: str) -> int:
        """How many of pattern.format(0), pattern.format(1), ... begin the name of a tensor: the depth of a stack of blocks."""
        depth = 0
        while any(name.startswith(pattern.format(depth)) for name in self._handle):
            depth += 1
        return depth


def load(module: nn.Module, checkpoint: Checkpoint, sources: Mapping[str, Source],
         initialise: Callable[[str, Tensor], None] | None = None,
         dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """Give every parameter and buffer of `module` (built on the meta device) its tensor from `checkpoint`.

    sources:    own name -> Source. A name of the module that is not in it is left to `initialise(name, tensor)`.
    Raises ValueError with every tensor that is missing, superfluous or wrongly shaped, before any weights are read.
    """
    own, used, problems = module.state_dict(), set(), []
    for name, target in own.items():
        source = sources.get(name)
        if source is None:
            if initialise is None:
                problems.append(f"missing: nothing in the file for {name} {tuple(target.shape)}")
            continue
        used.update(source.names)
        if absent := [n for n in source.names if n not in checkpoint]:
            problems.append(f"missing: {', '.join(absent)} (needed for {name})")
            continue
        found = [checkpoint.shape(n) for n in source.names]
        try:
            shape = source.combine(*(torch.empty(s, device="meta") for s in found)).shape
        except (RuntimeError, ValueError):                       # the parts do not fit together
            shape = None
        if shape != target.shape:
            problems.append(f"wrong shape: {', '.join(f'{n} {s}' for n, s in zip(source.names, found))}, "
                            f"expected {tuple(target.shape)} for {name}")
    problems += [f"superfluous: {name} {checkpoint.shape(name)}" for name in checkpoint.names()
                 if name not in used and not name.startswith(tuple(UNUSED))]
    if problems:
        shown = "\n  ".join(problems[:12]) + (f"\n  and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise ValueError(f"{checkpoint.path}: does not fit {type(module).__name__}:\n  {shown}")

    tensors = {}
    for name, target in own.items():
        if name in sources:
            plain = sources[name].combine is _concatenate       # sums and products are formed in float32, then rounded once
            parts = [checkpoint.read(n, dtype if plain else torch.float32, device) for n in sources[name].names]
            tensors[name] = sources[name].combine(*parts).to(dtype).contiguous()
        else:
            tensors[name] = torch.empty(target.shape, dtype=dtype, device=device)
            initialise(name, tensors[name])
    module.load_state_dict(tensors, strict=True, assign=True)
    return module


# ---------------------------------------------------------------- writing

def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call write(temporary file), then move the result to `path`: a kill at any moment leaves the old file or the new one, whole."""
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
    """Write tensors with a configuration (a dataclass, kept as JSON in the metadata), atomically."""
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
    print(f"{len(listed.names())} tensors; configuration: {listed.config or 'none, it is inferred from the shapes'}")
