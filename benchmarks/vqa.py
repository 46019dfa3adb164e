"""Questions about pictures: files of questions, answers of a model, scores.

Two kinds of files:
  JSON lines     {"question_id": 1, "image": "a.jpg", "question": "...", "answers": [ten texts]}
                 "answer": one right text in place of "answers"; both are optional
                 options as "A": "...", "B": "...", ...; "answer" is then the letter
                 "hint", "answer_type" or "category" are optional
  MMBench's TSV  columns index, question, image (base64, or the index of the row that has it), and
                 optional hint, A, B, C, D, answer, category (open-compass/VLMEvalKit)

Texts are scored by VQAv2's rule, options by their exact letter.
"""
import base64
import csv
import json
import os
import re
import string
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import read_json
from jobs import load_source
from records import find_file, origin_of, read_lines
from run_folder import append
from text_encoder import asked

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


# ---------------------------------------------------------------- scores

# the rule of GT-Vision-Lab/VQA, vqaEval.py, with its marks and words
_MARKS = ";/[]\"{}()=+\\_-><@`,?!"
_NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                    "0 0 1 2 3 4 5 6 7 8 9 10".split()))
_ARTICLES = ("a", "an", "the")
# endings, and the words before them that are commonly written without an apostrophe; words that
# would read as another one ("ill", "shed", "its") and double endings ("couldn't've") are left out
_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
           "wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you"}
CONTRACTIONS = {(word + ending).replace("'", ""): word + ending
                 for ending, words in _ENDINGS.items() for word in words.split()}
CONTRACTIONS |= {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"}


def normalize(text: str) -> str:
    """Normalize an answer as VQAv2 does: case, punctuation, numbers, articles, contractions."""
    plain = " ".join(text.split())
    in_number = re.search(r"\d,\d", plain)
    result = plain
    for mark in _MARKS:
        at_space = f"{mark} " in plain or f" {mark}" in plain
        result = result.replace(mark, "" if at_space or in_number else " ")
    result = re.sub(r"\.(?!\d)", "", result)                    # periods, except of decimals
    words = [_NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_score(answer: str, references: Sequence[str]) -> float:
    """VQAv2's accuracy: min(matches / 3, 1), averaged over all references but one.

    A single reference is matched exactly.
    """
    answer = normalize(answer)
    matches = [normalize(reference) == answer for reference in references]
    if len(matches) == 1:
        return float(matches[0])
    others = [sum(matches) - match for match in matches]
    return sum(min(count / 3, 1) for count in others) / len(others)


def option_letter(answer: str) -> str | None:
    """The option that an answer names: "B", "B.", "(B)", "B) text", "Answer: B"; else None."""
    form = r"(?i:answer\s*:\s*)?(?:\(([A-Z])\)(?:\s.*)?|([A-Z])(?:[.)](?:\s.*)?)?)"
    match = re.fullmatch(form, answer.strip(), re.DOTALL)
    return match and (match[1] or match[2])


# ---------------------------------------------------------------- questions

class Question(NamedTuple):
    """A question about a picture."""
    id: int | str
    text: str
    prompt: str                     # the question with hint, options and suffix
    picture: Path | str             # a file, or base64
    options: str                    # their letters; empty: the answer is a text
    references: tuple[str, ...]     # right answers, or the right letter; (): unknown
    kind: str                       # of answer, or the category

    def score(self, answer: str) -> float | None:
        """The score of an answer from 0 to 1; None without a reference."""
        if not self.references:
            return None
        if self.options:
            return float(option_letter(answer) == self.references[0])
        return vqa_score(answer, self.references)


def _cell(record: dict, name: str) -> str:
    """A text of a record; empty for none, which pandas writes as NaN."""
    value = record.get(name)
    return "" if value is None or value != value else str(value).strip()


def _references(record: dict, options: str) -> tuple[str, ...]:
    """The right answers of a record. Raises ValueError for another form."""
    answers = record.get("answers") or []
    texts = [a.get("answer") if isinstance(a, dict) else a for a in answers]
    if answers and (len(texts) < 4 or not all(isinstance(text, str) for text in texts)):
        raise ValueError(f"'answers' is {answers!r:.60}, expected the ten answers of VQAv2; write "
                         "a single right one as 'answer'")
    if not texts and _cell(record, "answer"):
        texts = [_cell(record, "answer")]
    if options and texts and (len(texts) > 1 or texts[0] not in options):
        raise ValueError(f"'answer' is {texts[0]!r:.60}, expected one of the letters {options}")
    return tuple(texts)


def _question(record: dict, picture: Path | str, name: str, suffix: str | None) -> Question:
    """Read a record whose id has this name. Raises ValueError for what is missing or wrong."""
    key, text = record.get(name), _cell(record, "question")
    if isinstance(key, bool) or not isinstance(key, (int, str)) or key == "" or not text:
        raise ValueError(f"expected a '{name}' and a 'question'")
    options = "".join(c for c in string.ascii_uppercase if _cell(record, c))
    if suffix is None:
        suffix = LETTER if options else SHORT
    lines = [_cell(record, "hint"), text, *(f"{c}. {_cell(record, c)}" for c in options), suffix]
    prompt = " ".join(line for line in lines if line)
    kind = _cell(record, "answer_type") or _cell(record, "category")
    return Question(key, text, prompt, picture, options, _references(record, options), kind)


def _jsonl_records(path: Path, images: Path) -> Iterator[tuple[str, dict, Path, str]]:
    """Yield where a record is, the record, its picture and the name of its id."""
    for line in read_lines(path):
        where = origin_of(path, line.number)
        record = read_json(line.content, where)
        picture = find_file(images / _cell(record, "image"))
        if not picture.is_file():
            raise ValueError(f"{where}: no such picture: {picture}; expected 'image' to name a "
                             "file in --images")
        yield where, record, picture, "question_id"


def _tsv_records(path: Path) -> Iterator[tuple[str, dict, str, str]]:
    """The same of MMBench's TSV, where a short cell names the row that has the picture."""
    csv.field_size_limit(2 ** 31 - 1)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as tab-separated text ({error})") from error
    if not rows or not {"index", "question", "image"} <= rows[0].keys():
        raise ValueError(f"{path}: expected the columns index, question and image, as MMBench has "
                         "them")
    pictures = {row["index"]: row["image"] or "" for row in rows}
    for row in rows:
        where = f"{path}, index {row['index']}"
        picture = row["image"] or ""
        if len(picture) <= 64:                                  # as VLMEvalKit reads it
            picture = pictures.get(picture, "")
        if len(picture) <= 64:
            raise ValueError(f"{where}: 'image' is {row['image']!r:.70}, expected a picture in "
                             "base64 or the index of a row that has one")
        index = _cell(row, "index")
        key = int(index) if index.isdecimal() else index
        yield where, row | {"index": key}, picture, "index"


def read_questions(path: Path, images: Path | None, suffix: str | None = None) -> list[Question]:
    """Read questions from JSON lines, or from a .tsv file.

    images: folder of the pictures that JSON lines name; None: that of the file.
    suffix: text after each question; None: `LETTER` where there are options, else `SHORT`.
    Raises ValueError that names the line.
    """
    is_tsv = path.suffix.lower() == ".tsv"
    records = _tsv_records(path) if is_tsv else _jsonl_records(path, images or path.parent)
    questions: dict[int | str, Question] = {}
    for where, record, picture, name in records:
        try:
            question = _question(record, picture, name, suffix)
            if question.id in questions:
                raise ValueError(f"a second question with the {name} {question.id!r}")
        except ValueError as error:
            raise ValueError(f"{where}: {error}; formats: benchmarks/vqa.py") from error
        questions[question.id] = question
    return list(questions.values())


# ---------------------------------------------------------------- answers

_START = b'{"question_id": '                                    # of every line of answers


def read_answers(out: Path, prompts: Mapping[int | str, str]) -> dict[int | str, str]:
    """Read the answers that are there already; a last line that a kill cut off is removed.

    Raises ValueError for a file of another kind, and for answers to other prompts.
    """
    content = out.read_bytes() if out.exists() else b""
    whole = content[:content.rfind(b"\n") + 1]
    answers = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        where = origin_of(out, number)
        record = read_json(line, where)
        if not {"question_id", "prompt", "answer"} <= record.keys():
            raise ValueError(f"{where}: no answer of this program; choose another --out")
        key = record["question_id"]
        if prompts.get(key, record["prompt"]) != record["prompt"]:
            raise ValueError(f"{where}: question {key} was asked in other words; choose another "
                             "--out")
        answers[key] = record["answer"]
    if rest := content[len(whole):]:
        if not rest.startswith(_START[:len(rest)]):
            raise ValueError(f"{out}: no answers of this program; choose another --out")
        os.truncate(out, len(whole))
    return answers


def _load(question: Question, size: tuple[int, int], squash: bool, folder: Path) -> Tensor:
    """Load the picture of a question, (3, H, W). folder: for a decoded one."""
    if isinstance(question.picture, Path):
        return load_source(question.picture, size, squash)
    file = folder / "picture"
    try:
        file.write_bytes(base64.b64decode("".join(question.picture.split()), validate=True))
        return load_source(file, size, squash)
    except ValueError as error:                                 # base64's own errors are some, too
        raise ValueError(f"question {question.id}: its picture cannot be read "
                         f"({error.__cause__ or error})") from error


def answer_missing(pipeline, questions: Sequence[Question], out: Path, batch: int = 8,
                   seed: int = 0, steps: int | None = None, squash: bool = False,
                   progress: bool = True) -> dict[int | str, str]:
    """Ask the questions that have no answer in the file `out`; append each batch when it is done.

    pipeline: a `sample.Pipeline`. Batches are fixed parts of the list, with a seed each, so an
    interrupted run gives the same answers. Returns all answers by id. Raises ValueError, after all
    other questions are answered, for pictures that cannot be read and questions that are too long.
    """
    s = pipeline.settings
    prompts = {question.id: asked(question.prompt, s.question_template) for question in questions}
    answers = read_answers(out, prompts)
    starts = [start for start in range(0, len(questions), batch)
              if any(q.id not in answers for q in questions[start:start + batch])]
    unusable = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for start in tqdm(starts, desc="questions", unit="batch", disable=not progress):
            group, images = [], []
            for question in questions[start:start + batch]:
                try:
                    pipeline.tokenizer.dialogue([prompts[question.id]], length=s.text_length)
                    size = s.image_size, s.image_size
                    images.append(_load(question, size, squash, Path(folder)))
                    group.append(question)
                except ValueError as error:                     # too long, or unreadable
                    unusable.append(str(error))
            if not group:
                continue
            texts = pipeline.caption(torch.stack(images), seed + start, steps,
                                     questions=[question.prompt for question in group])
            lines = []
            for question, text in zip(group, texts):
                if question.id not in answers:
                    answers[question.id] = text
                    record = {"question_id": question.id, "question": question.text,
                              "prompt": prompts[question.id], "answer": text}
                    if question.references:
                        record["score"] = question.score(text)
                    lines.append(json.dumps(record) + "\n")
            append(out, "".join(lines))                         # at once: a kill cuts one line off
    if unusable:
        raise ValueError(f"{len(unusable)} questions have no answer: {'; '.join(unusable[:3])}")
    return answers


# ---------------------------------------------------------------- summary

def _accuracy(scores: Sequence[float]) -> dict[str, float | int]:
    return {"accuracy": round(sum(scores) / len(scores), 4), "scored": len(scores)}


def summarize(questions: Sequence[Question], answers: dict[int | str, str]) -> dict:
    """Count and score the answers: all, by kind, and MMBench's circular accuracy.

    MMBench asks a question again with its options shifted, under the index + 1000000 n. Its
    circular accuracy counts a question only if every form of it is answered right, as in
    VLMEvalKit's multiple_choice.py.
    """
    answered = [q for q in questions if q.id in answers]
    scored = [(q, q.score(answers[q.id])) for q in answered if q.references]
    summary = {"questions": len(questions), "answered": len(answered),
               "empty": sum(not answers[q.id].strip() for q in answered)}
    if not scored:
        return summary
    kinds: dict[str, list[float]] = {}
    forms: dict[int, list[float]] = {}
    for question, score in scored:
        kinds.setdefault(question.kind, []).append(score)
        if question.options and isinstance(question.id, int):
            forms.setdefault(question.id % 1_000_000, []).append(score)
    summary["all"] = _accuracy([score for _, score in scored])
    if any(len(scores) > 1 for scores in forms.values()):
        summary["circular"] = _accuracy([min(scores) for scores in forms.values()])
    if set(kinds) != {""}:
        summary["by kind"] = {kind or "none": _accuracy(kinds[kind]) for kind in sorted(kinds)}
    return summary


def summary_lines(summary: dict) -> list[str]:
    """A summary as lines of text."""
    rows = {name: summary[name] for name in ("all", "circular") if name in summary}
    rows |= summary.get("by kind", {})
    counts = ", ".join(f"{name} {summary[name]}" for name in ("questions", "answered", "empty"))
    return [counts, *(f"{name:40} {row['accuracy']:.4f} of {row['scored']}"
                      for name, row in rows.items())]
