"""What the README says of the kernels is what was recorded."""

from benchmarks import kernels


def test_readme_holds_the_newest_figures():
    text = kernels.README.read_text("utf-8")
    held = text[text.index(kernels.BEGIN) + len(kernels.BEGIN) : text.index(kernels.END)].strip()
    assert held == kernels.tables(), "lines were recorded since: python -m benchmarks.kernels --table"


def test_a_program_that_does_not_compile_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    line = '{"device": "cpu", "commit": "a", "op": "op", "program": "it", "topology": "v5p:2x2x1", "failed": "no"}'
    (tmp_path / "tpu_scores.jsonl").write_text(line, "utf-8")
    assert kernels.scores().splitlines()[2] == "| op | it | does not compile |"


def test_tables_are_written_between_the_marks(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(kernels, "README", readme)
    readme.write_text(f"before\n{kernels.BEGIN}\nold\n{kernels.END}\nafter\n", "utf-8")
    kernels.write_readme()
    text = readme.read_text("utf-8")
    assert text.startswith(f"before\n{kernels.BEGIN}\n\nNVIDIA") and text.endswith(f"\n\n{kernels.END}\nafter\n") and "old" not in text
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


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
