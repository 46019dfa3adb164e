"""gpu_check.py on a CPU: every section runs, and a failure becomes a row."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import TESTS

import gpu_check
from gpu_check import TINY, TOLERANCE, Bench, Report

SCRIPT = TESTS / "gpu_check.py"


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    file = tmp_path_factory.mktemp("gpu_check") / "result.json"
    done = subprocess.run([sys.executable, SCRIPT, "--tiny", "--json", file],
                          cwd=file.parent, capture_output=True, text=True, timeout=480)
    return done, json.loads(file.read_text())


def figures(result, section: str) -> dict[str, float | None]:
    return {row["case"]: row["figure"] for row in result[1]["rows"] if row["section"] == section}


def test_table_and_json_have_the_same_rows(result):
    done, content = result
    assert done.returncode == 0, done.stdout
    table, _, text = done.stdout.strip().rpartition("\n\n")
    assert json.loads(text) == content
    assert {"device", "torch", "date", "seconds", "rows"} == set(content)
    lines = table.splitlines()
    assert lines[0].split() == ["section", "case", "figure", "unit"]
    assert len(lines) == 1 + len(content["rows"])
    for line, row in zip(lines[1:], content["rows"]):
        assert line.startswith(row["section"]) and row["case"] in line
        assert row.keys() == {"section", "case", "figure", "unit", "note"}
        assert not row["note"].startswith(("error", "skipped", "out of memory"))


def test_every_component_is_near_its_reference(result):
    errors = figures(result, "references")
    assert len(errors) == 2 + 2 * 11
    for case, error in errors.items():
        assert error < TOLERANCE if case.endswith("float32") else 1e-4 < error < 0.3, case


def test_a_step_of_every_task(result):
    differences = figures(result, "steps")
    assert {case.split(":")[0] for case in differences} == {
        "text_to_image", "partial", "plan", "edits", "edges", "depth", "pose", "personalisation",
        "questions"}
    pair = {case.split(": ")[1] for case in differences if case.startswith("text_to_image")}
    assert pair == {"flow_matching", "masked_token", "contrastive", "intrinsic", "loss",
                    "gradient norm", "loss after"}
    assert not any(differences.values())                # the CPU beside itself


def test_the_run_is_stopped_and_resumed(result):
    training = figures(result, "training")
    assert 0 < training["steps in its checkpoint"] < training["steps reached"] == 24
    assert set(figures(result, "sampling")) == {"draw", "describe", "ask", "edit"}


def test_speed_and_memory_at_every_batch(result):
    cases = figures(result, "full size")
    assert cases["2 guided steps, 64 px"] > 0 and cases["caption, 16 tokens, 2 steps"] > 0
    for variant in ("plain", "checkpointing", "compiled"):
        for batch in (1, 2):
            case = f"{variant}, batch {batch}"
            assert cases[case] > 0 and cases[f"{case}: speed"] > 0
            assert {f"{case}: memory of {phase}" for phase in ("forward", "backward", "optimizer")
                    } < set(cases)
    assert all(share > 0 for case, share in cases.items() if case.endswith("share of peak"))


# ---------------------------------------------------------------- failures

def test_an_exception_becomes_a_row():
    report = Report(minutes=1)
    assert report.attempt("fine", report.add, "fine", 1.0, "s") and not report.failed()
    assert not report.attempt("broken", int, "x") and report.failed()
    report.add("empty", float("nan"), "s")
    report.deadline = 0
    assert not report.attempt("late", report.add, "late")
    assert [row["note"] for row in report.rows] == [
        "", "error: ValueError: invalid literal for int() with base 10: 'x'", "error: nan",
        "skipped: no time left"]
    assert [row["figure"] for row in report.rows] == [1.0, None, None, None]


def test_exhausted_memory_is_a_result_of_the_full_size_only():
    def exhaust():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    report = Report(minutes=1)
    report.section = "full size"
    assert not report.attempt("large", exhaust) and not report.failed()
    report.section = "steps"
    assert not report.attempt("small", exhaust) and report.failed()


def test_a_variant_ends_with_the_batch_that_does_not_fit(monkeypatch):
    def time_steps(self, case, model, optimizers, batch, flops):
        if batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.report.add(case, flops)

    monkeypatch.setattr(Bench, "time_steps", time_steps)
    report = Report(minutes=1)
    report.section = "full size"
    Bench(report, TINY._replace(batches=(1, 2, 4)), torch.device("cpu")).train()
    expected = [(f"{variant}, batch {batch}", note)
                for variant in ("plain", "checkpointing", "compiled")
                for batch, note in ((1, ""), (2, "out of memory"))]
    assert [(row["case"], row["note"]) for row in report.rows] == expected


def test_flops_of_the_2b_model():
    """Two samples of 1024 + 256 tokens through 24 blocks of 12 D^2 weights for each token."""
    weights, scores = 12 * 1536 ** 2, 2 * 1280 * 1536           # multiplications per token
    forward = 2 * 2 * 24 * 1280 * (weights + scores)            # FLOPs of both branches
    flops = Bench(Report(1), gpu_check.FULL, torch.device("cpu")).training_flops()
    assert abs(flops / (3 * forward) - 1) < 0.05


@pytest.mark.parametrize("arguments", [["--device", "cuda", "--tiny"], ["--device", "cpu"]])
def test_a_missing_gpu_is_named(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()
    assert "needs a GPU" in capsys.readouterr().err


def test_no_file_is_overwritten(tmp_path, monkeypatch, capsys):
    file = tmp_path / "old.json"
    file.write_text("precious")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--tiny", "--json", str(file)])
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()
    assert "nothing is overwritten" in capsys.readouterr().err and file.read_text() == "precious"
