"""`infinitevl data`: what a mixture contains, as text."""

import json
import re

import pytest
from PIL import Image
from typer.testing import CliRunner

from infinitevl_jax.cli import app

PRESET = """\
[model]
from = "{folder}"

[train.data]
batch = 2
length = 96
patches = 64

[train.data.sources.chats]
path = "chats.json"
images = "photos"
held_out = "train[:1]"

[train.data.sources.tales]
path = "tales.jsonl"
weight = 2
"""


@pytest.fixture
def place(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.toml").write_text(PRESET.format(folder=folder))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (12, 12), (200, 30, 30)).save(tmp_path / "photos" / "a.png")
    rows = []
    for name, answer in (("a", "Red"), ("b", "Blue"), ("a", "Yes \x1b[31m"), ("a", "Red " * 99)):
        said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
        rows.append({"image": f"{name}.png", "conversations": said})
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    tales = [json.dumps({"text": "Once " * n}) for n in (3, 50)]
    (tmp_path / "tales.jsonl").write_text("\n".join(tales))
    return tmp_path


def show(*arguments, status=0):
    result = CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.output


def test_a_mixture(place):
    out = show("p.toml", "--samples", 2)
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines() if line}
    assert lines["chats"][1:4] == ["4", "2", "1"] and lines["tales"][1:4] == ["2", "0", "2"]
    assert lines["all"][1:3] == ["6", "2"]
    # 15 and 250 bytes with an end: as many with loss as tokens
    assert lines["tales"][5] == lines["tales"][6] == "265"
    tokens = int(lines["chats"][5])
    assert lines["chats"][4] == f"{tokens / (tokens + 2 * 265):.1%}" and lines["chats"][6] != tokens
    assert re.search(r"an epoch: \d+ steps of 2 rows of 96 tokens, [\d.]+% of them used", out)
    assert "skipped, chats.json:" in out and "b.png" in out
    assert re.search(r"row 3: the conversation takes \d+ tokens, train.data.length is 96", out)
    assert "<|vision_start|><|image_pad|> x 9 <|vision_end|>What?" in out
    assert "[[Red<|im_end|>]]" in out and "[[Yes \\x1b[31m<|im_end|>]]" in out
    assert "[[Once Once Once <|endoftext|>]]" in out and "\x1b" not in out
    assert len(list(place.iterdir())) == 4  # nothing is written


def test_some_rows_alone(place):
    out = show("p.toml", "--rows", 2)
    assert re.search(r"^chats +2 +0 ", out, re.MULTILINE) and "row 2" not in out.split("tales")[0]
    assert "chats, row 0:" in out


def test_held_out_rows_and_changes(place):
    out = show("p.toml", "--held-out", "--samples", 0)
    assert re.search(r"^chats +1 +0 ", out, re.MULTILINE) and "tales" not in out
    out = show("p.toml", "train.data.too_long=cut", "--skipped", 0)
    assert re.search(r"^chats +4 +1 ", out, re.MULTILINE) and "skipped," not in out
    out = show(
        "p.toml", "train.data.sources={}", "train.data.path=chats.json", "train.data.images=photos"
    )
    assert re.search(r"^the data +4 +2 ", out, re.MULTILINE)


def test_questions_of_a_fresh_model(place, tiny_data):
    """Its words come from the rows; nothing is written."""
    from tiny_run import write_preset

    path = write_preset(place, tiny_data)
    out = show(path)
    assert "an epoch: 2 steps of 8 images with 2 questions each" in out
    assert re.search(r"what color is it \? <\|im_start\|>\[\[\w+ <\|im_end\|>\]\]", out)
    assert not (place / "run").exists()


def test_what_is_wrong_is_one_error(place):
    (place / "chats.json").write_text("[")
    out = show("p.toml", status=2)
    assert "chats.json is not a JSON array of rows" in out and "Traceback" not in out
