"""The judge against a local server that answers well, badly, late or not at all; the table."""
import base64
import collections
import csv
import itertools
import json
import math
import os
import re
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks import judge as judge_file
from benchmarks.judge import GROUPS, judge, read_answer, read_paper, seconds_to_wait, table

KEY = "sk-secret-123"
GOOD = '{"consistency": 8, "quality": 4.5, "reason": "one hat is missing"}'


# ---------------------------------------------------------------- a server and pictures

def completion(text):
    """The body of a reply in the chat completions format."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's plan says for the picture of the request."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def send(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self):
        self.send(404, "no list of models")

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, *images = request["messages"][0]["content"]
        instruction = text["text"].rpartition("The text:\n")[2]
        with server.lock:
            number = server.counts[instruction]
            server.counts[instruction] += 1
            server.requests.append((self.path, dict(self.headers), request, time.monotonic()))
        plan = server.plans.get(instruction, [GOOD])
        step = plan[min(number, len(plan) - 1)]
        if callable(step):
            step(self)
        else:
            self.send(200, completion(step))


@pytest.fixture
def server(monkeypatch):
    """A server; plans: {instruction: answers in turn, the last one repeated}."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(judge_file, "BACKOFF", 0.01)
    monkeypatch.setattr(judge_file, "GRACE", 0.3)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.lock, server.released = threading.Lock(), threading.Event()
    server.plans, server.counts, server.requests = {}, collections.Counter(), []
    server.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def status(code, body="", **headers):
    return lambda handler: handler.send(code, body, **headers)


def slow(handler):
    handler.server.released.wait(20)
    handler.close_connection = True


def drop(handler):
    handler.close_connection = True
    handler.connection.close()


def draw(out, group, key, prompt="", color=(200, 10, 10)):
    """Write a picture with its prompt, and its source if it is an edit."""
    folder = out / "fullset" / group
    folder.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    if prompt is not None:
        info.add_itxt("prompt", prompt or f"{group} {key}")
    Image.new("RGB", (8, 8), color).save(folder / f"{key}.png", pnginfo=info)
    if group.startswith("edit"):
        Image.new("RGB", (8, 8), (0, 0, key)).save(folder / f"{key}_SRCIMG.png")


@pytest.fixture
def out(tmp_path):
    """Two pictures in each group."""
    folder = tmp_path / "ours"
    for group in GROUPS:
        for key in range(2):
            draw(folder, group, key)
    return folder


ALL = {f"{group} {key}": 1 for group in GROUPS for key in range(2)}


def ask(out, server, **options):
    judge(out, server.address, "org/judge 1", **{"timeout": 5, "retries": 3} | options)


def verdicts(out):
    return [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]


def rows_of(out, group, model="org_judge_1"):
    with open(out / model / f"{out.name}_{group}_score.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- answers

@pytest.mark.parametrize("text", [
    GOOD,
    f"Let me see. The hat is missing {{that costs}} points.\n{GOOD}\nI hope this helps!",
    f"```json\n{GOOD}\n```",
    f'{{"consistency": 1, "quality": 1}} no, wait: {GOOD}',
    f'<think>{{"consistency": 1, "quality": 2}} or more?</think>{GOOD}',
    f'thoughts without a beginning {{"consistency": 1, "quality": 2}}</think>\n{GOOD}',
    f'{{"scores": {GOOD}}}',
    f'{GOOD} {{"consistency": 11, "quality": 3}} {{"consistency": 5',
    '{"quality": "4.5", "consistency": " 8 ", "reason": "one hat is missing"}'])
def test_answers_that_can_be_read(text):
    assert read_answer(text) == (8.0, 4.5, "one hat is missing")


@pytest.mark.parametrize("text", [
    "", "8 and 4", "{", "[8, 4]", '{"consistency": 8}', '{"consistency": 8, "quality": 10.1}',
    '{"consistency": -1, "quality": 4}', '{"consistency": NaN, "quality": 4}',
    '{"consistency": Infinity, "quality": 4}', '{"consistency": "nan", "quality": 4}',
    '{"consistency": true, "quality": 4}', '{"consistency": "8/10", "quality": 4}',
    '{"consistency": null, "quality": 4}', '{"consistency": [8], "quality": 4}',
    '{"consistency": GRADE, "quality": GRADE, "reason": "one short sentence"}',
    '{"consistency": 1' + "0" * 500 + ', "quality": 4}', '{"consistency":' * 3000,
    '<think>{"consistency": 8, "quality": 4} but is it'])
def test_answers_that_cannot_be_read(text):
    assert read_answer(text) is None


def test_the_limits_are_grades():
    assert read_answer('{"consistency": 0, "quality": 10}') == (0.0, 10.0, "")


# ---------------------------------------------------------------- requests

def test_every_picture_is_asked_for_once(out, server, capsys):
    ask(out, server)
    assert server.counts == ALL
    assert len(verdicts(out)) == 8
    assert {(v["consistency"], v["quality"]) for v in verdicts(out)} == {(8.0, 4.5)}
    assert "8 of 8 pictures have a verdict" in capsys.readouterr().out


def test_the_request(out, server):
    ask(out, server)
    for path, headers, request, _ in server.requests:
        text, *images = request["messages"][0]["content"]
        group, key = text["text"].splitlines()[-1].split()
        picture = out / "fullset" / group / f"{key}.png"
        files = [picture.with_stem(f"{key}_SRCIMG"), picture] if "edit" in group else [picture]
        contents = [re.fullmatch("data:image/png;base64,(.*)", i["image_url"]["url"])[1]
                    for i in images]
        assert [base64.b64decode(c) for c in contents] == [f.read_bytes() for f in files]
        assert ("source" in text["text"]) == ("edit" in group)
        assert (path, headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
        assert (request["model"], request["temperature"]) == ("org/judge 1", 0)


def test_a_local_server_needs_no_key(out, server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    ask(out, server)
    assert not any("Authorization" in headers for _, headers, _, _ in server.requests)


def test_all_faults_at_once_lose_nothing_and_ask_nothing_twice(out, server):
    bad = "I cannot see a picture."
    server.plans = {
        "t2i_long 0": [bad, GOOD], "t2i_long 1": [bad],
        "t2i_complex 0": [slow, GOOD], "t2i_complex 1": [status(429, Retry_After="0.1"), GOOD],
        "edit_multi 0": [status(500), status(503), GOOD], "edit_multi 1": [drop, GOOD],
        "edit_complex 0": [status(200, "<html>busy</html>"), GOOD],
        "edit_complex 1": [f"Well:\n```json\n{GOOD}\n```"]}
    ask(out, server, timeout=1.5)
    assert server.counts == {
        "t2i_long 0": 2, "t2i_long 1": 3, "t2i_complex 0": 2, "t2i_complex 1": 2,
        "edit_multi 0": 3, "edit_multi 1": 2, "edit_complex 0": 2, "edit_complex 1": 1}
    grades = {(v["group"], v["key"]): v["consistency"] for v in verdicts(out)}
    assert len(verdicts(out)) == len(grades) == 8
    assert grades.pop(("t2i_long", 1)) is None and set(grades.values()) == {8.0}
    [missing] = [v for v in verdicts(out) if v["consistency"] is None]
    assert missing["quality"] is None and bad in missing["reason"]

    server.counts.clear()                   # a restart asks for the missing one alone
    server.plans = {}
    ask(out, server)
    assert server.counts == {"t2i_long 1": 1}
    assert [row["sementics_score"] for row in rows_of(out, "t2i_long")] == ["8.0", "8.0"]


def test_an_unreadable_answer_is_asked_for_again_in_another_way(out, server):
    server.plans = {"t2i_long 0": ["?"]}
    ask(out, server)
    asked = [r["temperature"] for _, _, r, _ in server.requests
             if r["messages"][0]["content"][0]["text"].endswith("t2i_long 0")]
    assert len(set(asked)) == 3 and asked == sorted(asked) and asked[0] == 0 and asked[-1] <= 1


def test_retry_after_is_honoured(out, server):
    server.plans = {"t2i_long 0": [status(429, Retry_After="0.6"), GOOD]}
    ask(out, server)
    first, second = (when for _, _, r, when in server.requests
                     if r["messages"][0]["content"][0]["text"].endswith("t2i_long 0"))
    assert 0.55 < second - first < 3


def test_waits_grow_and_follow_the_server(monkeypatch):
    monkeypatch.setattr(judge_file, "BACKOFF", 1.0)
    for attempt, least, most in ((0, 0.5, 1.5), (1, 1, 3), (3, 4, 12), (50, 30, 90)):
        waits = [seconds_to_wait(attempt, None) for _ in range(50)]
        assert least <= min(waits) < max(waits) <= most
    assert seconds_to_wait(0, "40") == 40
    assert seconds_to_wait(0, "1" + "0" * 400) == judge_file.LONGEST_WAIT
    in_a_minute = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 55 < seconds_to_wait(0, in_a_minute) <= 60
    for strange in ("", "soon", "-5", "nan", "Wed, 21 Oct 2015 07:28:00 GMT", "1.2.3"):
        assert seconds_to_wait(0, strange) <= 1.5


@pytest.mark.parametrize("code", [400, 401, 404])
def test_a_refusal_ends_the_run_at_once_and_loses_nothing(out, server, code):
    message = f'{{"error": {{"message": "no model for key {KEY} here"}}}}'
    server.plans = {"edit_multi 0": [status(code, message)]}
    with pytest.raises(ValueError, match=f"HTTP {code}.*no model for key .* here") as caught:
        ask(out, server, workers=1)
    assert KEY not in str(caught.value) and "4 of 8 pictures have a verdict" in str(caught.value)
    assert len(verdicts(out)) == 4 and server.counts.total() == 5
    server.plans = {}
    ask(out, server)
    assert server.counts == ALL | {"edit_multi 0": 2}


def test_answers_under_way_are_kept_when_the_run_ends(out, server, monkeypatch):
    monkeypatch.setattr(judge_file, "GRACE", 10)
    arrived = threading.Event()

    def late(handler):
        arrived.set()
        time.sleep(0.15)
        handler.send(200, completion(GOOD))

    def refuse(handler):
        arrived.wait(10)
        handler.send(401, "")

    server.plans = {"t2i_long 0": [refuse], "t2i_long 1": [late]}
    with pytest.raises(ValueError, match="HTTP 401"):
        ask(out, server, workers=2)
    assert [v["instruction"] for v in verdicts(out)] == ["t2i_long 1"]


def test_a_picture_without_any_answer_is_missing_and_the_others_go_on(out, server):
    server.plans = {"t2i_long 0": [status(500, "overloaded")]}
    ask(out, server, retries=2)
    assert server.counts == ALL | {"t2i_long 0": 3}
    [missing] = [v for v in verdicts(out) if v["consistency"] is None]
    assert "HTTP 500: overloaded" in missing["reason"]


def test_a_server_that_falls_silent_ends_the_run(out, server):
    server.plans = {f"{group} {key}": [drop] for group in GROUPS[1:] for key in range(2)}
    with pytest.raises(ValueError, match="no answer after 1 requests.*2 of 8 pictures"):
        ask(out, server, workers=1, retries=0)
    assert 2 + judge_file.SILENT <= server.counts.total() <= 2 + 6


def test_the_key_is_in_no_file_and_no_output(out, server, capfd):
    server.plans = {"t2i_long 0": [f"your key is {KEY}"], "t2i_long 1": [status(500, KEY)],
                    "edit_complex 1": [status(403, KEY)]}
    with pytest.raises(ValueError) as caught:
        ask(out, server, workers=1)
    assert table(out)
    assert KEY not in str(caught.value) + "".join(capfd.readouterr())
    for file in out.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()


def test_a_key_that_http_would_print_is_refused(out, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a\nb")
    with pytest.raises(ValueError, match="OPENAI_API_KEY: expected") as caught:
        ask(out, server)
    assert "sk-a" not in str(caught.value)


@pytest.mark.parametrize("address, message", [
    ("http://127.0.0.1:9/v1", "cannot be reached"), ("localhost:8000", "expected an address"),
    ("file:///etc", "expected an address"), ("http://a b/v1", "cannot be reached")])
def test_an_endpoint_that_does_not_answer(out, server, address, message):
    with pytest.raises(ValueError, match=message):
        judge(out, address, "m")
    assert not (out / "verdicts.jsonl").exists()


def test_the_address_may_be_that_of_the_completions(out, server):
    judge(out, f"{server.address}/chat/completions/", "m")
    assert server.counts == ALL


@pytest.mark.parametrize("options", [
    {"workers": 0}, {"timeout": 0}, {"timeout": math.nan}, {"retries": -1}])
def test_numbers_out_of_range(out, server, options):
    with pytest.raises(ValueError, match="expected at least one worker"):
        ask(out, server, **options)


# ---------------------------------------------------------------- restarts

def test_ctrl_c_ends_soon_and_the_next_run_goes_on(out, server, capsys):
    def interrupt(handler):
        os.kill(os.getpid(), signal.SIGINT)
        slow(handler)

    server.plans = {"edit_multi 0": [interrupt, GOOD]}
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(out, server, workers=1, timeout=30)
    assert time.monotonic() - start < 8
    assert "4 of 8 pictures have a verdict" in capsys.readouterr().err
    assert len(rows_of(out, "t2i_complex")) == 2 and rows_of(out, "edit_multi") == []
    ask(out, server)
    assert server.counts == ALL | {"edit_multi 0": 2}


def test_ctrl_c_while_a_verdict_is_written_loses_nothing(out, server, monkeypatch):
    append, calls = judge_file.append, itertools.count()

    def interrupted(path, text):
        if next(calls) == 2:
            raise KeyboardInterrupt
        append(path, text)

    monkeypatch.setattr(judge_file, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(out, server, workers=1)
    assert len((out / "verdicts.jsonl").read_text().splitlines()) == server.counts.total() >= 3


def test_a_finished_run_asks_nothing(out, server, capsys):
    ask(out, server)
    before = (out / "verdicts.jsonl").read_bytes()
    ask(out, server)
    assert server.counts == ALL and (out / "verdicts.jsonl").read_bytes() == before
    judge(out, "http://127.0.0.1:9/v1", "org/judge 1")          # so no server is needed
    assert "8 of 8 are judged already" in capsys.readouterr().out


@pytest.mark.parametrize("cut", [1, 30])
def test_a_line_cut_off_by_a_kill_is_asked_for_again(out, server, cut):
    ask(out, server, workers=1)
    file = out / "verdicts.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    ask(out, server)
    again = 0 if cut == 1 else 1                                # the end of the line alone: whole
    assert server.counts == ALL | {"edit_complex 1": 1 + again}
    ask(out, server)
    assert server.counts.total() == 8 + again
    assert len(rows_of(out, "edit_complex")) == 2


def test_verdicts_belong_to_the_picture_the_instruction_and_the_judge(out, server):
    ask(out, server)
    draw(out, "t2i_long", 0, color=(0, 0, 0))
    Image.new("RGB", (8, 8), (9, 9, 9)).save(out / "fullset" / "edit_multi" / "1_SRCIMG.png")
    ask(out, server)
    assert server.counts == ALL | {"t2i_long 0": 2, "edit_multi 1": 2}
    judge(out, server.address, "another")
    assert server.counts.total() == 10 + 8
    server.plans = {"a new text": ["?"]}
    assert len(rows_of(out, "t2i_long")) == 2
    ask(out, server, bench=write_bench(out, "t2i_long 0", "a new text"))
    assert server.counts.total() == 18 + 3 and server.counts["a new text"] == 3
    assert [row["instruction"] for row in rows_of(out, "t2i_long")] == ["t2i_long 1"]


def write_bench(out, *change):
    """The rows of the pictures as a benchmark's file; change: a text and its replacement."""
    rows = [{group: f"{group} {key}" for group in GROUPS} | {"image_id": key} for key in range(2)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = out.parent / "bench.jsonl"
    path.write_text(text.replace(*change) if change else text)
    return path


def test_pictures_without_a_prompt_need_the_bench(out, server):
    draw(out, "t2i_long", 1, prompt=None)
    with pytest.raises(ValueError, match="t2i_long.1.png: holds no prompt.*--bench"):
        ask(out, server)
    ask(out, server, bench=write_bench(out))
    assert server.counts == ALL
    draw(out, "t2i_long", 2)
    with pytest.raises(ValueError, match="has no text t2i_long in row 2"):
        ask(out, server, bench=write_bench(out))


def test_pictures_that_are_missing_or_broken(out, server, capsys):
    picture = out / "fullset" / "edit_multi" / "1.png"
    picture.unlink()
    ask(out, server)
    assert "edit_multi 1, edit_complex 2; the groups differ in size" in capsys.readouterr().out
    assert "edit_multi 1" not in server.counts
    broken = out / "fullset" / "t2i_long" / "0.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    with pytest.raises(ValueError, match="0.png: cannot be read as a picture"):
        ask(out, server)
    (out / "fullset" / "edit_multi" / "0_SRCIMG.png").unlink()
    with pytest.raises(ValueError, match="its source picture 0_SRCIMG.png is missing"):
        ask(out, server)
    with pytest.raises(ValueError, match="holds no pictures.*semgen"):
        ask(out.parent, server)


# ---------------------------------------------------------------- scores

def test_csv_files_have_the_released_columns(out, server):
    server.plans = {"edit_multi 0": ["?"]}
    ask(out, server)
    text = (out / "org_judge_1" / "ours_edit_multi_score.csv").read_text()
    assert text.splitlines()[0] == ("data_type,source_image,generated_image,instruction,"
                                    "sementics_score,quality_score")
    folder = out / "fullset"
    assert rows_of(out, "edit_multi") == [{
        "data_type": "edit_multi", "source_image": str(folder / "edit_multi" / "1_SRCIMG.png"),
        "generated_image": str(folder / "edit_multi" / "1.png"), "instruction": "edit_multi 1",
        "sementics_score": "8.0", "quality_score": "4.5"}]
    assert [row["source_image"] for row in rows_of(out, "t2i_long")] == ["", ""]


def test_instructions_of_any_kind_survive_the_csv(out, server):
    text = 'Add "Crème", then\na 2nd line, 中文'
    draw(out, "t2i_long", 0, prompt=text)
    ask(out, server)
    assert rows_of(out, "t2i_long")[0]["instruction"] == text


def grades(consistency, quality):
    return [json.dumps({"consistency": consistency, "quality": quality})]


@pytest.fixture
def judged(out, server, monkeypatch, tmp_path):
    """Verdicts with different grades, and no rows of the paper."""
    monkeypatch.setattr(judge_file, "PAPER", tmp_path / "paper.csv")
    server.plans = {
        "t2i_long 0": grades(9, 4), "t2i_long 1": grades(1, 4),             # overall 6, 2
        "t2i_complex 0": grades(10, 10), "t2i_complex 1": ["?"],            # 10
        "edit_multi 0": grades(0, 8), "edit_multi 1": grades(4, 4),         # 0, 4
        "edit_complex 0": grades(3, 3), "edit_complex 1": grades(3, 3)}     # 3, 3
    ask(out, server)
    return out


def test_the_table_computed_by_hand(judged):
    text = table(judged)
    assert (judged / "table.md").read_text() == text
    rows = [json.loads(line) for line in (judged / "table.jsonl").read_text().splitlines()]
    numbers = {row["group"]: [row[key] for key in (
        "consistency", "quality", "overall", "scored", "missing")] for row in rows}
    assert numbers == {
        "t2i_long": [5, 4, 4, 2, 0], "t2i_complex": [10, 10, 10, 1, 1],
        "edit_multi": [2, 6, 2, 2, 0], "edit_complex": [3, 3, 3, 2, 0],
        "average": [5, 5.75, 4.75, 7, 1]}
    intervals = {row["group"]: (row["low"], row["high"]) for row in rows}
    # of two rows a quarter of the resamples has the first twice, a quarter the second
    assert intervals["t2i_long"] == (2, 6) and intervals["edit_complex"] == (3, 3)
    assert intervals["t2i_complex"] == (10, 10)
    # twice the first row: (6 + 10 + 0 + 3) / 4; the second row has no score of t2i_complex
    assert intervals["average"] == (4.75, 4.75)
    assert "| t2i_long | ours | org/judge 1 | 5.00 | 4.00 | 4.00 | 2.00 to 6.00 | 2 | 0 |" in text
    assert "The paper's rows are not here" in text
    assert table(judged) == text


def test_the_interval_is_that_of_the_mean(out, server):
    for key in range(2, 100):
        draw(out, "t2i_long", key)
    server.plans = {f"t2i_long {key}": grades(2, 2) if key % 2 else grades(8, 8)
                    for key in range(100)}
    ask(out, server, workers=8)
    table(out)
    [row] = [row for row in map(json.loads, (out / "table.jsonl").read_text().splitlines())
             if row["group"] == "t2i_long" and row.get("judge")]
    assert row["overall"] == 5                          # standard error 3 / sqrt(100) = 0.3
    assert row["low"] == pytest.approx(5 - 1.96 * 0.3, abs=0.07)
    assert row["high"] == pytest.approx(5 + 1.96 * 0.3, abs=0.07)


def test_the_table_stands_beside_the_paper(judged):
    judge_file.PAPER.write_text("model,group,consistency,quality,overall\n"
                                "Somebody,edit_multi,7.5,6,6.7\n")
    lines = table(judged).splitlines()
    groups = [line.split(" | ")[0] for line in lines[2:8]]
    assert groups == [f"| {group}" for group in (*GROUPS[:3], *GROUPS[2:], "average")]
    assert "| edit_multi | Somebody (paper) | - | 7.50 | 6.00 | 6.70 | - | - | - |" in lines
    assert "not here" not in "".join(lines)


def test_a_file_of_the_paper_with_only_a_header_has_no_rows(judged):
    judge_file.PAPER.write_text("model,group,consistency,quality,overall\n")
    assert "The paper's rows are not here" in table(judged)


@pytest.mark.parametrize("line", ["A,edit,1,1,1", "A,edit_multi,1,,1", "A,edit_multi,1,11,1",
                                  "A,edit_multi,1"])
def test_wrong_rows_of_the_paper(tmp_path, line):
    path = tmp_path / "paper.csv"
    path.write_text(f"model,group,consistency,quality,overall\n{line}\n")
    with pytest.raises(ValueError, match="paper.csv: .*expected the columns"):
        read_paper(path)


def test_the_papers_file_of_this_repository_if_it_is_there():
    path = judge_file.PAPER
    assert path.name == "semgen_paper.csv" and path.parent.name == "benchmarks"
    rows = read_paper(path)
    assert bool(rows) <= ({row["group"] for row in rows} >= set(GROUPS))


def test_each_judge_has_its_rows(judged, server):
    judge(judged, server.address, "another")
    text = table(judged)
    assert text.count("| ours | org/judge 1 |") == text.count("| ours | another |") == 5


def test_the_table_ignores_verdicts_on_pictures_that_were_drawn_again(judged):
    draw(judged, "t2i_complex", 0, color=(1, 2, 3))
    text = table(judged)
    assert "| t2i_complex | ours | org/judge 1 | - | - | - | - | 0 | 2 |" in text
    assert "| average | ours | org/judge 1 | 3.33 | 4.33 | 3.00 |" in text


def test_a_table_without_verdicts(out, server):
    with pytest.raises(ValueError, match="verdicts.jsonl: holds no verdict.*judge"):
        table(out)
