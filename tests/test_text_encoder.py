"""text_encoder.py against the public reference implementation.

In every layout, at full size without weights, and on bad input.
"""
import json
import pickle
import re

import pytest
import sentencepiece
import torch
from conftest import TESTS, golden, manifest, parameter_count, write_shards, write_sparse
from safetensors.torch import save_file

from checkpoint import save
from text_encoder import T5Config, T5Encoder, T5Tokenizer, asked, relative_buckets

SPIECE = TESTS / "golden" / "t5_spiece.model"
CASES = json.loads((TESTS / "golden" / "t5_tokens.json").read_text())["cases"]
TINY = T5Config(vocab_size=150, dim=128, head_dim=32, ff_dim=256, depth=2, num_heads=4)
PREFIX = "text_encoders.t5xxl.transformer."


@pytest.fixture(scope="module")
def tok():
    return T5Tokenizer(SPIECE)


# ---------------------------------------------------------------- tokenizer

@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["text"][:24]))
def test_ids_of_real_prompts(tok, case):
    assert tok.encode(case["text"]) == case["ids"]


def test_special_ids(tok):
    assert (tok.vocab_size, tok.mask_id) == (32100, 32099)
    assert (tok.pad_id, tok.eos_id, tok.unk_id) == (0, 1, 2)
    assert T5Tokenizer(SPIECE, sentinels=5).mask_id == 32004


def test_sentinels_in_a_text(tok):
    cat, dog = tok.encode("a cat")[:-1], tok.encode("dog")[:-1]
    assert tok.encode("<extra_id_0>") == [32099, 1]
    assert tok.encode("a cat <extra_id_0> dog<extra_id_99>") == cat + [32099] + dog + [32000, 1]
    for text in ("<extra_id_100>", "<extra_id_07>", "<extra_id_>"):
        assert max(tok.encode(text)) < 32000


def test_pieces_of_a_text(tok):
    pieces = [tok.piece(i) for i in tok.encode("a triangle <extra_id_0><extra_id_99>")]
    assert pieces == ["▁", "a", "▁triangle", "<extra_id_0>", "<extra_id_99>", "</s>"]


def test_batch_is_padded_and_cut(tok):
    ids = tok(["a cat", "", "a cat on a mat in a hat"], length=6)
    cat, long = tok.encode("a cat"), tok.encode("a cat on a mat in a hat")
    assert ids.dtype == torch.int64
    assert ids.tolist() == [cat + [1] * (6 - len(cat)), [1] * 6, long[:5] + [1]]
    zeros = T5Tokenizer(SPIECE, padding_id=0)(["a cat"], length=6)
    assert zeros.tolist() == [cat + [0] * (6 - len(cat))]
    assert tok(["a cat"]).shape == (1, 256) and tok([], length=8).shape == (0, 8)
    assert tok(["a cat"], length=len(cat)).tolist() == [cat]
    assert tok(["a cat"], length=1).tolist() == [[1]]


@pytest.mark.parametrize("padding_id", [0, 1])
def test_a_caption_is_the_answer_to_no_question(padding_id):
    tok = T5Tokenizer(SPIECE, padding_id=padding_id)
    texts = ["a cat", "", "a cat on a mat in a hat"]
    for length in (4, 6, 256):
        ids, answer = tok.dialogue([""] * 3, texts, length)
        assert ids.dtype == torch.int64 and torch.equal(ids, tok(texts, length))
        assert answer.dtype == torch.bool and answer.shape == ids.shape and answer.all()
    ids, answer = tok.dialogue(["", ""], length=6)
    assert ids.tolist() == [[tok.mask_id] * 6] * 2 and answer.all()
    nothing = tok.dialogue([], [], 8) + tok.dialogue([], length=8)
    assert [part.shape for part in nothing] == [(0, 8)] * 4
    assert tok.dialogue(["a"], ["b"])[0].shape == (1, 256)


@pytest.mark.parametrize("padding_id", [0, 1])
def test_questions_and_answers(padding_id):
    tok = T5Tokenizer(SPIECE, padding_id=padding_id)
    question, other = tok.encode("what is it?")[:-1], tok.encode("a dog or a cat?")[:-1]
    cat, long, length = tok.encode("a cat"), tok.encode("a cat on a mat in a hat"), 12
    ids, answer = tok.dialogue(["what is it?", "a dog or a cat?", "what is it?"],
                               ["a cat", "a cat", "a cat on a mat in a hat"], length)
    assert ids.tolist() == [
        question + cat + [padding_id] * (length - len(question + cat)),
        other + cat + [padding_id] * (length - len(other + cat)),
        question + long[:length - len(question) - 1] + [1],      # cut, with </s> as its last id
    ]
    starts = [len(question), len(other), len(question)]
    assert answer.tolist() == [[False] * n + [True] * (length - n) for n in starts]
    masked, same = tok.dialogue(["what is it?", "a dog or a cat?"], length=length)
    assert masked.tolist() == [q + [tok.mask_id] * (length - len(q)) for q in (question, other)]
    assert torch.equal(same, answer[:2])


def test_a_question_that_leaves_no_room(tok):
    n = len(tok.encode("what is it?")) - 1
    ids, answer = tok.dialogue(["", "what is it?"], ["a cat", "a cat"], n + 2)
    assert answer[1].sum() == 2 and ids[1, -1] == tok.eos_id
    for answers in (None, ["a cat", "a cat"]):
        words = rf"'what is it\?' has {n} tokens: .* at most {n - 1} of the length {n + 1}"
        with pytest.raises(ValueError, match=words):
            tok.dialogue(["", "what is it?"], answers, n + 1)


def test_questions_in_the_template_of_a_checkpoint():
    assert asked("what is it?") == "what is it?"
    assert asked("what {is} it?", "Q: {question} A: ") == "Q: what {is} it? A: "
    assert asked("", "Q: {question} A: ") == ""                  # a caption


@pytest.mark.parametrize("padding_id", [0, 1])
def test_dialogues(padding_id):
    """Every answer is predicted with its </s>, no question is, and padding is."""
    tok = T5Tokenizer(SPIECE, padding_id=padding_id)
    q, other = tok.encode("what is it?")[:-1], tok.encode("and a dog?")[:-1]
    cat, yes = tok.encode("a cat"), tok.encode("yes")
    turns = [("q", q), ("a", cat), ("q", other), ("a", yes), ("q", q), ("a", cat)]
    whole = sum((part for _, part in turns), [])
    flags = sum(([kind == "a"] * len(part) for kind, part in turns), [])
    before = [[("what is it?", "a cat"), ("and a dog?", "yes")], []]
    ids, answer = tok.dialogue(["what is it?"] * 2, ["a cat"] * 2, len(whole) + 3, before)
    assert ids[0].tolist() == whole + [padding_id] * 3
    assert answer[0].tolist() == flags + [True] * 3
    alone = tok.dialogue(["what is it?"], ["a cat"], len(whole) + 3)
    assert torch.equal(ids[1:], alone[0]) and torch.equal(answer[1:], alone[1])
    for length in range(len(q) + 2, len(whole)):                # a long one is cut
        ids, answer = tok.dialogue(["what is it?"], ["a cat"], length, before[:1])
        assert ids.tolist() == [whole[:length - 1] + [1]]
        assert answer.tolist() == [flags[:length]]
    masked, answer = tok.dialogue(["what is it?"] * 2, None, len(whole) + 3, before)
    start = len(whole) - len(cat)                               # earlier answers are given
    assert masked[0].tolist() == whole[:start] + [tok.mask_id] * (len(cat) + 3)
    assert answer[0].tolist() == [False] * start + [True] * (len(cat) + 3)
    assert masked[1].tolist() == q + [tok.mask_id] * (len(whole) + 3 - len(q))


def test_dialogues_that_leave_no_room(tok):
    """In training the first answer needs room, in sampling the last one."""
    before = [[("what is it?", "a cat")]]
    first = len(tok.encode("what is it?")) - 1
    start = first + len(tok.encode("a cat")) + len(tok.encode("and a dog?")) - 1
    assert tok.dialogue(["and a dog?"], ["yes"], first + 2, before)[1].sum() == 2
    with pytest.raises(ValueError, match=rf"question 'what is it\?' has {first} tokens"):
        tok.dialogue(["and a dog?"], ["yes"], first + 1, before)
    assert tok.dialogue(["and a dog?"], None, start + 2, before)[1].sum() == 2
    with pytest.raises(ValueError, match=rf"up to the question 'and a dog\?' has {start} tokens"):
        tok.dialogue(["and a dog?"], None, start + 1, before)


def test_decode(tok):
    texts = ["A photo of a cat.", "", "two dogs, 3 cups"]
    assert tok.decode(tok(texts, length=20)) == texts
    cat, dog = tok.encode("a cat")[:-1], tok.encode("dog")
    rows = [[0, 32099, *cat, 0, 32000, *dog, *cat], [32127, *dog], []]
    assert tok.decode(rows) == ["a cat dog", "dog", ""]


def test_tokenizer_survives_pickling(tok):
    assert pickle.loads(pickle.dumps(tok)).encode("a cat") == tok.encode("a cat")


@pytest.mark.parametrize("call", [
    lambda tok: tok("a cat"),
    lambda tok: tok(["a cat"], length=0),
    lambda tok: tok([None]),
    lambda tok: tok.encode(b"a cat"),
    lambda tok: tok.decode([1, 2]),
    lambda tok: tok.decode([[3, -1]]),
    lambda tok: tok.decode(torch.rand(1, 2)),
    lambda tok: tok.dialogue("what?"),
    lambda tok: tok.dialogue(["what?"], "that"),
    lambda tok: tok.dialogue([None]),
    lambda tok: tok.dialogue(["what?"], []),
    lambda tok: tok.dialogue(["what?"], ["a", "b"]),
    lambda tok: tok.dialogue([""], length=0),
    lambda tok: tok.dialogue(["what?"], ["a"], before=[]),
])
def test_bad_texts_and_ids(tok, call):
    with pytest.raises(ValueError, match="expected"):
        call(tok)


def test_missing_and_garbage_models(tmp_path):
    with pytest.raises(ValueError, match="absent.model: no such file"):
        T5Tokenizer(tmp_path / "absent.model")
    for content in (b"", b"garbage", SPIECE.read_bytes()[:9999]):
        (tmp_path / "x.model").write_bytes(content)
        with pytest.raises(ValueError, match="x.model: not a sentencepiece model"):
            T5Tokenizer(tmp_path / "x.model")


def test_a_model_with_other_special_ids(tmp_path):
    with open(tmp_path / "other.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a red circle", "a blue square"] * 9), model_writer=file,
            vocab_size=20, hard_vocab_limit=False, minloglevel=2)
    words = "other.model: <pad>, </s> and <unk> have the ids (-1, 2, 0)"
    with pytest.raises(ValueError, match=re.escape(words)):
        T5Tokenizer(tmp_path / "other.model")
    with pytest.raises(ValueError, match="sentinels = 0"):
        T5Tokenizer(SPIECE, sentinels=0)


# ---------------------------------------------------------------- agreement with the reference

@torch.no_grad()
def agrees(encoder):
    _, inputs, outputs, _ = golden("t5_encoder")
    torch.testing.assert_close(encoder(inputs["ids"]), outputs["embeddings"], rtol=0, atol=2e-5)


def folder(path, **changes):
    """A repository like the release: two shards, index and config.json below text_encoder_3/."""
    weights, _, _, config = golden("t5_encoder")
    below = path / "text_encoder_3"
    shards = write_shards(below, weights, lambda file, part: save_file(part, file))
    (below / "config.json").write_text(json.dumps(config | changes))
    return shards


def test_repository_and_folder_with_shards(tmp_path):
    folder(tmp_path)
    for path in (tmp_path, tmp_path / "text_encoder_3"):
        encoder = T5Encoder.from_pretrained(path)
        agrees(encoder)
        assert encoder.config == T5Config(
            vocab_size=300, dim=24, head_dim=8, ff_dim=56, depth=3, num_heads=4)


@pytest.mark.parametrize("prefix, foreign", [
    ("", {}),
    (PREFIX, {}),
    (PREFIX, {"first_stage_model.x": torch.zeros(2)}),
])
@pytest.mark.parametrize("embedding", [
    ["shared"],
    ["shared", "encoder.embed_tokens"],
    ["encoder.embed_tokens"],
])
def test_stand_alone_and_single_file(tmp_path, prefix, foreign, embedding):
    weights = golden("t5_encoder")[0]
    matrix = weights.pop("shared.weight")
    weights |= {f"{name}.weight": matrix.clone() for name in embedding}
    prefixed = {prefix + name: tensor for name, tensor in weights.items()}
    save_file(prefixed | foreign, tmp_path / "x.safetensors")
    agrees(T5Encoder.from_pretrained(tmp_path / "x.safetensors"))


def test_fp8_computes_with_exactly_the_upcast_weights(tmp_path):
    weights, inputs, _, _ = golden("t5_encoder")
    fp8 = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()}
    save_file(fp8, tmp_path / "fp8.safetensors")
    float32 = {name: tensor.float() for name, tensor in fp8.items()}
    save_file(float32, tmp_path / "upcast.safetensors")
    encoder = T5Encoder.from_pretrained(tmp_path / "fp8.safetensors")
    upcast = T5Encoder.from_pretrained(tmp_path / "upcast.safetensors")
    assert torch.equal(encoder.blocks[1].attention.out.weight,
                       fp8["encoder.block.1.layer.0.SelfAttention.o.weight"].float())
    assert torch.equal(encoder(inputs["ids"]), upcast(inputs["ids"]))


def test_own_layout(tmp_path):
    folder(tmp_path)
    encoder = T5Encoder.from_pretrained(tmp_path)
    save(tmp_path / "own.safetensors", encoder.state_dict(), encoder.config)
    again = T5Encoder.from_pretrained(tmp_path / "own.safetensors")
    assert again.config == encoder.config
    agrees(again)
    save(tmp_path / "bare.safetensors", encoder.state_dict())
    assert T5Encoder.from_pretrained(tmp_path / "bare.safetensors").config == encoder.config


def test_bfloat16_stays_near_the_reference(tmp_path):
    folder(tmp_path)
    _, inputs, outputs, _ = golden("t5_encoder")
    embeddings = T5Encoder.from_pretrained(tmp_path, dtype=torch.bfloat16)(inputs["ids"])
    assert embeddings.dtype == torch.bfloat16
    assert 0 < (embeddings - outputs["embeddings"]).abs().mean() < 0.02


# ---------------------------------------------------------------- full size, no weights

@pytest.mark.parametrize("layout", ["shards", "stand-alone", "single file"])
def test_full_size_manifest(tmp_path, layout):
    released = manifest("t5_v1_1_xxl_encoder")
    shapes, path = released["tensors"], tmp_path / "x.safetensors"
    if layout == "shards":
        below = tmp_path / "text_encoder_3"
        write_shards(below, shapes, write_sparse)
        (below / "config.json").write_text(json.dumps(released["config"]))
        path = tmp_path
    elif layout == "stand-alone":
        write_sparse(path, shapes | {"encoder.embed_tokens.weight": shapes["shared.weight"]})
    else:
        foreign = manifest("sd3_medium_single_file")["tensors"]
        write_sparse(path, {PREFIX + name: shape for name, shape in shapes.items()} | foreign)
    encoder = T5Encoder.from_pretrained(path, device="meta", dtype=torch.bfloat16)
    assert parameter_count(encoder) == released["parameters"]
    assert encoder.config == T5Config()


# ---------------------------------------------------------------- mask token

@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"mask_token": v}, torch.nn.Parameter])
def test_mask_token_replaces_one_row(tmp_path, wrap):
    folder(tmp_path)
    vector = torch.randn(24, dtype=torch.bfloat16)
    torch.save(wrap(vector), tmp_path / "mask.pth")
    plain = T5Encoder.from_pretrained(tmp_path)
    masked = T5Encoder.from_pretrained(
        tmp_path, mask_token=tmp_path / "mask.pth", mask_id=299)
    assert torch.equal(masked.embedding.weight[299], vector.float())
    assert torch.equal(masked.embedding.weight[:299], plain.embedding.weight[:299])


def test_mask_token_at_full_size(tmp_path):
    write_sparse(tmp_path / "x.safetensors", manifest("t5_v1_1_xxl_encoder")["tensors"])
    torch.save(torch.zeros(4096, dtype=torch.bfloat16), tmp_path / "mask.pth")
    encoder = T5Encoder.from_pretrained(
        tmp_path / "x.safetensors", mask_token=tmp_path / "mask.pth", device="meta")
    assert encoder.config.mask_id == 32099


@pytest.mark.parametrize("content, words", [
    (torch.zeros(23), "expected a mask token of shape (24,), found shape (23,)"),
    (torch.zeros(1, 24), "found shape (1, 24)"),
    ({"a": torch.zeros(24), "b": torch.zeros(24)}, "found dict"),
    ([1.0] * 24, "found list"),
])
def test_mask_token_of_another_form(tmp_path, content, words):
    folder(tmp_path)
    torch.save(content, tmp_path / "mask.pth")
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        T5Encoder.from_pretrained(tmp_path, mask_token=tmp_path / "mask.pth", mask_id=299)
    assert "mask.pth" in str(error.value)


class Malicious:
    def __reduce__(self):
        return print, ("run while loading",)


def test_mask_token_that_cannot_be_read(tmp_path, capsys):
    folder(tmp_path)
    for write in (lambda path: None,
                  lambda path: path.write_bytes(b""),
                  lambda path: path.write_bytes(b"garbage"),
                  lambda path: torch.save(Malicious(), path)):
        write(tmp_path / "mask.pth")
        with pytest.raises(ValueError, match="mask.pth: cannot read"):
            T5Encoder.from_pretrained(tmp_path, mask_token=tmp_path / "mask.pth", mask_id=299)
    assert "run while loading" not in capsys.readouterr().out


def test_mask_row_outside_the_vocabulary(tmp_path):
    folder(tmp_path)
    torch.save(torch.zeros(24), tmp_path / "mask.pth")
    with pytest.raises(ValueError, match="mask_id = 32099, but the embedding has 300 rows"):
        T5Encoder.from_pretrained(tmp_path, mask_token=tmp_path / "mask.pth")


# ---------------------------------------------------------------- behaviour

def test_relative_buckets():
    buckets = relative_buckets(400, 32, 128, "cpu")
    assert buckets.diagonal().eq(0).all()
    assert buckets[8, 0] == 8 and buckets[7, 0] == 7 and buckets[0, 7] == 16 + 7
    assert buckets[399, 0] == buckets[399, 271] == 15 and buckets[0, 399] == 31
    assert buckets[399, 399 - 64] == 14
    assert set(buckets.flatten().tolist()) == set(range(32)) - {16}


def test_a_fresh_encoder_has_unit_outputs_that_distinguish_tokens():
    torch.manual_seed(0)
    encoder = T5Encoder(TINY)
    with torch.no_grad():
        out = encoder(torch.arange(100).view(2, 50))
    assert out.shape == (2, 50, 128) and 0.9 < out.std() < 1.1
    similarity = torch.corrcoef(out.flatten(0, 1)).fill_diagonal_(0)
    assert similarity.abs().max() < 0.6
    # Context and order matter: a token in another place or beside another word gets another output.
    a, b = encoder(torch.tensor([[5, 6, 7, 8], [5, 7, 6, 8]]))
    assert (a[0] - b[0]).abs().max() > 0.01 and (a[1] - b[2]).abs().max() > 0.01


def test_float16_is_refused(tmp_path):
    folder(tmp_path)
    for dtype in (torch.float16, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"T5 in {dtype}"):
            T5Encoder.from_pretrained(tmp_path, dtype=dtype)
    with pytest.raises(ValueError, match="overflows in float16"):
        T5Encoder(TINY).half()(torch.ones(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("ids, words", [
    (torch.tensor([[150]]), "ids from 150 to 150, expected 0 to 149"),
    (torch.tensor([[3, -1]]), "ids from -1 to 3"),
    (torch.tensor([3]), "expected integer ids (B, L), got torch.int64 (1,)"),
    (torch.tensor([[3.0]]), "got torch.float32"),
    (torch.zeros(1, 0, dtype=torch.int64), "(1, 0)"),
])
def test_bad_ids(ids, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        T5Encoder(TINY)(ids)


@pytest.mark.parametrize("fields", [
    {"depth": 0}, {"buckets": 30}, {"buckets": 0}, {"max_distance": 8},
])
def test_impossible_configurations(fields):
    with pytest.raises(ValueError, match="must be"):
        T5Config(**fields)


# ---------------------------------------------------------------- checkpoints that do not fit

def test_missing_superfluous_and_misshapen_tensors(tmp_path):
    weights, file = golden("t5_encoder")[0], tmp_path / "x.safetensors"
    del weights["encoder.block.1.layer.0.SelfAttention.k.weight"]
    del weights["encoder.final_layer_norm.weight"]
    weights["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(2, 2)
    weights["encoder.block.2.layer.1.DenseReluDense.wi_1.weight"] = torch.zeros(55, 24)
    save_file(weights, file)
    with pytest.raises(ValueError) as error:
        T5Encoder.from_pretrained(file)
    for words in (str(file),
                  "missing: encoder.block.1.layer.0.SelfAttention.k.weight "
                  "(needed for blocks.1.attention.qkv.weight)",
                  "missing: encoder.final_layer_norm.weight (needed for norm_out.weight)",
                  "superfluous: decoder.block.0.layer.0.SelfAttention.q.weight (2, 2)",
                  "encoder.block.2.layer.1.DenseReluDense.wi_1.weight (55, 24), "
                  "expected (112, 24)"):
        assert words in str(error.value)


def test_missing_relative_bias(tmp_path):
    weights = golden("t5_encoder")[0]
    del weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    save_file(weights, tmp_path / "x.safetensors")
    words = "x.safetensors: no tensor 'encoder.block.0.layer.0.SelfAttention.relative_attention"
    with pytest.raises(ValueError, match=words):
        T5Encoder.from_pretrained(tmp_path / "x.safetensors")


def test_missing_shard(tmp_path):
    folder(tmp_path)[1].unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors: this shard is missing"):
        T5Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes, words", [
    ({"feed_forward_proj": "relu"}, "feed_forward_proj = 'relu', expected 'gated-gelu'"),
    ({"num_layers": "3"}, "depth = '3', expected int"),
    ({"layer_norm_epsilon": None}, "norm_eps = None, expected float"),
    ({"num_layers": 4}, "missing"),
    ({"num_layers": 2}, "superfluous"),
    ({"d_model": 32}, "wrong shape"),
])
def test_config_json_that_does_not_fit(tmp_path, changes, words):
    folder(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        T5Encoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_file_of_something_else(tmp_path):
    save_file({"encoder.conv_in.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    words = "x.safetensors: no T5 encoder in it.*found encoder.conv_in.weight"
    with pytest.raises(ValueError, match=words):
        T5Encoder.from_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name, words", [
    ("joint_blocks.0.x_block.attn.qkv.weight", "an MM-DiT, expected a T5 text encoder"),
    ("text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP text encoder, expected a T5"),
])
def test_another_model_is_named(tmp_path, name, words):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: this is {words}"):
        T5Encoder.from_pretrained(tmp_path / "x.safetensors")


ATTENTION_1 = "encoder.block.1.layer.0.SelfAttention."
FEED_FORWARD_0 = "encoder.block.0.layer.1.DenseReluDense."


@pytest.mark.parametrize("change, words", [
    (lambda w: w.update({f"{ATTENTION_1}relative_attention_bias.weight": torch.zeros(32, 4)}),
     "a UMT5 encoder"),
    (lambda w: w.update({f"{FEED_FORWARD_0}wi.weight": w.pop(f"{FEED_FORWARD_0}wi_0.weight")}),
     "the first version of T5"),
    (lambda w: w.update({"encoder.block.0.layer.0.SelfAttention.q.lora_A": torch.zeros(1)}),
     "a LoRA"),
    (lambda w: w.update({"shared.weight": torch.zeros(250112, 24)}), "a multilingual T5"),
])
def test_relatives_of_t5_are_named(tmp_path, change, words):
    weights = golden("t5_encoder")[0]
    change(weights)
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: this is {words}") as error:
        T5Encoder.from_pretrained(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_a_whole_t5_with_its_decoder(tmp_path):
    decoder = {"decoder.final_layer_norm.weight": torch.ones(24), "lm_head.weight": torch.ones(2),
               "decoder.block.0.layer.1.EncDecAttention.q.weight": torch.zeros(2, 2)}
    save_file(golden("t5_encoder")[0] | decoder, tmp_path / "x.safetensors")
    agrees(T5Encoder.from_pretrained(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("change", [lambda matrix: matrix * 1.01, lambda matrix: matrix[:200]])
@pytest.mark.parametrize("changed", ["shared.weight", "encoder.embed_tokens.weight"])
def test_two_embeddings_that_differ(tmp_path, changed, change):
    weights = golden("t5_encoder")[0]
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"].clone()
    weights[changed] = change(weights[changed]).contiguous()
    save_file(weights, tmp_path / "x.safetensors")
    words = "(?s)x.safetensors: .*shared.weight.*encoder.embed_tokens.weight"
    with pytest.raises(ValueError, match=words):
        T5Encoder.from_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_scaled_fp8(tmp_path, prefix):
    """As ComfyUI writes it: each matrix divided by a factor that stands beside it."""
    weights, inputs, _, _ = golden("t5_encoder")
    scaled, plain = {"scaled_fp8": torch.empty(0).to(torch.float8_e4m3fn)}, {}
    for name, tensor in weights.items():
        plain[name] = scaled[name] = tensor.float()
        if "SelfAttention" in name and "bias" not in name or "DenseReluDense" in name:
            scale = tensor.float().abs().max() / 448
            scaled[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + "scale_weight"] = scale
            plain[name] = scaled[name].float() * scale
    save_file({prefix + name: x for name, x in scaled.items()}, tmp_path / "scaled.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")
    actual, expected = (T5Encoder.from_pretrained(tmp_path / f"{name}.safetensors")
                        for name in ("scaled", "plain"))
    assert torch.equal(actual(inputs["ids"]), expected(inputs["ids"]))
    assert (plain[f"{ATTENTION_1}q.weight"] - weights[f"{ATTENTION_1}q.weight"]).abs().max() < 0.05


# ---------------------------------------------------------------- the tokenizer's file

@pytest.mark.parametrize("name", ["spiece.model", "tokenizer/spiece.model",
                                  "tokenizer_3/spiece.model", "tokenizer.model"])
def test_the_folder_of_a_tokenizer(tmp_path, tok, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(SPIECE.read_bytes())
    assert T5Tokenizer(tmp_path).encode("a cat") == tok.encode("a cat")


def test_a_folder_without_a_sentencepiece_model(tmp_path):
    with pytest.raises(ValueError, match="this folder has no spiece.model; expected"):
        T5Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no spiece.model but tokenizer.json, another format"):
        T5Tokenizer(tmp_path)


@pytest.mark.parametrize("content, words", [
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    (b"<html>", "saved web page"),
    (b'{"version": "1.0"}', "a text that begins"),
    (b"\x40" + bytes(7) + b"{}", "a safetensors file"),
])
def test_what_is_no_sentencepiece_model_is_named(tmp_path, content, words):
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.model: not a sentencepiece model but .*{words}"):
        T5Tokenizer(tmp_path / "x.model")
    folder(tmp_path)
    with pytest.raises(ValueError, match=f"x.model: cannot read a mask token .*{words}"):
        T5Encoder.from_pretrained(tmp_path, mask_token=tmp_path / "x.model", mask_id=299)


# ---------------------------------------------------------------- weights that stay in fp8

def test_fp8_weights_stay_as_they_are_stored(tmp_path):
    """Unscaled, or scaled with one factor for a matrix, which is then one for each row."""
    weights, inputs, _, _ = golden("t5_encoder")
    stored, scaled = {}, {}
    for name, tensor in weights.items():
        stored[name] = tensor.to(torch.float8_e4m3fn)
        scaled[name] = stored[name]
        if "SelfAttention" in name and "bias" not in name or "DenseReluDense" in name:
            scaled[name.removesuffix("weight") + "scale_weight"] = torch.tensor(0.37)
    for name, tensors in (("stored", stored), ("scaled", scaled)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        kept = T5Encoder.from_pretrained(tmp_path / f"{name}.safetensors", float8=True)
        upcast = T5Encoder.from_pretrained(tmp_path / f"{name}.safetensors")
        matrix = kept.blocks[1].attention.qkv
        expected = [stored[f"{ATTENTION_1}{part}.weight"].float() for part in "qkv"]
        assert torch.equal(matrix.weight.float(), torch.cat(expected))
        assert set(matrix.scale.tolist()) == {torch.tensor(0.37 if name == "scaled" else 1).item()}
        torch.testing.assert_close(kept(inputs["ids"]), upcast(inputs["ids"]), rtol=0, atol=2e-5)


def test_other_weights_are_cast_row_by_row(tmp_path):
    folder(tmp_path)
    weights, inputs, _, _ = golden("t5_encoder")
    kept = T5Encoder.from_pretrained(tmp_path, dtype=torch.bfloat16, float8=True)
    plain = T5Encoder.from_pretrained(tmp_path)
    for block, own in zip(kept.blocks, plain.blocks):
        for matrix, exact in ((block.attention.qkv, own.attention.qkv),
                              (block.feed_forward.out, own.feed_forward.out)):
            assert matrix.weight.dtype == torch.float8_e4m3fn
            assert (matrix.weight.float().abs().amax(dim=1) == 448).all()       # the largest
            error = (matrix.weight.float() * matrix.scale[:, None] - exact.weight).abs()
            # three bits after the first one; below 2^-6 of the factor the steps are even
            assert (error <= exact.weight.abs() / 16 + matrix.scale[:, None] / 1024).all()
    assert kept.embedding.weight.dtype == kept.norm_out.weight.dtype == torch.bfloat16
    out, expected = kept(inputs["ids"]), plain(inputs["ids"])
    assert out.dtype == torch.bfloat16
    error = (out.float() - expected).norm() / expected.norm()
    assert 0.02 < error < 0.15               # bfloat16 alone: 0.016


def test_fp8_values_that_are_not_finite_are_refused(tmp_path):
    for value in (torch.nan, torch.inf):
        weights = golden("t5_encoder")[0]
        weights[f"{ATTENTION_1}k.weight"][0, 0] = value
        save_file(weights, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="SelfAttention.k.weight.* holds NaN or infinity"):
            T5Encoder.from_pretrained(tmp_path / "x.safetensors", float8=True)


def test_the_range_of_ids_on_a_gpu_is_not_read():
    """Reading it would wait for the GPU. The meta device refuses to be read, too."""
    with torch.device("meta"):
        encoder = T5Encoder(TINY)
    assert encoder(torch.zeros(1, 4, dtype=torch.int64, device="meta")).shape == (1, 4, 128)
