"""vae.py against the public reference implementation.

In every layout, at full size without weights, and on bad input.
"""
import json
import re

import numpy as np
import pytest
import torch
from conftest import golden, manifest, parameter_count, write_sparse
from PIL import Image
from safetensors.torch import save_file

from checkpoint import save
from vae import VAE, ResBlock, VAEConfig, reconstruct

TINY = VAEConfig(
    block_channels=(16, 16), layers_per_block=1, norm_groups=8, stem=4, mid_attention=False)


def diffusers_folder(path, **changes):
    """A repository like the release: reference weights below vae/, `changes` in config.json."""
    weights, _, _, config = golden("vae_diffusers")
    (path / "vae").mkdir()
    save_file(weights, path / "vae" / "diffusion_pytorch_model.safetensors")
    (path / "vae" / "config.json").write_text(json.dumps(config | changes))
    return path


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def agrees(vae, name):
    _, inputs, outputs, _ = golden(name)
    mean, logvar = vae.moments(inputs["image"])
    close(mean, outputs["mean"])
    close(logvar, outputs["logvar"])
    close(vae.encode(inputs["image"]), (outputs["mean"] - 0.0609) * 1.5305)
    close(vae.decode(inputs["normalized_latents"]), outputs["decoded"])


# ---------------------------------------------------------------- agreement with the reference

def test_diffusers_repository_and_folder(tmp_path):
    root = diffusers_folder(tmp_path)
    for path in (root, root / "vae"):
        vae = VAE.from_pretrained(path)
        agrees(vae, "vae_diffusers")
        assert vae.config == VAEConfig(block_channels=(8, 16, 16, 16), norm_groups=4)
        assert vae.downscale == 8


def test_diffusers_file_without_configuration(tmp_path):
    file = diffusers_folder(tmp_path) / "vae" / "diffusion_pytorch_model.safetensors"
    agrees(VAE.from_pretrained(file, norm_groups=4), "vae_diffusers")


@pytest.mark.parametrize("foreign", [
    {},
    {"model.diffusion_model.x": torch.zeros(2), "text_encoders.clip_l.y": torch.zeros(3)},
])
def test_single_file(tmp_path, foreign):
    save_file(golden("vae_single_file")[0] | foreign, tmp_path / "sd3.safetensors")
    agrees(VAE.from_pretrained(tmp_path / "sd3.safetensors", norm_groups=4), "vae_single_file")


def test_own_layout(tmp_path):
    vae = VAE.from_pretrained(diffusers_folder(tmp_path))
    save(tmp_path / "own.safetensors", vae.state_dict(), vae.config)
    again = VAE.from_pretrained(tmp_path / "own.safetensors")
    assert again.config == vae.config
    agrees(again, "vae_diffusers")


def test_tiny_configuration_is_read_back_from_shapes_alone(tmp_path):
    vae = VAE(TINY)
    save(tmp_path / "own.safetensors", vae.state_dict())
    again = VAE.from_pretrained(tmp_path / "own.safetensors", norm_groups=8)
    assert again.config == TINY
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(again.encode(images), vae.encode(images))


def test_scale_and_shift_of_config_json_are_used(tmp_path):
    _, inputs, outputs, _ = golden("vae_diffusers")
    vae = VAE.from_pretrained(diffusers_folder(tmp_path, scaling_factor=2.0, shift_factor=1.0))
    close(vae.encode(inputs["image"]), (outputs["mean"] - 1) * 2)


# ---------------------------------------------------------------- full size, no weights

def test_full_size_diffusers_manifest(tmp_path):
    released = manifest("sd3_medium_vae_diffusers")
    write_sparse(tmp_path / "vae" / "x.safetensors", released["tensors"])
    (tmp_path / "vae" / "config.json").write_text(json.dumps(released["config"]))
    vae = VAE.from_pretrained(tmp_path, device="meta")
    assert parameter_count(vae) == released["parameters"] and vae.config == VAEConfig()


def test_full_size_single_file_manifest(tmp_path):
    write_sparse(tmp_path / "sd3_medium.safetensors", manifest("sd3_medium_single_file")["tensors"])
    vae = VAE.from_pretrained(tmp_path / "sd3_medium.safetensors", device="meta")
    assert parameter_count(vae) == manifest("sd3_medium_vae_diffusers")["parameters"]
    assert vae.config == VAEConfig()


# ---------------------------------------------------------------- behaviour

def test_stem_folds_pixels_into_channels_and_back():
    vae = VAE(TINY)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = vae.encode(images)
    assert vae.downscale == 8 and latents.shape == (2, 16, 4, 6)
    assert vae.decode(latents).shape == images.shape
    folded = vae.encoder.stem(images)
    assert folded.shape == (2, 48, 8, 12) and torch.equal(vae.decoder.unstem(folded), images)


def test_sampling_follows_the_posterior():
    vae = VAE(TINY)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    images = image.expand(400, -1, -1, -1)
    with torch.no_grad():
        # Log variances near 0 would pass with any factor on them.
        vae.encoder.conv_out.bias[16:] += 2
        mean, logvar = vae.moments(image)
        draws = vae.encode(images, sample=True, generator=torch.Generator().manual_seed(0))
        again = vae.encode(images, sample=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    z = draws / vae.config.scale + vae.config.shift
    normal = (z - mean) / (0.5 * logvar).exp()
    assert normal.mean().abs() < 0.02 and (normal.std() - 1).abs() < 0.02


def test_logvar_is_clamped():
    vae = VAE(TINY)
    with torch.no_grad():
        vae.encoder.conv_out.bias[16:24] = 1000
        vae.encoder.conv_out.bias[24:] = -1000
    logvar = vae.moments(torch.zeros(1, 3, 16, 16))[1]
    assert (logvar[:, :8] == 20).all() and (logvar[:, 8:] == -30).all()


def test_gradients_reach_every_parameter_and_bfloat16_runs():
    vae = VAE(VAEConfig(block_channels=(8, 16), layers_per_block=1, norm_groups=4))
    for block in vae.modules():
        # A fresh block is its shortcut alone: its first half gets no gradient.
        if isinstance(block, ResBlock):
            torch.nn.init.normal_(block.conv2.weight, std=0.1)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    vae.decode(vae.encode(images, sample=True)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.decoder.parameters())
    assert all(p.grad is not None for p in vae.encoder.parameters())
    assert vae.bfloat16().decode(vae.encode(images)).dtype == torch.bfloat16


@pytest.mark.parametrize("images, words", [
    (torch.zeros(1, 3, 36, 32), "multiples of 8, got (36, 32)"),
    (torch.zeros(1, 3, 0, 32), "multiples of 8, got (0, 32)"),
    (torch.zeros(1, 4, 32, 32), "(B, 3, H, W), got torch.float32 (1, 4, 32, 32)"),
    (torch.zeros(3, 32, 32), "(B, 3, H, W), got torch.float32 (3, 32, 32)"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
     "floating-point tensor (B, 3, H, W), got torch.uint8"),
])
def test_bad_images(images, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        VAE(TINY).moments(images)


@pytest.mark.parametrize("latents", [
    torch.zeros(1, 4, 2, 2),
    torch.zeros(16, 2, 2),
    torch.zeros(1, 16, 2, 2, dtype=torch.int64),
    torch.zeros(1, 16, 0, 2),
])
def test_bad_latents(latents):
    with pytest.raises(ValueError, match="latents"):
        VAE(TINY).decode(latents)


def test_reconstruct_prints_the_psnr(tmp_path, capsys):
    vae = VAE(TINY)
    with torch.no_grad():
        vae.decoder.conv_out.weight.zero_()
        vae.decoder.conv_out.bias.fill_(1)                       # every result is white
    save(tmp_path / "vae.safetensors", vae.state_dict(), vae.config)
    grey = np.full((19, 33, 3), 204, np.uint8)                   # 0.6 in [-1, 1]; white is 1
    Image.fromarray(grey).save(tmp_path / "grey.png")
    reconstruct(tmp_path / "vae.safetensors", tmp_path / "grey.png", tmp_path / "out.png")
    # 10 log10(2^2 / 0.4^2) dB
    assert capsys.readouterr().out == "32 x 16 pixels, PSNR 13.98 dB\n"
    assert np.array_equal(np.array(Image.open(tmp_path / "out.png")), np.full((16, 32, 3), 255))


# ---------------------------------------------------------------- large batches, large pictures

class Calls:
    """Counts the pictures of each call of a module."""
    def __init__(self, module):
        self.sizes = []
        module.register_forward_pre_hook(lambda module, inputs: self.sizes.append(len(inputs[0])))


@torch.no_grad()
def test_a_batch_in_chunks_is_the_whole_batch(tmp_path):
    vae = VAE.from_pretrained(diffusers_folder(tmp_path))
    images = torch.rand(5, 3, 32, 48) * 2 - 1
    latents = vae.encode(images)
    whole = vae.decode(latents)
    decoded, encoded = Calls(vae.decoder), Calls(vae.encoder)
    # six maps of 16 (decoder) and 8 channels (encoder) of 32 x 48 float32
    close(vae.decode(latents, memory=2 * 6 * 16 * 32 * 48 * 4), whole)
    close(vae.encode(images, memory=2 * 6 * 8 * 32 * 48 * 4), latents)
    assert decoded.sizes == encoded.sizes == [2, 2, 1]
    vae.decode(latents)
    vae.decode(latents, memory=float("inf"))
    assert decoded.sizes[3:] == [5, 5]
    with torch.enable_grad():               # the activations are kept, so chunks would save nothing
        assert vae.decode(latents, memory=1).requires_grad
    assert decoded.sizes[5:] == [5]


@torch.no_grad()
@pytest.mark.parametrize("strip", [8, 700, 3000])
@pytest.mark.parametrize("size", [(40, 24), (8, 8), (72, 16)])
def test_a_large_picture_in_strips_is_the_whole_picture(tmp_path, monkeypatch, strip, size):
    """Another picture at the top than at the bottom, so that each strip has other statistics."""
    monkeypatch.setattr("vae.STRIP", strip)
    torch.manual_seed(0)
    reference = VAE.from_pretrained(diffusers_folder(tmp_path))
    tiny = VAE(TINY)
    for block in tiny.modules():
        if isinstance(block, ResBlock):
            torch.nn.init.normal_(block.conv2.weight, std=0.1)
    for vae in (reference, tiny):
        images = torch.rand(2, 3, *size) * 2 - 1
        images[:, :, :size[0] // 2] *= 0.1
        latents = vae.encode(images)
        encoded, decoded = vae.encode(images, memory=1), vae.decode(latents, memory=1)
        torch.testing.assert_close(encoded, latents, rtol=0, atol=5e-5)
        torch.testing.assert_close(decoded, vae.decode(latents), rtol=0, atol=5e-5)
        assert decoded.std() > 0.05


# ---------------------------------------------------------------- checkpoints that do not fit

def test_missing_superfluous_and_misshapen_tensors(tmp_path):
    weights, file = golden("vae_single_file")[0], tmp_path / "x.safetensors"
    prefix = "first_stage_model."
    del weights[prefix + "decoder.up.3.block.2.conv1.weight"]
    del weights[prefix + "encoder.mid.attn_1.k.bias"]
    weights[prefix + "quant_conv.weight"] = torch.zeros(32, 32, 1, 1)
    weights[prefix + "decoder.conv_out.bias"] = torch.zeros(4)
    save_file(weights, file)
    with pytest.raises(ValueError) as error:
        VAE.from_pretrained(file, norm_groups=4)
    for words in (str(file),
                  "missing: decoder.up.3.block.2.conv1.weight "
                  "(needed for decoder.levels.0.blocks.2.conv1.weight)",
                  "missing: encoder.mid.attn_1.k.bias (needed for encoder.mid.attention.qkv.bias)",
                  "superfluous: quant_conv.weight (32, 32, 1, 1)",
                  "wrong shape: decoder.conv_out.bias (4,), expected (3,)"):
        assert words in str(error.value)


@pytest.mark.parametrize("changes, words", [
    ({"layers_per_block": "two"}, "layers_per_block = 'two', expected int"),
    ({"block_out_channels": 8}, "block_channels = 8"),
    ({"norm_num_groups": 3}, "norm_groups = 3 does not divide"),
    ({"shift_factor": None}, "shift = None, expected float"),
    ({"block_out_channels": [8, 16, 16, 32]}, "wrong shape"),
])
def test_config_json_that_does_not_fit(tmp_path, changes, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        VAE.from_pretrained(diffusers_folder(tmp_path, **changes))
    assert str(tmp_path) in str(error.value)


def test_groups_that_the_shapes_do_not_show(tmp_path):
    save_file(golden("vae_single_file")[0], tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors.*norm_groups = 32 does not divide"):
        VAE.from_pretrained(tmp_path / "x.safetensors")


def test_a_file_of_something_else(tmp_path):
    save_file({"shared.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    words = "x.safetensors: not an SD3 autoencoder.*found shared.weight"
    with pytest.raises(ValueError, match=words):
        VAE.from_pretrained(tmp_path / "x.safetensors")


def test_unknown_override(tmp_path):
    with pytest.raises(ValueError, match="unknown field 'groups'"):
        VAE.from_pretrained(diffusers_folder(tmp_path), groups=4)


@pytest.mark.parametrize("name, words", [
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder, expected an autoenc"),
    ("joint_blocks.0.x_block.attn.qkv.weight", "an MM-DiT, expected an autoencoder"),
    ("double_blocks.0.img_attn.qkv.weight", "a Flux transformer"),
    ("encoder.layers.0.weight", "TAESD"),
])
def test_another_model_is_named(tmp_path, name, words):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: this is {'.*' + words}") as error:
        VAE.from_pretrained(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_four_latent_channels(tmp_path):
    weights = golden("vae_diffusers")[0]
    weights["encoder.conv_out.weight"] = torch.zeros(8, 16, 3, 3)
    weights["decoder.conv_in.weight"] = torch.zeros(16, 4, 3, 3)
    weights["quant_conv.weight"] = torch.zeros(8, 8, 1, 1)
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="Stable Diffusion 1, 2 or XL, with 4 latent channels"):
        VAE.from_pretrained(tmp_path / "x.safetensors", norm_groups=4)


# ---------------------------------------------------------------- constants

def test_guessed_constants_are_printed(tmp_path, capsys):
    file = tmp_path / "ae.safetensors"
    save_file(golden("vae_single_file")[0], file)
    vae = VAE.from_pretrained(file, norm_groups=4)
    assert (vae.config.scale, vae.config.shift) == (1.5305, 0.0609)
    line = capsys.readouterr().err
    assert line.startswith(f"note: {file}: a guess") and line.count("\n") == 1
    assert "scale 1.5305, shift 0.0609" in line and "norm_groups" not in line
    assert "Flux" in line and "scale=0.3611, shift=0.1159" in line
    VAE.from_pretrained(file, norm_groups=4)
    VAE.from_pretrained(file, norm_groups=4, scale=0.3611, shift=0.1159)
    assert not capsys.readouterr().err


def test_the_transformer_beside_shows_the_constants(tmp_path, capsys):
    for name, prefix, expected in (("joint_blocks", "first_stage_model.", (1.5305, 0.0609)),
                                   ("double_blocks", "vae.", (0.3611, 0.1159))):
        weights = {n.replace("first_stage_model.", prefix): x
                   for n, x in golden("vae_single_file")[0].items()}
        weights[f"model.diffusion_model.{name}.0.x"] = torch.zeros(1)
        save_file(weights, tmp_path / f"{name}.safetensors")
        config = VAE.from_pretrained(tmp_path / f"{name}.safetensors", norm_groups=4).config
        assert (config.scale, config.shift) == expected
    assert not capsys.readouterr().err


def test_constants_of_flux_and_of_diffusers_defaults(tmp_path, capsys):
    root = diffusers_folder(tmp_path, scaling_factor=0.3611, shift_factor=0.1159)
    for path in (root, root / "vae" / "diffusion_pytorch_model.safetensors"):
        config = VAE.from_pretrained(path).config
        assert (config.scale, config.shift, config.norm_groups) == (0.3611, 0.1159, 4)
    config = json.loads((root / "vae" / "config.json").read_text())
    del config["shift_factor"]                                   # diffusers: no shift
    (root / "vae" / "config.json").write_text(json.dumps(config))
    assert VAE.from_pretrained(root).config.shift == 0
    assert not capsys.readouterr().err
