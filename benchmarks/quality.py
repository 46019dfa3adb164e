"""The paper's benchmarks on a trained or a released model (arXiv 2509.23760, Tables 1 to 4).

  draw SemGen-Bench, have a vision model judge it, print the table
    python -m benchmarks.quality semgen --bench semgen_bench.jsonl --images photos --out OUT \\
        --model UniAlignment
    python -m benchmarks.quality judge --out OUT --endpoint http://localhost:8000/v1 --model NAME
    python -m benchmarks.quality table --out OUT
  draw the prompts of GenEval, of DPG-Bench or of a text file for their public scorers
    python -m benchmarks.quality prompts --layout geneval --file evaluation_metadata.jsonl --out OUT
  draw the edits of ImgEdit or of GEdit-Bench for theirs
    python -m benchmarks.quality edits --layout imgedit --file basic_edit.json --images DIR \\
        --out OUT
  answer questions about pictures, and score the answers
    python -m benchmarks.quality vqa --questions FILE.jsonl --images DIR --out answers.jsonl
  all options of a command
    python -m benchmarks.quality COMMAND --help

A benchmark is a `Table`: the pictures to draw, and the files beside them. One loop draws all
tables. Started again, it draws what is missing; under torchrun, the ranks share the pictures. They
are the same either way.
"""
import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

import numpy as np
import torch

from arguments import add_flow_options, add_model_options
from benchmarks.judge import GROUPS, judge
from benchmarks.judge import table as score_table
from benchmarks.vqa import answer_missing, read_questions, summarize, summary_lines
from checkpoint import read_json, write_atomically
from data import load_picture, to_pictures
from jobs import Job, draw_missing, load_source, readable, save_picture
from ranks import explain, joined_ranks
from records import find_file, origin_of, read_lines
from sample import change_settings, load_pipeline


# ---------------------------------------------------------------- items and names

@dataclass
class Table:
    """The items of a benchmark and the names of its files."""
    jobs: list[Job] = field(default_factory=list)                   # the pictures to draw
    copies: dict[Path, Path] = field(default_factory=dict)          # source as drawn: the source
    sheets: dict[Path, list[Path]] = field(default_factory=dict)    # 2 x 2 pictures: the four
    texts: dict[Path, str] = field(default_factory=dict)            # for the scorer: the content


def seed_of(seed: int, *names: object) -> int:
    """The seed of one item, a function of the run's seed and the item's names alone."""
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


def read_text(path: Path) -> str:
    """Read UTF-8 text. Raises ValueError for other bytes."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error


def rows_of(path: Path, limit: int | None) -> Iterator[tuple[str, dict]]:
    """Yield the rows of a JSONL file, each after the words for its place; at most `limit`."""
    for number, line in enumerate(read_lines(path)):
        if number == limit:
            return
        where = origin_of(path, line.number)
        yield where, read_json(line.content, where)


def text_of(row: dict, key: str, where: str) -> str:
    """A text of a row. Raises ValueError without one."""
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: '{key}' is {text!r:.60}, expected a text")
    return text


def name_of(row: dict, key: str, where: str) -> str:
    """A text of a row that is the name of a file or folder. Raises ValueError for another one."""
    name = text_of(row, key, where)
    if PureWindowsPath(name).name != name or name.startswith("."):
        raise ValueError(f"{where}: '{key}' is {name!r:.60}, expected a plain file name")
    return name


def beside(path: Path) -> Path:
    """The name of a source picture beside its result."""
    return path.with_name(f"{path.stem}_SRCIMG.png")


def semgen(a: argparse.Namespace) -> Table:
    """SemGen-Bench: OUT/fullset/GROUP/KEY.png, with the row's number as key, as released."""
    photographs: dict[str, list[Path]] = {}
    for path in sorted(a.images.rglob("*")):
        photographs.setdefault(path.name, []).append(path)
    rows, sources = list(rows_of(a.bench, a.limit)), []
    for where, row in rows:                         # image_path is absolute, of another machine
        name = PureWindowsPath(text_of(row, "image_path", where)).name
        if len(files := photographs.get(name, [])) != 1:
            raise ValueError(f"{where}: {len(files)} files named {name} in {a.images}, expected "
                             "one; name the folder of the photographs with --images")
        sources += files
    table = Table()
    for group in a.groups:
        is_edit = group.startswith("edit")
        for key, ((where, row), source) in enumerate(zip(rows, sources)):
            path = a.out / "fullset" / group / f"{key}.png"
            table.jobs.append(Job(
                path, text_of(row, group, where), (source,) if is_edit else (),
                seed_of(a.seed, group, key), a.edit_guidance if is_edit else a.guidance))
            if is_edit:
                table.copies[beside(path)] = source
    return table


def geneval(a: argparse.Namespace) -> Table:
    """GenEval: OUT/00000/metadata.jsonl and OUT/00000/samples/0000.png (djghosh13/geneval)."""
    table = Table()
    for i, (where, row) in enumerate(rows_of(a.file, a.limit)):
        folder, prompt = a.out / f"{i:05d}", text_of(row, "prompt", where)
        table.texts[folder / "metadata.jsonl"] = json.dumps(row) + "\n"
        table.jobs += [Job(folder / "samples" / f"{n:04d}.png", prompt, (), seed_of(a.seed, i, n),
                           a.guidance) for n in range(a.samples)]
    return table


def dpg(a: argparse.Namespace) -> Table:
    """DPG-Bench: four pictures of each NAME.txt as the sheet OUT/NAME.png (TencentQQGYLab/ELLA).

    Its scorer takes every file in OUT for a sheet, so the four are in a folder of their own.
    """
    table, out = Table(), a.out.absolute()
    files = sorted(a.file.glob("*.txt"))
    if not files:
        raise ValueError(f"{a.file}: no folder with prompts NAME.txt; expected dpg_bench/prompts")
    for file in files[:a.limit]:
        if not (prompt := " ".join(read_text(file).split())):
            raise ValueError(f"{file}: an empty file, expected a prompt")
        parts = [out.with_name(f"{out.name}-parts") / f"{file.stem}-{n}.png" for n in range(4)]
        table.sheets[a.out / f"{file.stem}.png"] = parts
        table.jobs += [Job(part, prompt, (), seed_of(a.seed, file.stem, n), a.guidance)
                       for n, part in enumerate(parts)]
    return table


def flat(a: argparse.Namespace) -> Table:
    """A text file with a prompt a line: OUT/00000.png, ...; empty lines do not count."""
    prompts = [line.strip() for line in read_text(a.file).split("\n") if line.strip()]
    return Table([Job(a.out / f"{i:05d}.png", prompt, (), seed_of(a.seed, i), a.guidance)
                  for i, prompt in enumerate(prompts[:a.limit])])


def imgedit(a: argparse.Namespace) -> Table:
    """ImgEdit's basic edits: OUT/KEY.png (PKU-YuanGroup/ImgEdit, Benchmark/Basic)."""
    table = Table()
    for key, row in list(read_json(read_text(a.file), str(a.file)).items())[:a.limit]:
        where = f"{a.file}, key {key}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {row!r:.60}, expected an object with 'id' and 'prompt'")
        source = find_file(a.images / text_of(row, "id", where))
        table.jobs.append(Job(
            a.out / f"{name_of({'key': key}, 'key', where)}.png", text_of(row, "prompt", where),
            (source,), seed_of(a.seed, key), a.edit_guidance))
    return table


def gedit(a: argparse.Namespace) -> Table:
    """GEdit-Bench: OUT/fullset/TASK/LANGUAGE/KEY.png (stepfun-ai/Step1X-Edit, GEdit-Bench)."""
    table = Table()
    for where, row in rows_of(a.file, a.limit):
        names = [name_of(row, column, where)
                 for column in ("task_type", "instruction_language", "key")]
        path = a.out.joinpath("fullset", *names[:2], f"{names[2]}.png")
        source = find_file(a.images / text_of(row, "input_image", where))
        table.jobs.append(Job(path, text_of(row, "instruction", where), (source,),
                              seed_of(a.seed, *names), a.edit_guidance))
        table.copies[beside(path)] = source
    return table


TABLES = {"semgen": semgen, "geneval": geneval, "dpg": dpg, "flat": flat, "imgedit": imgedit,
          "gedit": gedit}


# ---------------------------------------------------------------- drawing

def check(table: Table) -> None:
    """Raise ValueError before the long work: no items, one name twice, unusable sources."""
    paths = [job.path for job in table.jobs]
    if not paths:
        raise ValueError("no items in the benchmark's file, expected at least one")
    if len(set(paths)) < len(paths):
        twice = next(path for i, path in enumerate(paths) if path in paths[:i])
        raise ValueError(f"{twice}: two items of the benchmark have this name")
    problems = []
    sources = dict.fromkeys(source for job in table.jobs for source in job.sources)
    for source in sources:
        try:
            load_picture(source)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{len(problems)} of {len(sources)} source pictures cannot be used: "
                         f"{'; '.join(problems[:3])}")


def write_text(path: Path, text: str) -> None:
    """Write a text, or check that it is there. Raises ValueError for another one."""
    if not path.exists():
        write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
    elif read_text(path) != text:
        raise ValueError(f"{path}: belongs to another item; choose another --out")


def write_copy(path: Path, source: Path, side: int, squash: bool) -> None:
    """Write a source as the model sees it, or check that it is there; ValueError for another."""
    [picture] = to_pictures(load_source(source, (side, side), squash)[None])        # (S, S, 3)
    if not readable(path):
        save_picture(picture, path)
    elif not np.array_equal(np.array(load_picture(path)), picture):
        raise ValueError(f"{path}: differs from {source} as it is read now (another picture, "
                         "--image-size or --squash); choose another --out")


def write_sheet(path: Path, parts: Sequence[Path]) -> None:
    """Write four pictures as one, in reading order, if it is missing."""
    if readable(path):
        return
    pictures = [np.array(load_picture(part)) for part in parts]                     # (S, S, 3)
    rows = [np.hstack(pictures[:2]), np.hstack(pictures[2:])]                       # (S, 2 S, 3)
    save_picture(np.vstack(rows), path)                                             # (2 S, 2 S, 3)


def draw(a: argparse.Namespace) -> None:
    """Draw what is missing of a benchmark. Raises ValueError and OSError."""
    table = TABLES[a.layout](a)
    check(table)
    with joined_ranks() as ranks:
        if ranks.world > 1:
            a.device = str(ranks.device)
        pipeline = load_pipeline(a)
        change_settings(pipeline, a)
        if ranks.first:
            for path, text in table.texts.items():
                write_text(path, text)
            length = pipeline.settings.text_length
            if cut := sum(len(pipeline.tokenizer.encode(job.prompt)) > length
                          for job in table.jobs):
                print(f"warning: the model reads {length} tokens, {cut} of {len(table.jobs)} "
                      "prompts are longer and cut off", file=sys.stderr)
        mine = slice(ranks.rank, None, ranks.world)
        for path, source in list(table.copies.items())[mine]:
            write_copy(path, source, pipeline.settings.image_size, a.squash)
        drawn = sum(1 for _ in draw_missing(
            pipeline, table.jobs, a.batch, ranks.rank, ranks.world, a.steps, squash=a.squash,
            progress=ranks.first))
        ranks.wait("pictures")                  # a sheet has pictures of several ranks
        for path, parts in list(table.sheets.items())[mine]:
            write_sheet(path, parts)
        drawn = sum(ranks.gather(drawn))
        if ranks.first:
            missing = [job.path for job in table.jobs if not readable(job.path)]
            before = len(table.jobs) - drawn - len(missing)
            print(f"{a.out}: pictures drawn: {drawn}, there before: {before}, missing: "
                  f"{len(missing)}")
            if missing:
                raise ValueError(f"{missing[0]}: is missing, though it was drawn; start again")


def answer(a: argparse.Namespace) -> None:
    """Answer what is missing of a file of questions, and score it. Raises ValueError, OSError."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("vqa runs in one process; start it without torchrun")
    if a.out.suffix != ".jsonl" or a.out.absolute() == a.questions.absolute():
        raise ValueError(f"--out {a.out}: expected the name of another .jsonl file")
    questions = read_questions(a.questions, a.images, a.suffix)[:a.limit]
    pipeline = load_pipeline(a)
    pipeline.check_writes()
    answers = answer_missing(pipeline, questions, a.out, a.batch, a.seed, a.steps, a.squash)
    summary = summarize(questions, answers)
    text = json.dumps(summary, indent=2) + "\n"
    write_atomically(a.out.with_suffix(".summary.json"), lambda file: file.write_text(text))
    print(*summary_lines(summary), sep="\n")


# ---------------------------------------------------------------- command line

PROMPTS = """Draw the prompts of a benchmark, in the layout that its public scorer reads.

  geneval  --file evaluation_metadata.jsonl
           writes OUT/00000/metadata.jsonl, OUT/00000/samples/0000.png, ...
           scored by djghosh13/geneval: evaluation/evaluate_images.py OUT
  dpg      --file dpg_bench/prompts, a folder of NAME.txt
           writes OUT/NAME.png, four pictures as one; they are in OUT-parts
           scored by TencentQQGYLab/ELLA: dpg_bench/dist_eval.sh OUT 512 (--image-size)
  flat     --file FILE.txt, one prompt a line
           writes OUT/00000.png, ...
"""
EDITS = """Draw the edits of a benchmark, in the layout that its public scorer reads.

  imgedit  --file basic_edit.json --images DIR, the folder of its original images
           writes OUT/KEY.png
           scored by PKU-YuanGroup/ImgEdit: Benchmark/Basic/basic_bench.py
  gedit    --file gedit.jsonl --images DIR
           writes OUT/fullset/TASK/LANGUAGE/KEY.png, and as KEY_SRCIMG.png its source
           laid out as by stepfun-ai/Step1X-Edit: GEdit-Bench/generate_image_example.py

GEdit-Bench is read by the package `datasets`. These lines write gedit.jsonl with its English rows,
and its pictures beside it:

  import json
  from datasets import load_dataset
  with open("gedit.jsonl", "w") as file:
      for row in load_dataset("stepfun-ai/GEdit-Bench")["train"]:
          if row["instruction_language"] == "en":
              row.pop("input_image_raw")
              picture, row["input_image"] = row["input_image"], row["key"] + ".png"
              picture.save(row["input_image"])
              file.write(json.dumps(row) + "\\n")
"""
VQA = """Answer questions about pictures, and score the answers.

--questions names a file of JSON lines, {"question_id": 1, "image": "a.jpg", "question": "..."}, or
a .tsv of MMBench, which holds its pictures. To be scored, a question needs "answers" (VQAv2's ten)
or an "answer"; with options "A", "B", ... the "answer" is a letter. benchmarks/vqa.py has all.

Each batch of answers is appended to --out at once. Started again, the command asks the questions
without an answer. FILE.summary.json gets the accuracy, by "answer_type" or "category" too, and the
number of empty answers.
"""


def number(least: float, kind: type = int) -> Callable[[str], float]:
    """A reader of an option's number, from `least` up."""
    def value_of(text: str) -> float:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected a number from {least} up")
        return value
    return value_of


def _add_drawing(p: argparse.ArgumentParser, pictures: bool, edits: bool) -> None:
    """Add the options of the commands that draw."""
    p.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    if pictures:
        p.add_argument("--guidance", type=number(0, float), default=7.0,
                       help="weight of a prompt (default: %(default)s)")
    if edits:
        p.add_argument("--edit-guidance", type=number(0, float), default=9.0,
                       help="weight of an instruction (default: %(default)s)")
    p.add_argument("--steps", type=number(1), default=50,
                   help="steps per picture (default: %(default)s)")
    add_flow_options(p)
    _add_common(p, edits)


def _add_common(p: argparse.ArgumentParser, sources: bool) -> None:
    """Add the options of the commands that run the model."""
    if sources:
        p.add_argument("--squash", action="store_true",
                       help="squash photographs to a square, as the released code does; without "
                            "it, a centre crop keeps their shape")
    p.add_argument("--limit", type=number(1), metavar="N", help="only the first N rows")
    p.add_argument("--batch", type=number(1), default=8,
                   help="at a time; lower it where memory runs out (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0,
                   help="any integer, from which every item's own seed is computed "
                        "(default: %(default)s)")
    p.set_defaults(squash=False)
    add_model_options(p)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable, text: str, example: str) -> argparse.ArgumentParser:
        c = commands.add_parser(
            name, description=text, help=text.partition("\n")[0], allow_abbrev=False,
            epilog=f"example:\n  python -m benchmarks.quality {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter)
        c.set_defaults(run_command=run)
        return c

    c = add("semgen", draw, "Draw SemGen-Bench, the paper's own: OUT/fullset/GROUP/KEY.png.",
            "--bench semgen_bench.jsonl --images photos --out OUT \\\n      --model UniAlignment")
    c.add_argument("--bench", type=Path, required=True, help="semgen_bench.jsonl")
    c.add_argument("--images", type=Path, required=True,
                   help="folder of the photographs, which are found by their file names")
    c.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP",
                   help=f"some of {', '.join(GROUPS)} (default: all)")
    c.set_defaults(layout="semgen")
    _add_drawing(c, pictures=True, edits=True)

    c = add("judge", lambda a: judge(a.out, a.endpoint, a.model, a.workers, a.timeout,
                                        bench=a.bench),
            "Have a vision model judge the pictures of semgen.",
            "--out OUT --endpoint http://localhost:8000/v1 --model NAME")
    c.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    c.add_argument("--endpoint", required=True,
                   help="address of an OpenAI-compatible server; its key comes from the "
                        "environment, OPENAI_API_KEY")
    c.add_argument("--model", required=True, help="name of the vision model at the endpoint")
    c.add_argument("--workers", type=number(1), default=4,
                   help="requests at a time (default: %(default)s)")
    c.add_argument("--timeout", type=number(1, float), default=120.0,
                   help="seconds of a request (default: %(default)s)")
    c.add_argument("--bench", type=Path,
                   help="semgen_bench.jsonl, for pictures that another program has drawn")

    c = add("table", lambda a: print(score_table(a.out), end=""),
            "Print the scores of judge beside those of the paper.", "--out OUT")
    c.add_argument("--out", type=Path, required=True, help="folder of the pictures")

    c = add("prompts", draw, PROMPTS, "--layout geneval --file evaluation_metadata.jsonl \\\n"
            "      --out OUT --model UniAlignment")
    c.add_argument("--layout", choices=("geneval", "dpg", "flat"), required=True)
    c.add_argument("--file", type=Path, required=True, help="file or folder of the prompts")
    c.add_argument("--samples", type=number(1), default=4,
                   help="pictures per prompt of geneval (default: %(default)s)")
    _add_drawing(c, pictures=True, edits=False)

    c = add("edits", draw, EDITS, "--layout imgedit --file basic_edit.json --images DIR \\\n"
            "      --out OUT --model UniAlignment")
    c.add_argument("--layout", choices=("imgedit", "gedit"), required=True)
    c.add_argument("--file", type=Path, required=True, help="file of the instructions")
    c.add_argument("--images", type=Path, required=True, help="folder of the pictures to edit")
    _add_drawing(c, pictures=False, edits=True)

    c = add("vqa", answer, VQA, "--questions questions.jsonl --images DIR \\\n"
            "      --out answers.jsonl --model UniAlignment")
    c.add_argument("--questions", type=Path, required=True, help="a .jsonl or .tsv file")
    c.add_argument("--images", type=Path,
                   help="folder of the pictures (default: that of --questions)")
    c.add_argument("--out", type=Path, required=True, help="the .jsonl file of the answers")
    c.add_argument("--suffix", help="text after each question (default: the demand for a single "
                                    "word or phrase, or for an option's letter)")
    c.add_argument("--steps", type=number(1), help="steps per answer (default: the model's)")
    _add_common(c, sources=True)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    a = parser().parse_args(argv)
    try:
        a.run_command(a)
    except (torch.OutOfMemoryError, MemoryError) as error:
        sys.exit(f"error: out of memory ({error}); lower --batch")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if message := explain(error):
            sys.exit(f"error: {message}")
        raise
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
