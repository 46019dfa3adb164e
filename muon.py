"""The Muon optimizer: the update of a matrix is its momentum, made orthogonal.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. The steps are those of
torch.optim.Muon. Matrices of one shape are made orthogonal together, in one batched product, which
takes less than half the time of torch's product per matrix on two cores (experiments/LOG.md). The
tiny preset trains the matrices of its blocks and its autoencoder with it.

Run alone to see how the iteration changes singular values:   python muon.py
"""
import torch
from torch import Tensor

# Of the odd polynomial that has the steepest slope at zero.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of each matrix to about one (0.7 to 1.2), by Newton-Schulz steps.

    x: (n, rows, columns), any floating-point type. Returns bfloat16 of the same shape.
    """
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).bfloat16()                        # (n, r, c) with r <= c
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)    # no singular value above one
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT                                         # (n, r, r)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)    # b g + c g^2, (n, r, r)
        x = torch.baddbmm(x, polynomial, x, beta=a)             # a x + (b g + c g^2) x, (n, r, c)
    return x.mT if tall else x                                  # (n, rows, columns)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal, for matrices and for the weights of convolutions.

    A convolution's weight (out, in, k, k) counts as a matrix of `out` rows and in k k columns.
    lr:    step size of a wide or square matrix; a tall one takes sqrt(rows / columns) times it
    every: N. Update every N steps, with N times the step size. A matrix counts only the steps in
           which it has a gradient. Momentum changes little between two steps, and making it
           orthogonal costs a small model as much time as its forward pass.
    found_inf, as of torch's fused optimizers: a tensor that is 1 where a gradient is not finite, to
    be set before a step. The weights then stay. Momentum is lost, and its NaN never reaches them.
    """

    found_inf: Tensor | None = None

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95, every: int = 1):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "every": every})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(
                        "Muon is for matrices and convolutions, got a parameter of shape "
                        f"{tuple(p.shape)}")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    same_shape.setdefault(p.shape, []).append(p)
            for matrices in same_shape.values():
                self._accumulate(matrices, group["momentum"])
                due = [p for p in matrices if self.state[p]["step"] % group["every"] == 0]
                if due:
                    self._update(due, group)

    def _accumulate(self, matrices: list[Tensor], momentum: float) -> None:
        """Count the step and update the momentum of each matrix."""
        for p in matrices:
            if not self.state[p]:
                # torch keeps a state of this name in host memory, where it can be read at once
                self.state[p].update(momentum_buffer=torch.zeros_like(p), step=torch.zeros(()))
            self.state[p]["step"] += 1
        buffers = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(buffers, [p.grad for p in matrices], 1 - momentum)

    def _update(self, matrices: list[Tensor], group: dict) -> None:
        """Move matrices of one shape along their Nesterov momentum, made orthogonal."""
        buffers = [self.state[p]["momentum_buffer"] for p in matrices]
        nesterov = torch._foreach_lerp([p.grad for p in matrices], buffers, group["momentum"])
        stacked = torch.stack(nesterov).flatten(2)               # (n, rows, columns)
        updates = orthogonalise(stacked).float()                 # (n, rows, columns)
        rows, columns = stacked.shape[1:]
        if self.found_inf is not None:
            updates = updates.nan_to_num(nan=0.0) * (1 - self.found_inf)
        scale = group["every"] * group["lr"] * max(1.0, rows / columns) ** 0.5
        moves = updates.view(-1, *matrices[0].shape).unbind()
        torch._foreach_add_(matrices, list(moves), alpha=-scale)


if __name__ == "__main__":
    example = torch.randn(1, 128, 512, generator=torch.Generator().manual_seed(0))
    for count in range(6):
        values = torch.linalg.svdvals(orthogonalise(example, count).float()[0])
        print(f"{count} steps: singular values {values.min():.3f} to {values.max():.3f}")
