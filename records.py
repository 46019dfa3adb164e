"""Records in JSON lines: one parser, read whole or line by line through an index.

`read_jsonl` reads a file whole and checks its pictures. `open_records` serves files of any size: it
parses a line when its example is asked for. Its index holds 18 bytes for each example: where the
line is, and all that grouping needs. The index is built once, in a file beside the JSONL file, and
memory-mapped, so that all processes of a machine share it. data.py documents the formats.
"""
import bisect
import hashlib
import itertools
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from checkpoint import write_atomically
from text_encoder import T5Tokenizer, asked

MASK_TOKEN = "<extra_id_0>"


class Example(NamedTuple):
    """One training example, whatever its format was."""
    task: str                       # the record's name, or text_to_image, image_to_image, questions
    image: Path | None              # the picture to generate, or that the text is about; or none
    sources: tuple[Path, ...]       # source pictures of editing and composition
    prompt: str | None              # input of the image branch; None: no image is generated
    question: str                   # asked of the text branch; empty: to describe the picture
    caption: str                    # target of the text branch; empty: no text is generated
    before: tuple[tuple[str, str], ...] = ()    # earlier questions and answers of a dialogue

    @property
    def pictures(self) -> tuple[Path, ...]:
        """All of its pictures: the image and then the sources."""
        return (self.image, *self.sources) if self.image else ()


# ---------------------------------------------------------------- parsing

class Unusable(ValueError):
    """A record of a known form that lacks a text."""


def _shown(value) -> str:
    return "null" if value is None else f"{value!r:.60}"


def _text(value, name: str, expected: str = "a text") -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_shown(value)}, expected {expected}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds {value[error.start]!r}, half of a character in UTF-16; "
                         "write the character whole or remove it") from error
    return value


def _needed(record: dict, key: str) -> str:
    text = _text(record[key], f"'{key}'").strip()
    if not text:
        raise Unusable(f"'{key}' is empty")
    return text


def _files(record: dict, key: str, folder: Path) -> list[Path]:
    """The pictures of a key: a list of names, or one name as LLaVA writes it."""
    names = record[key]
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list):
        raise ValueError(f"'{key}' is {_shown(names)}, expected a list of file names")
    if not all(_text(name, f"'{key}'", "file names") for name in names):
        raise ValueError(f"'{key}' holds an empty name")
    return [folder / name for name in names]


def _turn_texts(turns, shows_picture: bool) -> list[str]:
    """The texts of a conversation, which the human begins and gpt ends.

    A turn is a string or {"from": ..., "value": ...}. <image> stands for the record's picture.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"'conversations' is {_shown(turns)}, expected a list of turns")
    texts = []
    for number, turn in enumerate(turns, start=1):
        text = turn["value"] if isinstance(turn, dict) else turn
        text = _text(text, f"turn {number}")
        if "<image>" in text and not shows_picture:
            raise KeyError("image")                             # perhaps under another name
        text = text.replace("<image>", "").strip()
        speakers = ("gpt", "assistant") if len(texts) % 2 else ("human", "user")
        if isinstance(turn, dict) and "from" in turn and turn["from"] not in speakers:
            if turn["from"] == "system" and not text:
                continue
            raise ValueError(f"turn {number} is from {_shown(turn['from'])}, expected "
                             f"{' or '.join(speakers)}: human and gpt take turns, human first")
        texts.append(text)
    return texts


def parse_record(record: dict, folder: Path, dialogues: bool = False) -> list[Example]:
    """The examples of a record: one for each question, or with `dialogues` one for all of them.

    Raises KeyError or ValueError for an unknown form, Unusable if a text is empty that is needed.
    """
    if not isinstance(record, dict):
        raise ValueError(f"the line is {_shown(record)}, expected an object")
    task = record.get("task")
    if task is not None:
        _text(task, "'task'", "a name")
    if "original_images" in record:
        sources = tuple(_files(record, "original_images", folder))
        targets = _files(record, "generated_images", folder)
        if not targets:
            raise ValueError("'generated_images' is empty, expected a file name")
        kind = "image_to_image" if sources else "text_to_image"
        caption = _text(record.get("caption", ""), "'caption'").strip()
        prompt = _needed(record, "edit_prompt")
        return [Example(task or kind, targets[0], sources, prompt, "", caption)]

    texts = _turn_texts(record["conversations"], shows_picture="image" in record)
    is_text_only = "image" not in record and "instruction" not in record and all(texts)
    pictures = [] if is_text_only else _files(record, "image", folder)
    if "instruction" in record:
        if len(pictures) < 2:
            raise ValueError(f"has an instruction and {len(pictures)} picture(s), expected sources "
                             "and then the target")
        *sources, target = pictures
        instruction = _needed(record, "instruction")
        return [Example(
            task or "image_to_image", target, tuple(sources), instruction, "", texts[0])]

    if len(pictures) != 1 and not is_text_only:
        raise ValueError(f"has {len(pictures)} pictures and no instruction, expected one picture, "
                         "or for a text without a picture no key 'image'")
    picture = None if is_text_only else pictures[0]
    if len(texts) == 2 and not texts[1]:                        # the answer is "<image>"
        if not texts[0]:
            raise Unusable("the caption is empty")
        return [Example(task or "text_to_image", picture, (), texts[0], "", texts[0])]
    if len(texts) % 2:
        raise ValueError(f"has {len(texts)} turns, expected questions and answers in pairs")
    if not all(texts):
        raise Unusable(f"has {len(texts)} turns, some of them empty")
    turns = tuple(zip(texts[::2], texts[1::2]))
    task = task or "questions"
    if dialogues:
        return [Example(task, picture, (), None, *turns[-1], turns[:-1])]
    return [Example(task, picture, (), None, *turn) for turn in turns]


# ---------------------------------------------------------------- lines

class Line(NamedTuple):
    """A line of a JSONL file that is not blank."""
    offset: int                     # of its first byte
    number: int                     # from 1
    content: bytes


_SPACE = b"\xef\xbb\xbf \t\r\n"                                 # and a byte order mark


def origin_of(path: Path, line: int) -> str:
    return f"{path}, line {line}"


def _conversion(path: Path) -> str:
    """A command that writes a JSON array as JSON lines, beside the file."""
    code = ("import json, sys; [print(json.dumps(r)) for r in "
            "json.load(open(sys.argv[1], encoding='utf-8-sig'))]")
    return f'python -c "{code}" "{path}" > "{path.with_name(path.stem)}-lines.jsonl"'


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a JSONL file. Raises ValueError if there is none, or a JSON array."""
    try:
        file = open(path, "rb")
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: no such file; expected a JSONL file (formats: data.py)") from error
    with file:
        offset, blank = 0, True
        for number, content in enumerate(file, start=1):
            if stripped := content.strip(_SPACE):
                if blank and stripped.startswith(b"["):
                    raise ValueError(f"{path}: a JSON array, expected JSON lines, one object per "
                                     f"line; convert it:  {_conversion(path)}")
                yield Line(offset, number, content)
                blank = False
            offset += len(content)
    if blank:
        raise ValueError(f"{path}: no records; expected one JSON object per line")


def parse_line(content: bytes, path: Path, number: int, dialogues: bool = False) -> list[Example]:
    """The examples of a line. Raises ValueError that names it, Unusable with the reason alone."""
    where = origin_of(path, number)
    try:
        text = content.decode("utf-8-sig")                      # without a byte order mark
        return parse_record(json.loads(text), path.parent, dialogues)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    except KeyError as error:
        raise ValueError(f"{where}: the key {error} is missing; formats: data.py") from error
    except Unusable:
        raise
    except ValueError as error:
        raise ValueError(f"{where}: {error}; formats: data.py") from error


def find_file(path: str | Path) -> Path:
    """The file of this name, or of its other form in Unicode: Macs write é as two characters.

    Returns `path` itself if there is no file under any form.
    """
    path = Path(path)
    if os.path.exists(path) or str(path).isascii():
        return path
    found = Path()
    for part in path.parts:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        found = next((found / form for form in forms if os.path.exists(found / form)), found / part)
    return found if os.path.exists(found) else path


def read_jsonl(path: str | Path) -> list[Example]:
    """Read every example of a JSONL file.

    Raises ValueError that names the line, if it is not JSON, has no known form, lacks a text or
    names a picture that does not exist.
    """
    path = Path(path)
    examples: list[Example] = []
    files: dict[Path, Path] = {}                                # each picture is looked up once
    for line in read_lines(path):
        where = origin_of(path, line.number)
        try:
            parsed = parse_line(line.content, path, line.number)
        except Unusable as error:
            raise ValueError(f"{where}: {error}; formats: data.py") from error
        for e in parsed:
            for picture in e.pictures:
                if picture not in files:
                    files[picture] = find_file(picture)
                    if not os.path.isfile(files[picture]):
                        raise ValueError(f"{where}: no such picture: {picture}")
            image, *sources = [files[picture] for picture in e.pictures] or [None]
            examples.append(e._replace(image=image, sources=tuple(sources)))
    return examples


# ---------------------------------------------------------------- texts and kinds

class Kind(NamedTuple):
    """What grouping needs of an example besides the length of its prompt."""
    task: str
    sources: int
    no_prompt: bool
    no_image: bool
    has_caption: bool


def kind_of(e: Example) -> Kind:
    return Kind(e.task, len(e.sources), e.prompt is None, e.image is None, bool(e.caption))


class Texts(NamedTuple):
    """An example's texts as the tokenizer reads them."""
    tokens: int                     # of its prompt, as far as they fit
    problem: str                    # why the example cannot be trained; empty: it can
    cut: list[str]                  # texts that are longer than the model reads
    unknown: list[str]              # texts with words that the tokenizer does not know


def length_for(no_image: bool, text_length: int, text_only_length: int) -> int:
    """The longest text that the model reads, in tokens, with a picture or without."""
    return text_only_length if no_image and text_only_length else text_length


def examine(e: Example, tokenizer: T5Tokenizer, length: int,
            template: str = "{question}") -> Texts:
    """Measure the texts of an example.

    length: the longest that the model reads, in tokens, see `length_for`; template: of questions,
    see `asked`.
    """
    turns = [(asked(question, template), answer)
             for question, answer in (*e.before, (e.question, e.caption))]
    ids = {text: tokenizer.encode(text) for text in {e.prompt or "", *itertools.chain(*turns)}}
    first = turns[0][0]
    question = len(ids[first]) - 1                              # without </s>
    problem = ""
    if any(MASK_TOKEN in text for text in ids):
        problem = (f"a text of the task {e.task} holds the mask token {MASK_TOKEN}; remove it"
                   if e.image is None else
                   f"the text of {e.image} holds the mask token {MASK_TOKEN}; remove it")
    elif length - question < 2:
        problem = (f"the question {first!r:.80} has {question} tokens: too little room for an "
                   f"answer, expected at most {length - 2} of the length {length}")
    sizes = {e.prompt or "": len(ids[e.prompt or ""])}
    sizes[e.caption] = sum(len(ids[q]) - 1 + len(ids[a]) for q, a in turns)     # of all turns
    cut = [text for text, size in sizes.items() if size > length]
    unknown = [text for text in ids if tokenizer.unk_id in ids[text]]
    return Texts(min(len(ids[e.prompt or ""]), length), problem, cut, unknown)


# ---------------------------------------------------------------- the index

ROW = np.dtype([
    ("offset", "<i8"),              # of the line
    ("line", "<u4"),
    ("number", "<u2"),              # of the example in its line
    ("kind", "<u2"),                # row of the header's kinds
    ("tokens", "<u2")])             # of the prompt
_SHOWN = 3                                                      # examples in a note


def _expected_state(path: Path, tokenizer: T5Tokenizer, length: int, text_only_length: int,
                    template: str, dialogues: bool) -> dict:
    """Everything that an index depends on."""
    pieces = hashlib.sha256(tokenizer.pieces.serialized_model_proto()).hexdigest()
    file = path.stat()
    return {"version": 2, "size": file.st_size, "time": file.st_mtime_ns, "pieces": pieces,
            "sentinels": tokenizer.sentinels, "text_length": length,
            "text_only_length": text_only_length, "question_template": template,
            "dialogues": dialogues}


class _Note:
    """How many texts have a flaw, and the first of them, each with its line."""

    def __init__(self):
        self.count, self.first = 0, []

    def add(self, texts: list[str], line: int) -> None:
        self.count += len(texts)
        for text in texts[:_SHOWN - len(self.first)]:
            self.first.append((line, text[:60]))


def _build_index(path: Path, state: dict, tokenizer: T5Tokenizer, target: Path) -> None:
    """Write the index of a JSONL file: rows, header as JSON, the header's size in 8 bytes.

    Raises ValueError for a line that is not JSON or has no known form, and if no example is left.
    """
    digest, kinds = hashlib.sha256(), {}
    unusable: list[tuple[int, str]] = []                        # (line, reason)
    cut, unknown = _Note(), _Note()
    lengths = state["text_length"], state["text_only_length"]
    template = state["question_template"]

    def rows_of(line: Line) -> list[tuple]:
        try:
            examples = parse_line(line.content, path, line.number, state["dialogues"])
        except Unusable as error:
            unusable.append((line.number, str(error)))
            return []
        rows = []
        for number, e in enumerate(examples):
            length = length_for(e.image is None, *lengths)
            texts = examine(e, tokenizer, length, template)
            if texts.problem:
                unusable.append((line.number, texts.problem))
                continue
            cut.add(texts.cut, line.number)
            unknown.add(texts.unknown, line.number)
            kind = kinds.setdefault(kind_of(e), len(kinds))
            if max(number, kind) >= 2 ** 16:
                raise ValueError(f"{origin_of(path, line.number)}: more than {2 ** 16} questions "
                                 "of a line, or tasks of a file")
            rows.append((line.offset, line.number, number, kind, texts.tokens))
        return rows

    def write(temporary: Path) -> None:
        count = 0
        with open(temporary, "wb") as file, tqdm(
                total=state["size"], desc=f"indexing {path.name}", unit="B", unit_scale=True,
                leave=False, delay=1) as bar:
            all_lines = read_lines(path)
            while lines := list(itertools.islice(all_lines, 4096)):
                rows = [row for line in lines for row in rows_of(line)]
                file.write(np.array(rows, ROW).tobytes())
                count += len(rows)
                for line in lines:
                    digest.update(line.content)
                bar.update(lines[-1].offset + len(lines[-1].content) - bar.n)
            if not count:
                raise ValueError(f"{path}: no usable records, for example line "
                                 f"{unusable[0][0]}: {unusable[0][1]}")
            header = {"state": state, "rows": count, "digest": digest.hexdigest(),
                      "kinds": list(kinds), "unusable": unusable,
                      "cut": vars(cut), "unknown": vars(unknown)}
            encoded = json.dumps(header).encode()
            file.write(encoded + len(encoded).to_bytes(8, "little"))

    write_atomically(target, write)


def _read_header(index: Path, state: dict) -> dict | None:
    """The header of an index; None if it is missing, cut off or of another state."""
    try:
        with open(index, "rb") as file:
            size = file.seek(-8, os.SEEK_END) + 8
            length = int.from_bytes(file.read(8), "little")
            file.seek(size - 8 - length)
            header = json.loads(file.read(length))
        whole = header["rows"] * ROW.itemsize + length + 8 == size
        return header if whole and header["state"] == state else None
    except (OSError, ValueError, OverflowError, KeyError, TypeError):
        return None


def build_beside(path: Path, ending: str, folder: Path, build: Callable[[Path], None],
                 is_valid: Callable[[Path], bool]) -> Path:
    """The file of this ending that belongs to a JSONL file; built if it is missing or old.

    It lies beside the JSONL file, or in `folder` where that cannot be written.
    """
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:8]
    places = path.with_name(f"{path.name}.{ending}"), folder / f"{path.name}.{name}.{ending}"
    for place in places:
        if is_valid(place):
            return place
    try:
        build(places[0])
        return places[0]
    except OSError:                                             # read-only, or full
        build(places[1])
        return places[1]


class Part(NamedTuple):
    """A JSONL file and its index."""
    path: Path
    index: Path
    header: dict


def _open_part(path: Path, tokenizer: T5Tokenizer, length: int, text_only_length: int, folder: Path,
               template: str, dialogues: bool) -> Part:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a JSONL file (formats: data.py)")
    state = _expected_state(path, tokenizer, length, text_only_length, template, dialogues)
    index = build_beside(path, "index", folder,
                         lambda target: _build_index(path, state, tokenizer, target),
                         lambda place: _read_header(place, state) is not None)
    return Part(path, index, _read_header(index, state))


class Records(Sequence[Example]):
    """The usable examples of JSONL files, each parsed when it is asked for; see `open_records`.

    chosen: the examples to keep, by their numbers in all files; None: all of them.
    """

    def __init__(self, parts: list[Part], chosen: np.ndarray | None = None):
        self.parts, self.chosen = parts, chosen
        self.rows = [np.memmap(part.index, ROW, "r", shape=part.header["rows"]) for part in parts]
        self.starts = [0, *itertools.accumulate(len(rows) for rows in self.rows)]

    def __reduce__(self):                                       # a process maps the files anew
        return Records, (self.parts, self.chosen)

    def __len__(self) -> int:
        return self.starts[-1] if self.chosen is None else len(self.chosen)

    def _place(self, i: int) -> tuple[Part, np.void]:
        """The file of example i and its row."""
        i = range(len(self))[i]
        if self.chosen is not None:
            i = int(self.chosen[i])
        k = bisect.bisect_right(self.starts, i) - 1
        return self.parts[k], self.rows[k][i - self.starts[k]]

    def __getitem__(self, i: int) -> Example:
        """Read example i. Raises ValueError that names the line if the file has changed."""
        part, row = self._place(i)
        try:
            with open(part.path, "rb") as file:
                file.seek(row["offset"])
                content = file.readline()
        except OSError as error:
            raise ValueError(f"{part.path}: cannot be read ({error})") from error
        state = part.header["state"]
        examples = parse_line(content, part.path, row["line"], state["dialogues"])
        kind = Kind(*part.header["kinds"][row["kind"]])
        if row["number"] >= len(examples) or kind_of(examples[row["number"]]) != kind:
            raise ValueError(f"{self.origin(i)}: has changed since the start; leave the file as it "
                             "is, or start again")
        return examples[row["number"]]

    def origin(self, i: int) -> str:
        """The file and line of example i."""
        part, row = self._place(i)
        return origin_of(part.path, row["line"])

    def select(self, chosen: Sequence[int]) -> "Records":
        """These examples only, by their numbers in this sequence."""
        chosen = np.asarray(chosen)
        return Records(self.parts, chosen if self.chosen is None else self.chosen[chosen])

    def columns(self) -> tuple[list[Kind], np.ndarray, np.ndarray]:
        """All kinds, and for each example the number of its kind and its prompt's tokens."""
        kinds: dict[Kind, int] = {}
        codes, tokens = [], []
        for part, rows in zip(self.parts, self.rows):
            named = [Kind(*values) for values in part.header["kinds"]]
            numbers = [kinds.setdefault(kind, len(kinds)) for kind in named]
            codes.append(np.array(numbers, np.int32)[rows["kind"]])
            tokens.append(np.asarray(rows["tokens"]))
        columns = np.concatenate(codes), np.concatenate(tokens)                     # (n,) each
        if self.chosen is not None:
            columns = columns[0][self.chosen], columns[1][self.chosen]
        return list(kinds), *columns

    @property
    def digest(self) -> str:
        """A number in hex that changes with the contents of the files and with their order."""
        digests = "".join(part.header["digest"] for part in self.parts)
        return hashlib.sha256(digests.encode()).hexdigest()

    @property
    def unusable(self) -> list[tuple[str, str]]:
        """Records that lack a text or cannot be trained: (file and line, reason)."""
        return [(origin_of(part.path, line), reason)
                for part in self.parts for line, reason in part.header["unusable"]]

    def notes(self) -> list[str]:
        """Lines about texts that training would lose silently; none, if there are none."""
        length = self.parts[0].header["state"]["text_length"]
        flaws = {"cut": f"texts longer than {length} tokens, which are cut",
                 "unknown": "texts with words that the tokenizer does not know"}
        notes = []
        for key, flaw in flaws.items():
            count = sum(part.header[key]["count"] for part in self.parts)
            first = [f"{origin_of(part.path, line)}: {text!r}"
                     for part in self.parts for line, text in part.header[key]["first"]]
            if count:
                notes.append(f"{flaw}: {count}, for example {'; '.join(first[:_SHOWN])}")
        return notes


def open_records(paths: Sequence[Path], tokenizer: T5Tokenizer, text_length: int, folder: Path,
                 template: str = "{question}", dialogues: bool = False,
                 text_only_length: int = 0) -> Records:
    """Open JSONL files as one sequence of examples; build the indexes that are missing or old.

    folder: takes the index of a file whose own folder is read-only. template: of questions.
    dialogues: all questions of a record are one example. text_only_length: of texts without a
    picture; 0: text_length.
    Raises ValueError that names the line, if it is not JSON or has no known form.
    """
    return Records([_open_part(Path(path), tokenizer, text_length, text_only_length, folder,
                               template, dialogues) for path in paths])
