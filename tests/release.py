"""Write a release in miniature: every file that a user of the real weights has, in its layout.

    python tests/release.py FOLDER       50 MB in a second

    sd3_medium.safetensors          SD3's single file, float16: MM-DiT and autoencoder
    sd3_medium_incl_clips_t5xxlfp8.safetensors      the same with CLIP towers, and T5 in fp8
    sd3/                            of its diffusers folder: vae, text_encoder_3, tokenizer_3
    UniAlignment/                   the released pipeline's folder, bfloat16
    mask_token_emb.00-of-01.pth     the trained mask vector of its T5
    Qwen2.5-VL-7B-Instruct/         the teacher
    pictures/, *.jsonl              a few pictures; training data and edits in every form

Names and types of tensors, files and fields are the released ones (tests/manifests/), widths and
depths are not: random weights, drawn with fixed seeds. Nothing here uses the project's loaders.
"""
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import TESTS, manifest, write_shards
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

# Released width -> narrow width, for each kind of model. Widths that differ stay different, so that
# a tensor in the wrong place does not fit.
MMDIT = {1536: 128, 3072: 2 * 128, 4608: 3 * 128, 6144: 4 * 128, 9216: 6 * 128,
         4096: 32, 2048: 80, 3584: 48, 192 ** 2: 48 ** 2}
VAE = {128: 32, 256: 64, 512: 96}
T5 = {4096: 32, 10240: 80, 64: 2}
QWEN = {1280: 64, 3840: 3 * 64, 3420: 96, 5120: 4 * 64, 3584: 48}

# What train.py needs to be told: the widths of the alignment heads, and a depth that exists.
TRAIN_OPTIONS = ["--model.align_dims", f"{MMDIT[2048]},{QWEN[3584]}", "--align_depth", "2"]


# ---------------------------------------------------------------- tensors

def shorten(shapes: dict[str, list[int]], stack: str, depth: int) -> dict[str, list[int]]:
    """Keep the first depth - 1 blocks of a stack and its last, which may differ from the others."""
    block = re.compile(re.escape(stack) + r"\.(\d+)\.")
    matches = {name: block.match(name) for name in shapes}
    last = max(int(match[1]) for match in matches.values() if match)
    new_number = {number: number for number in range(depth - 1)} | {last: depth - 1}
    result = {}
    for name, match in matches.items():
        if match is None:
            result[name] = shapes[name]
        elif (number := new_number.get(int(match[1]))) is not None:
            result[f"{stack}.{number}.{name[match.end():]}"] = shapes[name]
    return result


def random_tensors(shapes: dict[str, list[int]], widths: dict[int, int], dtype: torch.dtype,
                   seed: int) -> dict[str, Tensor]:
    """Draw narrow tensors: matrices keep the scale of their input, norms are near 1."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        shape = [widths.get(size, size) for size in shape]
        tensor = torch.randn(shape, generator=generator)
        tensor *= math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.02
        if len(shape) == 1 and name.endswith("weight"):         # of a norm
            tensor += 1
        tensors[name] = tensor.to(dtype)
    return tensors


def mmdit_tensors(name: str, stack: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """The MM-DiT of a manifest, with three blocks of two heads."""
    shapes = {tensor: shape for tensor, shape in manifest(name)["tensors"].items()
              if not tensor.startswith("first_stage_model.")}
    return random_tensors(shorten(shapes, stack, 3), MMDIT, dtype, seed)


# ---------------------------------------------------------------- files of weights

def write_model(folder: Path, tensors: dict[str, Tensor], config: dict,
                stem: str = "diffusion_pytorch_model") -> None:
    """Write one file of weights with its config.json."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_sharded(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """Write two shards with their index, and a config.json."""
    write_shards(folder, tensors, lambda path, part: save_file(part, path, {"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_tokenizer(folder: Path) -> None:
    folder.mkdir()
    shutil.copyfile(TESTS / "golden" / "t5_spiece.model", folder / "spiece.model")
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def t5_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    """T5 with two blocks of two heads."""
    shapes = shorten(manifest("t5_v1_1_xxl_encoder")["tensors"], "encoder.block", 2)
    return random_tensors(shapes, T5, dtype, seed=2)


def write_parts(folder: Path, dtype: torch.dtype, text_encoder: str, tokenizer: str) -> None:
    """Write autoencoder, T5 and its tokenizer into a pipeline's folder."""
    vae = manifest("sd3_medium_vae_diffusers")
    channels = [VAE[width] for width in vae["config"]["block_out_channels"]]
    write_model(folder / "vae", random_tensors(vae["tensors"], VAE, dtype, seed=1),
                {"_class_name": "AutoencoderKL"} | vae["config"] | {"block_out_channels": channels})
    narrow = {"d_model": T5[4096], "d_kv": T5[4096] // T5[64], "d_ff": T5[10240],
              "num_heads": T5[64], "num_layers": 2}
    config = {"architectures": ["T5EncoderModel"], "model_type": "t5"}
    config |= manifest("t5_v1_1_xxl_encoder")["config"] | narrow
    write_sharded(folder / text_encoder, t5_tensors(dtype), config)
    write_tokenizer(folder / tokenizer)


def write_sd3(folder: Path) -> None:
    """Write SD3's single files, and the parts of its diffusers folder that training needs."""
    name, stack = "sd3_medium_single_file", "model.diffusion_model.joint_blocks"
    shapes = {tensor: shape for tensor, shape in manifest(name)["tensors"].items()
              if tensor.startswith("first_stage_model.")}
    tensors = mmdit_tensors(name, stack, torch.float16, seed=3)
    tensors |= random_tensors(shapes, VAE, torch.float16, seed=4)
    save_file(tensors, folder / "sd3_medium.safetensors", {"format": "pt"})
    tensors |= {f"text_encoders.t5xxl.transformer.{tensor}": value
                for tensor, value in t5_tensors(torch.float8_e4m3fn).items()}
    projection = "transformer.text_projection.weight"           # one tensor stands for a tower
    tensors |= {f"text_encoders.{tower}.{projection}": torch.zeros(8, 8, dtype=torch.float16)
                for tower in ("clip_l", "clip_g")}
    save_file(tensors, folder / "sd3_medium_incl_clips_t5xxlfp8.safetensors", {"format": "pt"})
    write_parts(folder / "sd3", torch.float16, "text_encoder_3", "tokenizer_3")


def write_unialignment(folder: Path) -> None:
    """Write the folder of UniAlignment's pipeline, and its mask vector beside it."""
    pipeline = folder / "UniAlignment"
    name, stack = "unialignment_transformer", "transformer_blocks"
    narrow = {"num_layers": 3, "num_attention_heads": 2, "joint_attention_dim": MMDIT[4096],
              "caption_projection_dim": MMDIT[1536], "pooled_projection_dim": MMDIT[2048],
              "pos_embed_max_size": 48, "sample_size": 64}
    write_model(pipeline / "transformer", mmdit_tensors(name, stack, torch.bfloat16, seed=5),
                {"_class_name": "SD3JointModelFlexible"} | manifest(name)["config"] | narrow)
    write_parts(pipeline, torch.bfloat16, "text_encoder", "tokenizer")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
                 "shift": 3.0}
    (pipeline / "scheduler").mkdir()
    (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    vector = random_tensors({"mask": [MMDIT[4096]]}, {}, torch.bfloat16, seed=6)["mask"]
    torch.save(vector, folder / "mask_token_emb.00-of-01.pth")


def write_qwen(folder: Path) -> None:
    """Write the teacher: the vision tower, the input embedding, the tokenizer."""
    qwen = manifest("qwen25vl_7b_vision")
    shapes = shorten(qwen["tensors"], "visual.blocks", 3)
    bpe = TESTS / "golden" / "qwen_bpe"
    tokens = 64 + max(json.loads((bpe / "vocab.json").read_text()).values())
    shapes["model.embed_tokens.weight"] = [tokens, 3584]
    narrow = {"depth": 3, "hidden_size": QWEN[1280], "intermediate_size": QWEN[3420],
              "num_heads": 4, "fullatt_block_indexes": [1], "out_hidden_size": QWEN[3584]}
    config = {"model_type": "qwen2_5_vl", "hidden_size": QWEN[3584],
              "vision_config": qwen["config"] | narrow}
    teacher = folder / "Qwen2.5-VL-7B-Instruct"
    write_sharded(teacher, random_tensors(shapes, QWEN, torch.bfloat16, seed=7), config)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(bpe / name, teacher / name)


# ---------------------------------------------------------------- pictures and data

# Name of a picture -> (width, height) as it is stored.
PICTURES = {"square.png": (64, 64), "wide.png": (128, 64), "tall.jpg": (60, 90),
            "turned.jpg": (120, 80)}
_ORIENTATION, _ROTATED = 0x0112, 6                              # the EXIF tag and a value of it


def write_pictures(folder: Path) -> None:
    """Write `PICTURES`: two colours, one left and one right; turned.jpg is upright by its EXIF."""
    folder.mkdir()
    for number, (name, (width, height)) in enumerate(PICTURES.items()):
        pixels = np.full((height, width, 3), (40 * number, 200, 90), np.uint8)      # (H, W, 3)
        pixels[:, width // 2:] = (220, 60 * number, 30)
        exif = Image.Exif()
        if name.startswith("turned"):
            exif[_ORIENTATION] = _ROTATED
        Image.fromarray(pixels).save(folder / name, exif=exif)


def turns(*texts: str) -> list[dict[str, str]]:
    """A conversation: human and gpt take turns."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


SQUARE, WIDE, TALL, TURNED = (f"pictures/{name}" for name in PICTURES)
CAPTIONS = {SQUARE: "a green square and a red square", WIDE: "a wide flag of green and red",
            TALL: "two tall stripes, one of them red", TURNED: "a blue field above an orange one"}

PAIRS = [{"image": [image], "conversations": turns(caption, "<image>")}
         for image, caption in CAPTIONS.items()]
TRAINED_EDITS = [
    {"image": [SQUARE, WIDE], "instruction": "make it wider", "conversations": [CAPTIONS[WIDE]]},
    {"image": [WIDE, SQUARE], "instruction": "cut off both ends",
     "conversations": [CAPTIONS[SQUARE]]},
    {"task": "depth", "image": [TALL, TURNED], "conversations": [CAPTIONS[TURNED]],
     "instruction": "Provide a detailed depth map of the entire scene."}]
COMPOSITIONS = [
    {"original_images": [SQUARE, TALL], "generated_images": [WIDE],
     "edit_prompt": "hang the stripes beside the square", "caption": CAPTIONS[WIDE]}]
QUESTIONS = [
    {"image": SQUARE, "conversations": turns(
        "<image>\nWhich colour is on the right?", "red", "And on the left?", "green")},
    {"image": [TALL], "conversations": turns("<image>\nIs there a cat?", "no")}]
# of sample.py --edits
EDITS = [
    {"image": SQUARE, "instruction": "make it wider"},
    {"image": TURNED, "instruction": "turn the sky green", "seed": 3, "name": "sky.png"}]

# README's commands train on these files; edits.jsonl has its tasks, fine.jsonl one of each.
DATA = {"pairs": PAIRS, "edits": TRAINED_EDITS, "compositions": COMPOSITIONS,
        "questions": QUESTIONS, "fine": PAIRS[:2] + TRAINED_EDITS[:2] + COMPOSITIONS,
        "edits_to_sample": EDITS}


def write_data(folder: Path) -> None:
    """Write the pictures, and the JSON lines of `DATA` beside them."""
    write_pictures(folder / "pictures")
    for name, records in DATA.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)


def write_release(folder: Path) -> None:
    """Write all of it into a folder, which may be new."""
    folder.mkdir(parents=True, exist_ok=True)
    write_sd3(folder)
    write_unialignment(folder)
    write_qwen(folder)
    write_data(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_release(Path(sys.argv[1]))
