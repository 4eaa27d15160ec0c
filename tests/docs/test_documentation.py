"""Commands, snippets and links of README, CONTRIBUTING and docs/; examples of benchmarks."""

import subprocess
import sys
from pathlib import Path

import pytest
from doc_commands import handle
from doc_pages import (
    PAGES,
    ROOT,
    Block,
    anchors,
    blocks,
    commands,
    examples,
    links,
    mentioned,
)

from infinitevl_jax import InfiniteVL, Processor
from infinitevl_jax.config.data import SourceConfig
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.sources import open_source

PROGRAMS = [p for p in (ROOT / "benchmarks").rglob("*.py") if "def main(" in p.read_text("utf-8")]
BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def test_every_block_is_of_a_kind_that_is_tested():
    assert {block.language for block in BLOCKS} == {"bash", "python", "toml", "json"}
    assert len(of("python")) >= 8 and len(of("bash")) >= 10


@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_shell(block, workspace):
    for command in commands(block):
        handle(command.words, command.runs)


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python(block, workspace):
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", of("toml"), ids=str)
def test_presets(block, workspace):
    (workspace / "preset.toml").write_text(block.text, "utf-8")
    load_preset(workspace / "preset.toml")


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_rows(block, workspace):
    """Lines of a JSONL file, which is recognised."""
    Path("rows.jsonl").write_text(block.text, "utf-8")
    rows = open_source(SourceConfig(path="rows.jsonl"), "train")
    model = InfiniteVL.from_pretrained("InfiniteVL")
    encoder = Encoder(rows, Processor.from_pretrained("InfiniteVL"), model.config)
    assert all(encoder.conversation(i).branch.answer.any() for i in range(len(rows)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences(page, workspace):
    for command in mentioned(page):
        handle(command.words, False)


def module(program) -> str:
    """What `python -m` runs. A package's program is its `command`."""
    return ".".join(program.relative_to(ROOT).with_suffix("").parts).removesuffix(".command")


@pytest.mark.parametrize("program", sorted(PROGRAMS), ids=module)
def test_examples_of_benchmarks(program, workspace):
    found = examples(program)
    assert any(c.words[:3] == ("python", "-m", module(program)) for c in found)
    for command in found:
        handle(command.words, False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in links(page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.is_relative_to(ROOT) and other.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(other), f"{page.name} links to {target}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_every_page_is_linked_from_the_readme():
    linked = {
        (ROOT / target.partition("#")[0]).resolve()
        for target in links(ROOT / "README.md")
        if "://" not in target
    }
    assert {page for page in PAGES if page.name != "README.md"} <= linked


@pytest.mark.parametrize(
    ("line", "runs"),
    [
        ("python train.py configs/no_such.toml train.seed=1", False),
        ("python train.py configs/easy_vqa.toml train.sed=1", False),
        ("python -m benchmarks.no_such", False),
        ("python -m benchmarks.full_size --no-such", False),
        ("infinitevl ask InfiniteVL Hello --no-such", False),
        ("infinitevl ask no_such Hello", True),
        ("python convert_torch.py import no_such there", True),
        ("python convert_torch.py embark InfiniteVL there", False),
        ("pip install '.[no_such]'", False),
        ("pytest tests/no_such.py", False),
        ("no_such --help", True),
    ],
)
def test_what_is_wrong_fails(line, runs, workspace, tmp_path):
    (command,) = commands(Block(tmp_path, 1, "bash", line))
    with pytest.raises(Exception):  # noqa: B017  of many kinds: what matters is that none passes
        handle(command.words, runs)


def test_the_picture_is_what_its_script_draws(workspace):
    script = ROOT / "docs" / "draw_architecture.py"
    subprocess.run(
        [sys.executable, str(script), "--output", "again.svg"], check=True, capture_output=True
    )
    again, kept = (
        path.read_text("utf-8")
        for path in (workspace / "again.svg", ROOT / "docs" / "architecture.svg")
    )
    texts = [text.split("<text")[1:] for text in (again, kept)]
    words = [[part.partition(">")[2].partition("<")[0] for part in found] for found in texts]
    assert words[0] == words[1] and "Gated DeltaNet" in words[0]
