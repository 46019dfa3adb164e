"""The processes of torchrun, called ranks: how they start, wait for each other and end together.

A failure on one rank ends all of them within seconds. Long waits (one rank prepares, one scores)
go through a shared store, so that the time limit of collectives can stay short.
"""
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(NamedTuple):
    """This process among those of torchrun. The store is a dictionary that all of them share."""
    rank: int
    world: int
    device: torch.device
    store: dist.Store | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """Average a tensor over the ranks, in place where there are several."""
        if self.world > 1:
            dist.all_reduce(x)
        return x / self.world

    def gather(self, x: object) -> list:
        """One object of every rank, in the order of the ranks."""
        objects = [x] * self.world
        if self.world > 1:
            dist.all_gather_object(objects, x)
        return objects

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on one of the ranks. In host memory: no GPU is waited for."""
        if self.world == 1:
            return flag
        count = torch.tensor(float(flag))
        dist.all_reduce(count)
        return count.item() > 0

    def send(self, tensors: list[tuple[Tensor, int]]) -> None:
        """Copy each tensor from the rank that is named beside it to all others, in place."""
        sent = [dist.broadcast(x, owner, async_op=True) for x, owner in tensors]
        for work in sent:
            work.wait()

    def unite(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all ranks, each with a name of its own: in the first one's host memory.

        One after another, so that a GPU holds one at a time. Other ranks get an empty dictionary.
        """
        if self.world == 1:
            return tensors
        united, mine = {}, {n: (x.shape, x.dtype, x.device.type) for n, x in tensors.items()}
        for owner, theirs in enumerate(self.gather(mine)):
            for name, (shape, dtype, device) in theirs.items():
                x = torch.empty(shape, dtype=dtype, device=device)
                if owner == self.rank:
                    x.copy_(tensors[name])
                dist.broadcast(x, owner)
                if self.first:
                    united[name] = x.cpu()
        return united

    def wait(self, event: str) -> None:
        """Wait until all ranks are here, for as long as it takes: a collective would time out."""
        if self.store is None:
            return
        self.store.set(f"{event}-{self.rank}", "here")
        keys = [f"{event}-{rank}" for rank in range(self.world)]
        while not self.store.check(keys):                       # all of them
            time.sleep(0.1)


def start_ranks() -> Ranks:
    """Join torchrun's processes, if there are any: NCCL between GPUs, gloo between CPUs."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return Ranks(0, 1, torch.device("cuda" if cuda else "cpu"))
    needed = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise ValueError(f"the environment has RANK but not {', '.join(missing)}: start several "
                         "ranks with torchrun, or unset RANK for a single one")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
    # each tensor goes by its device: flags and objects in host memory do not wait for the GPU
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("training", store),
                            rank=rank, world_size=world, timeout=timedelta(minutes=10))
    return Ranks(rank, world, device, dist.PrefixStore("ranks", store))


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the other ranks. A failure of any of them ends all.

    A rank whose partner has failed waits in a collective, where Python runs no handler. So a thread
    looks every second whether a failure was announced.
    """
    ranks = start_ranks()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            try:
                failed = ranks.store.check(["failed"])
            except RuntimeError:            # the process that holds the store has ended
                failed = True
            if failed and not done.wait(5.0):       # the rank that failed ends first, and says why
                os._exit(1)

    if ranks.store is not None:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield ranks
    except BaseException:
        done.set()
        if ranks.store is not None:
            ranks.store.set("failed", str(ranks.rank))
        raise
    ranks.wait("end")                       # no rank leaves before the last message
    done.set()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def explain(error: RuntimeError) -> str | None:
    """One line for a RuntimeError that is no fault of the program; None for all others."""
    text = str(error)
    if "DataLoader worker" in text:
        return f"{text.splitlines()[0]} (out of memory? lower --workers)"
    if isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text:
        return f"another rank has ended, and its message says why ({text.splitlines()[0]:.120})"
    if isinstance(error, torch.OutOfMemoryError):
        return (f"{text.splitlines()[0]} Lower --batch_size and raise --accumulation, or add "
                "--gradient_checkpointing true")
    return None
