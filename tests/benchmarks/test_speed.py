"""benchmarks/speed.py: every case runs at narrow sizes, and the figures fit each other."""
import json

import pytest
import torch

from benchmarks import speed


def test_every_case_runs(tmp_path, capsys):
    file = tmp_path / "speed.json"
    speed.main(["--quick", "--device", "cpu", "--json", str(file)])
    result = json.loads(file.read_text())
    rows = {(row["size"], row["case"]): row for row in result["rows"]}
    assert set(rows) == {(size, case) for size in ("tiny", "small") for case in speed.CASES}
    for row in rows.values():
        assert row["seconds"] > 0 and row["flops"] > 0 and row["share_of_matmul"] > 0
        for rate in row["per_second"].values():
            assert rate > 0
    step = rows["small", "train"]["per_second"]
    assert step["tokens"] == pytest.approx(2 * (16 + 16) * step["steps"])   # 64 pixels, 16 tokens
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 1 + len(rows) and "share of the matmul peak" in printed


def test_some_cases(capsys):
    speed.main(["--quick", "--device", "cpu", "--only", "t5,encode,small"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| t5 small", "| encode small"]


def test_full_has_the_released_sizes():
    sizes = speed.sizes_of("sd3", torch.device("cpu"), quick=False)
    assert sizes.config.model.depth == 24 and sizes.t5.dim == sizes.config.model.text_dim == 4096


def test_peak_memory():
    memory = speed.Memory(torch.device("cpu"))
    if memory.peak() is None:
        pytest.skip("this system does not say how much memory a process has used")
    block = torch.ones(2 ** 25)                                 # 134 MB
    del block
    assert 120e6 < memory.peak() < 200e6


@pytest.mark.parametrize("arguments, words", [
    (["--only", "tee"], "--only tee"), (["--rounds", "0"], "--rounds 0"),
    (["--json", __file__], "exists")])
def test_wrong_arguments(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        speed.main(arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err
