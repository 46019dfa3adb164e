"""quality.py, vqa.py: names and layouts of each benchmark, what is drawn again, answers, scores."""
import argparse
import base64
import csv
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from release import write_unialignment

from benchmarks import quality, vqa
from benchmarks.quality import TABLES, draw, main, seed_of
from benchmarks.vqa import (LETTER, SHORT, answer_missing, normalize, option_letter, read_questions,
                            summarize, summary_lines, vqa_score)
from config import DUAL
from data import load_picture, to_pictures
from jobs import draw_missing, load_source
from sample import load_pipeline

SEMGEN = Path(__file__).parent.parent / "semgen"
BENCH = SEMGEN / "semgen_bench.jsonl"
ROWS = [json.loads(line) for line in BENCH.read_text().splitlines()]
GROUPS = ("t2i_long", "t2i_complex", "edit_multi", "edit_complex")


def options(**values) -> argparse.Namespace:
    """The options that a table reads."""
    return argparse.Namespace(**{
        "out": Path("out"), "bench": BENCH, "images": SEMGEN, "groups": GROUPS, "limit": None,
        "seed": 0, "guidance": 7.0, "edit_guidance": 9.0, "samples": 4, **values})


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def names(table) -> list[str]:
    return [job.path.as_posix() for job in table.jobs]


# ---------------------------------------------------------------- items and names

def test_the_seed_of_an_item_depends_on_seed_and_names_alone():
    assert seed_of(0, "edit_multi", 3) == 213232907280428
    seeds = {seed_of(*names) for names in
             [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, 1, "a"), (-1, "a", 1)]}
    assert len(seeds) == 6 and all(0 <= seed < 2 ** 48 for seed in seeds)


def test_semgen_has_four_groups_in_the_released_layout():
    table = TABLES["semgen"](options())
    assert names(table) == [f"out/fullset/{group}/{key}.png" for group in GROUPS
                            for key in range(3)]
    assert [job.prompt for job in table.jobs] == [row[group] for group in GROUPS for row in ROWS]
    photographs = [SEMGEN / "images" / f"{i}.jpg" for i in (1, 2, 10)]      # key 2 is image 10
    assert [job.sources for job in table.jobs] == [()] * 6 + [(p,) for p in photographs] * 2
    assert [job.guidance for job in table.jobs] == [7.0] * 6 + [9.0] * 6
    assert len({job.seed for job in table.jobs}) == 12
    assert table.copies == {Path(f"out/fullset/{group}/{key}_SRCIMG.png"): photographs[key]
                            for group in GROUPS[2:] for key in range(3)}
    assert not table.sheets and not table.texts


def test_a_part_of_semgen_has_the_same_items():
    whole = {job.path: job for job in TABLES["semgen"](options()).jobs}
    part = TABLES["semgen"](options(limit=2, groups=["edit_multi", "t2i_long"])).jobs
    assert len(part) == 4 and all(whole[job.path] == job for job in part)
    other = TABLES["semgen"](options(seed=1)).jobs
    assert all(whole[job.path].seed != job.seed for job in other)


def test_photographs_are_found_by_name_in_any_folder(tmp_path):
    for row, folder in zip(ROWS, ("a", "b/c", ".")):
        name = Path(row["image_path"]).name
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(SEMGEN / "images" / name, tmp_path / folder / name)
    jobs = TABLES["semgen"](options(images=tmp_path, groups=["edit_multi"])).jobs
    assert [job.sources for job in jobs] == [
        (tmp_path / name,) for name in ("a/1.jpg", "b/c/2.jpg", "10.jpg")]
    windows = lines(tmp_path / "bench.jsonl", ROWS[0] | {"image_path": "D:\\photos\\1.jpg"})
    [job] = TABLES["semgen"](options(bench=windows, images=tmp_path, groups=["edit_multi"])).jobs
    assert job.sources == (tmp_path / "a/1.jpg",)
    shutil.copy(tmp_path / "10.jpg", tmp_path / "a")
    with pytest.raises(ValueError, match=r"line 3: 2 files named 10\.jpg in .*expected one"):
        TABLES["semgen"](options(images=tmp_path))


@pytest.mark.parametrize("row, message", [
    (ROWS[0] | {"edit_multi": " "}, "line 2: 'edit_multi' is ' ', expected a text"),
    ({"image_path": "1.jpg"}, "line 2: 't2i_long' is None, expected a text"),
    (ROWS[0] | {"image_path": "x/99.jpg"}, "line 2: 0 files named 99.jpg in "),
    ([1], "line 2: expected a JSON object")])
def test_rows_that_are_wrong_name_their_line(tmp_path, row, message):
    bench = lines(tmp_path / "bench.jsonl", ROWS[0], row)
    with pytest.raises(ValueError, match=re.escape(message)):
        TABLES["semgen"](options(bench=bench))


def test_geneval_has_a_folder_for_each_prompt(tmp_path):
    rows = [{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"},
            {"tag": "colors", "include": [], "prompt": "a röd car"}]
    table = TABLES["geneval"](options(file=lines(tmp_path / "m.jsonl", *rows), samples=2))
    assert names(table) == ["out/00000/samples/0000.png", "out/00000/samples/0001.png",
                            "out/00001/samples/0000.png", "out/00001/samples/0001.png"]
    assert [job.prompt for job in table.jobs] == ["two cats"] * 2 + ["a röd car"] * 2
    assert len({job.seed for job in table.jobs}) == 4
    assert {path.as_posix(): json.loads(text) for path, text in table.texts.items()} == {
        "out/00000/metadata.jsonl": rows[0], "out/00001/metadata.jsonl": rows[1]}


def test_dpg_has_a_sheet_for_each_prompt_file(tmp_path):
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.mkdir()
    (prompts / "partiprompts10.txt").write_text("a cat\n")
    (prompts / "COCOval2014000000012896.txt").write_text("two\ndogs")
    table = TABLES["dpg"](options(file=prompts, out=out))
    assert list(table.sheets) == [out / "COCOval2014000000012896.png", out / "partiprompts10.png"]
    assert [job.path for job in table.jobs] == [part for parts in table.sheets.values()
                                                for part in parts]
    assert {job.path.parent for job in table.jobs} == {tmp_path / "out-parts"}
    assert [job.prompt for job in table.jobs] == ["two dogs"] * 4 + ["a cat"] * 4
    assert len({job.seed for job in table.jobs}) == 8
    assert len(TABLES["dpg"](options(file=prompts, out=out, limit=1)).jobs) == 4
    with pytest.raises(ValueError, match="no folder with prompts"):
        TABLES["dpg"](options(file=out, out=out))


def test_flat_has_a_picture_for_each_line(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa cat\n\n  two dogs \r\n", encoding="utf-8")
    table = TABLES["flat"](options(file=tmp_path / "p.txt"))
    assert names(table) == ["out/00000.png", "out/00001.png"]
    assert [job.prompt for job in table.jobs] == ["a cat", "two dogs"]


def test_imgedit_has_a_picture_for_each_key(tmp_path):
    edits = {"1082": {"id": "images/1.jpg", "prompt": "make it red", "edit_type": "adjust"},
             "7": {"id": "images/2.jpg", "prompt": "remove it", "edit_type": "remove"}}
    (tmp_path / "e.json").write_text(json.dumps(edits))
    table = TABLES["imgedit"](options(file=tmp_path / "e.json"))
    assert names(table) == ["out/1082.png", "out/7.png"]
    assert table.jobs[0].sources == (SEMGEN / "images/1.jpg",) and not table.copies
    assert table.jobs[1].prompt == "remove it" and table.jobs[1].guidance == 9.0


GEDIT = {"key": "0f38", "task_type": "subject-add", "instruction": "add a dog",
         "instruction_language": "en", "input_image": "images/1.jpg", "Intersection_exist": True}


def test_gedit_has_folders_of_tasks_and_languages(tmp_path):
    rows = GEDIT, GEDIT | {"instruction_language": "cn", "instruction": "加一只狗"}
    table = TABLES["gedit"](options(file=lines(tmp_path / "g.jsonl", *rows)))
    assert names(table) == ["out/fullset/subject-add/en/0f38.png",
                            "out/fullset/subject-add/cn/0f38.png"]
    assert table.jobs[0].seed != table.jobs[1].seed and table.jobs[1].prompt == "加一只狗"
    assert table.copies == {Path(f"out/fullset/subject-add/{language}/0f38_SRCIMG.png"):
                            SEMGEN / "images/1.jpg" for language in ("en", "cn")}


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "..", ".x", "C:x", 7])
def test_a_name_from_a_file_stays_in_its_folder(tmp_path, name):
    file = lines(tmp_path / "g.jsonl", GEDIT | {"key": name})
    with pytest.raises(ValueError, match="line 1: 'key' is .*expected a (plain file name|text)"):
        TABLES["gedit"](options(file=file))


# ---------------------------------------------------------------- drawing

@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The folder of released weights in miniature."""
    folder = tmp_path_factory.mktemp("release")
    write_unialignment(folder)
    return folder / "UniAlignment"


def model_options(release) -> list[str]:
    return ["--model", str(release), "--image-size", "32"]


def semgen_options(release, out) -> list[str]:
    return ["semgen", "--bench", str(BENCH), "--images", str(SEMGEN), "--out", str(out),
            "--steps", "1", "--batch", "2", *model_options(release)]


@pytest.fixture(scope="module")
def drawn(release, tmp_path_factory):
    """A folder with SemGen-Bench, drawn in one go. Read only."""
    out = tmp_path_factory.mktemp("drawn") / "out"
    main(semgen_options(release, out))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def test_semgen_from_end_to_end(drawn):
    pictures = {f"fullset/{group}/{key}.png" for group in GROUPS for key in range(3)}
    sources = {f"fullset/{group}/{key}_SRCIMG.png" for group in GROUPS[2:] for key in range(3)}
    files = contents(drawn)
    assert set(files) == pictures | sources
    assert len({files[name] for name in pictures}) == 12
    for name in files:
        assert load_picture(drawn / name).size == (32, 32)
    with Image.open(drawn / "fullset/edit_multi/2.png") as picture:
        used = json.loads(picture.info["settings"])
        assert picture.info["prompt"] == ROWS[2]["edit_multi"]
    assert used["guidance"] == 9 and used["steps"] == 1
    assert used["seed"] == seed_of(0, "edit_multi", 2)
    assert used["negative"] == DUAL.negative_prompt
    cropped = load_source(SEMGEN / "images/10.jpg", (32, 32))[None]
    copy = np.array(load_picture(drawn / "fullset/edit_multi/2_SRCIMG.png"))
    assert np.array_equal(copy, to_pictures(cropped)[0])


def test_only_what_is_missing_is_drawn_again(drawn, release, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(drawn, out)
    whole = contents(out)
    (out / "fullset/t2i_long/1.png").unlink()
    half = out / "fullset/edit_multi/0.png"
    half.write_bytes(half.read_bytes()[:len(half.read_bytes()) // 2])
    (out / "fullset/edit_complex/2_SRCIMG.png").write_bytes(b"")
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    main(semgen_options(release, out))
    assert contents(out) == whole
    assert "drawn: 2, there before: 10, missing: 0" in capsys.readouterr().out
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"0.png", "2_SRCIMG.png"}


def test_ranks_draw_the_same_pictures(drawn, release, tmp_path):
    a = quality.parser().parse_args(semgen_options(release, tmp_path / "out"))
    pipeline, jobs = load_pipeline(a), TABLES["semgen"](a).jobs
    shares = [[job.path for job in draw_missing(pipeline, jobs, 2, rank, 2, 1, progress=False)]
              for rank in (1, 0)]
    assert len(shares[0]) == len(shares[1]) == 6 and not set(shares[0]) & set(shares[1])
    whole = contents(drawn)
    assert contents(tmp_path / "out") == {job.path.relative_to(tmp_path / "out").as_posix():
                                          whole[job.path.relative_to(tmp_path / "out").as_posix()]
                                          for job in jobs}


def test_squash_keeps_all_of_a_photograph_and_is_not_mixed_with_crops(drawn, release, tmp_path,
                                                                     capsys):
    out = tmp_path / "out"
    shutil.copytree(drawn / "fullset/edit_multi", out / "fullset/edit_multi")
    with pytest.raises(SystemExit, match="0_SRCIMG.png: differs from .*choose another --out"):
        main([*semgen_options(release, out), "--squash", "--groups", "edit_multi"])
    main([*semgen_options(release, tmp_path / "other"), "--squash", "--groups", "edit_multi",
          "--limit", "1"])
    copy = np.array(load_picture(tmp_path / "other/fullset/edit_multi/0_SRCIMG.png"))
    with Image.open(SEMGEN / "images/1.jpg") as photograph:
        squashed = photograph.resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(copy, np.array(squashed))


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_an_unusable_photograph_stops_before_the_model_is_loaded(tmp_path, damage, monkeypatch):
    shutil.copytree(SEMGEN / "images", tmp_path / "images")
    if damage == "missing":
        (tmp_path / "images/2.jpg").unlink()
    else:
        (tmp_path / "images/2.jpg").write_bytes(b"no picture")
    monkeypatch.setattr(quality, "load_pipeline", lambda a: pytest.fail("was loaded"))
    message = {"missing": "line 2: 0 files named 2.jpg",
               "broken": "1 of 3 source pictures cannot be used: .*2.jpg"}[damage]
    with pytest.raises(SystemExit, match=message):
        main(["semgen", "--bench", str(BENCH), "--images", str(tmp_path / "images"),
              "--out", str(tmp_path / "out"), "--model", "nowhere"])
    assert not (tmp_path / "out").exists()


def test_two_items_with_one_name_and_no_items(tmp_path):
    file = lines(tmp_path / "g.jsonl", GEDIT, GEDIT)
    with pytest.raises(ValueError, match="en.0f38.png: two items of the benchmark"):
        draw(options(layout="gedit", file=file))
    (tmp_path / "p.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="no items"):
        draw(options(layout="flat", file=tmp_path / "p.txt"))


def test_geneval_from_end_to_end(release, tmp_path, capsys):
    rows = [{"tag": "a", "prompt": "two cats"}, {"tag": "b", "prompt": "dog " * 300}]
    command = ["prompts", "--layout", "geneval", "--file", str(lines(tmp_path / "m.jsonl", *rows)),
               "--out", str(tmp_path / "out"), "--samples", "2", "--steps", "1",
               *model_options(release)]
    main(command)
    assert sorted(contents(tmp_path / "out")) == [
        f"0000{i}/{name}" for i in range(2)
        for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")]
    assert json.loads((tmp_path / "out/00001/metadata.jsonl").read_text()) == rows[1]
    assert "256 tokens, 2 of 4 prompts are longer and cut off" in capsys.readouterr().err
    main(command)
    assert "drawn: 0, there before: 4, missing: 0" in capsys.readouterr().out
    lines(tmp_path / "m.jsonl", {"tag": "c", "prompt": "two cats"}, rows[1])
    with pytest.raises(SystemExit, match="metadata.jsonl: belongs to another item"):
        main(command)


def test_dpg_from_end_to_end(release, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/7.txt").write_text("a cat")
    command = ["prompts", "--layout", "dpg", "--file", str(tmp_path / "prompts"),
               "--out", str(tmp_path / "out"), "--steps", "1", *model_options(release)]
    main(command)
    assert list(contents(tmp_path / "out")) == ["7.png"]            # all that its scorer may see
    sheet = np.array(load_picture(tmp_path / "out/7.png"))
    parts = [np.array(load_picture(tmp_path / f"out-parts/7-{n}.png")) for n in range(4)]
    assert sheet.shape == (64, 64, 3)
    for part, (y, x) in zip(parts, [(0, 0), (0, 32), (32, 0), (32, 32)]):
        assert np.array_equal(sheet[y:y + 32, x:x + 32], part)
    assert len({part.tobytes() for part in parts}) == 4
    before = contents(tmp_path)
    (tmp_path / "out/7.png").write_bytes(before["out/7.png"][:100])
    (tmp_path / "out-parts/7-2.png").unlink()
    main(command)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("layout", ["imgedit", "gedit"])
def test_edits_from_end_to_end(release, tmp_path, layout):
    if layout == "imgedit":
        (tmp_path / "e.json").write_text(json.dumps({"5": {"id": "images/1.jpg", "prompt": "x"}}))
        file, expected = tmp_path / "e.json", ["5.png"]
    else:
        file = lines(tmp_path / "g.jsonl", GEDIT)
        expected = [f"fullset/subject-add/en/0f38{end}.png" for end in ("", "_SRCIMG")]
    main(["edits", "--layout", layout, "--file", str(file), "--images", str(SEMGEN),
          "--out", str(tmp_path / "out"), "--steps", "1", *model_options(release)])
    assert sorted(contents(tmp_path / "out")) == expected


# ---------------------------------------------------------------- scores

@pytest.mark.parametrize("text, expected", [
    ("Yes.", "yes"), ("The Cat", "cat"), ("an apple a day", "apple day"), ("two dogs", "2 dogs"),
    ("none", "0"), ("ten", "10"), ("3.5", "3.5"), ("no. 5.", "no 5"), ("1,000", "1000"),
    ("black,white", "black white"), ("black, white", "black white"), ("t-shirt", "t shirt"),
    ("left-hand - side", "lefthand side"), ("it's 5:30", "it's 5:30"), ("dont know", "don't know"),
    ("Whats  up?\n", "what's up"), ("couldve", "could've"), ("youre", "you're"), ("wont", "won't"),
    ("twas", "'twas"), ("shed", "shed"), ("well", "well"), ("its", "its"), ("the", ""), ("", "")])
def test_normalized_answers(text, expected):
    assert normalize(text) == expected


def test_the_contractions_are_words_with_one_apostrophe_less():
    assert {"aint": "ain't", "cant": "can't", "hes": "he's", "itll": "it'll", "oclock": "o'clock",
            "shant": "shan't", "somebodys": "somebody's", "someoned": "someone'd",
            "thered": "there'd", "theyve": "they've", "whyre": "why're", "yall": "y'all"
            }.items() <= vqa.CONTRACTIONS.items()
    assert all(short == word.replace("'", "") for short, word in vqa.CONTRACTIONS.items())
    assert not {"ill", "hell", "shell", "shed", "wed", "were", "well", "its", "id", "im"
                } & vqa.CONTRACTIONS.keys()


@pytest.mark.parametrize("matches, expected", [
    (0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_scores_by_hand(matches, expected):
    """One match of ten: nine of the ten subsets of nine have it, so 9/10 of 1/3."""
    references = ["two"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_score("2", references) == pytest.approx(expected)


def test_a_single_reference_is_matched_after_normalization():
    assert vqa_score("A dog.", ["dog"]) == 1 and vqa_score("dogs", ["dog"]) == 0
    assert vqa_score("", ["dog"]) == 0


@pytest.mark.parametrize("answer, letter", [
    ("B", "B"), (" B \n", "B"), ("B.", "B"), ("B)", "B"), ("(B)", "B"), ("B) two dogs", "B"),
    ("(B) two\ndogs", "B"), ("B. two dogs", "B"), ("Answer: B", "B"), ("answer : (B)", "B"),
    ("ANSWER:B.", "B"),
    ("b", None), ("B dogs", None), ("A dog", None), ("two dogs", None), ("", None), ("AB", None),
    ("A or B", None), ("A, B", None), ("(B", None), ("B.C", None), ("Both", None),
    ("The answer is B", None), ("Answer B", None), ("É", None), ("1", None)])
def test_only_exact_letters_name_an_option(answer, letter):
    assert option_letter(answer) == letter


# ---------------------------------------------------------------- questions

def test_questions_from_json_lines(tmp_path):
    people = [{"answer": "yes", "answer_id": i} for i in range(10)]
    file = lines(
        tmp_path / "q.jsonl",
        {"question_id": 7, "image": "images/1.jpg", "question": "Is it red?", "answers": people,
         "answer_type": "yes/no"},
        {"question_id": "x", "image": "images/2.jpg", "question": "What is it?", "answer": "cat"},
        {"question_id": 8, "image": "images/2.jpg", "question": "What is it?", "hint": "Look.",
         "A": "cat", "B": "dog", "C": None, "D": float("nan"), "answer": "B",
         "category": "animals"},
        {"question_id": 9, "image": "images/2.jpg", "question": "Why?"})
    first, second, third, last = read_questions(file, SEMGEN)
    assert first.prompt == f"Is it red? {SHORT}" and first.text == "Is it red?"
    assert first.references == ("yes",) * 10 and first.kind == "yes/no" and first.id == 7
    assert first.picture == SEMGEN / "images/1.jpg"
    assert second.references == ("cat",) and second.kind == "" and second.id == "x"
    assert third.prompt == f"Look. What is it? A. cat B. dog {LETTER}"
    assert third.options == "AB" and third.references == ("B",) and third.kind == "animals"
    assert last.references == () and last.score("because") is None
    assert third.score("(B) dog") == 1 and third.score("dog") == 0
    assert read_questions(file, SEMGEN, "Be short.")[2].prompt.endswith("B. dog Be short.")
    assert read_questions(file, SEMGEN, "")[0].prompt == "Is it red?"


QUESTION = {"question_id": 1, "image": "images/1.jpg", "question": "What?"}


@pytest.mark.parametrize("changes, message", [
    ({"question_id": None}, "expected a 'question_id' and a 'question'"),
    ({"question_id": True}, "expected a 'question_id'"), ({"question": " "}, "and a 'question'"),
    ({"image": "none.jpg"}, "no such picture: "), ({"image": None}, "no such picture: "),
    ({"answers": ["a", "b"]}, "expected the ten answers of VQAv2"),
    ({"answers": [1] * 10}, "expected the ten answers"),
    ({"A": "x", "B": "y", "answer": "C"}, "'answer' is 'C', expected one of the letters AB"),
    ({"A": "x", "B": "y", "answer": "x"}, "'answer' is 'x', expected one of the letters AB"),
    ({"A": "x", "B": "y", "answers": ["A"] * 10}, "expected one of the letters"),
    ({"question_id": 0}, "a second question with the question_id 0")])
def test_questions_that_are_wrong_name_their_line(tmp_path, changes, message):
    file = lines(tmp_path / "q.jsonl", QUESTION | {"question_id": 0}, QUESTION | changes)
    with pytest.raises(ValueError, match="line 2.*" + re.escape(message)):
        read_questions(file, SEMGEN)


def write_tsv(path: Path, *rows: dict) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)),
                                delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def encoded(name: str) -> str:
    return base64.b64encode((SEMGEN / "images" / name).read_bytes()).decode()


MMBENCH = [
    {"index": 3, "question": "What\tis it?", "hint": "", "A": "cat", "B": "sign", "C": "", "D": "",
     "answer": "B", "category": "identity", "image": encoded("1.jpg")},
    {"index": 4, "question": 'Is "it" red?', "hint": "A hint", "A": "yes", "B": "no", "C": "", "D":
     "", "answer": "", "category": "color", "image": encoded("2.jpg")},
    {"index": 1000003, "question": "What\tis it?", "hint": "", "A": "sign", "B": "cat", "C": "",
     "D": "", "answer": "A", "category": "identity", "image": "3"}]


def test_questions_from_mmbench(tmp_path):
    first, second, third = read_questions(write_tsv(tmp_path / "q.tsv", *MMBENCH), None)
    assert first.id == 3 and first.prompt == f"What\tis it? A. cat B. sign {LETTER}"
    assert second.prompt == f'A hint Is "it" red? A. yes B. no {LETTER}'
    assert second.references == () and third.references == ("A",)
    assert first.picture == third.picture == encoded("1.jpg") != second.picture
    assert len(first.picture) < 131072 and first.kind == "identity"
    long = MMBENCH[0] | {"image": "A" * 200_000}                    # beyond the csv module's limit
    [question] = read_questions(write_tsv(tmp_path / "long.tsv", long), None)
    assert len(question.picture) == 200_000


@pytest.mark.parametrize("rows, message", [
    ([MMBENCH[2]], "index 1000003: 'image' is '3', expected a picture in base64 or the index"),
    ([MMBENCH[0], MMBENCH[2] | {"image": "1000003"}], "'image' is '1000003', expected"),
    ([MMBENCH[0] | {"image": ""}], "index 3: 'image' is ''"),
    ([MMBENCH[0], MMBENCH[0]], "a second question with the index 3"),
    ([MMBENCH[0] | {"answer": "D"}], "expected one of the letters AB"),
    ([{"question": "x", "image": "y"}], "expected the columns index, question and image")])
def test_rows_of_mmbench_that_are_wrong(tmp_path, rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_questions(write_tsv(tmp_path / "q.tsv", *rows), None)


# ---------------------------------------------------------------- answers

class Talker:
    """A pipeline whose answers tell what it was asked; it ends after `batches` of them."""
    settings = replace(DUAL, image_size=16, text_length=20)

    def __init__(self, batches=99):
        self.calls, self.batches, self.tokenizer = [], batches, self

    def dialogue(self, questions, length):
        if len(questions[0].split()) > length:
            raise ValueError(f"the question {questions[0]!r:.20} is too long")

    def caption(self, images, seed, steps, questions):
        if len(self.calls) == self.batches:
            raise KeyboardInterrupt
        self.calls.append((seed, [question.split()[0] for question in questions]))
        assert images.shape == (len(questions), 3, 16, 16)
        digests = [hashlib.sha1(image.numpy().tobytes()).hexdigest()[:4] for image in images]
        return [f"{q.split()[0]} {seed} {len(questions)} {digest}"
                for q, digest in zip(questions, digests)]


def five(folder: Path) -> list[vqa.Question]:
    """Five questions; the last is MMBench's first."""
    records = [QUESTION | {"question_id": i, "question": f"q{i} é?"} for i in range(4)]
    questions = read_questions(lines(folder / "q.jsonl", *records), SEMGEN)
    [decoded] = read_questions(write_tsv(folder / "q.tsv", MMBENCH[0]), None, "")
    return [*questions, decoded._replace(id="m", references=())]


def test_an_answered_question_is_not_asked_again(tmp_path):
    questions, whole, out = five(tmp_path), tmp_path / "whole.jsonl", tmp_path / "a/b/out.jsonl"
    talker = Talker()
    answers = answer_missing(talker, questions, whole, batch=2, seed=5, progress=False)
    assert talker.calls == [(5, ["q0", "q1"]), (7, ["q2", "q3"]), (9, ["What"])]
    records = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [record["question_id"] for record in records] == [0, 1, 2, 3, "m"]
    assert records[0] == {"question_id": 0, "question": "q0 é?", "answer": answers[0],
                          "prompt": f"Q: q0 é? {SHORT} A: "}
    assert len({answer[-4:] for answer in answers.values()}) == 1      # both are 1.jpg

    with pytest.raises(KeyboardInterrupt):
        answer_missing(Talker(batches=2), questions, out, batch=2, seed=5, progress=False)
    assert out.read_bytes() == b"".join(whole.read_bytes().splitlines(True)[:4])
    out.write_bytes(out.read_bytes()[:-30])                         # a kill while it was written
    talker = Talker()
    again = answer_missing(talker, questions, out, batch=2, seed=5, progress=False)
    assert talker.calls == [(7, ["q2", "q3"]), (9, ["What"])]       # whole batches
    assert out.read_bytes() == whole.read_bytes() and again == answers
    talker = Talker()
    assert answer_missing(talker, questions, out, batch=2, seed=5, progress=False) == answers
    assert not talker.calls


def test_a_file_of_others_is_left_alone(tmp_path):
    questions, out = five(tmp_path), tmp_path / "out.jsonl"
    for content, message in [
            (b"some notes", "no answers of this program"), (b"notes\n", "line 1.*not valid JSON"),
            (b'{"question_id": 0}\n', "line 1: no answer of this program"),
            (b'{"question_id": 0, "prompt": "q0?", "answer": ""}\n', "asked in other words")]:
        out.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            answer_missing(Talker(), questions, out, progress=False)
        assert out.read_bytes() == content


def test_unusable_questions_wait_until_the_others_are_answered(tmp_path):
    shutil.copytree(SEMGEN / "images", tmp_path / "images")
    records = [QUESTION | {"question_id": i, "question": f"q{i}"} for i in range(4)]
    records[1]["image"], records[2]["question"] = "images/2.jpg", "word " * 20
    good = (tmp_path / "images/2.jpg").read_bytes()
    (tmp_path / "images/2.jpg").write_bytes(good[:5000])
    questions = read_questions(lines(tmp_path / "q.jsonl", *records), None, "")
    broken = vqa.Question("b", "q", "q", "!" * 100, "", (), "")
    cut = broken._replace(id="c", picture=encoded("1.jpg")[:4000])
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="4 questions have no answer: .*2.jpg.*too long"):
        answer_missing(Talker(), [*questions, broken, cut], out, batch=2, progress=False)
    assert [json.loads(line)["question_id"] for line in out.read_text().splitlines()] == [0, 3]
    for question in (broken, cut):
        with pytest.raises(ValueError, match="question [bc]: its picture cannot be read"):
            answer_missing(Talker(), [question], tmp_path / "other.jsonl", progress=False)
    (tmp_path / "images/2.jpg").write_bytes(good)
    answers = answer_missing(Talker(), questions[:2], out, batch=2, progress=False)
    assert sorted(answers) == [0, 1, 3]


def question(key, kind="", options="", *references) -> vqa.Question:
    return vqa.Question(key, "q", "q", Path("x.jpg"), options, references, kind)


def test_the_summary_counts_and_scores():
    questions = [question(1, "number", "", *["2"] * 10), question(2, "number", "", "3"),
                 question(3, "", "", "cat"), question(4), question(5, "number", "", "3")]
    summary = summarize(questions, {1: "two", 2: "4", 3: "", 4: " "})
    assert summary == {
        "questions": 5, "answered": 4, "empty": 2, "all": {"accuracy": 0.3333, "scored": 3},
        "by kind": {"none": {"accuracy": 0.0, "scored": 1},
                    "number": {"accuracy": 0.5, "scored": 2}}}
    text = "\n".join(summary_lines(summary))
    assert "questions 5, answered 4, empty 2" in text and re.search("number +0.5000 of 2", text)
    assert summarize([question(4)], {4: "x"}) == {"questions": 1, "answered": 1, "empty": 0}


def test_circular_accuracy_wants_every_form_right():
    forms = [(3, "B"), (1000003, "A"), (4, "A"), (1000004, "B"), (5, "A")]
    questions = [question(key, "", "AB", letter) for key, letter in forms]
    summary = summarize(questions, {key: letter for key, letter in forms} | {1000004: "A"})
    assert summary["all"] == {"accuracy": 0.8, "scored": 5}
    assert summary["circular"] == {"accuracy": 0.6667, "scored": 3}
    assert "circular" not in summarize(questions[::2], dict(forms))


def test_vqa_from_end_to_end(release, tmp_path, capsys):
    file, out = write_tsv(tmp_path / "q.tsv", *MMBENCH), tmp_path / "out.jsonl"
    command = ["vqa", "--questions", str(file), "--out", str(out), "--steps", "2", "--squash",
               *model_options(release)]
    main([*command, "--limit", "1"])
    first = out.read_bytes()
    main(command)
    assert out.read_bytes().startswith(first)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["question_id"] for record in records] == [3, 4, 1000003]
    assert records[1]["prompt"] == f'Q: A hint Is "it" red? A. yes B. no {LETTER} A: '
    assert [record.get("score") in (0.0, 1.0) for record in records] == [True, False, True]
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert summary["questions"] == summary["answered"] == 3 and summary["all"]["scored"] == 2
    assert summary["circular"]["scored"] == 1
    assert "questions 3, answered 3" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected the name of another .jsonl file"):
        main(["vqa", "--questions", str(out), "--out", str(out)])


# ---------------------------------------------------------------- command line

def test_judge_and_table_get_their_options(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(quality, "judge", lambda *args, **more: calls.append((args, more)))
    monkeypatch.setattr(quality, "score_table", lambda out: f"| {out} |\n")
    main("judge --out o --endpoint http://h/v1 --model m --workers 2 --bench b.jsonl".split())
    assert calls == [((Path("o"), "http://h/v1", "m", 2, 120.0), {"bench": Path("b.jsonl")})]
    main(["table", "--out", "o"])
    assert capsys.readouterr().out == "| o |\n"


@pytest.mark.parametrize("command", ["semgen", "judge", "table", "prompts", "edits", "vqa"])
def test_the_help_of_each_command_has_an_example(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"example:\n  python -m benchmarks.quality {command} --" in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--steps", "0"], ["--guidance", "nan"], ["--limit", "0"],
                                    ["--batch", "x"], ["--groups", "edit"]])
def test_numbers_out_of_range(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["semgen", "--bench", "b", "--images", "i", "--out", "o", *option])
    assert option[0] in capsys.readouterr().err


def test_a_shortage_of_memory_is_one_line(monkeypatch):
    def fail(a):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(quality, "score_table", fail)
    with pytest.raises(SystemExit, match="error: out of memory .*; lower --batch"):
        main(["table", "--out", "o"])
