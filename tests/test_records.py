"""records.py: every record format, every way to get it wrong, the index of large files."""
import json
import os
import pickle
import re
import unicodedata

import pytest
from PIL import Image

import records
from conftest import TESTS
from records import Example, find_file, kind_of, open_records, parse_record, read_jsonl
from text_encoder import T5Tokenizer

TOKENIZER = T5Tokenizer(TESTS / "golden" / "t5_spiece.model")


@pytest.fixture
def folder(tmp_path):
    """A folder with five small pictures."""
    (tmp_path / "images").mkdir()
    for name in "abcde":
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def write(folder, *lines, name="records.jsonl"):
    """Write a JSONL file; a line is an object or raw."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in lines]
    path = folder / name
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def says(who, value):
    return {"from": who, "value": value}


A, B, C = (f"images/{name}.png" for name in "abc")
PAIR = {"image": [A], "conversations": [says("human", " a cat "), says("gpt", "<image>")]}


# ---------------------------------------------------------------- formats

def named(record, task):
    return record if task is None else {"task": task} | record


@pytest.mark.parametrize("task", [None, "", "drawings"])
@pytest.mark.parametrize("turns", [
    [says("human", " a cat \n"), says("gpt", "<image>")],
    [" a cat \n", "<image>"]])
def test_text_to_image(folder, turns, task):
    record = named({"image": [A], "conversations": turns}, task)
    assert read_jsonl(write(folder, record)) == [
        Example(task or "text_to_image", folder / A, (), "a cat", "", "a cat")]


@pytest.mark.parametrize("task", [None, "edits"])
@pytest.mark.parametrize("turns", [
    ["a dog", "<image>"],
    [says("human", "a dog"), says("gpt", "<image>")],
    ["a dog"]])
def test_image_to_image(folder, turns, task):
    record = {"image": [A, B], "conversations": turns, "instruction": " make it a dog "}
    kind = task or "image_to_image"
    assert read_jsonl(write(folder, named(record, task))) == [
        Example(kind, folder / B, (folder / A,), "make it a dog", "", "a dog")]


def test_image_to_image_of_several_sources_and_without_a_caption(folder):
    record = {"image": [A, B, C], "conversations": [says("human", "")],
              "instruction": "x", "task": "edges"}
    assert read_jsonl(write(folder, record)) == [
        Example("edges", folder / C, (folder / A, folder / B), "x", "", "")]


@pytest.mark.parametrize("task", [None, "personalisation"])
def test_composition_with_any_number_of_references(folder, task):
    records = [
        {"original_images": [A, B, C], "generated_images": ["images/d.png"],
         "edit_prompt": " all three ", "caption": " three "},
        {"original_images": [C], "generated_images": [A], "edit_prompt": "one"},
        {"original_images": [], "generated_images": [B], "edit_prompt": "none", "caption": "zero"}]
    a, b, c, d = (folder / f"images/{name}.png" for name in "abcd")
    kind = task or "image_to_image"
    assert read_jsonl(write(folder, *(named(record, task) for record in records))) == [
        Example(kind, d, (a, b, c), "all three", "", "three"),
        Example(kind, a, (c,), "one", "", ""),
        Example(task or "text_to_image", b, (), "none", "", "zero")]    # prompt and caption differ


@pytest.mark.parametrize("task", [None, "quiz"])
@pytest.mark.parametrize("plain", [False, True])
def test_questions(folder, plain, task):
    turns = ["<image>\nWhat is it?", "A cat.", "What colour?\n<image>", "Red."]
    if not plain:
        turns = [says(("human", "gpt")[i % 2], text) for i, text in enumerate(turns)]
    record = named({"image": [B], "conversations": turns}, task)
    assert read_jsonl(write(folder, record)) == [
        Example(task or "questions", folder / B, (), None, "What is it?", "A cat."),
        Example(task or "questions", folder / B, (), None, "What colour?", "Red.")]


def test_questions_as_a_dialogue(folder):
    """All turns are one example; other records are what they were."""
    record = {"image": [B], "conversations": ["q", "a", "r", "b", "s", "c"]}
    single = record | {"conversations": ["q", "a"]}
    assert parse_record(record, folder, dialogues=True) == [
        Example("questions", folder / B, (), None, "s", "c", (("q", "a"), ("r", "b")))]
    for other in (single, PAIR, {"image": [A, B], "conversations": ["b"], "instruction": "i"}):
        assert parse_record(other, folder, dialogues=True) == parse_record(other, folder)


def test_mixed_file_with_blank_lines_keeps_the_order(folder):
    edit = {"image": [A, B], "conversations": ["b"], "instruction": "i"}
    examples = read_jsonl(write(folder, PAIR, "", edit, "   ", PAIR))
    assert [e.task for e in examples] == ["text_to_image", "image_to_image", "text_to_image"]


def test_absolute_paths(folder, tmp_path_factory):
    elsewhere = write(tmp_path_factory.mktemp("elsewhere"), PAIR | {"image": [str(folder / A)]})
    assert read_jsonl(elsewhere)[0].image == folder / A


@pytest.mark.parametrize("text", ["naïve 猫", "line\u2028separator", "next\x85line"])
def test_captions_of_any_characters(folder, text):
    path = write(folder, PAIR | {"conversations": [text, "<image>"]})
    assert read_jsonl(path)[0].caption == text


@pytest.mark.parametrize("task", [None, "plan"])
def test_texts_without_a_picture(folder, task):
    named = {"task": task} if task else {}
    path = write(folder, named | {"conversations": ["two circles", "a red circle", "a", "b"]}, PAIR)
    plan, second, pair = read_jsonl(path)
    assert plan == Example(task or "questions", None, (), None, "two circles", "a red circle")
    assert plan.pictures == () and pair.pictures == (pair.image,)
    assert second.question == "a" and kind_of(plan) == kind_of(second)
    assert kind_of(plan).no_image and not kind_of(pair).no_image


@pytest.mark.parametrize("bad, words", [
    ("{'image': 1}", "not valid JSON"),
    ('{"image": ["images/a.png"], ', "not valid JSON"),
    ("[1, 2]", "formats"),
    ("3", "formats"),
    ({"conversations": ["a", "<image>"]}, "the key 'image' is missing"),
    ({"images": [A], "conversations": ["<image>\na?", "b"]}, "the key 'image' is missing"),
    ({"conversations": ["a?", "b"], "instruction": "x"}, "the key 'image' is missing"),
    ({"image": [A]}, "the key 'conversations' is missing"),
    ({"image": [A], "conversations": [{"from": "human"}, "<image>"]}, "the key 'value' is missing"),
    ({"original_images": [A], "edit_prompt": "x"}, "the key 'generated_images' is missing"),
    ({"original_images": [A], "generated_images": [B]}, "the key 'edit_prompt' is missing"),
    ({"original_images": [A], "generated_images": [], "edit_prompt": "x"}, "formats"),
    ({"image": ["images/z.png"], "conversations": ["a", "<image>"]}, "no such picture"),
    ({"image": ["images/z.png", A], "conversations": ["a"], "instruction": "x"}, "z.png"),
    ({"original_images": [A, "images/y.png"], "generated_images": [B], "edit_prompt": "x"},
     "y.png"),
    ({"image": [A, B], "conversations": ["a", "<image>"]}, "has 2 pictures and no instruction"),
    ({"image": [], "conversations": ["a", "<image>"]}, "has 0 pictures"),
    ({"image": [A], "conversations": ["a"], "instruction": "x"}, "1 picture(s), expected sources"),
    ({"image": [A], "conversations": ["q", "a", "q"]}, "3 turns"),
    ({"image": [A], "conversations": ["q", "a", "q", ""]}, "4 turns"),
    ({"image": [A], "conversations": []}, "formats"),
    ({"image": [A], "conversations": "a cat"}, "formats"),
    ({"image": [A], "conversations": "abcd"}, "formats"),
    ({"image": [A], "conversations": [None, "<image>"]}, "formats"),
    (PAIR | {"task": 3}, "'task' is 3, expected a name"),
    (PAIR | {"task": ["edits"]}, "'task' is ['edits'], expected a name"),
])
def test_errors_name_the_line(folder, bad, words):
    path = write(folder, PAIR, "", bad)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_jsonl(path)
    assert f"{path}, line 3: " in str(error.value)


def test_empty_and_missing_file(folder):
    with pytest.raises(ValueError, match="records.jsonl: no records"):
        read_jsonl(write(folder, "\ufeff", "  "))
    with pytest.raises(ValueError, match="none.jsonl: no such file"):
        read_jsonl(folder / "none.jsonl")


def test_a_file_that_is_not_text(folder):
    (folder / "records.jsonl").write_bytes(json.dumps(PAIR).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match="records.jsonl"):
        read_jsonl(folder / "records.jsonl")


# ---------------------------------------------------------------- records mean what they say

def test_one_name_in_place_of_a_list(folder):
    """LLaVA writes one picture as a string."""
    llava = {"image": A, "conversations": [says("human", "q"), says("gpt", "a")]}
    one = {"original_images": A, "generated_images": B, "edit_prompt": "x"}
    assert read_jsonl(write(folder, llava, one)) == [
        Example("questions", folder / A, (), None, "q", "a"),
        Example("image_to_image", folder / B, (folder / A,), "x", "", "")]


@pytest.mark.parametrize("human, gpt", [("human", "gpt"), ("user", "assistant")])
def test_who_asks_and_who_answers(folder, human, gpt):
    turns = [says("system", ""), says(human, "q"), says(gpt, "a"), says(human, "r"), says(gpt, "b")]
    examples = read_jsonl(write(folder, {"image": A, "conversations": turns}))
    assert [(e.question, e.caption) for e in examples] == [("q", "a"), ("r", "b")]


@pytest.mark.parametrize("turns, words", [
    ([says("gpt", "a"), says("human", "q")], "turn 1 is from 'gpt', expected human or user"),
    ([says("gpt", "<image>"), says("human", "a cat")], "turn 1 is from 'gpt'"),
    ([says("human", "q"), says("human", "r")], "turn 2 is from 'human', expected gpt or assistant"),
    ([says("human", "q"), says("gpt", "a"), says("gpt", "b")], "turn 3 is from 'gpt'"),
    ([says("gpt", "hi"), says("human", "q"), says("gpt", "a")], "turn 1 is from 'gpt'"),
    ([says("system", "be brief"), says("human", "q"), says("gpt", "a")],
     "turn 1 is from 'system', expected human"),
    ([says("tool", "q"), says("gpt", "a")], "turn 1 is from 'tool'"),
    ([says(None, "q"), says("gpt", "a")], "turn 1 is from null"),
    ([says(["human"], "q"), says("gpt", "a")], "turn 1 is from ['human']"),
    (["q", says("human", "a")], "turn 2 is from 'human'"),
])
def test_turns_in_another_order(folder, turns, words):
    path = write(folder, PAIR, {"image": A, "conversations": turns})
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: {words}")):
        read_jsonl(path)


EDIT = {"image": [A, B], "conversations": ["a dog"], "instruction": "x"}
COMPOSITION = {"original_images": [A], "generated_images": [B], "edit_prompt": "x", "caption": "y"}


@pytest.mark.parametrize("value, shown", [(None, "null"), (3, "3"), (2.5, "2.5"), (["x"], "['x']")])
@pytest.mark.parametrize("record, key", [
    (EDIT, "instruction"), (COMPOSITION, "edit_prompt"), (COMPOSITION, "caption")])
def test_no_text_where_a_text_belongs(folder, record, key, value, shown):
    path = write(folder, PAIR, record | {key: value})
    words = f"{path}, line 2: '{key}' is {shown}, expected a text"
    with pytest.raises(ValueError, match=re.escape(words)):
        read_jsonl(path)


@pytest.mark.parametrize("bad, words", [
    (PAIR | {"conversations": [says("human", None), says("gpt", "<image>")]}, "turn 1 is null"),
    (PAIR | {"conversations": ["a", 3]}, "turn 2 is 3, expected a text"),
    (PAIR | {"image": None}, "'image' is null, expected a list of file names"),
    (PAIR | {"image": 3}, "'image' is 3, expected a list of file names"),
    (PAIR | {"image": [None]}, "'image' is null, expected file names"),
    (PAIR | {"image": ""}, "'image' holds an empty name"),
    (COMPOSITION | {"original_images": None}, "'original_images' is null"),
    (COMPOSITION | {"generated_images": []}, "'generated_images' is empty"),
    ("null", "the line is null, expected an object"),
    ('"a cat"', "the line is 'a cat', expected an object"),
    ("[" * 100_000, "not valid JSON"),
    (PAIR | {"conversations": ["", "<image>"]}, "the caption is empty"),
    (EDIT | {"instruction": " "}, "'instruction' is empty"),
    (COMPOSITION | {"edit_prompt": ""}, "'edit_prompt' is empty"),
    (PAIR | {"conversations": ["q", "a", "", "b"]}, "has 4 turns, some of them empty"),
])
def test_what_is_missing_is_named(folder, bad, words):
    path = write(folder, PAIR, bad)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: {words}")):
        read_jsonl(path)


@pytest.mark.parametrize("place", ["caption", "task", "image"])
def test_half_a_surrogate_pair(folder, place):
    text = "a cat \ud83d"
    bad = {"caption": PAIR | {"conversations": [text, "<image>"]},
           "task": PAIR | {"task": text}, "image": PAIR | {"image": [text]}}[place]
    path = write(folder, PAIR, json.dumps(bad))
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: ") + r".*'\\ud83d', half of"):
        read_jsonl(path)
    whole = PAIR | {"conversations": ["a cat \U0001f600", "<image>"]}
    assert read_jsonl(write(folder, json.dumps(whole)))[0].caption == "a cat \U0001f600"


def test_byte_order_marks(folder):
    """At the start, and where two files were put together."""
    path = write(folder, "\ufeff" + json.dumps(PAIR), PAIR, "\ufeff" + json.dumps(PAIR))
    assert len(read_jsonl(path)) == 3
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(read_jsonl(path)) == 3


@pytest.mark.parametrize("start", ["", "\n \n", "\ufeff"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(folder, start, indent):
    path = write(folder, start + json.dumps([PAIR, PAIR], indent=indent))
    words = "records.jsonl: a JSON array, expected JSON lines"
    with pytest.raises(ValueError, match=words) as error:
        read_jsonl(path)
    command = str(error.value).partition("convert it:  ")[2]
    assert os.system(command) == 0
    assert len(read_jsonl(folder / "records-lines.jsonl")) == 2


def test_another_encoding_names_the_line(folder):
    path = write(folder, PAIR)
    line = json.dumps(PAIR).replace("cat", "caf\xe9")
    path.write_bytes(path.read_bytes() + line.encode("cp1252"))
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: not UTF-8 text")):
        read_jsonl(path)


@pytest.mark.parametrize("written, stored", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_the_other_form_of_unicode(folder, written, stored):
    def name(form):
        return unicodedata.normalize(form, "Bücher/café.png")

    (folder / name(stored)).parent.mkdir()
    Image.new("RGB", (8, 8)).save(folder / name(stored))
    path = write(folder, PAIR | {"image": [name(written)]})
    assert read_jsonl(path)[0].image == find_file(folder / name(written)) == folder / name(stored)
    missing = folder / unicodedata.normalize(written, "thé.png")
    assert find_file(missing) == missing
    with pytest.raises(ValueError, match="line 1: no such picture"):
        read_jsonl(write(folder, PAIR | {"image": [missing.name]}))


# ---------------------------------------------------------------- the index

QUIZ = {"image": [B], "conversations": ["q", "a", "what is it?", "b"], "task": "quiz"}


def opened(*paths, length=16, tokenizer=TOKENIZER):
    return open_records(paths, tokenizer, length, paths[0].parent / "run")


def test_records_are_those_of_the_whole_file(folder):
    first = write(folder, "\ufeff" + json.dumps(PAIR), "", QUIZ, EDIT, name="first.jsonl")
    second = write(folder, COMPOSITION, QUIZ | {"task": "more"}, name="second.jsonl")
    records = opened(first, second)
    examples = read_jsonl(first) + read_jsonl(second)
    assert list(records) == examples and len(records) == 7
    assert records[-1] == examples[-1]
    origins = [records.origin(i) for i in range(7)]
    assert origins == [f"{first}, line {n}" for n in (1, 3, 3, 4)] + [
        f"{second}, line {n}" for n in (1, 2, 2)]
    for outside in (7, -8):
        with pytest.raises(IndexError):
            records[outside]
    some = records.select([6, 2, 0])
    assert list(some) == [examples[i] for i in (6, 2, 0)] and some.origin(0) == origins[6]
    assert list(some.select([1])) == [examples[2]]
    assert some.digest == records.digest
    for whole in (records, some):                               # as a loader process gets them
        assert list(pickle.loads(pickle.dumps(whole))) == list(whole)


def test_the_index_is_built_once(folder, monkeypatch):
    path = write(folder, PAIR, QUIZ)
    expected = list(opened(path))
    monkeypatch.setattr(records, "examine", lambda *_: pytest.fail("the index was built again"))
    again = opened(path)
    assert list(again) == expected
    assert sorted(file.name for file in folder.iterdir()) == [
        "images", "records.jsonl", "records.jsonl.index"]


def test_the_index_follows_the_file_and_the_tokenizer(folder):
    path = write(folder, PAIR, QUIZ)
    before = opened(path)
    digest = before.digest
    write(folder, PAIR)                                         # another size
    assert list(opened(path)) == read_jsonl(path) and opened(path).digest != digest
    text = path.read_text()
    path.write_text(text.replace("a cat", "a dog"))             # the same size at another time
    os.utime(path, ns=(1, 1))
    assert opened(path)[0].prompt == "a dog"
    path.write_text(text)
    os.utime(path, ns=(2, 2))
    same = opened(path).digest
    os.utime(path, ns=(3, 3))
    assert opened(path).digest == same                          # of the contents, not of the time
    _, _, tokens = opened(path).columns()
    _, _, cut = opened(path, length=2).columns()
    assert (tokens.tolist(), cut.tolist()) == ([4], [2])
    more = T5Tokenizer(TESTS / "golden" / "t5_spiece.model", sentinels=3)
    before = opened(path).parts[0].header["state"]
    after = opened(path, tokenizer=more).parts[0].header["state"]
    assert (before["sentinels"], after["sentinels"]) == (100, 3)


def test_the_index_follows_template_and_dialogues(folder):
    question = " ".join(["word"] * 10)                          # as many tokens
    path = write(folder, QUIZ, {"image": A, "conversations": [question, "a", "q", "b"]})
    assert [e.question for e in opened(path)] == ["q", "what is it?", question, "q"]
    asked = open_records([path], TOKENIZER, 16, folder / "run", "Please tell me: {question} A:")
    [(origin, reason)] = asked.unusable
    assert [e.question for e in asked] == ["q", "what is it?", "q"] and "line 2" in origin
    assert f"the question 'Please tell me: {question} A:' has" in reason
    talks = open_records([path], TOKENIZER, 18, folder / "run", dialogues=True)
    expected = [("what is it?", "b", (("q", "a"),)), ("q", "b", ((question, "a"),))]
    assert [(e.question, e.caption, e.before) for e in talks] == expected
    assert list(pickle.loads(pickle.dumps(talks))) == list(talks)
    assert talks.notes() == [] and len(opened(path)) == 4
    talks = open_records([path], TOKENIZER, 17, folder / "run", dialogues=True)
    assert talks.notes() == [
        f"texts longer than 17 tokens, which are cut: 1, for example {path}, line 2: 'b'"]
    crowded = open_records([path], TOKENIZER, 11, folder / "run", dialogues=True)
    assert len(crowded) == 1 and "too little room" in crowded.unusable[0][1]


def test_unknown_words_and_masks_of_all_turns(folder):
    path = write(folder, {"image": A, "conversations": ["is it 猫?", "a", "q", "b"]},
                 {"image": A, "conversations": ["q", "<extra_id_0>", "q", "b"]})
    talks = open_records([path], TOKENIZER, 32, folder / "run", dialogues=True)
    assert "does not know: 1, for example" in talks.notes()[0]
    assert len(talks) == 1 and "mask token" in talks.unusable[0][1]


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 100, None])
def test_a_broken_index_is_built_again(folder, content):
    path = write(folder, PAIR, QUIZ)
    expected = list(opened(path))
    index = folder / "records.jsonl.index"
    index.write_bytes(index.read_bytes()[18:] if content is None else content)
    assert list(opened(path)) == expected


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    path = write(folder, PAIR, QUIZ)
    written = records.write_atomically

    def write_elsewhere(target, write):
        if target.parent == folder:
            raise PermissionError(13, "Permission denied", str(target))
        written(target, write)

    monkeypatch.setattr(records, "write_atomically", write_elsewhere)
    assert list(opened(path)) == read_jsonl(path)
    [index] = (folder / "run").iterdir()
    monkeypatch.setattr(records, "examine", lambda *_: pytest.fail("the index was built again"))
    assert list(opened(path)) == read_jsonl(path)


@pytest.mark.parametrize("bad, words", [
    ("{", "line 2: not valid JSON"), ({"image": [A]}, "line 2: the key 'conversations' is missing"),
    ({"image": A, "conversations": [says("gpt", "a"), says("human", "q")]}, "line 2: turn 1"),
    (PAIR | {"image": [A, B]}, "line 2: has 2 pictures")])
def test_opening_refuses_unknown_forms(folder, bad, words):
    path = write(folder, PAIR, bad)
    with pytest.raises(ValueError, match=re.escape(words)):
        opened(path)
    assert sorted(file.name for file in folder.iterdir()) == ["images", "records.jsonl"]


def test_records_that_lack_what_they_need(folder):
    long = " ".join(["word"] * 20)
    path = write(
        folder, PAIR, PAIR | {"conversations": [" ", "<image>"]}, EDIT | {"instruction": ""},
        {"image": A, "conversations": ["q", "a", long, "b"]},
        {"image": A, "conversations": ["q", ""]} | {"instruction": "x", "image": [A, B]},
        {"image": A, "conversations": ["q", "a", "q", ""]},
        PAIR | {"conversations": ["an <extra_id_0>", "<image>"]})
    records = opened(path)
    assert [(e.prompt, e.question, e.caption) for e in records] == [
        ("a cat", "", "a cat"), (None, "q", "a"), ("x", "", "q")]
    reasons = dict(records.unusable)
    assert [int(origin.rpartition(" ")[2]) for origin in reasons] == [2, 3, 4, 6, 7]
    for reason, words in zip(reasons.values(), (
            "caption is empty", "'instruction' is empty", "has 20 tokens: too little room",
            "some of them empty", "mask token")):
        assert words in reason
    with pytest.raises(ValueError, match="no usable records, for example line 1: the caption is"):
        opened(write(folder, PAIR | {"conversations": ["", "<image>"]}))


def test_texts_that_training_would_lose(folder):
    long = "a " * 20
    pairs = [PAIR | {"conversations": [text.strip(), "<image>"]}
             for text in ("a cat", long, "一只猫", "a dog", long + "end")]
    asked = {"image": A, "conversations": ["is it 猫?", "yes", "a a a a", long]}
    path = write(folder, *pairs, asked, EDIT | {"instruction": long + "x"})
    cut, unknown = opened(path).notes()
    words = "texts longer than 16 tokens, which are cut: 4, for example"
    assert cut.startswith(f"{words} {path}, line 2: 'a a a")
    assert "line 5" in cut and "line 6" in cut
    assert unknown.startswith("texts with words that the tokenizer does not know: 2, for example")
    assert "line 3: '一只猫'" in unknown and "line 6: 'is it 猫?'" in unknown
    assert opened(path, length=64).notes() == [unknown]
    assert opened(write(folder, PAIR)).notes() == []


def test_a_file_that_changes_during_a_run(folder):
    path = write(folder, PAIR, QUIZ)
    records = opened(path)
    text = path.read_text()
    path.write_text(text + json.dumps(PAIR))                    # more lines do no harm
    assert len(list(records)) == 3
    path.write_text(text.replace("quiz", "exam"))
    with pytest.raises(ValueError, match="line 2: has changed since the start"):
        records[1]
    path.write_text(text[5:])
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        records[2]
    path.unlink()
    with pytest.raises(ValueError, match="records.jsonl: cannot be read"):
        records[0]


def test_many_lines_take_little_memory(folder):
    """The index has 18 bytes for each example, and an opened file holds no text."""
    path = write(folder, *[PAIR] * 5000)
    records = opened(path)
    header = 1000
    assert (folder / "records.jsonl.index").stat().st_size < 5000 * 18 + header
    assert len(pickle.dumps(records)) < 2 * header
