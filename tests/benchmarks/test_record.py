"""A file of results is a snapshot: one line a case and device, the newest."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import record as recorder
from benchmarks.record import CASES, record

SPEED = {"heads": [16, 2], "implementation": "xla", "work": "forward", "length": 4096}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(
        recorder, "circumstances", lambda: {"date": "2026-11-26", "device": "H100", "jax": "0.11.2"}
    )
    return tmp_path / "results"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_line_replaces_the_older_one_of_its_case(results, capsys):
    for commit, change in (
        ("a", {}),
        ("b", {"length": 8192}),
        ("c", {"work": "forward+backward"}),
        ("d", {"heads": [8, 8]}),
    ):
        record("attend", commit, SPEED | change | {"ms": 1.0})
    line = record("attend", "e", SPEED | {"ms": 2.0, "errors": {"out": 0.1}})
    assert [line["commit"] for line in lines(results / "attend.jsonl")] == ["b", "c", "d", "e"]
    assert lines(results / "attend.jsonl")[-1] == line
    assert line == {
        "date": "2026-11-26",
        "device": "H100",
        "jax": "0.11.2",
        "commit": "e",
        **SPEED,
        "ms": 2.0,
        "errors": {"out": 0.1},
    }
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    assert [path.name for path in results.iterdir()] == ["attend.jsonl"]


def test_devices_stand_beside_each_other(results, monkeypatch):
    record("convert", "a", {"parameters": 4})
    monkeypatch.setattr(recorder, "circumstances", lambda: {"device": "H200"})
    record("convert", "b", {"parameters": 4})
    assert [(line["device"], line["commit"]) for line in lines(results / "convert.jsonl")] == [
        ("H100", "a"),
        ("H200", "b"),
    ]


def test_the_other_lines_keep_their_bytes(results):
    other = '{"device":"H100",  "seed": 1, "note": "\u00e9 as it was written"}\n'
    results.mkdir()
    (results / "easy_vqa.jsonl").write_text(other, "utf-8")
    record("easy_vqa", "a", {"seed": 0, "accuracy": 0.5})
    assert (results / "easy_vqa.jsonl").read_text("utf-8").startswith(other)


def test_a_file_of_ones_own(results, tmp_path):
    for mesh in ({"fsdp": 2}, {"data": 2}, {"fsdp": 2}):
        record("meshes", "a", {"part": "mesh", "mesh": mesh}, tmp_path / "mine" / "meshes.jsonl")
    assert [line["mesh"] for line in lines(tmp_path / "mine" / "meshes.jsonl")] == [
        {"data": 2},
        {"fsdp": 2},
    ]
    assert not results.exists()


def test_every_benchmark_says_what_its_cases_are():
    sources = [path.read_text("utf-8") for path in Path(recorder.__file__).parent.rglob("*.py")]
    assert {name for text in sources for name in re.findall(r'\brecord\(\s*"(\w+)"', text)} == set(
        CASES
    )
