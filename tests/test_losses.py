"""losses.py against the reference values, in half precision, over two processes, and on bad input."""
import pytest
import torch
import torch.distributed as dist
from conftest import golden

import losses
from losses import contrastive_loss, flow_matching_loss, intrinsic_loss, masked_token_loss, total_loss

_, IN, OUT, _ = golden("losses")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(found, expected, atol=2e-5):
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found, torch.as_tensor(expected).float(), rtol=0, atol=atol)


# ---------------------------------------------------------------- agreement with the reference

def test_flow_matching():
    arguments = IN["velocity"], IN["noise"], IN["latents"]
    close(flow_matching_loss(*arguments), OUT["flow_matching"])
    close(flow_matching_loss(*arguments, IN["sigma"]), OUT["flow_matching_x0_form"])


def test_flow_matching_is_zero_for_the_true_velocity():
    close(flow_matching_loss(IN["noise"] - IN["latents"], IN["noise"], IN["latents"]), 0.0)


def test_masked_tokens():
    arguments = IN["logits"], IN["x0"], IN["mask"], IN["t"]
    close(masked_token_loss(*arguments), OUT["masked_token_loss"])
    close(masked_token_loss(*arguments, answer=IN["answer"]), OUT["masked_token_loss_answer_only"])


def test_contrastive():
    close(contrastive_loss(IN["image_hidden"], IN["text_hidden"]), OUT["contrastive_symmetric"])
    close(contrastive_loss(IN["image_hidden"], IN["text_hidden"], symmetric=False), OUT["contrastive_image_to_text"])


def test_intrinsic():
    arguments = IN["image_mid"], IN["teacher_image"], IN["text_mid"], IN["teacher_text"]
    close(intrinsic_loss(*arguments), OUT["intrinsic_paper"])
    close(intrinsic_loss(*arguments, released=True), OUT["intrinsic_released"])


def test_total_is_equation_5():
    parts = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    close(total_loss(*parts), 1 + 0.2 * 10 + 0.05 * 100 + 0.1 * 1000)
    close(total_loss(*parts[:2]), 1 + 0.2 * 10)
    close(total_loss(*parts, text_weight=0.5, cross_weight=0.25, intrinsic_weight=0.0), 1 + 5 + 25.0)


# ---------------------------------------------------------------- what counts in the masked-token loss

def test_only_masked_positions_count_and_the_mask_token_is_no_answer():
    logits = IN["logits"].clone()
    logits[~IN["mask"]] = torch.nan                                                           # not even looked at
    logits[..., -1] = 1e4                                                                     # the mask token takes no probability
    close(masked_token_loss(logits, IN["x0"], IN["mask"], IN["t"]), OUT["masked_token_loss"])


def test_nothing_masked_is_zero_with_a_gradient():
    logits = IN["logits"].clone().requires_grad_()
    loss = masked_token_loss(logits, IN["x0"], torch.zeros_like(IN["mask"]), IN["t"])
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_masked_token_loss_estimates_the_same_sum_for_every_masking_probability():
    """1/t makes up for how few tokens are masked: the mean over maskings is the mean cross entropy, whatever t is."""
    logits, tokens = torch.randn(1, 6, 20), torch.randint(0, 19, (1, 6))
    expected = torch.nn.functional.cross_entropy(logits[0, :, :-1], tokens[0])
    generator = torch.Generator().manual_seed(0)
    for t in (0.3, 0.9):
        mask = torch.rand(4000, 6, generator=generator) < t
        found = masked_token_loss(logits.expand(4000, -1, -1), tokens.expand(4000, -1), mask, torch.full((4000,), t))
        assert abs(found / expected - 1) < 0.05


# ---------------------------------------------------------------- precision

def half(name):
    return IN[name].bfloat16() if IN[name].is_floating_point() else IN[name]


@pytest.mark.parametrize("loss, names", [
    (flow_matching_loss, ("velocity", "noise", "latents", "sigma")),
    (masked_token_loss, ("logits", "x0", "mask", "t")),
    (contrastive_loss, ("image_hidden", "text_hidden")),
    (intrinsic_loss, ("image_mid", "teacher_image", "text_mid", "teacher_text")),
])
def test_float32_whatever_comes_in(loss, names):
    rounded = [half(name) for name in names]
    expected = loss(*(x.float() if x.is_floating_point() else x for x in rounded))
    found = loss(*rounded)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):                                               # as the training loop calls it
        found = loss(*rounded)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- the global batch

def _hidden(layer, rows):
    """The two streams of some rows of the global batch of eight, through one shared layer."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(8, 9, 16, generator=generator), torch.randn(8, 5, 16, generator=generator)
    return layer(image[rows]), layer(text[rows])


def _layer():
    torch.manual_seed(1)
    return torch.nn.Linear(16, 12)


def _one_rank(rank, folder, symmetric):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    layer = _layer()
    loss = contrastive_loss(*_hidden(layer, slice(4 * rank, 4 * rank + 4)), symmetric=symmetric)
    loss.backward()
    torch.save((loss.detach(), [p.grad for p in layer.parameters()]), f"{folder}/{rank}.pt")
    dist.barrier()                                                                            # a rank that leaves first can abort the other
    dist.destroy_process_group()


@pytest.mark.parametrize("symmetric", [True, False])
def test_contrastive_over_two_processes_is_that_of_the_whole_batch(tmp_path, symmetric):
    torch.multiprocessing.spawn(_one_rank, (str(tmp_path), symmetric), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    layer = _layer()
    expected = contrastive_loss(*_hidden(layer, slice(0, 8)), symmetric=symmetric)
    expected.backward()
    halves = [contrastive_loss(*_hidden(layer, rows), symmetric=symmetric) for rows in (slice(0, 4), slice(4, 8))]
    assert abs(sum(halves) / 2 - expected) > 0.1                                              # it is not the mean of the ranks' own losses
    for loss, _ in ranks:
        close(loss, expected.detach(), atol=1e-6)
    for (_, first), (_, second) in [ranks]:
        for mine, a, b in zip(layer.parameters(), first, second):
            torch.testing.assert_close((a + b) / 2, mine.grad, rtol=0, atol=1e-6)
            assert mine.grad.abs().max() > 1e-3


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("call", [
    lambda: flow_matching_loss(IN["velocity"][:1], IN["noise"], IN["latents"]),
    lambda: flow_matching_loss(IN["velocity"], IN["noise"], IN["latents"][..., :4]),
    lambda: flow_matching_loss(IN["velocity"], IN["noise"], IN["latents"], torch.full((3,), 0.5)),
    lambda: flow_matching_loss(IN["velocity"], IN["noise"], IN["latents"], IN["sigma"][:1]),
    lambda: masked_token_loss(IN["logits"][:, :-1], IN["x0"], IN["mask"], IN["t"]),
    lambda: masked_token_loss(IN["logits"], IN["x0"], IN["mask"][:, :-1], IN["t"]),
    lambda: masked_token_loss(IN["logits"], IN["x0"], IN["mask"], IN["t"][:1]),
    lambda: masked_token_loss(IN["logits"], IN["x0"], IN["mask"], IN["t"], answer=IN["answer"][0]),
    lambda: contrastive_loss(IN["image_hidden"], IN["text_hidden"][:3]),
    lambda: contrastive_loss(IN["image_hidden"], IN["text_hidden"][..., :8]),
    lambda: contrastive_loss(IN["image_hidden"][:, 0], IN["text_hidden"][:, 0]),
    lambda: intrinsic_loss(IN["image_mid"], IN["teacher_image"][:1], IN["text_mid"], IN["teacher_text"]),
    lambda: intrinsic_loss(IN["image_mid"], IN["teacher_image"], IN["text_mid"], IN["teacher_text"][:, :-1]),
])
def test_shapes_that_do_not_fit(call):
    with pytest.raises(ValueError, match="shape|expected"):
        call()


def test_one_process_gathers_nothing():
    x = torch.randn(2, 3)
    assert losses.gather_with_gradient(x) is x
