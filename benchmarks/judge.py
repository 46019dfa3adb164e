"""Scores of SemGen-Bench: a vision model judges the pictures, a table shows the means.

    python -m benchmarks.quality judge --out OUT --endpoint http://localhost:8000/v1 --model NAME
    python -m benchmarks.quality table --out OUT

`judge` asks an OpenAI-compatible endpoint about each picture OUT/fullset/GROUP/KEY.png, with its
source KEY_SRCIMG.png if it is an edit. OUT/verdicts.jsonl gets every verdict at once, so a restart
asks only for what is missing. A verdict belongs to a model, a picture and an instruction; a picture
that was drawn again is judged again. The key of the endpoint comes from the environment,
OPENAI_API_KEY; a local server needs none.
"""
import base64
import contextlib
import csv
import email.utils
import hashlib
import http.client
import json
import os
import queue
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from checkpoint import read_json, write_atomically
from records import origin_of, read_lines
from run_folder import append

GROUPS = ("t2i_long", "t2i_complex", "edit_multi", "edit_complex")
BACKOFF = 1.0                   # seconds before the first repetition, doubled for each further one
LONGEST_WAIT = 3600.0           # seconds, even if the server asks for more
REPEATED = 2                    # times that an unreadable answer is asked for again
SILENT = 5                      # pictures in a row without an answer, which end the run
GRACE = 1.0                     # seconds in which a run that ends takes answers under way


# ---------------------------------------------------------------- the question

DRAWN = "A computer program drew this picture from a text. Grade the picture.\n"
EDITED = ("The first picture is the source. A computer program changed it as a text demands; the "
          "second picture is the result. Grade the second picture.\n")
CONSISTENCY = """Give two grades from 0 to 10; fractions are allowed. Use the whole range.

consistency: does the picture show what the text demands? Check every demand: objects, their number,
colours, materials, places and actions, written words, style.
  10  every demand is met
   7  the main demands are met, a detail is wrong or missing
   4  about half of the demands are met
   1  hardly one demand is met
   0  the picture has nothing to do with the text
"""
UNCHANGED = """All that the text does not mention must stay as it is in the source: take points off
for each change that nobody asked for. A result that equals the source, or shows another scene,
gets 0.
"""
QUALITY = """
quality: how well is the picture made, whatever the text says? Look at shapes, faces and hands,
light and shadows, sharpness, seams and noise.
  10  flawless: natural, or in one consistent style
   7  good, with small flaws on a closer look
   4  plain flaws: deformed objects, blur, wrong perspective, visible borders
   1  hardly anything can be recognised
   0  noise, or a blank picture

Grade each on its own: a fine picture of something else has a low consistency and a high quality.
Reply with one JSON object of this form and nothing else:
{"consistency": GRADE, "quality": GRADE, "reason": "one short sentence"}

The text:
"""


def words(instruction: str, is_edit: bool) -> str:
    """The text of the question about a picture."""
    rubric = EDITED + CONSISTENCY + UNCHANGED if is_edit else DRAWN + CONSISTENCY
    return rubric + QUALITY + instruction


class Verdict(NamedTuple):
    """Two grades from 0 to 10, or None for both without a readable answer."""
    consistency: float | None
    quality: float | None
    reason: str


def _grade(value: object) -> float:
    """A number from 0 to 10, also one in a string. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is no number")
    number = float(value) if isinstance(value, str) else value
    if not 0 <= number <= 10:                                   # NaN neither
        raise ValueError(f"{value!r:.60} is not from 0 to 10")
    return float(number)


def read_answer(text: str) -> Verdict | None:
    """The last JSON object with two valid grades in an answer, outside of its thoughts."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    verdict = None
    for brace in re.finditer("{", text):
        try:
            answer, _ = json.JSONDecoder().raw_decode(text, brace.start())
            grades = _grade(answer["consistency"]), _grade(answer["quality"])
        except (ValueError, KeyError, RecursionError):
            continue
        verdict = Verdict(*grades, str(answer.get("reason", "")))
    return verdict


# ---------------------------------------------------------------- pictures and verdicts

class Item(NamedTuple):
    """A picture to judge."""
    group: str
    key: int                        # row of the benchmark
    files: tuple[Path, ...]         # the picture; before it its source, if it is an edit
    digest: str                     # of the files and the rubric

    @property
    def is_edit(self) -> bool:
        return len(self.files) == 2


def find_items(out: Path) -> list[Item]:
    """The pictures in OUT/fullset. Raises ValueError if there is none, or a source is missing."""
    items = []
    for group in GROUPS:
        paths = [path for path in (out / "fullset" / group).glob("*.png") if path.stem.isdecimal()]
        for path in sorted(paths, key=lambda path: int(path.stem)):
            is_edit, source = group.startswith("edit"), path.with_stem(f"{path.stem}_SRCIMG")
            if is_edit and not source.is_file():
                raise ValueError(f"{path}: its source picture {source.name} is missing; remove the "
                                 "picture and draw it again")
            files = (source, path) if is_edit else (path,)
            content = [words("", is_edit).encode(), *(file.read_bytes() for file in files)]
            digest = hashlib.blake2b(b"".join(content), digest_size=16).hexdigest()
            items.append(Item(group, int(path.stem), files, digest))
    if not items:
        raise ValueError(f"{out}: holds no pictures fullset/{GROUPS[0]}/0.png, ...; draw them: "
                         f"python -m benchmarks.quality semgen --out {out} ...")
    return items


def _prompt(path: Path) -> object:
    """The prompt in the text chunks of a picture, None without one. Raises ValueError."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.info.get("prompt")
    except Exception as error:              # Pillow raises almost every kind for a broken file
        raise ValueError(f"{path}: cannot be read as a picture ({error}); remove it and draw it "
                         "again") from error


def find_instructions(items: list[Item], bench: Path | None) -> dict[Item, str]:
    """The instruction of each picture: from the benchmark's file, else from the picture."""
    instructions, lines = {}, list(read_lines(bench)) if bench else []
    rows = [read_json(line.content, origin_of(bench, line.number)) for line in lines]
    for item in items:
        path = item.files[-1]
        text = _prompt(path)
        if bench:
            text = rows[item.key].get(item.group) if item.key < len(rows) else None
        if not isinstance(text, str):
            raise ValueError(f"{path}: {bench} has no text {item.group} in row {item.key}" if bench
                             else f"{path}: holds no prompt; add --bench FILE, the file with it")
        instructions[item] = text
    return instructions


Verdicts = dict[tuple[str, Item], dict]     # by judge and picture: instruction and two grades


def read_verdicts(path: Path, items: list[Item]) -> Verdicts:
    """The newest verdict of each judge on each picture.

    None of these is one: an answer that could not be read, a line cut off by a kill, a line about
    a picture that has changed.
    """
    known = {(item.group, item.key, item.digest): item for item in items}
    verdicts = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            v = json.loads(line)
            judged = v["model"], known[v["group"], v["key"], v["digest"]]
            verdicts.pop(judged, None)
            verdicts[judged] = {"instruction": v["instruction"],
                                "consistency": _grade(v["consistency"]),
                                "quality": _grade(v["quality"])}
        except (ValueError, KeyError, TypeError):
            continue
    return verdicts


def write_scores(out: Path, model: str, items: list[Item], verdicts: Verdicts) -> None:
    """Write a CSV file for each group in the released columns, without the missing."""
    folder = out / (re.sub(r"[^\w.-]+", "_", model).strip("._") or "judge")

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("data_type", "source_image", "generated_image", "instruction",
                             "sementics_score", "quality_score"))               # as released
            for item in items:
                if item.group == group and (v := verdicts.get((model, item))):
                    source = item.files[0] if item.is_edit else ""
                    writer.writerow((group, source, item.files[-1], *v.values()))

    for group in dict.fromkeys(item.group for item in items):
        write_atomically(folder / f"{out.resolve().name}_{group}_score.csv", write)


# ---------------------------------------------------------------- the endpoint

def seconds_to_wait(attempt: int, asked_for: str | None) -> float:
    """Seconds before a repetition: exponential with jitter, or more where the server asks for it.

    asked_for: the header Retry-After, a number of seconds or a date.
    """
    wait = min(BACKOFF * 2 ** attempt, 60) * random.uniform(0.5, 1.5)
    try:
        if re.fullmatch(r"[\d.]+", asked_for or ""):
            seconds = float(asked_for)
        else:
            seconds = email.utils.parsedate_to_datetime(asked_for).timestamp() - time.time()
    except (TypeError, ValueError):
        seconds = 0.0
    return max(wait, min(seconds, LONGEST_WAIT))


class Endpoint:
    """An OpenAI-compatible server with a vision model; several threads may ask it."""

    def __init__(self, address: str, model: str, timeout: float, retries: int):
        if not re.match("https?://", address):
            raise ValueError(f"--endpoint {address}: expected an address such as "
                             "http://localhost:8000/v1")
        self.address = address.rstrip("/").removesuffix("/chat/completions")
        self.model, self.timeout, self.retries = model, timeout, retries
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch("[!-~]*", self.key):                # http.client would print it
            raise ValueError("OPENAI_API_KEY: expected ASCII characters without spaces")
        self.stop = threading.Event()

    def check(self) -> None:
        """Raise ValueError if nothing answers at the address, whatever the answer is."""
        try:
            urllib.request.urlopen(f"{self.address}/models", timeout=10).close()
        except urllib.error.HTTPError as error:
            error.close()
        except (urllib.error.URLError, http.client.InvalidURL) as error:
            reason = getattr(error, "reason", error)
            raise ValueError(f"--endpoint {self.address}: cannot be reached ({reason}); start the "
                             "server or correct the address") from error
        except (OSError, http.client.HTTPException):
            pass                                                # busy; requests are repeated

    def _text(self, content: bytes) -> str:
        """A reply without the key, which some servers repeat in their errors."""
        text = content.decode("utf-8", errors="replace")
        return text.replace(self.key, "***") if self.key else text

    def _post(self, body: bytes) -> str:
        """Send a request; the model's answer, or the whole reply if there is none in it."""
        request = urllib.request.Request(f"{self.address}/chat/completions", body,
                                         {"Content-Type": "application/json"})
        if self.key:                                            # not for a server it redirects to
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            text = self._text(reply.read())
        try:
            return str(json.loads(text)["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError, RecursionError):
            return text

    def _answer(self, body: bytes) -> str:
        """Repeat a request until it is answered.

        Raises ValueError for one that the server refuses, TimeoutError after the last repetition.
        """
        for attempt in range(self.retries + 1):
            asked_for = None
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                problem, asked_for = f"HTTP {error.code}", error.headers.get("Retry-After")
                with contextlib.suppress(OSError, http.client.HTTPException), error:
                    problem += f": {' '.join(self._text(error.read()).split()):.300}"
                if error.code not in (408, 429) and error.code < 500:
                    raise ValueError(f"{self.address}, model {self.model}: {problem}") from None
            except (OSError, http.client.HTTPException) as error:
                problem = str(error) or type(error).__name__
            if attempt == self.retries or self.stop.wait(seconds_to_wait(attempt, asked_for)):
                break
        raise TimeoutError(f"{self.address}: no answer after {attempt + 1} requests, the last: "
                           f"{problem}")

    def ask(self, item: Item, instruction: str) -> Verdict:
        """Ask for the verdict on a picture; again, if the answer cannot be read."""
        content: list[dict] = [{"type": "text", "text": words(instruction, item.is_edit)}]
        for path in item.files:
            url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        request = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        for attempt in range(1 + REPEATED):                     # warmer, for another answer
            text = self._answer(json.dumps(request | {"temperature": 0.3 * attempt}).encode())
            if verdict := read_answer(text):
                return verdict
        return Verdict(None, None, f"cannot be read: {text:.300}")


# ---------------------------------------------------------------- judging

def ask_all(server: Endpoint, questions: dict[Item, str], workers: int,
            record: Callable[[Item, Verdict], None]) -> None:
    """Ask about all pictures, several at a time; record each verdict at once, in this thread.

    However it ends, answers that are there, or come within GRACE seconds, are recorded.
    Raises ValueError if the server refuses a request, TimeoutError if it falls silent.
    """
    wanted: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
    answers: list[tuple[Item, Verdict | Exception]] = []
    for item in (*questions, *[None] * workers):                # None ends a thread
        wanted.put(item)

    def work() -> None:
        for item in iter(wanted.get, None):
            if server.stop.is_set():
                return
            try:
                answers.append((item, server.ask(item, questions[item])))
            except Exception as error:                          # raised again below
                if not isinstance(error, TimeoutError):
                    server.stop.set()                           # no thread asks anything else
                answers.append((item, error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    recorded = silent = 0
    try:
        for thread in threads:
            thread.start()
        while recorded < len(questions):
            if recorded == len(answers):
                time.sleep(0.02)        # no wait for an answer: on Windows Ctrl-C ends none
                continue
            item, answer = answers[recorded]
            silent = silent + 1 if isinstance(answer, TimeoutError) else 0
            if isinstance(answer, Exception) and silent in (0, SILENT):
                raise answer
            record(item, Verdict(None, None, str(answer)) if silent else answer)
            recorded += 1               # last, so that Ctrl-C within `record` loses nothing
    finally:
        server.stop.set()
        end = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(0, end - time.monotonic()))
        for item, answer in answers[recorded:]:
            if isinstance(answer, Verdict):
                record(item, answer)


def judge(out: Path, endpoint: str, model: str, workers: int = 4, timeout: float = 120,
          retries: int = 6, bench: Path | None = None) -> None:
    """Ask for every verdict that OUT/verdicts.jsonl lacks, then write the CSV files.

    workers: requests at a time; timeout: of a request, in seconds; retries: repetitions of a
    request without an answer; bench: the benchmark's file, for pictures without a prompt in them.
    Raises ValueError that says what is kept; KeyboardInterrupt after a note.
    """
    if workers < 1 or not 0 < timeout < 1e6 or retries < 0:
        raise ValueError(f"workers {workers}, timeout {timeout}, retries {retries}: expected at "
                         "least one worker, a positive timeout and no negative number of retries")
    server = Endpoint(endpoint, model, timeout, retries)
    path, items = out / "verdicts.jsonl", find_items(out)
    instructions = find_instructions(items, bench)

    def open_questions() -> dict[Item, str]:
        verdicts = read_verdicts(path, items)
        return {item: text for item, text in instructions.items()
                if verdicts.get((model, item), {}).get("instruction") != text}

    def record(item: Item, verdict: Verdict) -> None:
        line = {"model": model, "group": item.group, "key": item.key, "digest": item.digest,
                "instruction": instructions[item], **verdict._asdict()}
        append(path, json.dumps(line) + "\n")
        bar.update()

    def state() -> str:
        missing = len(open_questions())
        note = "; the same command asks for the others" if missing else ""
        return f"{len(items) - missing} of {len(items)} pictures have a verdict in {path}{note}"

    questions = open_questions()
    sizes = {group: sum(item.group == group for item in items) for group in GROUPS}
    note = "" if len(set(sizes.values())) == 1 else "; the groups differ in size: some are missing"
    print(f"pictures: {', '.join(f'{group} {size}' for group, size in sizes.items())}{note}")
    print(f"{len(items) - len(questions)} of {len(items)} are judged already", flush=True)
    bar = tqdm(total=len(items), initial=len(items) - len(questions), desc="judging",
               unit="picture", disable=not questions)
    try:
        if questions:
            server.check()
            if path.exists() and not path.read_bytes().endswith(b"\n"):
                append(path, "\n")                              # after a line cut off by a kill
            ask_all(server, questions, min(workers, len(questions)), record)
    except KeyboardInterrupt:
        print(f"\n{state()}", file=sys.stderr)
        raise
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; {state()}") from error
    finally:
        bar.close()
        write_scores(out, model, items, read_verdicts(path, items))
    print(state())


# ---------------------------------------------------------------- the table

PAPER = Path(__file__).with_name("semgen_paper.csv")
GRADES = ("consistency", "quality", "overall")
RESAMPLES = 10_000


def read_paper(path: Path) -> list[dict]:
    """The rows of the paper's Table 4; none without the file. Raises ValueError."""
    if not path.exists():
        return []
    rows = []
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        try:
            grades = {name: _grade(row[name]) for name in GRADES}
            if row["group"] not in (*GROUPS, "average"):
                raise ValueError("unknown group")
            rows.append({"model": f"{row['model']} (paper)", "group": row["group"], **grades})
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: {row}: {error}; expected the columns model,group,"
                             f"{','.join(GRADES)} with grades from 0 to 10") from error
    return rows


def mean_scores(name: str, items: list[Item], verdicts: Verdicts, model: str) -> list[dict]:
    """The mean scores of pictures by one judge: a row for each group, one for the groups' average.

    overall: mean of sqrt(consistency * quality); low, high: its 95 % interval by the bootstrap,
    which resamples the rows of the benchmark, for all groups together. missing: rows without a
    score; a row counts if any group has a picture of it. The average is over groups with scores.
    """
    keys = sorted({item.key for item in items})
    weights = np.random.default_rng(0).multinomial(
        len(keys), np.full(len(keys), 1 / len(keys)), RESAMPLES)                # (resamples, keys)
    means, resampled, scored = {}, {}, {}
    for group in GROUPS:
        found = {item.key: verdicts[model, item] for item in items
                 if item.group == group and (model, item) in verdicts}
        scored[group] = len(found)
        if found:
            grades = np.array([(v["consistency"], v["quality"]) for v in found.values()])  # (n, 2)
            overall = np.sqrt(grades.prod(axis=1))                              # (n,)
            means[group] = [*grades.mean(axis=0), overall.mean()]
            chosen = weights[:, [keys.index(key) for key in found]]             # (resamples, n)
            with np.errstate(invalid="ignore"):                 # a resample may lack all of them
                resampled[group] = chosen @ overall / chosen.sum(axis=1)        # (resamples,)
    if means:
        for column in (means, resampled):
            column["average"] = np.mean(list(column.values()), axis=0)
        scored["average"] = sum(scored.values())
    rows = []
    for group, count in scored.items():
        row = {"model": name, "judge": model, "group": group}
        if group in means:
            interval = np.nanquantile(resampled[group], (0.025, 0.975))
            row |= zip((*GRADES, "low", "high"), map(float, (*means[group], *interval)))
        possible = len(keys) * (len(GROUPS) if group == "average" else 1)
        rows.append(row | {"scored": count, "missing": possible - count})
    return rows


def table(out: Path) -> str:
    """The scores of OUT beside the paper's, in Markdown; also in OUT/table.md and table.jsonl."""
    items, path, rows = find_items(out), out / "verdicts.jsonl", []
    verdicts = read_verdicts(path, items)
    if not verdicts:
        raise ValueError(f"{path}: holds no verdict on these pictures; ask for them: "
                         f"python -m benchmarks.quality judge --out {out} ...")
    for model in sorted({model for model, _ in verdicts}):
        rows += mean_scores(out.resolve().name, items, verdicts, model)
    paper = read_paper(PAPER)
    rows = sorted(rows + paper, key=lambda row: (*GROUPS, "average").index(row["group"]))
    header = ("group", "model", "judge", *GRADES, "95 % interval", "scored", "missing")
    lines = [header, ["---"] * len(header)]
    for row in rows:
        shown = {name: f"{x:.2f}" if isinstance(x, float) else str(x) for name, x in row.items()}
        if "low" in row:
            shown["95 % interval"] = f"{shown['low']} to {shown['high']}"
        lines.append([shown.get(name, "-") for name in header])
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    text += ("\nGrades from 0 to 10; overall: mean of sqrt(consistency * quality), with its "
             "bootstrap interval over the rows.\n")
    text += ("The paper's judge is Qwen2.5-VL-72B with another rubric: compare with care.\n"
             if paper else "The paper's rows are not here: write its Table 4 (arXiv 2509.23760) "
             f"into benchmarks/{PAPER.name}, columns model,group,{','.join(GRADES)}.\n")
    as_lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(out / "table.md", lambda file: file.write_text(text, encoding="utf-8"))
    write_atomically(out / "table.jsonl", lambda file: file.write_text(as_lines))
    return text
