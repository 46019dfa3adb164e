"""losses.py against reference values, in half precision, over two processes and on bad input."""
import pytest
import torch
import torch.distributed as dist
from conftest import golden

import losses
from losses import (contrastive_loss, flow_matching_loss, intrinsic_loss, masked_token_loss,
                    sum_over_all_positions, total_loss)

_, IN, OUT, _ = golden("losses")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(loss, expected, atol=2e-5):
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, torch.as_tensor(expected).float(), rtol=0, atol=atol)


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
    arguments = IN["image_hidden"], IN["text_hidden"]
    close(contrastive_loss(*arguments), OUT["contrastive_symmetric"])
    close(contrastive_loss(*arguments, symmetric=False), OUT["contrastive_image_to_text"])


def test_intrinsic():
    arguments = IN["image_mid"], IN["teacher_image"], IN["text_mid"], IN["teacher_text"]
    close(intrinsic_loss(*arguments), OUT["intrinsic_paper"])
    close(intrinsic_loss(*arguments, released=True), OUT["intrinsic_released"])


def test_total_is_equation_5():
    parts = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    close(total_loss(*parts), 1 + 0.2 * 10 + 0.05 * 100 + 0.1 * 1000)
    close(total_loss(*parts[:2]), 1 + 0.2 * 10)
    weighted = total_loss(*parts, text_weight=0.5, cross_weight=0.25, intrinsic_weight=0.0)
    close(weighted, 1 + 5 + 25.0)


# ---------------------------------------------------------------- masked positions

def test_only_masked_positions_count_and_the_mask_token_is_no_answer():
    logits = IN["logits"].clone()
    logits[~IN["mask"]] = torch.nan                              # never read
    logits[..., -1] = 1e4                                        # no probability for the mask token
    close(masked_token_loss(logits, IN["x0"], IN["mask"], IN["t"]), OUT["masked_token_loss"])


@pytest.mark.parametrize("counted", [IN["mask"], torch.zeros_like(IN["mask"])])
def test_the_form_of_a_gpu_has_the_same_value_and_gradient(counted):
    results = []
    for loss in (masked_token_loss, sum_over_all_positions):
        logits = IN["logits"].clone().requires_grad_()
        value = loss(logits, IN["x0"], counted, IN["t"])
        value.backward()
        results.append((value.detach(), logits.grad))
    close(results[1][0], OUT["masked_token_loss"] if counted.any() else 0.0)
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_nothing_masked_is_zero_with_a_gradient():
    logits = IN["logits"].clone().requires_grad_()
    loss = masked_token_loss(logits, IN["x0"], torch.zeros_like(IN["mask"]), IN["t"])
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_masked_token_loss_estimates_the_same_sum_for_every_masking_probability():
    """1/t offsets the share of masked tokens: the mean over maskings is the mean cross entropy."""
    logits, tokens = torch.randn(1, 6, 20), torch.randint(0, 19, (1, 6))
    expected = torch.nn.functional.cross_entropy(logits[0, :, :-1], tokens[0])
    generator = torch.Generator().manual_seed(0)
    for t in (0.3, 0.9):
        mask = torch.rand(4000, 6, generator=generator) < t
        loss = masked_token_loss(logits.expand(4000, -1, -1), tokens.expand(4000, -1), mask,
                                 torch.full((4000,), t))
        assert abs(loss / expected - 1) < 0.05


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
    value = loss(*rounded)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):                  # as the training loop calls it
        value = loss(*rounded)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- the global batch

def _hidden(layer, rows):
    """Both streams of some rows of the global batch of eight, through one shared layer."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(8, 9, 16, generator=generator)
    text = torch.randn(8, 5, 16, generator=generator)
    return layer(image[rows]), layer(text[rows])


def _layer():
    torch.manual_seed(1)
    return torch.nn.Linear(16, 12)


def _one_rank(rank, folder, symmetric):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    layer = _layer()
    rows = slice(4 * rank, 4 * rank + 4)
    loss = contrastive_loss(*_hidden(layer, rows), symmetric=symmetric)
    loss.backward()
    torch.save((loss.detach(), [p.grad for p in layer.parameters()]), f"{folder}/{rank}.pt")
    dist.barrier()                                               # a rank that leaves aborts others
    dist.destroy_process_group()


@pytest.mark.parametrize("symmetric", [True, False])
def test_contrastive_over_two_processes_is_that_of_the_whole_batch(tmp_path, symmetric):
    torch.multiprocessing.spawn(_one_rank, (str(tmp_path), symmetric), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    layer = _layer()
    expected = contrastive_loss(*_hidden(layer, slice(0, 8)), symmetric=symmetric)
    expected.backward()
    halves = [contrastive_loss(*_hidden(layer, rows), symmetric=symmetric)
              for rows in (slice(0, 4), slice(4, 8))]
    # The mean of the ranks' own losses is another number.
    assert abs(sum(halves) / 2 - expected) > 0.1
    for loss, _ in ranks:
        close(loss, expected.detach(), atol=1e-6)
    for (_, first), (_, second) in [ranks]:
        for mine, a, b in zip(layer.parameters(), first, second):
            torch.testing.assert_close((a + b) / 2, mine.grad, rtol=0, atol=1e-6)
            assert mine.grad.abs().max() > 1e-3


# ---------------------------------------------------------------- bad input

VELOCITY, NOISE, LATENTS = IN["velocity"], IN["noise"], IN["latents"]
LOGITS, TOKENS, MASK, T = IN["logits"], IN["x0"], IN["mask"], IN["t"]
IMAGE, TEXT = IN["image_hidden"], IN["text_hidden"]
MIDS = IN["image_mid"], IN["teacher_image"], IN["text_mid"], IN["teacher_text"]


@pytest.mark.parametrize("call", [
    lambda: flow_matching_loss(VELOCITY[:1], NOISE, LATENTS),
    lambda: flow_matching_loss(VELOCITY, NOISE, LATENTS[..., :4]),
    lambda: flow_matching_loss(VELOCITY, NOISE, LATENTS, torch.full((3,), 0.5)),
    lambda: flow_matching_loss(VELOCITY, NOISE, LATENTS, IN["sigma"][:1]),
    lambda: masked_token_loss(LOGITS[:, :-1], TOKENS, MASK, T),
    lambda: masked_token_loss(LOGITS, TOKENS, MASK[:, :-1], T),
    lambda: masked_token_loss(LOGITS, TOKENS, MASK, T[:1]),
    lambda: masked_token_loss(LOGITS, TOKENS, MASK, T, answer=IN["answer"][0]),
    lambda: contrastive_loss(IMAGE, TEXT[:3]),
    lambda: contrastive_loss(IMAGE, TEXT[..., :8]),
    lambda: contrastive_loss(IMAGE[:, 0], TEXT[:, 0]),
    lambda: intrinsic_loss(MIDS[0], MIDS[1][:1], MIDS[2], MIDS[3]),
    lambda: intrinsic_loss(MIDS[0], MIDS[1], MIDS[2], MIDS[3][:, :-1]),
])
def test_shapes_that_do_not_fit(call):
    with pytest.raises(ValueError, match="shape|expected"):
        call()


def test_one_process_gathers_nothing():
    x = torch.randn(2, 3)
    assert losses.gather_with_gradient(x) is x
