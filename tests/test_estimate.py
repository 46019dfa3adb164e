"""estimate.py: counts and bytes against those of real tensors, and the command line."""
from dataclasses import replace

import pytest
import torch
from conftest import parameter_count
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import estimate
import train
from config import PRESETS
from estimate import MACHINES, Machine, Meter, cost_of
from model import MMDiT
from ranks import Ranks
from text_encoder import T5Encoder
from train import Corrupted, Objective, Parameters, make_optimizers
from vae import VAE

SMALL = PRESETS["small"]
NARROW = replace(
    SMALL, batch_size=4, accumulation=2, align_depth=1,
    model=replace(SMALL.model, width=64, depth=3, num_heads=4, vocab_size=500, position_table=16,
                  align_dims=(32, 48), text_positions=64),
    text_encoder=replace(SMALL.text_encoder, dim=48, ff_dim=96, depth=2, num_heads=2, head_dim=16,
                         vocab_size=600),
    vae=replace(SMALL.vae, block_channels=(8, 16, 16, 16), norm_groups=2),
    sampling=replace(SMALL.sampling, image_size=128, text_length=64))
CARD = Machine("card", tflops=100, memory=24, bandwidth=1000, link=10,
               shares=dict.fromkeys(estimate.ASSUMED, 0.5))


def cost(config, part: str = "MM-DiT") -> estimate.Cost:
    return estimate.costs_of(config, estimate.modules_of(config))[part]


def real_pairs(config) -> Corrupted:
    """A batch with values, in the shapes of `estimate.pairs`, every token masked."""
    c, b, length = config.model, config.batch_size, config.sampling.text_length
    side = config.sampling.image_size // 8
    x, noise, noisy = torch.randn(3, b, c.latent_channels, side, side)
    text, masked = torch.randn(2, b, length, config.text_encoder.dim).bfloat16()
    tokens = torch.randint(c.vocab_size - 1, (b, length))
    every, sigma = torch.ones_like(tokens, dtype=torch.bool), torch.full((b,), 0.5)
    features = tuple(torch.randn(2, b, c.align_dims[1]))
    return Corrupted(x, (), noise, sigma, noisy, text, tokens, every, every, sigma, masked,
                     features, None, None)


def real_model(config) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(replace(config.model, text_dim=config.text_encoder.dim))
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


def run_step(model, config, corrupted: Corrupted) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = Objective(model, config)(corrupted)["loss"]
    loss.backward()


# ---------------------------------------------------------------- counting

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [64, 192])
def test_flops_are_those_that_torch_counts(size, checkpointing):
    """64 pixels: attention is written out. 192 pixels: one kernel, which torch does not count."""
    config = replace(NARROW, gradient_checkpointing=checkpointing,
                     sampling=replace(NARROW.sampling, image_size=size))
    model, corrupted = real_model(config), real_pairs(config)
    with FlopCounterMode(display=False) as counter:
        run_step(model, config, corrupted)
    estimated = cost(config).flops
    rows, tokens = 2 * config.batch_size, (size // 16) ** 2 + 64
    product = 2 * rows * tokens ** 2 * config.model.width       # queries by keys
    products = 9 if checkpointing else 7                        # 2 forward, 5 backward
    kernels = products * product * config.model.depth if size == 192 else 0
    assert estimated == counter.get_total_flops() + kernels


def test_attention_of_long_sequences_is_counted():
    q = torch.randn(2, 3, 256, 16, requires_grad=True)
    attend = nn.functional.scaled_dot_product_attention
    product = 2 * 2 * 3 * 256 * 256 * 16
    assert cost_of(lambda: attend(q.detach(), q.detach(), q.detach())).flops == 2 * product
    assert cost_of(lambda: attend(q, q, q).sum().backward()).flops == (2 + 5) * product


def test_flops_of_the_frozen_parts():
    s = NARROW.sampling
    vae, encoder = VAE(NARROW.vae), T5Encoder(NARROW.text_encoder)
    images = torch.zeros(NARROW.batch_size, 3, s.image_size, s.image_size)
    ids = torch.zeros(2 * NARROW.batch_size, s.text_length, dtype=torch.int64)
    with torch.no_grad(), Meter() as of_vae:
        vae.encode(images)
    with torch.no_grad(), Meter() as of_t5:
        encoder(ids)
    assert cost(NARROW, "autoencoder").flops == of_vae.flops > 0
    assert cost(NARROW, "T5").flops == of_t5.flops > 0


def test_flops_of_the_teacher():
    """256 pixels are 18 x 18 patches in 7B's encoder: about its matrices times its tokens."""
    config = replace(SMALL, batch_size=2)
    m = estimate.modules_of(config)
    blocks, merger = parameter_count(m.teacher.blocks), parameter_count(m.teacher.merger)
    expected = 2 * 2 * (324 * blocks + 81 * merger)
    assert estimate.teacher_flops(config, m) == pytest.approx(expected, rel=0.01)


def test_a_meter_follows_bytes():
    with Meter() as meter:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        b += 1
        assert meter.bytes == 4000
        c = a + 1
        assert meter.bytes == 8000
        del c
        d = a.half()
        assert (meter.bytes, meter.peak) == (6000, 8000)
        del a, b, d
    assert (meter.bytes, meter.peak) == (0, 8000)


# ---------------------------------------------------------------- memory

def test_activations_are_near_the_saved_tensors():
    """A mid-size step, measured by the tensors that autograd keeps for the backward pass."""
    config = replace(NARROW, model=replace(NARROW.model, width=192, depth=6))
    model, corrupted = real_model(config), real_pairs(config)
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run_step(model, config, corrupted)
    own = {x.untyped_storage()._cdata for x in [*model.state_dict().values(), *corrupted[:1]]}
    measured = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    estimated = cost(config).bytes
    assert estimated == pytest.approx(measured, rel=0.15)


def test_bytes_are_those_of_a_real_step():
    """With values: the peak of a step beside the gradients of an earlier one."""
    config, corrupted = NARROW, real_pairs(NARROW)
    model = real_model(config)
    run_step(model, config, corrupted)
    measured = cost_of(lambda: run_step(model, config, corrupted)).bytes
    estimated = cost(config).bytes
    assert estimated == pytest.approx(measured, rel=0.05)


def test_recomputing_needs_less_memory_and_more_flops():
    plain = cost(NARROW)
    config = replace(NARROW, gradient_checkpointing=True)
    recomputed = cost(config)
    assert recomputed.bytes < 0.7 * plain.bytes
    assert 1.2 * plain.flops < recomputed.flops < 1.4 * plain.flops


@pytest.mark.parametrize("muon_lr", [0.0, 0.01])
def test_static_memory_is_exact(muon_lr):
    config = replace(NARROW, muon_lr=muon_lr)
    model = real_model(config)
    parameters, optimizers = Parameters(model, Ranks(0, 1, torch.device("cpu"))), \
        make_optimizers(model, config)
    run_step(model, config, real_pairs(config))
    parameters.update(optimizers, parameters.clip(1.0))
    states = [x for optimizer in optimizers for entry in optimizer.state.values()
              for x in entry.values() if isinstance(x, torch.Tensor) and x.ndim]
    e = estimate.estimate(config, 1, CARD)
    whole = sum(4 * x.numel() for x in model.state_dict().values())
    # pairs do not train these two
    later = 2 * 4 * (model.null_image.numel() + model.number_scale.numel())
    assert e.memory["optimizer"] == sum(4 * x.numel() for x in states) + later
    assert e.memory["weights"] == e.memory["averages"] == whole
    assert e.memory["gradients"] == 4 * parameter_count(model) == 4 * e.parameters["MM-DiT"]
    assert e.memory["T5"] == 2 * parameter_count(T5Encoder(config.text_encoder))
    assert e.memory["autoencoder"] == 4 * parameter_count(VAE(config.vae))


def test_several_gpus_share_the_optimizer():
    one, four = (estimate.estimate(NARROW, gpus, CARD) for gpus in (1, 4))
    assert 0.25 <= four.memory["optimizer"] / one.memory["optimizer"] < 0.5
    assert four.memory["weights"] == one.memory["weights"]
    assert (one.reduced, four.reduced) == (0, four.memory["gradients"])
    assert four.traffic == 9 / 4 * four.reduced / 10e9 and one.traffic == 0
    assert sum(four.flops.values()) == 4 * sum(one.flops.values())


def test_time_is_flops_over_the_share_of_the_peak():
    e = estimate.estimate(NARROW, 2, CARD)
    assert e.compute == pytest.approx(sum(e.flops.values()) / 2 / 50e12)
    assert e.seconds == e.compute + e.update + e.traffic


# ---------------------------------------------------------------- presets and the command line

@pytest.mark.parametrize("dim, ff_dim, depth, num_heads", [
    (768, 2048, 12, 12), (1024, 2816, 24, 16), (2048, 5120, 24, 32), (4096, 10240, 24, 64)])
def test_small_takes_any_t5(dim, ff_dim, depth, num_heads):
    """T5 v1.1 from base to XXL; about 280 M parameters without the alignment heads."""
    t5 = replace(SMALL.text_encoder, dim=dim, ff_dim=ff_dim, depth=depth, num_heads=num_heads)
    m = estimate.modules_of(replace(SMALL, text_encoder=t5))
    heads = parameter_count(m.model.image_align) + parameter_count(m.model.text_align)
    assert m.model.config.text_dim == dim
    assert parameter_count(m.model) - heads == pytest.approx(284e6, rel=0.01)


def test_the_whole_table(capsys, tmp_path):
    train.main(["--preset", "small", "--estimate", "--gpus", "4", "--gpu", "4090",
                "--accumulation", "4", "--out", str(tmp_path / "run")])
    text = capsys.readouterr().out
    assert text.startswith("4 x 4090: a step of 256 pairs")
    assert "MM-DiT" in text and "of 24: fits" in text and "100000 steps" in text
    assert not (tmp_path / "run").exists()


def test_what_to_change(capsys):
    """Smaller batches first, then recomputation; nothing, where the weights alone are large."""
    need = {b: estimate.estimate(replace(NARROW, batch_size=b), 1, CARD).total for b in (4, 2)}
    middle = CARD._replace(memory=(need[4] + need[2]) / 2e9)
    assert estimate.advice(NARROW, 1, middle) == "it fits with --batch_size 2 --accumulation 4"
    assert "no batch" in estimate.advice(NARROW, 1, CARD._replace(memory=0.001))


@pytest.mark.parametrize("arguments, words", [
    (["--gpu", "abacus"], "abacus"), (["--gpus", "0"], "--gpus 0"), (["--memory", "-1"], "-1"),
    (["--stepz", "1"], "--stepz")])
def test_wrong_arguments(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--estimate", *arguments])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_this_machine_can_be_measured():
    """The time of a deeper model follows from two blocks; the rest of the table is as assumed."""
    config = replace(NARROW, intrinsic_weight=0.0)
    machine = estimate.this_machine(config)
    assert machine.name == "this CPU" and machine.tflops > 0 and machine.memory > 1
    assert all(0 < machine.shares[name] < 1 for name in ("MM-DiT", "T5", "autoencoder"))
    assert machine.shares["teacher"] == estimate.ASSUMED["teacher"]
    step = estimate.transformer_step(config, estimate.modules_of(config))
    seconds = estimate.seconds_of(step, torch.device("cpu"))
    estimated = cost(config).flops / machine.tflops / 1e12 / machine.shares["MM-DiT"]
    assert 0.2 < estimated / seconds < 5                        # other work disturbs both
    assert all(m.memory > 20 and m.tflops < 1000 for m in MACHINES.values())
