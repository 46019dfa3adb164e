"""model.py against the public reference implementations.

In every layout, at full size without weights, and on bad input.
"""
import dataclasses
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import golden, manifest, parameter_count, write_sparse
from safetensors.torch import save_file

import model as model_file
from checkpoint import save
from model import MMDiT, MMDiTConfig, attention, sincos_positions

SIZES = {"width": 32, "depth": 3, "num_heads": 2, "text_dim": 24, "position_table": 12}
OPTIONS = MMDiTConfig(
    **SIZES, latent_channels=4, vocab_size=50, null_tokens=3, align_dims=(16, 20),
    align_silu=False, qk_norm=True, text_positions=7)
SINGLE = "model.diffusion_model."


def close(actual, expected, atol=2e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def write_folder(folder, name, changes=None, **config):
    """Write a folder as the release has it, with the reference weights.

    `changes` replace tensors (None: removed), `config` replaces fields of config.json.
    """
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
    """Latents (B, 4, H, W), text (B, L, 24) and timestep (B,)."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, side, side, generator=generator)
    text = torch.randn(batch, length, 24, generator=generator)
    return latents, text, torch.rand(batch, generator=generator) * 1000


# ---------------------------------------------------------------- agreement with the reference

@torch.no_grad()
def agrees_with_sd3(path, name, **overrides):
    _, inputs, outputs, _ = golden(name)
    model = MMDiT.from_pretrained(path, **overrides)
    out = model(inputs["latents"], inputs["text"], inputs["timestep"], want=("velocity",))
    close(out.velocity, outputs["velocity"])
    return model


@pytest.mark.parametrize("foreign", [{}, {
    "first_stage_model.decoder.conv_in.bias": torch.zeros(2),
    "text_encoders.clip_l.transformer.x": torch.zeros(3),
    "text_encoders.t5xxl.y": torch.zeros(4)}])
def test_sd3_single_file(tmp_path, foreign):
    save_file(golden("sd3_mmdit_single_file")[0] | foreign, tmp_path / "sd3.safetensors")
    model = agrees_with_sd3(tmp_path / "sd3.safetensors", "sd3_mmdit_single_file", num_heads=2)
    assert model.config == MMDiTConfig(**SIZES)


def test_sd3_single_file_without_prefix(tmp_path):
    prefixed = golden("sd3_mmdit_single_file")[0]
    weights = {name.removeprefix(SINGLE): x for name, x in prefixed.items()}
    weights["text_encoders.clip_g.x"] = torch.zeros(1)
    save_file(weights, tmp_path / "sd3.safetensors")
    agrees_with_sd3(tmp_path / "sd3.safetensors", "sd3_mmdit_single_file", num_heads=2)


def test_sd3_diffusers_repository_folder_and_file(tmp_path):
    folder, name = tmp_path / "transformer", "sd3_mmdit_diffusers"
    write_folder(folder, name)
    for path in (tmp_path, folder):
        assert agrees_with_sd3(path, name).config == MMDiTConfig(**SIZES)
    agrees_with_sd3(folder / "diffusion_pytorch_model.safetensors", name, num_heads=2)


TASKS = {"img_gen": [], "img_edit": ["edit"],
         "img_compose": ["compose_0", "compose_1", "compose_2"]}


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_unialignment(dual, task):
    _, inputs, outputs, config = golden("unialignment_mmdit")
    references = [inputs[name] for name in TASKS[task]]
    out = dual(inputs["latents"], inputs["text"], inputs["timestep"], references,
               align_depth=config["align_depth"])
    expected = {name.removeprefix(f"{task}/"): x for name, x in outputs.items()
                if name.startswith(f"{task}/")}
    assert {"velocity", "image_hidden", "image_mid"} <= set(expected)
    for name, x in expected.items():
        close(getattr(out, name), x)
    assert out.logits.shape == (2, 10, 300) and out.text_mid.shape == (2, 56)


@torch.no_grad()
def test_unialignment_text_only(dual):
    _, inputs, outputs, _ = golden("unialignment_mmdit")
    out = dual(None, inputs["text"], torch.zeros(2), want=("logits",))
    close(out.logits, outputs["text_only/logits"])
    assert out.velocity is out.image_hidden is None


def test_unialignment_configuration(dual):
    assert dual.config == MMDiTConfig(**SIZES, vocab_size=300, align_dims=(40, 56))


# ---------------------------------------------------------------- full size, no weights

def test_full_size_single_file_manifest(tmp_path):
    shapes = manifest("sd3_medium_single_file")["tensors"]
    shapes |= {"text_encoders.clip_l.transformer.x": [3]}
    write_sparse(tmp_path / "sd3_medium.safetensors", shapes)
    model = MMDiT.from_pretrained(tmp_path / "sd3_medium.safetensors", device="meta")
    assert model.config == MMDiTConfig() and model.image_head.weight.is_meta


def test_full_size_diffusers_manifest(tmp_path):
    """The shapes suffice for the configuration, and config.json agrees with them."""
    released, folder = manifest("sd3_medium_transformer_diffusers"), tmp_path / "transformer"
    write_sparse(folder / "diffusion_pytorch_model.safetensors", released["tensors"])
    assert MMDiT.from_pretrained(tmp_path, device="meta").config == MMDiTConfig()
    (folder / "config.json").write_text(json.dumps(released["config"]))
    assert MMDiT.from_pretrained(tmp_path, device="meta").config == MMDiTConfig()


@pytest.mark.parametrize("with_heads", [True, False])
def test_full_size_unialignment_manifest(tmp_path, with_heads):
    released = manifest("unialignment_transformer")
    shapes, count = dict(released["tensors"]), released["parameters"]
    heads = [name for name in shapes if name.startswith("siglip_adapter_")]
    assert len(heads) == 8
    if not with_heads:
        count -= sum(math.prod(shapes.pop(name)) for name in heads)
    write_sparse(tmp_path / "x.safetensors", shapes)
    (tmp_path / "config.json").write_text(json.dumps(released["config"]))
    model = MMDiT.from_pretrained(tmp_path, device="meta")
    assert model.config == MMDiTConfig(align_dims=(2048, 3584) if with_heads else ())
    # the table of positions, a parameter of the release, is a buffer here
    assert parameter_count(model) + model.pos_embed.numel() == count


# ---------------------------------------------------------------- SD3 becomes a dual model

@pytest.mark.parametrize("name", ["sd3_mmdit_single_file", "sd3_mmdit_diffusers"])
@torch.no_grad()
def test_fresh_text_stream_is_the_identity_in_the_last_block(tmp_path, name):
    save_file(golden(name)[0], tmp_path / "x.safetensors")
    model = MMDiT.from_pretrained(tmp_path / "x.safetensors", num_heads=2)
    texts = []
    model.blocks[-1].register_forward_hook(
        lambda block, inputs, outputs: texts.append((inputs[1], outputs[1])))
    latents, timestep = torch.randn(4, 16, 8, 8), torch.tensor([0.0, 1, 500, 1000])
    text = torch.randn(4, 10, 24) * torch.tensor([0.0, 1, 10, 100])[:, None, None]
    before = model(latents, text, timestep)
    assert torch.equal(*texts[0]) and texts[0][0].std() > 0
    assert (before.logits == 0).all()                               # the text head starts at zero
    last = model.blocks[-1].text
    for layer in (last.proj, last.fc1, last.fc2):                   # SD3 has none: no effect yet
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.normal_(layer.bias)
    after = model(latents, text, timestep)
    assert torch.equal(after.velocity, before.velocity)
    assert torch.equal(after.text_hidden, before.text_hidden)


@torch.no_grad()
def test_both_layouts_of_sd3_are_the_same_model(tmp_path):
    models = []
    for layout in ("single_file", "diffusers"):
        file = tmp_path / f"{layout}.safetensors"
        save_file(golden(f"sd3_mmdit_{layout}")[0], file)
        models.append(MMDiT.from_pretrained(file, num_heads=2))
    latents, text = torch.randn(3, 16, 6, 12), 5 * torch.randn(3, 4, 24)
    timestep = torch.tensor([3.0, 300, 930])
    single, diffusers = (model(latents, text, timestep).velocity for model in models)
    close(single, diffusers, atol=1e-6)


@torch.no_grad()
def test_fresh_parts_of_a_dual_model(tmp_path):
    save_file(golden("sd3_mmdit_diffusers")[0], tmp_path / "x.safetensors")
    model = agrees_with_sd3(tmp_path / "x.safetensors", "sd3_mmdit_diffusers", num_heads=2,
                            vocab_size=60, align_dims=(16, 20))
    assert model.text_head.weight.shape == (60, 32) and 0.01 < model.null_image.std() < 0.03
    latents, text = torch.randn(2, 16, 8, 8), torch.randn(2, 5, 24)
    out = model(latents, text, torch.zeros(2), align_depth=2)
    assert out.image_mid.shape == out.text_mid.shape == (2, 20) and out.image_mid.std() > 0


def test_positions_are_read_at_full_precision_only_if_they_are_the_fixed_table(tmp_path):
    table = golden("sd3_mmdit_diffusers")[0]["pos_embed.pos_embed"].float()
    folder = write_folder(tmp_path / "a", "sd3_mmdit_diffusers")
    loaded = MMDiT.from_pretrained(folder).pos_embed
    assert 0 < (loaded - table).abs().max() < 1e-3                  # rounded to half in the file
    spacing = round(12 * math.atan2(loaded[0, 1, 0], loaded[0, 1, 8])) / 12
    assert torch.equal(loaded, sincos_positions(12, 32, spacing))
    trained = table + 0.1 * torch.randn(table.shape)
    folder = write_folder(tmp_path / "b", "sd3_mmdit_diffusers", {"pos_embed.pos_embed": trained})
    assert torch.equal(MMDiT.from_pretrained(folder).pos_embed, trained)


@torch.no_grad()
def test_sd3_with_numbered_references(tmp_path):
    """The numbers are fresh; without references the velocity is still exactly SD3's."""
    save_file(golden("sd3_mmdit_diffusers")[0], tmp_path / "x.safetensors")
    model = agrees_with_sd3(tmp_path / "x.safetensors", "sd3_mmdit_diffusers", num_heads=2,
                            number_references=True)
    assert model.config == MMDiTConfig(**SIZES, number_references=True)
    assert model.number_scale.abs().max() == 0


def test_released_weights_have_no_numbers(tmp_path, dual):
    assert MMDiTConfig().number_references is False and dual.number_scale is None
    assert not any("number" in name for name in dual.state_dict())
    folder = write_folder(tmp_path / "x", "unialignment_mmdit")
    with pytest.raises(ValueError, match="number_scale"):
        MMDiT.from_pretrained(folder, number_references=True)


# ---------------------------------------------------------------- the project's own layout

@torch.no_grad()
def test_own_layout_round_trip_is_exact(tmp_path, tiny):
    save(tmp_path / "own.safetensors", tiny.state_dict(), tiny.config)
    again = MMDiT.from_pretrained(tmp_path / "own.safetensors")
    assert again.config == OPTIONS and again.number_scale is None
    outputs = tiny(*some_inputs(), align_depth=1)
    for first, second in zip(outputs, again(*some_inputs(), align_depth=1)):
        assert torch.equal(first, second)
    assert torch.equal(tiny.pos_embed, again.pos_embed)
    text, clean = some_inputs()[1], torch.zeros(3)
    assert torch.equal(again(None, text, clean, want=("logits",)).logits,
                       tiny(None, text, clean, want=("logits",)).logits)


def test_every_option_does_something(tiny):
    inputs = some_inputs()
    reference = tiny(*inputs, align_depth=2)
    for changes in ({"qk_norm": False}, {"text_positions": 0}, {"align_silu": True}):
        other = MMDiT(dataclasses.replace(OPTIONS, **changes))
        other.load_state_dict(tiny.state_dict(), strict=False)
        out = other(*inputs, align_depth=2)
        assert not torch.allclose(out.image_mid, reference.image_mid, atol=1e-3), changes


def test_exact_gelu_is_nearly_the_same(tiny):
    exact = MMDiT(dataclasses.replace(OPTIONS, exact_gelu=True))
    exact.load_state_dict(tiny.state_dict())
    velocity, reference = exact(*some_inputs()).velocity, tiny(*some_inputs()).velocity
    assert 0 < (velocity - reference).norm() < 1e-2 * reference.norm()


def test_streams_are_in_full_precision_under_autocast(tiny):
    inputs, seen = some_inputs(), []

    def outputs():
        return tiny(*inputs).velocity, tiny(None, *inputs[1:], want=("logits",)).logits

    tiny.blocks[0].register_forward_hook(
        lambda block, given, streams: seen.extend((*given[:2], *streams)))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = outputs()
    assert len(seen) == 8 and all(x.dtype == torch.float32 for x in seen)
    for a, b in zip(rounded, outputs()):
        assert (a.float() - b).norm() < 0.05 * b.norm()


def test_autograd_keeps_no_copy_of_the_modulations(tiny):
    """A third of all weights: under autocast a matrix product keeps its weight as bfloat16."""
    copies = []

    def pack(x):
        copies.extend([x.shape] if x.dtype == torch.bfloat16 else [])
        return x

    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            tiny(*some_inputs())
    weight = tiny.blocks[0].image.modulation.weight
    assert not {weight.shape, weight.T.shape} & set(copies)
    assert {tiny.blocks[0].image.fc1.weight.shape, tiny.blocks[0].image.fc1.weight.T.shape} & \
        set(copies)


def test_text_positions_distinguish_equal_tokens(tiny):
    """T5 encodes a fully masked caption as equal vectors."""
    latents, text, timestep = some_inputs()
    text = text[:, :1].expand(-1, 7, -1)
    logits = tiny(latents, text, timestep).logits
    assert (logits[:, 1:] - logits[:, :1]).abs().amax(dim=2).min() > 1e-3


def test_a_fresh_model_is_the_identity():
    model = MMDiT(OPTIONS)
    latents, text, timestep = some_inputs()
    out = model(latents, text, timestep)
    assert (out.velocity == 0).all() and (out.logits == 0).all()
    embedded = model.text_embed(text) + model.text_pos_embed[:, :7]
    close(out.text_hidden, F.layer_norm(embedded, (32,), eps=1e-6), atol=1e-6)
    assert torch.equal(model.pos_embed, sincos_positions(12, 32, 64 / 12))  # SD3's span of 64


def test_dtype_of_the_weights(tmp_path, tiny):
    save(tmp_path / "own.safetensors", tiny.state_dict(), tiny.config)
    model = MMDiT.from_pretrained(tmp_path / "own.safetensors", dtype=torch.bfloat16)
    latents, text, timestep = some_inputs()
    velocity = model(latents.bfloat16(), text.bfloat16(), timestep).velocity
    assert velocity.dtype == torch.bfloat16
    expected = tiny(latents, text, timestep).velocity
    assert (velocity.float() - expected).norm() < 0.05 * expected.norm()


# ---------------------------------------------------------------- outputs of a pass

def test_want_computes_only_what_is_asked(tiny):
    calls = []
    tiny.image_head.register_forward_hook(lambda *_: calls.append("velocity"))
    tiny.text_head.register_forward_hook(lambda *_: calls.append("logits"))
    full = tiny(*some_inputs())
    assert sorted(calls) == ["logits", "velocity"] and full.image_mid is full.text_mid is None
    hidden = {"velocity": "image_hidden", "logits": "text_hidden"}
    for asked in ((), ("velocity",), ("logits",)):
        calls.clear()
        out = tiny(*some_inputs(), want=asked)
        assert calls == list(asked)
        for head in hidden:
            for name in (head, hidden[head]):
                if head in asked:
                    assert torch.equal(getattr(out, name), getattr(full, name))
                else:
                    assert getattr(out, name) is None


def test_want_with_rows(tiny):
    full = tiny(*some_inputs(batch=4))
    first, last = slice(0, 3), slice(3, 4)
    out = tiny(*some_inputs(batch=4), want={"velocity": first, "logits": last})
    for name, rows in (("velocity", first), ("image_hidden", first),
                       ("logits", last), ("text_hidden", last)):
        close(getattr(out, name), getattr(full, name)[rows], atol=1e-6)


def test_logits_of_a_mask_of_tokens(tiny):
    latents, text, timestep = some_inputs()
    mask = torch.zeros(text.shape[:2], dtype=torch.bool)
    mask[0, 2:5] = mask[2, ::3] = True
    whole = tiny(latents, text, timestep)
    some = tiny(latents, text, timestep, want={"logits": mask})
    assert 0 < mask.sum() < mask.numel() and some.velocity is None
    close(some.logits, whole.logits[mask])
    close(some.text_hidden, whole.text_hidden[mask])


def test_the_last_block_updates_only_what_the_heads_read(tiny):
    seen, last = [], tiny.blocks[-1]
    last.image.fc1.register_forward_hook(lambda *_: seen.append("image"))
    last.text.fc1.register_forward_hook(lambda *_: seen.append("text"))
    whole = tiny(*some_inputs())
    assert sorted(seen) == ["image", "text"]
    seen.clear()
    assert torch.equal(tiny(*some_inputs(), want=("velocity",)).velocity, whole.velocity)
    assert seen == ["image"]
    seen.clear()
    assert torch.equal(tiny(*some_inputs(), want=("logits",)).logits, whole.logits)
    assert seen == ["text"]
    seen.clear()                            # the alignment after it reads both
    tiny(*some_inputs(), align_depth=len(tiny.blocks), want=("logits",))
    assert sorted(seen) == ["image", "text"]


def test_rows_of_a_batch_with_source_images(tiny):
    """The image head reads the noisy image alone: its tokens come before those of the sources."""
    references = [torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 6)]
    whole = tiny(*some_inputs(batch=4), references, align_depth=3)
    out = tiny(*some_inputs(batch=4), references, want={"velocity": slice(1, 4)})
    assert out.image_hidden.shape[:2] == (3, 9)
    close(out.velocity, whole.velocity[1:], atol=1e-5)
    close(out.image_hidden, whole.image_hidden[1:], atol=1e-5)


def test_alignment_after_the_last_block(tiny):
    """The mids need every row of the last block, for any choice of heads."""
    full = tiny(*some_inputs(), align_depth=3)
    out = tiny(*some_inputs(), align_depth=3, want={"logits": slice(0, 1)})
    close(out.image_mid, full.image_mid, atol=1e-6)
    close(out.text_mid, full.text_mid, atol=1e-6)
    close(out.logits, full.logits[:1], atol=1e-6)


def test_align_depth_counts_blocks_from_one(tiny):
    streams = []
    for block in tiny.blocks:
        block.register_forward_hook(lambda block, inputs, outputs: streams.append(outputs))
    for depth in (1, 3):
        streams.clear()
        out = tiny(*some_inputs(), references=[torch.randn(3, 4, 4, 4)], align_depth=depth)
        image, text = streams[depth - 1]
        close(out.image_mid, tiny.image_align(image[:, :9]), atol=1e-6)     # the noisy image's
        close(out.text_mid, tiny.text_align(text), atol=1e-6)


# ---------------------------------------------------------------- references

@torch.no_grad()
def test_references_of_another_size(tiny):
    latents, text, timestep = some_inputs()
    wide, small = torch.randn(3, 4, 2, 10), torch.randn(3, 4, 4, 4)
    plain, out = tiny(latents, text, timestep), tiny(latents, text, timestep, [wide, small])
    assert out.velocity.shape == latents.shape and out.image_hidden.shape == (3, 9, 32)
    assert not torch.allclose(out.velocity, plain.velocity, atol=1e-3)
    swapped = tiny(latents, text, timestep, [small, wide])      # tokens are a set: no order
    close(out.velocity, swapped.velocity, atol=1e-5)
    moved = tiny(latents, text, timestep, [wide, small.flip(3)])
    assert not torch.allclose(out.velocity, moved.velocity, atol=1e-4)


def with_numbers(model):
    """The same weights, with numbered references."""
    numbered = scramble(MMDiT(dataclasses.replace(OPTIONS, number_references=True)), seed=5)
    missing, superfluous = numbered.load_state_dict(model.state_dict(), strict=False)
    assert missing == ["number_scale"] and not superfluous
    return numbered


@torch.no_grad()
def test_numbers_distinguish_references(tiny):
    """With numbers the order of references matters to every output; without, they are a set."""
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
    """Swapping any two neighbours matters with numbers, and only with them."""
    numbered, inputs = with_numbers(tiny), some_inputs()
    references = [torch.randn(3, 4, 4, 2 + 2 * i) for i in range(count)]
    plain = tiny(*inputs, references).velocity
    velocity = numbered(*inputs, references).velocity
    assert velocity.shape == inputs[0].shape and velocity.isfinite().all()
    assert torch.equal(velocity, plain) == (count == 0)         # no reference, no number
    for i in range(count - 1):
        order = [*references[:i], references[i + 1], references[i], *references[i + 2:]]
        assert (numbered(*inputs, order).velocity - velocity).abs().max() > 1e-4
        close(tiny(*inputs, order).velocity, plain, atol=1e-5)
    numbered.number_scale.zero_()
    close(numbered(*inputs, references).velocity, plain, atol=1e-6)


@torch.no_grad()
def test_a_number_is_added_to_the_tokens_of_its_reference(tiny):
    """Reference k has the same number however many follow; the noisy image has none."""
    numbered, inputs, streams = with_numbers(tiny), some_inputs(), []
    numbered.blocks[0].register_forward_pre_hook(lambda block, args: streams.append(args[0]))
    references = [torch.randn(3, 4, 4, 4) for _ in range(3)]
    for count in (0, 1, 3):
        numbered(*inputs, references[:count])
    patches = 4
    codes = model_file.timestep_embedding(torch.arange(4), 32, max_period=100)      # (4, D)
    codes = codes * numbered.number_scale                                           # (4, D)
    for stream, count in zip(streams, (0, 1, 3)):
        expected = [numbered._embed_image(inputs[0])]
        expected += [numbered._embed_image(x) + codes[i]
                     for i, x in enumerate(references[:count], start=1)]
        assert stream.shape == (3, 9 + count * patches, 32)
        close(stream, torch.cat(expected, dim=1), atol=1e-5)


@torch.no_grad()
def test_numbers_are_saved_and_loaded(tmp_path, tiny):
    numbered, inputs, file = with_numbers(tiny), some_inputs(), tmp_path / "own.safetensors"
    references = [torch.randn(3, 4, 4, 4) for _ in range(2)]
    save(file, numbered.state_dict(), numbered.config)
    again = MMDiT.from_pretrained(file)
    assert again.config == numbered.config and again.config.number_references
    weights = numbered.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in again.state_dict().items())
    # not exact: kernels depend on the alignment of the memory
    velocity = again(*inputs, references).velocity
    close(velocity, numbered(*inputs, references).velocity, atol=1e-5)
    with pytest.raises(ValueError, match="superfluous: number_scale"):
        MMDiT.from_pretrained(file, number_references=False)
    half, (latents, text, timestep) = MMDiT.from_pretrained(file, dtype=torch.bfloat16), inputs
    rounded = half(latents.bfloat16(), text.bfloat16(), timestep,
                   [x.bfloat16() for x in references]).velocity
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - velocity).norm() < 0.05 * rounded.float().norm()


def test_numbers_learn_from_references_only(tiny):
    numbered, inputs = with_numbers(tiny), some_inputs()
    numbered(*inputs).velocity.square().mean().backward()
    assert numbered.number_scale.grad is None
    numbered(*inputs, [torch.randn(3, 4, 4, 4)]).velocity.square().mean().backward()
    assert numbered.number_scale.grad.abs().max() > 1e-6


@torch.no_grad()
def test_positions_are_the_centre_of_the_table(tiny):
    table = tiny.pos_embed.view(12, 12, 32)
    for height, width, rows, columns in (
            (4, 12, slice(5, 7), slice(3, 9)), (6, 10, slice(4, 7), slice(3, 8))):
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
    row = slice(1, 2)
    alone = tiny(latents[row], text[row], timestep[row], [reference[row]], align_depth=2)
    for a, b, c in zip(whole, changed, alone):
        close(b[1], a[1], atol=1e-5)
        close(c[0], a[1], atol=1e-5)
        assert (b[0] - a[0]).abs().max() > 1e-3


# ---------------------------------------------------------------- two ways to the same numbers

def gradients(model, inputs):
    model.zero_grad()
    out = model(*inputs, align_depth=2)
    sum(x.square().mean() for x in out).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()
            if parameter.grad is not None}


def test_gradient_checkpointing(tiny):
    inputs, calls = some_inputs(), []
    tiny.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    plain = gradients(tiny, inputs)
    names = {name for name, _ in tiny.named_parameters()}
    assert len(calls) == 1 and set(plain) == names - {"null_image"}
    tiny.gradient_checkpointing = True
    saved = gradients(tiny, inputs)
    assert len(calls) == 3                                      # once more in the backward pass
    for name in plain:
        close(saved[name], plain[name], atol=1e-6)
    with torch.no_grad():
        tiny(*inputs)
    assert len(calls) == 4


def test_attention_written_out_equals_the_fused_kernel(tiny, monkeypatch):
    fused, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(model_file.F, "scaled_dot_product_attention",
                        lambda *a, **k: fused.append(1) or real(*a, **k))
    scales = torch.tensor([3.0, 3, 1]).view(3, 1, 1, 1, 1)
    q, k, v = torch.randn(3, 2, 2, 13, 16) * scales
    written_out = attention(q, k, v)
    out = tiny(*some_inputs())
    assert not fused
    with torch.no_grad():
        close(written_out, attention(q, k, v), atol=1e-5)
        for a, b in zip(out, tiny(*some_inputs())):
            assert a is b is None or (a - b).abs().max() < 1e-5
    assert len(fused) == 1 + 3


@pytest.mark.parametrize("tokens", [20, 300])
def test_attention_and_its_gradient_are_those_of_the_formula(tokens):
    """Short sequences are written out, long ones use the fused kernel."""
    q, k, v = (torch.randn(2, 3, tokens, 8, requires_grad=True) for _ in range(3))
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) / math.sqrt(8)
    expected = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v.double())
    attended, weight = attention(q, k, v), torch.randn(2, 3, tokens, 8)
    close(attended.double(), expected, atol=1e-5)
    actual_gradients = torch.autograd.grad((attended * weight).sum(), (q, k, v))
    expected_gradients = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, b in zip(actual_gradients, expected_gradients):
        close(a, b, atol=1e-4)


# ---------------------------------------------------------------- bad input

LATENTS, TEXT, TIMESTEP = some_inputs()


@pytest.mark.parametrize("changes, words", [
    ({"text": TEXT[0]}, "text has shape (7, 24), expected (B, L, 24)"),
    ({"text": torch.zeros(3, 7, 25)}, "text has shape (3, 7, 25), expected (B, L, 24)"),
    ({"text": torch.zeros(3, 8, 24)}, "text has 8 tokens, this model has positions for 7"),
    ({"latents": LATENTS[0]}, "latents has shape (4, 6, 6), expected (3, 4, H, W)"),
    ({"latents": torch.zeros(3, 16, 6, 6)},
     "latents has shape (3, 16, 6, 6), expected (3, 4, H, W)"),
    ({"latents": LATENTS[:2]}, "latents has shape (2, 4, 6, 6), expected (3, 4, H, W)"),
    ({"latents": torch.zeros(3, 4, 6, 5)}, "latents is 6 x 5, expected multiples of 2 up to 24"),
    ({"latents": torch.zeros(3, 4, 26, 2)}, "latents is 26 x 2, expected multiples of 2 up to 24"),
    ({"references": [LATENTS, LATENTS[:1]]},
     "references[1] has shape (1, 4, 6, 6), expected (3, 4, H, W)"),
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
        "transformer_blocks.1.attn.to_k.bias": None,
        "text_proj_out.bias": None,
        "transformer_blocks.0.attn.norm_q.weight": torch.zeros(16),
        "proj_out.bias": torch.zeros(64),
        "image_proj_out.bias": torch.zeros(60),
        "transformer_blocks.2.attn.to_q.weight": torch.zeros(32, 33)})
    with pytest.raises(ValueError) as error:
        MMDiT.from_pretrained(folder)
    for words in (
            str(folder),
            "missing: transformer_blocks.1.attn.to_k.bias (needed for blocks.1.image.qkv.bias)",
            "missing: text_proj_out.bias",
            "superfluous: transformer_blocks.0.attn.norm_q.weight (16,)",
            "superfluous: proj_out.bias (64,)",
            "wrong shape: image_proj_out.bias (60,), expected (64,)",
            "wrong shape: transformer_blocks.2.attn.to_q.weight (32, 33)"):
        assert words in str(error.value)


def test_missing_tensors_of_sd3(tmp_path):
    weights = golden("sd3_mmdit_single_file")[0]
    del weights[SINGLE + "y_embedder.mlp.2.weight"]
    del weights[SINGLE + "joint_blocks.2.context_block.adaLN_modulation.1.bias"]
    save_file(weights, tmp_path / "sd3.safetensors")
    with pytest.raises(ValueError) as error:
        MMDiT.from_pretrained(tmp_path / "sd3.safetensors", num_heads=2)
    for words in ("missing: y_embedder.mlp.2.weight (needed for time_embed.2.bias)",
                  "missing: joint_blocks.2.context_block.adaLN_modulation.1.bias"):
        assert words in str(error.value)


def test_missing_tensors_of_the_own_layout(tmp_path, tiny):
    state = tiny.state_dict() | {"blocks.0.extra": torch.zeros(1)}
    del state["blocks.1.text.fc1.bias"], state["null_image"]
    save(tmp_path / "own.safetensors", state, tiny.config)
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


@pytest.mark.parametrize("name, words", [
    ("shared.x.encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder, expected"),
    ("encoder.down_blocks.0.resnets.0.conv1.weight", "an autoencoder, expected an MM-DiT"),
    ("double_blocks.0.img_attn.qkv.weight", "a Flux transformer"),
    ("single_transformer_blocks.0.attn.to_q.weight", "a Flux transformer"),
    ("input_blocks.0.0.weight", "a model with a U-Net"),
    ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA"),
])
def test_another_model_is_named(tmp_path, name, words):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: this is {words}"):
        MMDiT.from_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize("layout, name", [
    ("single_file", SINGLE + "joint_blocks.0.x_block.attn.ln_q.weight"),
    ("single_file", SINGLE + "joint_blocks.0.x_block.attn2.qkv.weight"),
    ("diffusers", "transformer_blocks.0.attn2.to_q.weight"),
    ("diffusers", "transformer_blocks.0.attn.norm_added_q.weight"),
])
def test_sd35_is_named(tmp_path, layout, name):
    save_file(golden(f"sd3_mmdit_{layout}")[0] | {name: torch.ones(16)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="this is .*Stable Diffusion 3.5") as error:
        MMDiT.from_pretrained(tmp_path / "x.safetensors", num_heads=2)
    assert "\n" not in str(error.value)


def test_a_variant_for_inpainting_is_named(tmp_path):
    weights = golden("sd3_mmdit_single_file")[0]
    weights[SINGLE + "x_embedder.proj.weight"] = torch.zeros(32, 33, 2, 2)
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="inpainting or editing, which takes 33 .* and gives 16"):
        MMDiT.from_pretrained(tmp_path / "x.safetensors", num_heads=2)


def test_a_guessed_number_of_heads_is_printed(tmp_path, capsys):
    file = tmp_path / "sd3.safetensors"
    save_file(golden("sd3_mmdit_single_file")[0], file)
    assert MMDiT.from_pretrained(file, device="meta").config.num_heads == 1
    line = capsys.readouterr().err
    assert line.startswith(f"note: {file}: a guess") and "num_heads 1" in line
    write_sparse(tmp_path / "y.safetensors", manifest("sd3_medium_single_file")["tensors"])
    MMDiT.from_pretrained(tmp_path / "y.safetensors", device="meta")
    MMDiT.from_pretrained(file, device="meta", num_heads=2)
    assert not capsys.readouterr().err                              # SD3 has a head for each block


def test_positions_are_computed_on_the_cpu():
    """Apple's GPUs have no float64; the meta device stands in for them."""
    expected = sincos_positions(12, 32, 64 / 12)
    with torch.device("meta"):
        table = sincos_positions(12, 32, 64 / 12)
    assert table.device.type == "cpu" and torch.equal(table, expected)


def test_a_model_needs_the_width_of_t5():
    """text_dim 0 is for presets: a run puts the width of its T5 there."""
    config = MMDiTConfig(**SIZES | {"text_dim": 0})
    with pytest.raises(ValueError, match="text_dim 0"):
        MMDiT(config)
    with pytest.raises(ValueError, match="positive"):
        MMDiTConfig(**SIZES | {"text_dim": -1})
