"""T5's embeddings of prompts, and files of them: a machine without T5 can draw what they hold."""
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoint import Checkpoint, save


class Texts(NamedTuple):
    """Embeddings of prompts, and of the negative prompt in each of their lengths."""
    prompts: list[Tensor]                   # (l, D) each
    negative: dict[int, Tensor]             # length l -> (l, D)


class Request(NamedTuple):
    """A prompt to embed. One about source pictures is padded less, to a length of its own."""
    prompt: str
    sources: int = 0


def save_embeddings(path: Path, embeddings: Iterable[tuple[Request, Tensor]],
                    negatives: dict[int, Tensor], negative: str, text_encoder: str) -> None:
    """Write embeddings (l, D) of requests, and those of the `negative` prompt by their length.

    text_encoder: the name of the encoder that made them
    """
    tensors = {f"negative.{length}": tensor for length, tensor in negatives.items()}
    requests = []
    for number, (request, tensor) in enumerate(embeddings):
        tensors[f"prompt.{number}"] = tensor.clone()             # not a part of its batch
        requests.append(request)
    save(path, tensors, prompts=json.dumps(requests), negative=negative, text_encoder=text_encoder)


class Embeddings:
    """A file that `save_embeddings` wrote. Tensors are read when they are asked for.

    Raises ValueError for another file.
    """

    def __init__(self, path: Path):
        self.path, self.file = path, Checkpoint(path)
        metadata = self.file.metadata
        try:
            requests = [Request(*request) for request in json.loads(metadata["prompts"])]
            self.negative, self.text_encoder = metadata["negative"], metadata["text_encoder"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: holds no embeddings of prompts; make them with sample.py "
                             "--save-embeddings") from error
        self.numbers = {request: number for number, request in enumerate(requests)}

    @property
    def width(self) -> int:
        """Channels of the text encoder."""
        return self.file.shape(self.file.names()[0])[1]

    def prompts(self) -> list[str]:
        """The prompts that need no source pictures."""
        return [request.prompt for request in self.numbers if not request.sources]

    def check(self, requests: Iterable[Request]) -> None:
        """Raise ValueError that names the requests which the file does not hold."""
        absent = {request: None for request in requests if request not in self.numbers}
        if absent:
            shown = ", ".join(f"{prompt!r:.80}" + (f" about {sources} pictures" if sources else "")
                              for prompt, sources in [*absent][:8])
            raise ValueError(f"{self.path}: holds no embeddings of {len(absent)} prompts: {shown}; "
                             "add them with sample.py --save-embeddings where T5 is")

    def texts(self, prompts: Sequence[str], sources: int, dtype: torch.dtype) -> Texts:
        """The embeddings of prompts, each about this number of source pictures."""
        requests = [Request(prompt, sources) for prompt in prompts]
        self.check(requests)
        tensors = [self.file.read(f"prompt.{self.numbers[r]}", dtype) for r in requests]
        lengths = {len(tensor) for tensor in tensors}
        negatives = {n: self.file.read(f"negative.{n}", dtype) for n in lengths}
        return Texts(tensors, negatives)
