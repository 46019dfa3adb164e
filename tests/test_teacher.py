"""teacher.py: Qwen2.5-VL's reference outputs, full-size tensor names, and errors for bad files."""
import json
import shutil
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint import Checkpoint
from teacher import (EMBEDDING, QwenTeacher, QwenTokenizer, QwenVision, QwenVisionConfig,
                     load_teacher, nearest_size, preprocess, word_pattern)

HERE = Path(__file__).parent
VISION = HERE / "golden" / "qwen25vl_vision.safetensors"
PREPROCESS = HERE / "golden" / "qwen25vl_preprocess.safetensors"
BPE = HERE / "golden" / "qwen_bpe"
MANIFEST = json.loads((HERE / "manifests" / "qwen25vl_7b_vision.json").read_text())
# sizes of the reference that its tensors' shapes do not determine
TINY = dict(num_heads=2, window_size=56, full_attention_blocks=(1, 3))


def weights():
    tensors = load_file(VISION)
    names = [name for name in tensors if name.startswith("weights/")]
    return {name.removeprefix("weights/"): tensors[name] for name in names}


def released_config():
    with safe_open(VISION, framework="pt") as file:
        vision = json.loads(file.metadata()["config"])
    vision["in_chans"] = vision.pop("in_channels")
    return {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "hidden_size": 40,
            "depth": 99, "vision_config": vision}


def shard(i):
    return f"model-{i:05d}-of-00005.safetensors"


def write_index(folder, weight_map):
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def released(tmp_path):
    """A small Qwen2.5-VL as it is released, without the two shards of five that nothing uses."""
    visual = weights()
    names = sorted(visual)
    embedding = torch.randn(2300, 40, generator=torch.Generator().manual_seed(0)).half()
    shards = {1: {n: visual[n] for n in names[:20]},
              4: {n: visual[n] for n in names[20:]},
              5: {EMBEDDING: embedding}}
    weight_map = {"model.layers.0.mlp.up_proj.weight": shard(2), "lm_head.weight": shard(3)}
    for i, tensors in shards.items():
        save_file(tensors, tmp_path / shard(i))
        weight_map |= dict.fromkeys(tensors, shard(i))
    write_index(tmp_path, weight_map)
    (tmp_path / "config.json").write_text(json.dumps(released_config()))
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(BPE / file, tmp_path)
    return tmp_path


@pytest.fixture
def bare(tmp_path):
    """The vision encoder alone: one file, no configuration."""
    save_file(weights(), tmp_path / "vision.safetensors")
    return tmp_path / "vision.safetensors"


def random_pictures(*sizes):
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


# ---------------------------------------------------------------- vision encoder

def test_vision_equals_reference(released, bare):
    reference = load_file(VISION)
    for vision in (QwenVision.from_pretrained(released), QwenVision.from_pretrained(bare, **TINY)):
        tokens = vision(reference["in/patches"], reference["in/grid_thw"])
        assert tokens.shape == reference["out/features"].shape
        assert (tokens - reference["out/features"]).abs().max() < 2e-5
        assert not tokens.requires_grad and not vision.training


def test_vision_in_bfloat16_stays_close(released):
    reference = load_file(VISION)
    vision = QwenVision.from_pretrained(released, dtype=torch.bfloat16)
    tokens = vision(reference["in/patches"], reference["in/grid_thw"])
    assert tokens.dtype == torch.bfloat16
    assert torch.cosine_similarity(tokens.float(), reference["out/features"]).min() > 0.99


def test_pictures_in_one_call_equal_each_alone(bare):
    vision = QwenVision.from_pretrained(bare, **TINY)
    pictures = random_pictures((56, 84), (140, 112), (84, 196))
    alone = [vision(*preprocess([picture])) for picture in pictures]
    assert [len(tokens) for tokens in alone] == [6, 20, 21]
    torch.testing.assert_close(vision(*preprocess(pictures)), torch.cat(alone), atol=2e-6, rtol=0)


def test_frames_do_not_see_each_other(bare):
    vision = QwenVision.from_pretrained(bare, **TINY)
    patches, grid = preprocess(random_pictures((84, 112), (84, 112)))
    video = vision(patches, torch.tensor([[2, 6, 8]]))
    torch.testing.assert_close(video, vision(patches, grid), atol=2e-6, rtol=0)


def test_windows_bound_the_attention(bare):
    windowed = QwenVision.from_pretrained(bare, **TINY | dict(full_attention_blocks=()))
    patches, grid = preprocess(random_pictures((140, 196)))      # 5 x 7 tokens, windows of 2 x 2
    changed = patches.clone()
    changed[4 * (2 * 7 + 3)] += 1                                # in the token of row 2, column 3
    difference = (windowed(changed, grid) - windowed(patches, grid)).abs().amax(1)
    moved = difference.view(5, 7) > 1e-5
    expected = torch.zeros(5, 7, dtype=torch.bool)
    expected[2:4, 2:4] = True
    assert torch.equal(moved, expected)
    full = QwenVision.from_pretrained(bare, **TINY)
    assert ((full(changed, grid) - full(patches, grid)).abs().amax(1) > 0).all()


@pytest.mark.parametrize("patches, grid, words", [
    ((48, 1175), [[1, 8, 6]], r"\(48, 1175\).*1176"),
    ((48, 1176), [[1, 8, 8]], r"\(48, 1176\), expected 64"),
    ((48, 1176), [[1, 8, 6], [1, 2, 2]], "expected 52"),
    ((45, 1176), [[1, 9, 5]], "multiples of 2"),
    ((48, 1176), [[8, 6]], r"\(frames, rows, columns\)"),
    ((48, 1176), [[-1, 8, -6]], r"\(frames, rows, columns\)"),
])
def test_vision_refuses_wrong_shapes(bare, patches, grid, words):
    with pytest.raises(ValueError, match=words):
        QwenVision.from_pretrained(bare, **TINY)(torch.zeros(patches), torch.tensor(grid))


@pytest.mark.parametrize("change, words", [
    (dict(), "num_heads = 16"),
    (dict(num_heads=2),
     r"full_attention_blocks = \(7, 15, 23, 31\), expected numbers from 0 to 3"),
    (dict(TINY, window_size=60), "window_size = 60 .*28"),
    (dict(TINY, full_attention_blocks=(1, 4)),
     r"full_attention_blocks = \(1, 4\), expected numbers from 0 to 3"),
    (dict(TINY, windowsize=56), "vision.safetensors: unknown field 'windowsize'"),
    (dict(TINY, hidden_size=36, num_heads=3), r"vision.safetensors(.|\n)*wrong shape: blocks.0"),
])
def test_wrong_configurations(bare, change, words):
    with pytest.raises(ValueError, match=words):
        QwenVision.from_pretrained(bare, **change)


# ---------------------------------------------------------------- checkpoints

@pytest.fixture
def full_size(tmp_path):
    """Qwen2.5-VL 7B's visual tensors and embedding in full size, in five sparse shards.

    Every tensor is zero, so that the files take no disk.
    """
    names = list(MANIFEST["tensors"])
    for i in range(5):
        header, end = {}, 0
        for name in names[i::5]:
            shape = MANIFEST["tensors"][name]
            begin, end = end, end + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(tmp_path / shard(i + 1), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    write_index(tmp_path, {name: shard(1 + k % 5) for k, name in enumerate(names)})
    config = {"hidden_size": 3584, "vision_config": MANIFEST["config"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_full_size_names_and_shapes(full_size):
    for with_config in (True, False):
        vision = QwenVision.from_pretrained(full_size, device="meta", dtype=torch.bfloat16)
        assert vision.config == QwenVisionConfig()
        count = sum(p.numel() for p in vision.parameters())
        assert count == MANIFEST["parameters"] - 152064 * 3584
        (full_size / "config.json").unlink(missing_ok=True)
    patches = torch.empty(2 * 36 * 36, 1176, device="meta")
    tokens = vision(patches, torch.tensor([[1, 36, 36], [1, 36, 36]]))
    assert tokens.shape == (2 * 18 * 18, 3584) and tokens.device.type == "meta"
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(BPE / file, full_size)
    teacher = QwenTeacher.from_pretrained(full_size, device="meta")
    assert teacher.embedding.shape == (152064, 3584)


@pytest.mark.parametrize("name, replacement, words", [
    ("visual.merger.ln_q.weight", {}, r"missing: merger\.ln_q\.weight"),
    ("visual.blocks.2.attn.qkv.bias", {"visual.blocks.2.attn.qkv.bias": (95,)},
     r"2\.attn\.qkv\.bias \(95,\), expected \(96"),
    ("visual.merger.ln_q.weight", {"visual.merger.ln_q.weight": (32,), "visual.extra": (3,)},
     r"superfluous: extra \(3,\)"),
    ("visual.patch_embed.proj.weight", {"visual.patch_embed.proj.weight": (32, 1176)},
     r"\(32, 1176\), expected \(hidden"),
    ("visual.patch_embed.proj.weight", {}, r"no tensor 'patch_embed\.proj\.weight'"),
])
def test_wrong_tensors(tmp_path, name, replacement, words):
    tensors = weights()
    del tensors[name]
    tensors |= {n: torch.zeros(shape) for n, shape in replacement.items()}
    save_file(tensors, tmp_path / "vision.safetensors")
    with pytest.raises(ValueError, match=rf"vision\.safetensors(.|\n)*{words}"):
        QwenVision.from_pretrained(tmp_path / "vision.safetensors", **TINY)


def test_only_wanted_shards_are_opened(released):
    assert sorted(Checkpoint(released, wanted=("visual.",)).names()) == sorted(weights())
    assert Checkpoint(released, wanted=(EMBEDDING,)).names() == [EMBEDDING]
    with pytest.raises(ValueError, match=rf"{shard(2)}.*missing"):
        Checkpoint(released)
    with pytest.raises(ValueError, match="index.json.*starts with audio. or speech."):
        Checkpoint(released, wanted=("audio.", "speech."))
    (released / shard(4)).unlink()
    with pytest.raises(ValueError, match=rf"{shard(4)}.*missing"):
        QwenVision.from_pretrained(released)


def test_the_names_of_newer_releases(released):
    """Since transformers 4.52, a saved model has its parts below model.*"""
    def renamed(name):
        name = name.replace("visual.", "model.visual.")
        return name.replace(EMBEDDING, "model.language_model.embed_tokens.weight")

    expected = QwenTeacher.from_pretrained(released)
    index = released / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    write_index(released, {renamed(name): file for name, file in weight_map.items()})
    for i in (1, 4, 5):
        tensors = load_file(released / shard(i))
        save_file({renamed(name): x for name, x in tensors.items()}, released / shard(i))
    actual = QwenTeacher.from_pretrained(released)
    for a, b in zip(actual.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_vision_encoder_is_named(tmp_path):
    for name in ("blocks.0.norm1.bias", "deepstack_merger_list.0.norm.weight"):
        save_file({f"visual.{name}": torch.zeros(2)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="x.safetensors: this is .*Qwen2-VL or Qwen3-VL"):
            QwenVision.from_pretrained(tmp_path / "x.safetensors")


# ---------------------------------------------------------------- preprocessing

def test_preprocess_equals_reference():
    reference = load_file(PREPROCESS)
    pixels = reference["in/image"].numpy()
    for picture in (pixels, Image.fromarray(pixels)):
        patches, grid = preprocess([picture])
        assert torch.equal(grid, reference["out/grid_thw"])
        torch.testing.assert_close(patches, reference["out/patches"], atol=1e-6, rtol=0)


def test_preprocess_order():
    """Each pixel holds the row and the column of its patch, and its own column in that patch."""
    rows, columns = np.indices((56, 112)) // 14
    inside = np.indices((56, 112))[1] % 14
    picture = np.stack((rows, columns, inside), axis=-1).astype(np.uint8)
    patches, grid = preprocess([picture])
    assert grid.tolist() == [[1, 4, 8]]
    patches = patches.view(32, 3, 2, 14, 14)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1, 1)
    values = ((patches * std + mean) * 255).round().int()
    where = values[:, :2, 0, 0, 0].tolist()
    assert where[:8] == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert where[16:20] == [[2, 0], [2, 1], [3, 0], [3, 1]]
    assert torch.equal(values[:, :, 0], values[:, :, 1])            # both frames show the picture
    assert (values[:, 2] == torch.arange(14)).all()                 # rows of pixels stay rows


@pytest.mark.parametrize("size, expected", [
    ((512, 512), (504, 504)), ((100, 200), (112, 196)),
    ((42, 70), (56, 56)),                                           # halves are rounded to even
    ((20, 20), (56, 56)), ((10, 1000), (28, 560)),
    ((2000, 3000), (812, 1204)), ((20, 4000), (28, 4004)),
])
def test_nearest_size(size, expected):
    assert nearest_size(*size, cell=28) == expected


def test_resizing_is_bicubic():
    picture = random_pictures((100, 60))[0]
    resized = np.asarray(Image.fromarray(picture).resize((56, 112), Image.Resampling.BICUBIC))
    patches, grid = preprocess([picture])
    assert grid.tolist() == [[1, 8, 4]] and torch.equal(patches, preprocess([resized])[0])


def test_preprocess_converts_pictures_to_rgb():
    picture = Image.fromarray(random_pictures((56, 56))[0])
    grey = picture.convert("L")
    assert torch.equal(preprocess([picture.convert("RGBA")])[0], preprocess([picture])[0])
    assert torch.equal(preprocess([grey])[0], preprocess([grey.convert("RGB")])[0])


@pytest.mark.parametrize("pictures, words", [
    ([], "at least one"),
    (Image.new("RGB", (56, 56)), "sequence"),
    (np.zeros((56, 56, 3), np.uint8), r"\(56, 3\)"),
    ([np.zeros((56, 56, 3), np.float32)], "float32, expected .*uint8"),
    ([np.zeros((56, 56), np.uint8)], r"\(56, 56\)"),
    ([np.zeros((3, 56, 56), np.uint8)], r"\(3, 56, 56\).*expected \(height, width, 3\)"),
    ([np.zeros((0, 56, 3), np.uint8)], r"\(0, 56, 3\)"),
    ([np.zeros((2, 402, 3), np.uint8)], "2 x 402"),
])
def test_preprocess_refuses(pictures, words):
    with pytest.raises(ValueError, match=words):
        preprocess(pictures)


# ---------------------------------------------------------------- tokenizer

@pytest.fixture(scope="module")
def tokenizer():
    return QwenTokenizer(BPE)


def test_tokens_equal_reference(tokenizer):
    for case in json.loads((BPE / "expected_ids.json").read_text()):
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]


def test_equal_texts_have_equal_ids(tokenizer):
    for text in ("é à ô", "한국어"):
        apart = unicodedata.normalize("NFD", text)
        assert apart != text and tokenizer.encode(apart) == tokenizer.encode(text)


@pytest.mark.parametrize("text, words", [
    ("He'll I'VEx it's 'em", ["He", "'ll", " I", "'VE", "x", " it", "'s", " '", "em"]),
    ("a_b-c  d", ["a", "_b", "-c", " ", " d"]),
    ("x²³ 12", ["x", "²", "³", " ", "1", "2"]),
    ("three!!\n\nlines \n  of", ["three", "!!\n\n", "lines", " \n", " ", " of"]),
    ("end  ", ["end", "  "]),
    ("\u3000字ª一二", ["\u3000字ª一二"]),
    ("!\x1c!\x85!", ["!\x1c!", "\x85", "!"]),                     # of the two, \x85 is white space
    ("𝒳𝒴 ⅷ🐈", ["𝒳𝒴", " ", "ⅷ", "🐈"]),
])
def test_words(text, words):
    assert word_pattern().findall(text) == words


def test_no_text_is_lost(tokenizer):
    names = {token: symbol for symbol, token in tokenizer.ids.items()}
    byte = {symbol: value for value, symbol in enumerate(tokenizer.symbols)}
    random = np.random.default_rng(0)
    for i in range(50):
        codes = random.integers(0, [0x80, 0x3000, 0x1F700][i % 3], 40)
        characters = [chr(code) for code in codes if not 0xD800 <= code < 0xE000]   # no surrogates
        text = unicodedata.normalize("NFC", "".join(characters))
        symbols = "".join(names[token] for token in tokenizer.encode(text))
        assert bytes(byte[symbol] for symbol in symbols).decode() == text


@pytest.mark.parametrize("file, change, words", [
    ("vocab.json", None, "vocab.json: no such file"),
    ("merges.txt", None, "merges.txt: no such file"),
    ("vocab.json", lambda text: text[:100], "vocab.json: not valid JSON"),
    ("vocab.json", lambda text: text.replace('"A": 32', '"AA": 32'),
     "vocab.json: no token for byte 65"),
    ("vocab.json", lambda text: f"[{text}]", "vocab.json: expected a JSON object"),
    ("merges.txt", lambda text: text.replace("i n\n", "i n g\n", 1), "merges.txt, line 4: 'i n g'"),
    ("merges.txt", lambda text: text.replace("i n\n", "in\n", 1), "merges.txt, line 4: 'in'"),
    ("merges.txt", lambda text: text.replace("i n\n", "in 日\n", 1), "merges.txt, line 4: 'in 日'"),
])
def test_tokenizer_names_the_wrong_file(tmp_path, file, change, words):
    for name in ("vocab.json", "merges.txt"):
        text = (BPE / name).read_text("utf-8")
        if name != file:
            (tmp_path / name).write_text(text, "utf-8")
        elif change is not None:
            assert change(text) != text
            (tmp_path / name).write_text(change(text), "utf-8")
    with pytest.raises(ValueError, match=words):
        QwenTokenizer(tmp_path)


# ---------------------------------------------------------------- teacher

def test_image_features_are_means_of_merged_tokens(released):
    teacher = QwenTeacher.from_pretrained(released)
    pictures = random_pictures((56, 84), (112, 112))
    features = teacher.image_features(pictures)
    assert features.shape == (2, 40) and features.dtype == torch.float32
    alone = torch.stack([teacher.vision(*preprocess([picture])).mean(0) for picture in pictures])
    torch.testing.assert_close(features, alone, atol=2e-6, rtol=0)


def test_text_features_are_means_without_padding(released):
    teacher = QwenTeacher.from_pretrained(released)
    table = load_file(released / shard(5))[EMBEDDING].float()
    texts = ["A photo of a cat.", "the"]
    expected = torch.stack([table[teacher.tokenizer.encode(text)].mean(0) for text in texts])
    assert len(teacher.tokenizer.encode(texts[0])) == 8
    torch.testing.assert_close(teacher.text_features(texts), expected, atol=1e-6, rtol=0)


def test_teacher_is_frozen(released):
    teacher = QwenTeacher.from_pretrained(released, dtype=torch.bfloat16)
    assert all(not p.requires_grad and p.dtype == torch.bfloat16 for p in teacher.parameters())
    assert teacher.text_features(["a cat"]).dtype == torch.float32
    assert teacher.image_features(random_pictures((56, 56))).dtype == torch.float32


@pytest.mark.parametrize("texts", [[], ["a", ""], "a cat"])
def test_text_features_refuse(released, texts):
    with pytest.raises(ValueError, match="expected a sequence of texts"):
        QwenTeacher.from_pretrained(released).text_features(texts)


@pytest.mark.parametrize("shape, words", [
    ((2000, 40), "at least 2256 rows"), ((2300, 39), "width 40"), ((2300,), r"\(2300,\)"),
])
def test_embedding_must_fit(released, shape, words):
    save_file({EMBEDDING: torch.zeros(shape)}, released / shard(5))
    with pytest.raises(ValueError, match=rf"{EMBEDDING}.*{words}"):
        QwenTeacher.from_pretrained(released)


# ---------------------------------------------------------------- both teachers

def check_interface(folder, dtype, kind, width):
    """The features that `load_teacher` promises for either teacher; also for the small one."""
    pictures = random_pictures((32, 32), (32, 32), (32, 32))
    teacher = load_teacher(folder, dtype, "cpu")
    assert type(teacher) is kind and teacher.out_dim == width
    assert next(teacher.parameters()).dtype == dtype
    for batch in (pictures, [Image.fromarray(picture) for picture in pictures]):
        features = teacher.image_features(batch)
        assert features.shape == (3, width) and features.dtype == torch.float32
    features = teacher.text_features(["a large red circle", "a small blue square"])
    assert features.shape == (2, width) and features.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qwen_teacher_has_the_common_interface(released, dtype):
    check_interface(released, dtype, QwenTeacher, 40)


def test_a_folder_without_a_teacher(tmp_path):
    words = "expected a teacher's folder, with tokenizer.model .* or vocab.json"
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=words):
            load_teacher(path)
