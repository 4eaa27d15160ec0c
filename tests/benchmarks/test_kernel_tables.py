"""The tables of docs/kernels.md, from lines that these tests write: what is recorded on a GPU
cannot break them."""

import json

import pytest

from benchmarks import kernels

H100 = {"device": "H100", "commit": "a"}
LINES = {
    "attend": [
        H100
        | {"implementation": "cudnn", "work": "forward", "length": 8192, "ms": {"median": 0.5789}},
        H100
        | {
            "implementation": "mosaic_gpu",
            "work": "forward",
            "length": 8192,
            "ms": {"median": 0.5194},
        },
        H100
        | {
            "implementation": "mosaic_gpu",
            "work": "forward",
            "length": 1 << 20,
            "ms": {"median": 1234.5},
        },
        H100
        | {
            "implementation": "xla",
            "work": "forward",
            "length": 4096,
            "case": "tower_windows",
            "ms": {"median": 0.267},
        },
    ],
    "gated_delta_rule": [
        H100
        | {
            "implementation": "mosaic_gpu",
            "heads": 16,
            "work": "forward",
            "shape": [2, 8192],
            "ms": {"median": 0.465},
        },
        H100
        | {
            "implementation": "mosaic_gpu",
            "heads": 4,
            "work": "forward",
            "shape": [1, 8192],
            "ms": {"median": 0.1638},
        },
    ],
    "decode": [
        H100
        | {"op": "attend, token step", "implementation": "xla", "batch": 8, "us": {"median": 85.6}}
    ],
    "tpu_scores": [
        H100 | {"op": "op", "program": "it", "topology": "v5p:2x2x1", "failed": "no"},
        H100
        | {
            "op": "op",
            "program": "it",
            "topology": "v5e:2x2",
            "estimate_ms": 1.59,
            "bytes": 103809024,
        },
    ],
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    for name, lines in LINES.items():
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), "utf-8"
        )
    return tmp_path


def test_tables_of_every_kind_of_line(results):
    assert kernels.tables().splitlines() == [
        "H100, milliseconds:",
        "",
        "| operator | work | by | 4K | 8K | 1024K | 2 x 8K |",
        "|---|---|---|---|---|---|---|",
        "| attend | forward | mosaic_gpu |  | 0.519 | 1234 |  |",
        "| attend | forward | cudnn |  | 0.579 |  |  |",
        "| attend tower windows | forward | xla | 0.267 |  |  |  |",
        "| gated_delta_rule | forward | mosaic_gpu |  |  |  | 0.465 |",
        "| gated_delta_rule, 4 heads | forward | mosaic_gpu |  | 0.164 |  |  |",
        "",
        "| a layer's | by | batch 8 |",
        "|---|---|---|",
        "| attend, token step | xla | 0.0856 |",
        "",
        "TPU, by the compiler, milliseconds / floor:",
        "",
        "| operator | program | v5e | v5p |",
        "|---|---|---|---|",
        "| op | it | 1.59 / 0.127 | does not compile |",
    ]


def test_tables_are_written_between_the_marks(results, monkeypatch):
    document = results / "kernels.md"
    monkeypatch.setattr(kernels, "DOCUMENT", document)
    document.write_text(f"before\n{kernels.BEGIN}\nold\n{kernels.END}\nafter\n", "utf-8")
    kernels.write_tables()
    assert (
        document.read_text("utf-8")
        == f"before\n{kernels.BEGIN}\n\n{kernels.tables()}\n\n{kernels.END}\nafter\n"
    )
    assert {file.suffix for file in results.iterdir()} == {".jsonl", ".md"}


def test_the_document_has_the_marks_once_and_in_order():
    text = kernels.DOCUMENT.read_text("utf-8")
    assert kernels.DOCUMENT.parts[-2:] == ("docs", "kernels.md")
    assert text.count(kernels.BEGIN) == text.count(kernels.END) == 1 and text.index(
        kernels.BEGIN
    ) < text.index(kernels.END)


def test_the_last_line_of_a_case_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    lines = [
        '{"device": "H100", "commit": "a", "work": "forward", "ms": {"median": 1.0}}',
        '{"device": "H100", "commit": "b", "work": "forward", "ms": {"median": 2.0}}',
        '{"device": "H200", "commit": "c", "work": "forward", "ms": {"median": 3.0}}',
        '{"device": "H100", "commit": "d", "work": "forward", "note": "no time"}',
    ]
    (tmp_path / "op.jsonl").write_text("\n".join(lines), "utf-8")
    assert kernels.newest("op", "work", device="H100")["forward",]["commit"] == "b"
    assert kernels.newest("op", "work")["forward",]["commit"] == "c"
    assert kernels.newest("nothing", "work") == {}
