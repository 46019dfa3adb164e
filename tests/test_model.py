"""model.py against the public reference implementations, in every layout, at full size without weights, and on bad input."""
import dataclasses
import json
import math
import re

import pytest
import torch
from conftest import golden, manifest, parameter_count, write_sparse
from safetensors.torch import save_file

import model as model_file
from checkpoint import save
from model import MMDiT, MMDiTConfig, attention, sincos_positions

SIZES = {"width": 32, "depth": 3, "num_heads": 2, "text_dim": 24, "position_table": 12}
OPTIONS = MMDiTConfig(**SIZES, latent_channels=4, vocab_size=50, null_tokens=3, align_dims=(16, 20), align_silu=False,
                      qk_norm=True, text_positions=7)
SINGLE = "model.diffusion_model."


def close(found, expected, atol=2e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def write_folder(folder, name, changes=None, **config):
    """A released-style folder with the reference weights; `changes` go into its tensors (None: removed) and `config` into config.json."""
    weights, _, _, released = golden(name)
    weights = {n: x for n, x in (weights | (changes or {})).items() if x is not None}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(released | config))
    return folder


def scramble(module, seed=0):
    """Random weights everywhere, also where a fresh model has zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def dual(tmp_path):
    return MMDiT.from_pretrained(write_folder(tmp_path, "unialignment_mmdit"))


@pytest.fixture
def tiny():
    return scramble(MMDiT(OPTIONS))


def some_inputs(batch=3, side=6, length=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 4, side, side, generator=generator), torch.randn(batch, length, 24, generator=generator),
            torch.rand(batch, generator=generator) * 1000)


# ---------------------------------------------------------------- agreement with the reference

@torch.no_grad()
def agrees_with_sd3(path, name, **overrides):
    _, inputs, outputs, _ = golden(name)
    model = MMDiT.from_pretrained(path, **overrides)
    close(model(inputs["latents"], inputs["text"], inputs["timestep"], want=("velocity",)).velocity, outputs["velocity"])
    return model


@pytest.mark.parametrize("foreign", [{}, {"first_stage_model.decoder.conv_in.bias": torch.zeros(2),
                                          "text_encoders.clip_l.transformer.x": torch.zeros(3), "text_encoders.t5xxl.y": torch.zeros(4)}])
def test_sd3_single_file(tmp_path, foreign):
    save_file(golden("sd3_mmdit_single_file")[0] | foreign, tmp_path / "sd3.safetensors")
    model = agrees_with_sd3(tmp_path / "sd3.safetensors", "sd3_mmdit_single_file", num_heads=2)
    assert model.config == MMDiTConfig(**SIZES)


def test_sd3_single_file_without_prefix(tmp_path):
    weights = {name.removeprefix(SINGLE): x for name, x in golden("sd3_mmdit_single_file")[0].items()}
    save_file(weights | {"text_encoders.clip_g.x": torch.zeros(1)}, tmp_path / "sd3.safetensors")
    agrees_with_sd3(tmp_path / "sd3.safetensors", "sd3_mmdit_single_file", num_heads=2)


def test_sd3_diffusers_repository_folder_and_file(tmp_path):
    write_folder(tmp_path / "transformer", "sd3_mmdit_diffusers")
    for path in (tmp_path, tmp_path / "transformer"):
        assert agrees_with_sd3(path, "sd3_mmdit_diffusers").config == MMDiTConfig(**SIZES)
    agrees_with_sd3(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", "sd3_mmdit_diffusers", num_heads=2)


TASKS = {"img_gen": [], "img_edit": ["edit"], "img_compose": ["compose_0", "compose_1", "compose_2"]}


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_unialignment(dual, task):
    _, inputs, outputs, config = golden("unialignment_mmdit")
    found = dual(inputs["latents"], inputs["text"], inputs["timestep"], [inputs[name] for name in TASKS[task]],
                 align_depth=config["align_depth"])
    expected = {name.removeprefix(f"{task}/"): x for name, x in outputs.items() if name.startswith(f"{task}/")}
    assert {"velocity", "image_hidden", "image_mid"} <= set(expected)
    for name, x in expected.items():
        close(getattr(found, name), x)
    assert found.logits.shape == (2, 10, 300) and found.text_mid.shape == (2, 56)


@torch.no_grad()
def test_unialignment_text_only(dual):
    _, inputs, outputs, _ = golden("unialignment_mmdit")
    found = dual(None, inputs["text"], torch.zeros(2), want=("logits",))
    close(found.logits, outputs["text_only/logits"])
    assert found.velocity is found.image_hidden is None


def test_unialignment_configuration(dual):
    assert dual.config == MMDiTConfig(**SIZES, vocab_size=300, align_dims=(40, 56))


# ---------------------------------------------------------------- full size, no weights

def test_full_size_single_file_manifest(tmp_path):
    shapes = manifest("sd3_medium_single_file")["tensors"] | {"text_encoders.clip_l.transformer.x": [3]}
    write_sparse(tmp_path / "sd3_medium.safetensors", shapes)
    model = MMDiT.from_pretrained(tmp_path / "sd3_medium.safetensors", device="meta")
    assert model.config == MMDiTConfig() and model.image_head.weight.is_meta


def test_full_size_diffusers_manifest(tmp_path):
    released = manifest("sd3_medium_transformer_diffusers")
    write_sparse(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", released["tensors"])
    assert MMDiT.from_pretrained(tmp_path, device="meta").config == MMDiTConfig()             # from the shapes alone
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(released["config"]))
    assert MMDiT.from_pretrained(tmp_path, device="meta").config == MMDiTConfig()


@pytest.mark.parametrize("with_heads", [True, False])
def test_full_size_unialignment_manifest(tmp_path, with_heads):
    released = manifest("unialignment_transformer")
    heads = {name: shape for name, shape in released["tensors"].items() if name.startswith("siglip_adapter_")}
    write_sparse(tmp_path / "x.safetensors", {n: s for n, s in released["tensors"].items() if with_heads or n not in heads})
    (tmp_path / "config.json").write_text(json.dumps(released["config"]))
    model = MMDiT.from_pretrained(tmp_path, device="meta")
    assert len(heads) == 8
    assert model.config == MMDiTConfig(align_dims=(2048, 3584) if with_heads else ())
    expected = released["parameters"] - (0 if with_heads else sum(map(math.prod, heads.values())))
    assert parameter_count(model) + model.pos_embed.numel() == expected                       # the table of positions is a buffer here


# ---------------------------------------------------------------- SD3 becomes a dual model

@pytest.mark.parametrize("name", ["sd3_mmdit_single_file", "sd3_mmdit_diffusers"])
@torch.no_grad()
def test_fresh_text_stream_is_the_identity_in_the_last_block(tmp_path, name):
    save_file(golden(name)[0], tmp_path / "x.safetensors")
    model = MMDiT.from_pretrained(tmp_path / "x.safetensors", num_heads=2)
    texts = []
    model.blocks[-1].register_forward_hook(lambda block, inputs, outputs: texts.append((inputs[1], outputs[1])))
    latents, timestep = torch.randn(4, 16, 8, 8), torch.tensor([0.0, 1, 500, 1000])
    text = torch.randn(4, 10, 24) * torch.tensor([0.0, 1, 10, 100])[:, None, None]
    before = model(latents, text, timestep)
    assert torch.equal(*texts[0]) and texts[0][0].std() > 0
    assert (before.logits == 0).all()                                                         # the text head starts at zero
    last = model.blocks[-1].text
    for layer in (last.proj, last.fc1, last.fc2):                                             # what SD3 does not have must not matter
        torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
    after = model(latents, text, timestep)
    assert torch.equal(after.velocity, before.velocity) and torch.equal(after.text_hidden, before.text_hidden)


@torch.no_grad()
def test_both_layouts_of_sd3_are_the_same_model(tmp_path):
    save_file(golden("sd3_mmdit_single_file")[0], tmp_path / "single.safetensors")
    save_file(golden("sd3_mmdit_diffusers")[0], tmp_path / "diffusers.safetensors")
    single, diffusers = (MMDiT.from_pretrained(tmp_path / f"{name}.safetensors", num_heads=2) for name in ("single", "diffusers"))
    latents, text, timestep = torch.randn(3, 16, 6, 12), 5 * torch.randn(3, 4, 24), torch.tensor([3.0, 300, 930])
    close(single(latents, text, timestep).velocity, diffusers(latents, text, timestep).velocity, atol=1e-6)


@torch.no_grad()
def test_fresh_parts_of_a_dual_model(tmp_path):
    save_file(golden("sd3_mmdit_diffusers")[0], tmp_path / "x.safetensors")
    model = agrees_with_sd3(tmp_path / "x.safetensors", "sd3_mmdit_diffusers", num_heads=2, vocab_size=60, align_dims=(16, 20))
    assert model.text_head.weight.shape == (60, 32) and 0.01 < model.null_image.std() < 0.03
    out = model(torch.randn(2, 16, 8, 8), torch.randn(2, 5, 24), torch.zeros(2), align_depth=2)
    assert out.image_mid.shape == out.text_mid.shape == (2, 20) and out.image_mid.std() > 0


def test_positions_are_read_at_full_precision_only_if_they_are_the_fixed_table(tmp_path):
    table = golden("sd3_mmdit_diffusers")[0]["pos_embed.pos_embed"].float()
    loaded = MMDiT.from_pretrained(write_folder(tmp_path / "a", "sd3_mmdit_diffusers")).pos_embed
    assert 0 < (loaded - table).abs().max() < 1e-3                                            # the file holds them rounded to half
    assert torch.equal(loaded, sincos_positions(12, 32, round(12 * math.atan2(loaded[0, 1, 0], loaded[0, 1, 8])) / 12))
    trained = table + 0.1 * torch.randn(table.shape)
    loaded = MMDiT.from_pretrained(write_folder(tmp_path / "b", "sd3_mmdit_diffusers", {"pos_embed.pos_embed": trained})).pos_embed
    assert torch.equal(loaded, trained)


@torch.no_grad()
def test_sd3_with_numbered_references(tmp_path):
    """The numbers are fresh; without references the velocity is still exactly SD3's."""
    save_file(golden("sd3_mmdit_diffusers")[0], tmp_path / "x.safetensors")
    model = agrees_with_sd3(tmp_path / "x.safetensors", "sd3_mmdit_diffusers", num_heads=2, number_references=True)
    assert model.config == MMDiTConfig(**SIZES, number_references=True) and model.number_scale.abs().max() == 0


def test_released_weights_have_no_numbers(tmp_path, dual):
    assert MMDiTConfig().number_references is False and dual.number_scale is None
    assert not any("number" in name for name in dual.state_dict())
    with pytest.raises(ValueError, match="number_scale"):
        MMDiT.from_pretrained(write_folder(tmp_path / "x", "unialignment_mmdit"), number_references=True)


# ---------------------------------------------------------------- the project's own layout

@torch.no_grad()
def test_own_layout_round_trip_is_exact(tmp_path, tiny):
    save(tmp_path / "own.safetensors", tiny.state_dict(), tiny.config)
    again = MMDiT.from_pretrained(tmp_path / "own.safetensors")
    assert again.config == OPTIONS and again.number_scale is None
    for first, second in zip(tiny(*some_inputs(), align_depth=1), again(*some_inputs(), align_depth=1)):
        assert torch.equal(first, second)
    assert torch.equal(tiny.pos_embed, again.pos_embed)
    assert torch.equal(again(None, some_inputs()[1], torch.zeros(3), want=("logits",)).logits,
                       tiny(None, some_inputs()[1], torch.zeros(3), want=("logits",)).logits)


def test_every_option_does_something(tiny):
    inputs = some_inputs()
    reference = tiny(*inputs, align_depth=2)
    for changes in ({"qk_norm": False}, {"text_positions": 0}, {"align_silu": True}):
        other = MMDiT(dataclasses.replace(OPTIONS, **changes))
        other.load_state_dict(tiny.state_dict(), strict=False)
        found = other(*inputs, align_depth=2)
        assert not torch.allclose(found.image_mid, reference.image_mid, atol=1e-3), changes


def test_exact_gelu_is_nearly_the_same(tiny):
    exact = MMDiT(dataclasses.replace(OPTIONS, exact_gelu=True))
    exact.load_state_dict(tiny.state_dict())
    found, reference = exact(*some_inputs()).velocity, tiny(*some_inputs()).velocity
    assert 0 < (found - reference).norm() < 1e-2 * reference.norm()


def test_streams_are_in_full_precision_under_autocast(tiny):
    inputs, seen = some_inputs(), []
    tiny.blocks[0].register_forward_hook(lambda block, given, streams: seen.extend((*given[:2], *streams)))
    with torch.autocast("cpu", torch.bfloat16):
        found = tiny(*inputs).velocity, tiny(None, *inputs[1:], want=("logits",)).logits
    assert len(seen) == 8 and all(x.dtype == torch.float32 for x in seen)
    expected = tiny(*inputs).velocity, tiny(None, *inputs[1:], want=("logits",)).logits
    assert all((a.float() - b).norm() < 0.05 * b.norm() for a, b in zip(found, expected))


def test_text_positions_tell_equal_tokens_apart(tiny):
    latents, text, timestep = some_inputs()
    text = text[:, :1].expand(-1, 7, -1)                                                      # a fully masked caption looks like this
    logits = tiny(latents, text, timestep).logits
    assert (logits[:, 1:] - logits[:, :1]).abs().amax(dim=2).min() > 1e-3


def test_a_fresh_model_is_the_identity():
    model = MMDiT(OPTIONS)
    latents, text, timestep = some_inputs()
    out = model(latents, text, timestep)
    assert (out.velocity == 0).all() and (out.logits == 0).all()
    expected = model.text_embed(text) + model.text_pos_embed[:, :7]
    close(out.text_hidden, torch.nn.functional.layer_norm(expected, (32,), eps=1e-6), atol=1e-6)
    assert torch.equal(model.pos_embed, sincos_positions(12, 32, 64 / 12))                      # 64 from side to side, as in SD3


def test_dtype_of_the_weights(tmp_path, tiny):
    save(tmp_path / "own.safetensors", tiny.state_dict(), tiny.config)
    model = MMDiT.from_pretrained(tmp_path / "own.safetensors", dtype=torch.bfloat16)
    latents, text, timestep = some_inputs()
    velocity = model(latents.bfloat16(), text.bfloat16(), timestep).velocity
    assert velocity.dtype == torch.bfloat16
    expected = tiny(latents, text, timestep).velocity
    assert (velocity.float() - expected).norm() < 0.05 * expected.norm()


# ---------------------------------------------------------------- what a pass computes

def test_want_computes_only_what_is_asked(tiny):
    calls = []
    tiny.image_head.register_forward_hook(lambda *_: calls.append("velocity"))
    tiny.text_head.register_forward_hook(lambda *_: calls.append("logits"))
    full = tiny(*some_inputs())
    assert sorted(calls) == ["logits", "velocity"] and full.image_mid is full.text_mid is None
    for asked in ((), ("velocity",), ("logits",)):
        calls.clear()
        found = tiny(*some_inputs(), want=asked)
        assert calls == list(asked)
        for head, hidden in (("velocity", "image_hidden"), ("logits", "text_hidden")):
            for name in (head, hidden):
                assert getattr(found, name) is None if head not in asked else torch.equal(getattr(found, name), getattr(full, name))


def test_want_with_rows(tiny):
    full = tiny(*some_inputs(batch=4))
    found = tiny(*some_inputs(batch=4), want={"velocity": slice(0, 3), "logits": slice(3, 4)})
    for name, rows in (("velocity", slice(0, 3)), ("image_hidden", slice(0, 3)), ("logits", slice(3, 4)), ("text_hidden", slice(3, 4))):
        close(getattr(found, name), getattr(full, name)[rows], atol=1e-6)


def test_the_last_block_leaves_source_pictures_as_they_are(tiny):
    """Nothing reads them after it: the same velocity with fewer tokens in its MLP."""
    tokens, references = [], [torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 6)]
    tiny.blocks[-1].image.fc1.register_forward_hook(lambda module, inputs, output: tokens.append(output.shape[:2]))
    whole = tiny(*some_inputs(batch=4), references, align_depth=3)
    found = tiny(*some_inputs(batch=4), references, want={"velocity": slice(1, 4)})
    assert tokens == [(4, 9 + 4 + 6), (3, 9)]
    close(found.velocity, whole.velocity[1:], atol=1e-5)
    close(found.image_hidden, whole.image_hidden[1:], atol=1e-5)


def test_alignment_after_the_last_block(tiny):
    """The mids need every row of the last block, whatever heads are asked for."""
    full, found = tiny(*some_inputs(), align_depth=3), tiny(*some_inputs(), align_depth=3, want={"logits": slice(0, 1)})
    close(found.image_mid, full.image_mid, atol=1e-6)
    close(found.text_mid, full.text_mid, atol=1e-6)
    close(found.logits, full.logits[:1], atol=1e-6)


def test_align_depth_counts_blocks_from_one(tiny):
    streams = []
    for block in tiny.blocks:
        block.register_forward_hook(lambda block, inputs, outputs: streams.append(outputs))
    for depth in (1, 3):
        streams.clear()
        out = tiny(*some_inputs(), references=[torch.randn(3, 4, 4, 4)], align_depth=depth)
        image, text = streams[depth - 1]
        close(out.image_mid, tiny.image_align(image[:, :9]), atol=1e-6)                       # 9 patches of the noisy picture
        close(out.text_mid, tiny.text_align(text), atol=1e-6)


@torch.no_grad()
def test_references_of_another_size(tiny):
    latents, text, timestep = some_inputs()
    wide, small = torch.randn(3, 4, 2, 10), torch.randn(3, 4, 4, 4)
    plain, found = tiny(latents, text, timestep), tiny(latents, text, timestep, [wide, small])
    assert found.velocity.shape == latents.shape and found.image_hidden.shape == (3, 9, 32)
    assert not torch.allclose(found.velocity, plain.velocity, atol=1e-3)
    swapped = tiny(latents, text, timestep, [small, wide])                                    # a set of tokens: the order does not matter
    close(found.velocity, swapped.velocity, atol=1e-5)
    moved = tiny(latents, text, timestep, [wide, small.flip(3)])
    assert not torch.allclose(found.velocity, moved.velocity, atol=1e-4)


def with_numbers(model):
    """The same weights, and references that are told apart by their number."""
    numbered = scramble(MMDiT(dataclasses.replace(OPTIONS, number_references=True)), seed=5)
    missing, superfluous = numbered.load_state_dict(model.state_dict(), strict=False)
    assert missing == ["number_scale"] and not superfluous
    return numbered


@torch.no_grad()
def test_numbers_tell_references_apart(tiny):
    """Which reference is the first one matters with numbers, and to both heads; without them they are a set."""
    numbered, inputs, (a, b) = with_numbers(tiny), some_inputs(), torch.randn(2, 3, 4, 6, 6)
    for model, matters in ((tiny, False), (numbered, True)):
        one, two = model(*inputs, [a, b], align_depth=2), model(*inputs, [b, a], align_depth=2)
        for name in ("velocity", "logits", "image_mid", "text_mid"):
            difference = (getattr(one, name) - getattr(two, name)).abs().max()
            assert difference > 1e-3 if matters else difference < 1e-5, name
        assert torch.equal(model(*inputs, [a, b]).velocity, model(*inputs, [a, b]).velocity)
    same = numbered(*inputs, [a, a])
    assert torch.equal(same.velocity, numbered(*inputs, [a.clone(), a]).velocity)


@pytest.mark.parametrize("count", range(6))
@torch.no_grad()
def test_any_number_of_references(tiny, count):
    numbered, (latents, text, timestep) = with_numbers(tiny), some_inputs()
    references = [torch.randn(3, 4, 4, 2 + 2 * i) for i in range(count)]
    plain, found = (model(latents, text, timestep, references) for model in (tiny, numbered))
    assert found.velocity.shape == latents.shape and found.velocity.isfinite().all()
    assert torch.equal(found.velocity, plain.velocity) == (count == 0)                        # nothing is numbered without a reference
    for i in range(count - 1):                                                                # any two of them
        order = [*references[:i], references[i + 1], references[i], *references[i + 2:]]
        assert (numbered(latents, text, timestep, order).velocity - found.velocity).abs().max() > 1e-4
        close(tiny(latents, text, timestep, order).velocity, plain.velocity, atol=1e-5)
    numbered.number_scale.zero_()
    close(numbered(latents, text, timestep, references).velocity, plain.velocity, atol=1e-6)


@torch.no_grad()
def test_a_number_is_added_to_the_tokens_of_its_reference(tiny):
    """The k-th reference has the same number however many follow; the noisy picture has none."""
    numbered, inputs, streams = with_numbers(tiny), some_inputs(), []
    numbered.blocks[0].register_forward_pre_hook(lambda block, args: streams.append(args[0]))
    references = [torch.randn(3, 4, 4, 4) for _ in range(3)]
    for count in (0, 1, 3):
        numbered(*inputs, references[:count])
    patches, codes = 4, model_file.timestep_embedding(torch.arange(4), 32, max_period=100) * numbered.number_scale    # (4, D)
    for stream, count in zip(streams, (0, 1, 3)):
        expected = [numbered._embed_image(inputs[0])] + [numbered._embed_image(x) + codes[i + 1] for i, x in enumerate(references[:count])]
        assert stream.shape == (3, 9 + count * patches, 32)
        close(stream, torch.cat(expected, dim=1), atol=1e-5)


@torch.no_grad()
def test_numbers_are_saved_and_loaded(tmp_path, tiny):
    numbered, inputs, references = with_numbers(tiny), some_inputs(), [torch.randn(3, 4, 4, 4) for _ in range(2)]
    save(tmp_path / "own.safetensors", numbered.state_dict(), numbered.config)
    again = MMDiT.from_pretrained(tmp_path / "own.safetensors")
    assert again.config == numbered.config and again.config.number_references
    assert all(torch.equal(x, numbered.state_dict()[name]) for name, x in again.state_dict().items())
    close(again(*inputs, references).velocity, numbered(*inputs, references).velocity, atol=1e-5)    # kernels look at the memory's alignment
    with pytest.raises(ValueError, match="superfluous: number_scale"):
        MMDiT.from_pretrained(tmp_path / "own.safetensors", number_references=False)
    half = MMDiT.from_pretrained(tmp_path / "own.safetensors", dtype=torch.bfloat16)
    found = half(inputs[0].bfloat16(), inputs[1].bfloat16(), inputs[2], [x.bfloat16() for x in references]).velocity
    assert found.dtype == torch.bfloat16 and (found.float() - again(*inputs, references).velocity).norm() < 0.05 * found.float().norm()


def test_numbers_learn_from_references_only(tiny):
    numbered, inputs = with_numbers(tiny), some_inputs()
    numbered(*inputs).velocity.square().mean().backward()
    assert numbered.number_scale.grad is None
    numbered(*inputs, [torch.randn(3, 4, 4, 4)]).velocity.square().mean().backward()
    assert numbered.number_scale.grad.abs().max() > 1e-6


@torch.no_grad()
def test_positions_are_the_centre_of_the_table(tiny):
    table = tiny.pos_embed.view(12, 12, 32)
    for height, width, rows, columns in ((4, 12, slice(5, 7), slice(3, 9)), (6, 10, slice(4, 7), slice(3, 8))):
        embedded = tiny._embed_image(torch.zeros(1, 4, height, width))[0] - tiny.patch_embed.bias
        close(embedded, table[rows, columns].reshape(-1, 32), atol=1e-6)


@torch.no_grad()
def test_rows_of_a_batch_do_not_mix(tiny):
    latents, text, timestep = some_inputs(batch=3)
    reference = torch.randn(3, 4, 4, 6)
    whole = tiny(latents, text, timestep, [reference], align_depth=2)
    others = [x.clone() for x in (latents, text, timestep, reference)]
    for x in others:
        x[0], x[2] = 7, -3
    changed = tiny(*others[:3], [others[3]], align_depth=2)
    alone = tiny(latents[1:2], text[1:2], timestep[1:2], [reference[1:2]], align_depth=2)
    for a, b, c in zip(whole, changed, alone):
        close(b[1], a[1], atol=1e-5)
        close(c[0], a[1], atol=1e-5)
        assert (b[0] - a[0]).abs().max() > 1e-3


# ---------------------------------------------------------------- two ways to the same numbers

def gradients(model, inputs):
    model.zero_grad()
    out = model(*inputs, align_depth=2)
    sum(x.square().mean() for x in out).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradient_checkpointing(tiny):
    inputs, calls = some_inputs(), []
    tiny.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    plain = gradients(tiny, inputs)
    assert len(calls) == 1 and set(plain) == {name for name, _ in tiny.named_parameters()} - {"null_image"}
    tiny.gradient_checkpointing = True
    saved = gradients(tiny, inputs)
    assert len(calls) == 3                                                                    # once more in the backward pass
    for name in plain:
        close(saved[name], plain[name], atol=1e-6)
    with torch.no_grad():
        tiny(*inputs)
    assert len(calls) == 4


def test_attention_written_out_equals_the_fused_kernel(tiny, monkeypatch):
    fused, real = [], model_file.F.scaled_dot_product_attention
    monkeypatch.setattr(model_file.F, "scaled_dot_product_attention", lambda *a, **k: fused.append(1) or real(*a, **k))
    q, k, v = torch.randn(3, 2, 2, 13, 16) * torch.tensor([3.0, 3, 1]).view(3, 1, 1, 1, 1)
    written_out = attention(q, k, v)
    out = tiny(*some_inputs())
    assert not fused
    with torch.no_grad():
        close(written_out, attention(q, k, v), atol=1e-5)
        for a, b in zip(out, tiny(*some_inputs())):
            assert a is b is None or (a - b).abs().max() < 1e-5
    assert len(fused) == 1 + 3


# ---------------------------------------------------------------- bad input

LATENTS, TEXT, TIMESTEP = some_inputs()


@pytest.mark.parametrize("changes, words", [
    ({"text": TEXT[0]}, "text has shape (7, 24), expected (B, L, 24)"),
    ({"text": torch.zeros(3, 7, 25)}, "text has shape (3, 7, 25), expected (B, L, 24)"),
    ({"text": torch.zeros(3, 8, 24)}, "text has 8 tokens, this model has positions for 7"),
    ({"latents": LATENTS[0]}, "latents has shape (4, 6, 6), expected (3, 4, H, W)"),
    ({"latents": torch.zeros(3, 16, 6, 6)}, "latents has shape (3, 16, 6, 6), expected (3, 4, H, W)"),
    ({"latents": LATENTS[:2]}, "latents has shape (2, 4, 6, 6), expected (3, 4, H, W)"),
    ({"latents": torch.zeros(3, 4, 6, 5)}, "latents is 6 x 5, expected multiples of 2 up to 24"),
    ({"latents": torch.zeros(3, 4, 26, 2)}, "latents is 26 x 2, expected multiples of 2 up to 24"),
    ({"references": [LATENTS, LATENTS[:1]]}, "references[1] has shape (1, 4, 6, 6), expected (3, 4, H, W)"),
    ({"references": [torch.zeros(3, 4, 3, 4)]}, "references[0] is 3 x 4, expected multiples of 2"),
    ({"timestep": TIMESTEP[:1]}, "timestep has shape (1,), expected (3,)"),
    ({"timestep": torch.tensor(5.0)}, "timestep has shape (), expected (3,)"),
    ({"align_depth": 0}, "align_depth=0, expected 1 to 3"),
    ({"align_depth": 4}, "align_depth=4, expected 1 to 3"),
    ({"want": ("velocity", "image")}, "want has ['image']"),
    ({"latents": None}, "text-only"),
    ({"latents": None, "references": [LATENTS], "want": ("logits",)}, "text-only"),
])
def test_bad_inputs(tiny, changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        tiny(**{"latents": LATENTS, "text": TEXT, "timestep": TIMESTEP} | changes)


def test_align_depth_without_heads():
    model = MMDiT(dataclasses.replace(OPTIONS, align_dims=()))
    with pytest.raises(ValueError, match="alignment heads"):
        model(LATENTS, TEXT, TIMESTEP, align_depth=1)


# ---------------------------------------------------------------- checkpoints that do not fit

def test_missing_superfluous_and_misshapen_tensors(tmp_path):
    folder = write_folder(tmp_path, "unialignment_mmdit", {
        "transformer_blocks.1.attn.to_k.bias": None, "text_proj_out.bias": None,
        "transformer_blocks.0.attn.norm_q.weight": torch.zeros(16), "proj_out.bias": torch.zeros(64),
        "image_proj_out.bias": torch.zeros(60), "transformer_blocks.2.attn.to_q.weight": torch.zeros(32, 33)})
    with pytest.raises(ValueError) as error:
        MMDiT.from_pretrained(folder)
    for words in (str(folder), "missing: transformer_blocks.1.attn.to_k.bias (needed for blocks.1.image.qkv.bias)",
                  "missing: text_proj_out.bias", "superfluous: transformer_blocks.0.attn.norm_q.weight (16,)",
                  "superfluous: proj_out.bias (64,)", "wrong shape: image_proj_out.bias (60,), expected (64,)",
                  "wrong shape: transformer_blocks.2.attn.to_q.weight (32, 33)"):
        assert words in str(error.value)


def test_missing_tensors_of_sd3_and_of_the_own_layout(tmp_path, tiny):
    weights = golden("sd3_mmdit_single_file")[0]
    del weights[SINGLE + "y_embedder.mlp.2.weight"], weights[SINGLE + "joint_blocks.2.context_block.adaLN_modulation.1.bias"]
    save_file(weights, tmp_path / "sd3.safetensors")
    with pytest.raises(ValueError) as error:
        MMDiT.from_pretrained(tmp_path / "sd3.safetensors", num_heads=2)
    for words in ("missing: y_embedder.mlp.2.weight (needed for time_embed.2.bias)",
                  "missing: joint_blocks.2.context_block.adaLN_modulation.1.bias"):
        assert words in str(error.value)
    state = tiny.state_dict()
    del state["blocks.1.text.fc1.bias"], state["null_image"]
    save(tmp_path / "own.safetensors", state | {"blocks.0.extra": torch.zeros(1)}, tiny.config)
    with pytest.raises(ValueError) as error:
        MMDiT.from_pretrained(tmp_path / "own.safetensors")
    for words in ("blocks.1.text.fc1.bias", "null_image", "superfluous: blocks.0.extra (1,)"):
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["sd3_mmdit_diffusers", "unialignment_mmdit"])
@pytest.mark.parametrize("config, words", [
    ({"num_layers": 4}, "missing: transformer_blocks.3."),
    ({"num_layers": 2}, "superfluous: transformer_blocks.2."),
    ({"caption_projection_dim": 64}, "wrong shape"),
    ({"in_channels": 4}, "wrong shape"),
    ({"num_layers": "three"}, "depth = 'three', expected int"),
    ({"num_attention_heads": 2.5}, "num_heads = 2.5, expected int"),
    ({"num_attention_heads": 5}, "must be a multiple of num_heads 5"),
    ({"num_attention_heads": 0}, "num_heads"),
    ({"num_layers": 0}, "MMDiT"),
])
def test_config_json_that_does_not_fit(tmp_path, name, config, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        MMDiT.from_pretrained(write_folder(tmp_path, name, **config))
    assert str(tmp_path) in str(error.value)


def test_a_file_of_something_else(tmp_path):
    save_file({"shared.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors: holds no MM-DiT.*shared.weight"):
        MMDiT.from_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize("sizes", [{"width": 32, "num_heads": 5}, {"width": 30, "num_heads": 2}])
def test_width_that_cannot_be_split(sizes):
    with pytest.raises(ValueError, match="width"):
        MMDiT(MMDiTConfig(**SIZES | sizes))


def test_unknown_override(tmp_path):
    with pytest.raises(ValueError, match="unknown field 'heads'"):
        MMDiT.from_pretrained(write_folder(tmp_path, "unialignment_mmdit"), heads=4)


@pytest.mark.parametrize("tokens", [20, 300])
def test_attention_and_its_gradient_are_those_of_the_formula(tokens):
    """Both ways to compute it, the one for short and the one for long sequences."""
    q, k, v = (torch.randn(2, 3, tokens, 8, requires_grad=True) for _ in range(3))
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) / math.sqrt(8)
    expected = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v.double())
    found, weight = attention(q, k, v), torch.randn(2, 3, tokens, 8)
    close(found.double(), expected, atol=1e-5)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), (q, k, v)), torch.autograd.grad((expected * weight).sum(), (q, k, v))):
        close(a, b, atol=1e-4)
