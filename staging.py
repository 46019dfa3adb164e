"""Models that are loaded when they are used and freed where others need their memory.

T5-XXL, the MM-DiT and the autoencoder take 14 GB in bfloat16, T5 alone two thirds of it. Pictures
need T5 only before the first step, so the largest model decides, not the sum.
"""
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container; "max" for none


def total_memory() -> float:
    """Bytes of memory of this machine, or of the container; infinite if the system does not say."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):                # Windows
        return float("inf")
    limit = _LIMIT.read_text().strip() if _LIMIT.is_file() else ""
    return min(total, int(limit)) if limit.isdecimal() else total


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on a device; infinite if the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return float("inf")
    [available] = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return min(available, total_memory() - own)


class Part:
    """A model that is loaded when it is first asked for, and can be freed.

    load: loads it onto the device that it is called with. On the meta device it reads no weights,
    so a file that does not fit is refused at once, and `outline` has configuration and size.
    """

    def __init__(self, load: Callable[[str | torch.device], nn.Module],
                 device: str | torch.device):
        self.load, self.device = load, torch.device(device)
        self.outline = load("meta")
        self.size = sum(tensor.nbytes for tensor in self.outline.state_dict().values())
        self.module: nn.Module | None = None

    def get(self) -> nn.Module:
        if self.module is None:
            self.module = self.load(self.device).eval()
        return self.module

    def free(self) -> None:
        self.module = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Loaded:
    """An attribute that is given a model, or a `Part`, and is the model."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __set__(self, instance, value) -> None:
        setattr(instance, self.name, value)

    def __get__(self, instance, owner=None):
        if instance is None:
            raise AttributeError(self.name)                      # the field has no default
        value = getattr(instance, self.name)
        return value.get() if isinstance(value, Part) else value
