"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): a matrix's momentum, made orthogonal, is its update.

The same steps as torch.optim.Muon, but matrices of one shape are made orthogonal together: one batched product where that has one
for each matrix, less than half its time on two cores (docs/choices.md). The tiny preset trains the matrices of its blocks with it.

Run alone to see what the iteration does to singular values:   python muon.py
"""
import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)                        # of the odd polynomial whose slope at zero is steepest


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """The singular values of each matrix of x (n, rows, columns) brought near one (0.7 to 1.2) by Newton-Schulz iteration; bfloat16."""
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).bfloat16()                        # (n, r, c) with r <= c
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)    # no singular value above one
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT                                         # (n, r, r)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)    # a x + b g x + c g^2 x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal; for 2-D parameters. A tall matrix takes steps sqrt(rows / columns) times as long.

    every: a matrix moves in each `every`-th step in which it has a gradient, then `every` times as far. Momentum hardly turns
    between two steps, and to make it orthogonal costs a small model as much as its forward pass.
    """

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95, every: int = 1):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "every": every})
        if wrong := [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2]:
            raise ValueError(f"Muon is for matrices, got a parameter of shape {wrong[0]}")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in shapes.items():
                for p in matrices:
                    if not self.state[p]:
                        self.state[p].update(momentum_buffer=torch.zeros_like(p), steps=torch.zeros(()))
                    self.state[p]["steps"] += 1
                torch._foreach_lerp_([self.state[p]["momentum_buffer"] for p in matrices], [p.grad for p in matrices],
                                     1 - group["momentum"])
                if due := [p for p in matrices if self.state[p]["steps"] % group["every"] == 0]:
                    buffers = [self.state[p]["momentum_buffer"] for p in due]
                    updates = orthogonalise(torch.stack(torch._foreach_lerp([p.grad for p in due], buffers, group["momentum"])))
                    scale = group["every"] * group["lr"] * max(1.0, rows / columns) ** 0.5
                    torch._foreach_add_(due, list(updates.float().unbind()), alpha=-scale)


if __name__ == "__main__":
    example = torch.randn(1, 128, 512, generator=torch.Generator().manual_seed(0))
    for count in range(6):
        values = torch.linalg.svdvals(orthogonalise(example, count).float()[0])
        print(f"{count} steps: singular values {values.min():.3f} to {values.max():.3f}")
