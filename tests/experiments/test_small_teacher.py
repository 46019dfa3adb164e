"""experiments/small_teacher.py, with random weights."""
import io

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_teacher import check_interface, random_pictures

from checkpoint import save
from experiments.small_teacher import PADDING, ContrastiveTeacher, ContrastiveTeacherConfig
from teacher import load_teacher

TEXTS = ["a large red circle at the top left on a gray background", "a small blue square"]


@pytest.fixture(scope="module")
def pieces():
    """A sentencepiece model of the words in TEXTS, as bytes."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type="word",
        vocab_size=100, hard_vocab_limit=False,
        pad_id=PADDING, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    return model.getvalue()


@pytest.fixture
def teacher(pieces):
    torch.manual_seed(0)
    tokenizer = SentencePieceProcessor(model_proto=pieces)
    config = ContrastiveTeacherConfig(
        tokenizer.get_piece_size(), image_size=32, channels=8,
        hidden_size=16, intermediate_size=24, num_heads=2, out_dim=12)
    return ContrastiveTeacher(config, tokenizer).eval()


@pytest.fixture
def trained(teacher, pieces, tmp_path):
    """The folder of a small teacher."""
    folder = tmp_path / "small"
    save(folder / "model.safetensors", teacher.state_dict(), teacher.config)
    (folder / "tokenizer.model").write_bytes(pieces)
    return folder


def test_small_teacher_is_read_back(teacher, trained):
    loaded = ContrastiveTeacher.from_pretrained(trained)
    pictures = random_pictures((32, 32), (32, 32))
    assert loaded.config == teacher.config
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded.image_features(pictures), teacher.image_features(pictures))
    assert torch.equal(loaded.text_features(TEXTS), teacher.text_features(TEXTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_teacher_has_the_common_interface(trained, dtype):
    check_interface(trained, dtype, ContrastiveTeacher, 12)


def test_training_and_features_agree(teacher):
    pictures = random_pictures((32, 32), (32, 32))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    image, text = teacher(images, teacher.token_ids(TEXTS))
    torch.testing.assert_close(image, teacher.image_features(pictures), atol=1e-6, rtol=0)
    torch.testing.assert_close(text, teacher.text_features(TEXTS), atol=1e-6, rtol=0)
    (image.sum() + text.sum()).backward()
    assert all(p.grad is not None for p in teacher.parameters())


def test_padding_does_not_matter(teacher):
    alone = torch.cat([teacher.text_features([text]) for text in TEXTS])
    torch.testing.assert_close(teacher.text_features(TEXTS), alone, atol=1e-6, rtol=0)
    ids = teacher.token_ids(TEXTS)
    assert (ids == PADDING).any()
    padded = torch.nn.functional.pad(ids, (0, 5), value=PADDING)
    _, text = teacher(torch.zeros(2, 3, 32, 32), padded)
    torch.testing.assert_close(text, alone, atol=1e-6, rtol=0)


def test_order_and_place_matter(teacher):
    texts = ["a large red circle at a blue square", "a large blue circle at a red square"]
    one, other = teacher.text_features(texts)
    assert (one - other).abs().max() > 1e-4
    left, right = np.zeros((2, 32, 32, 3), np.uint8)
    left[:16, :16], right[:16, 16:] = 255, 255
    one, other = teacher.image_features([left, right])
    assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize("texts", [[], ["a", ""], ["a", " "], "a cat"])
def test_small_teacher_refuses_texts(teacher, texts):
    with pytest.raises(ValueError, match="expected a sequence of texts, none of them empty"):
        teacher.text_features(texts)


@pytest.mark.parametrize("pictures", [
    [], random_pictures((32, 48)), random_pictures((32, 32), (64, 64)),
    [np.zeros((32, 32, 3), np.float32)],
])
def test_small_teacher_refuses_pictures(teacher, pictures):
    with pytest.raises(ValueError, match=r"expected .*(\(32, 32, 3\)|uint8)"):
        teacher.image_features(pictures)


@pytest.mark.parametrize("sizes, words", [
    (dict(num_heads=3), "num_heads = 3"), (dict(image_size=40), "multiple of 16"),
])
def test_small_teacher_sizes_must_fit(sizes, words):
    with pytest.raises(ValueError, match=words):
        ContrastiveTeacherConfig(vocab_size=40, **sizes)


@pytest.mark.parametrize("file, content, words", [
    ("tokenizer.model", b"no model", "tokenizer.model: not a sentencepiece model"),
    ("model.safetensors", b"no tensors", "model.safetensors: not a whole safetensors file"),
])
def test_small_teacher_names_the_wrong_file(trained, file, content, words):
    (trained / file).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_teacher(trained)


def test_small_teacher_needs_the_tokenizer_it_was_trained_with(teacher, trained):
    config = ContrastiveTeacherConfig(vocab_size=5)
    save(trained / "model.safetensors", teacher.state_dict(), config)
    with pytest.raises(ValueError, match="tokenizer.model: .* pieces.*expected 5"):
        load_teacher(trained)
