"""muon.py against torch.optim.Muon."""
import pytest
import torch

from muon import Muon, orthogonalise

SHAPES = [(24, 8), (8, 8), (8, 32), (24, 8), (32, 8), (8, 32)]


def parameters(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_steps_are_those_of_torch():
    own, theirs = parameters(0), parameters(0)
    muon = Muon(own, lr=0.1)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, momentum=0.95, nesterov=True)
    for step in range(5):
        gradients = [p.detach() for p in parameters(step + 1)]
        for group, optimizer in ((own, muon), (theirs, reference)):
            for p, gradient in zip(group, gradients):
                p.grad = gradient.clone()
            optimizer.step()
    for a, b, start in zip(own, theirs, parameters(0)):
        assert (b - start).abs().max() > 0.1
        # The two sum their bfloat16 products in different orders.
        torch.testing.assert_close(a, b, rtol=0, atol=5e-3)


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16), (1, 20, 20)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(x).float()
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert 0.6 < values.min() and values.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    rotated = u.mT @ result @ v.mT                              # (n, k, k), diagonal: same vectors
    diagonal = torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
    assert (rotated - diagonal).abs().max() < 0.05


def test_every_third_step_is_three_times_as_long():
    """The momentum includes every step in which the matrix has a gradient."""
    matrices = parameters(0)
    gradients = [[p.detach() for p in parameters(seed)] for seed in range(1, 6)]
    start = [p.detach().clone() for p in matrices]
    optimizer = Muon(matrices, lr=0.1, every=3)
    for step, given in enumerate(gradients):
        for i, (p, gradient) in enumerate(zip(matrices, given)):
            p.grad = None if i == 0 and step == 0 else gradient.clone()
        optimizer.step()
        moved = [not torch.equal(p, q) for p, q in zip(matrices, start)]
        assert moved == [step >= 3] + [step >= 2] * 5
    for i, p in enumerate(matrices):
        momentum = torch.zeros_like(p)
        first = 1 if i == 0 else 0
        used = [given[i] for given in gradients[first:first + 3]]
        for gradient in used:
            momentum = 0.95 * momentum + 0.05 * gradient
        update = orthogonalise((0.95 * momentum + 0.05 * used[-1])[None])[0].float()
        distance = 0.3 * max(1, p.shape[0] / p.shape[1]) ** 0.5
        torch.testing.assert_close(p, start[i] - distance * update, rtol=0, atol=5e-3)


def test_a_convolution_moves_as_the_matrix_of_its_rows():
    generator = torch.Generator().manual_seed(0)
    convolution = torch.nn.Parameter(torch.randn(8, 6, 3, 3, generator=generator))
    matrix = torch.nn.Parameter(convolution.detach().flatten(1).clone())
    for p in (convolution, matrix):
        p.grad = p.detach().sin()
        Muon([p], lr=0.1).step()
    assert convolution.shape == (8, 6, 3, 3)
    assert torch.equal(convolution.flatten(1), matrix)


def test_parameters_without_a_gradient_stay():
    a, b = parameters(0)[:2]
    a.grad, before = torch.ones_like(a), b.detach().clone()
    Muon([a, b], lr=0.1).step()
    assert torch.equal(b, before)


@pytest.mark.parametrize("every", [1, 2])
def test_state_continues(every):
    one, other = parameters(0), parameters(0)
    first, second = Muon(one, lr=0.1, every=every), Muon(other, lr=0.1, every=every)
    for p, q, gradient in zip(one, other, parameters(1)):
        p.grad, q.grad = gradient.detach().clone(), gradient.detach().clone()
    first.step(), second.step()
    third = Muon(other, lr=0.1, every=every)
    third.load_state_dict(second.state_dict())
    first.step(), third.step()
    for p, q, start in zip(one, other, parameters(0)):
        assert torch.equal(p, q) and not torch.equal(p, start)


def test_other_than_matrices_is_an_error():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
