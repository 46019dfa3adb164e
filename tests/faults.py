"""Start train.py many times and import it once, whole or with a fault: for test_faults.py.

Lines of JSON on standard input, each answered by a line:
    {"argv": [...], "cwd": ..., "env": {...}, "output": FILE, "fault": [NAME, ...]}    -> process id
    {"wait": ID, "seconds": N}                    -> exit status, null while the process still runs
A process is a fork of this one. It becomes `python train.py ARGV`, and ends as that would.
"""
import builtins
import gc
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file

import data
import run_folder
import train
from text_encoder import T5Config, T5Encoder

# ---------------------------------------------------------------- faults

def in_step(step: int, act: Callable[[], None]) -> None:
    """Call act() in the middle of a step, counted from 0 at the start of the process."""
    real, steps = train.corrupt, itertools.count()

    def corrupt(*arguments):
        if next(steps) == step:
            act()
        return real(*arguments)

    train.corrupt = corrupt


def in_loader(batch: int, act: Callable[[], None]) -> None:
    """Call act() in the loader process that loads its batch of this number."""
    real, batches = data.Tasks.__getitems__, itertools.count()

    def get(self, indices):
        if next(batches) == batch:
            act()
        return real(self, indices)

    data.Tasks.__getitems__ = get


def fail(kind: str, text: str) -> None:
    raise getattr(builtins, kind)(text)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def fill_disk(name: str, save: int) -> None:
    """Let no file grow beyond 100 kB, as if the disk were full, from a save of `name` on."""
    real, saves = run_folder.save, itertools.count(1)

    def save_or_fail(path, *arguments, **metadata):
        if path.name == name and next(saves) == save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        real(path, *arguments, **metadata)

    run_folder.save = save_or_fail


def fill_file(path: str) -> None:
    """Put a file without any room in the place of another."""
    os.unlink(path)
    os.symlink("/dev/full", path)


def nan_in_step(step: int) -> None:
    """Let the clean latents of a step hold one NaN."""
    real, steps = train.batch_latents, itertools.count()

    def batch_latents(*arguments):
        latents = real(*arguments).clone()
        if next(steps) == step:
            latents.view(-1)[7] = float("nan")
        return latents

    train.batch_latents = batch_latents


def fix_batches(file: str, kept: str) -> None:
    """Give the steps the micro batches in `file`, sliced by rank; keep and drop their gradients.

    file: the fields of `train.Corrupted` as NUMBER.FIELD, of the micro batches of all ranks.
    kept: gets the gradients of all steps as STEP.PARAMETER. The model stays as it is.
    """
    batches, micro, steps = load_file(file), itertools.count(), itertools.count()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    parameters, gradients = [], {}
    real_start, real_clip = train.Objective.__init__, torch.nn.utils.clip_grad_norm_

    def start(self, model, config):
        real_start(self, model, config)
        parameters.extend(model.named_parameters())

    def corrupt(*arguments):
        prefix = f"{next(micro)}."
        fields = {name.removeprefix(prefix): tensor.chunk(world)[rank]
                  for name, tensor in batches.items() if name.startswith(prefix)}
        fields["references"] = (fields.pop("source"),) if "source" in fields else ()
        if "image_features" in fields:
            fields["features"] = fields.pop("image_features"), fields.pop("text_features")
        return train.Corrupted(**dict.fromkeys(train.Corrupted._fields) | fields)

    def clip(*arguments):
        step = next(steps)
        trained = {name: p for name, p in parameters if p.grad is not None}
        gradients.update({f"{step}.{name}": p.grad.clone() for name, p in trained.items()})
        if rank == 0:
            save_file(gradients, kept)
        norm = real_clip(*arguments)
        for parameter in trained.values():
            parameter.grad.zero_()
        return norm

    train.Objective.__init__, train.corrupt = start, corrupt
    torch.nn.utils.clip_grad_norm_ = clip


FAULTS = {
    "kill in step": lambda step: in_step(step, lambda: send(signal.SIGKILL)),
    "stop in step": lambda step: in_step(step, lambda: send(signal.SIGTERM)),
    "fail in step": lambda step, *error: in_step(step, lambda: fail(*error)),
    "kill in loader": lambda batch: in_loader(batch, lambda: send(signal.SIGKILL)),
    "fail in loader": lambda batch, *error: in_loader(batch, lambda: fail(*error)),
    "full disk": fill_disk,
    "full file in step": lambda step, path: in_step(step, lambda: fill_file(path)),
    "NaN in step": nan_in_step,
    "fix batches": fix_batches,
}


# ---------------------------------------------------------------- processes

def become(argv: list[str], cwd: str, env: dict[str, str], output: str,
           fault: list | None = None) -> None:
    """Turn a fork of this process into train.py, in a group of its own with its loaders."""
    os.setsid()
    os.chdir(cwd)
    os.environ.update(env)
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), written, written)):
        os.dup2(file, number)
    sys.argv = ["train.py", *argv]
    if fault:
        name, *arguments = fault
        FAULTS[name](*arguments)


def wait(process: int, seconds: float) -> int | None:
    """The exit status of a process, minus the signal that killed it; None while it runs."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.005)


def serve() -> bool:
    """Answer requests until they end. Returns True in a process that has become train.py."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"], request["seconds"])
        else:
            answer = os.fork()
            if answer == 0:
                become(**request)
                return True
        print(json.dumps(answer), flush=True)
    return False


def prepare() -> None:
    """Spare the forks late imports of torch, and a copy of memory at their end."""
    with torch.device("meta"):
        T5Encoder(T5Config(dim=8, head_dim=8, ff_dim=8, depth=1, num_heads=1))
    gc.freeze()


if __name__ == "__main__":
    prepare()
    if serve():
        train.main()
