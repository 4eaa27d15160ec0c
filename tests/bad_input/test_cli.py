"""Command-line errors: exit code 2, culprit and cure on stderr, empty stdout, no traceback."""

import json
import shutil

import pytest
from PIL import Image
from tiny_folder import full_attention_config, tiny_config, tiny_model, write_folder
from typer.testing import CliRunner

from infinitevl_jax import InfiniteVL
from infinitevl_jax.cli import app


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Intact folders, one of a text model, and invalid images."""
    root = tmp_path_factory.mktemp("cli")
    write_folder(root / "model", tiny_model(tiny_config()))
    write_folder(root / "text", tiny_model(full_attention_config()))
    Image.new("RGB", (12, 12)).save(root / "fine.png")
    (root / "broken.png").write_bytes((root / "fine.png").read_bytes()[:40])
    (root / "words.mp4").write_text("not a film")
    (root / "clip.mp4").write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2")  # as every MP4 begins
    (root / "empty").mkdir()
    (root / "run" / "checkpoints" / "5").mkdir(parents=True)
    return root


def change(folder, file, **entries):
    """Change entries of a JSON file."""
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(content | entries))


CASES = {
    "no such folder": (["ask", "{root}/nowhere", "Hi"], ["nowhere", "not there"]),
    "a name on a hub": (
        ["chat", "someone/InfiniteVL"],
        ["someone/InfiniteVL", "fetch the checkpoint"],
    ),
    "a file": (["ask", "{root}/fine.png", "Hi"], ["fine.png", "is a file"]),
    "an empty folder": (["ask", "{root}/empty", "Hi"], ["config.json", "does not exist"]),
    "info of an empty folder": (["info", "{root}/empty"], ["config.json", "does not exist"]),
    "no question": (["ask", "{root}/model", "  "], ["question is empty"]),
    "a model alone": (["ask", "{root}/model"], ["the question to", "model is missing"]),
    "no such image": (
        ["ask", "{root}/model", "Hi", "--image", "{root}/no.png"],
        ["no.png", "not there"],
    ),
    "a folder as image": (
        ["ask", "{root}/model", "Hi", "--image", "{root}/empty"],
        ["empty", "a folder"],
    ),
    "a broken image": (
        ["ask", "{root}/model", "Hi", "--image", "{root}/fine.png", "--image", "{root}/broken.png"],
        ["broken.png"],
    ),
    "no such video": (
        ["ask", "{root}/model", "Hi", "--video", "{root}/no.mp4"],
        ["no.mp4", "not there"],
    ),
    "a broken video": (
        ["ask", "{root}/model", "Hi", "--video", "{root}/words.mp4"],
        ["words.mp4", "not a video in a format"],
    ),
    "a film as image": (
        ["ask", "{root}/model", "Hi", "--image", "{root}/clip.mp4"],
        ["clip.mp4", "not a picture but a video", "--video"],
    ),
    "an image as video": (
        ["ask", "{root}/model", "Hi", "--video", "{root}/fine.png"],
        ["fine.png", "not a video", "--image"],
    ),
    "an image for a text model": (
        ["ask", "{root}/text", "Hi", "--image", "{root}/fine.png"],
        ["text model", "fine.png"],
    ),
    "a placeholder in the question": (
        ["ask", "{root}/model", "<|image_pad|>?"],
        ["<|image_pad|>", "spells out"],
    ),
    "a mesh without numbers": (
        ["ask", "{root}/model", "Hi", "--mesh", "fsdp"],
        ["--mesh 'fsdp'", "fsdp=2,tensor=4"],
    ),
    "an unknown axis": (
        ["chat", "{root}/model", "--mesh", "tensor=2,pipeline=2"],
        ["pipeline=2", "data, fsdp, tensor"],
    ),
    "a mesh of no devices": (
        ["ask", "{root}/model", "Hi", "--mesh", "fsdp=0"],
        ["--mesh 'fsdp=0': fsdp is 0"],
    ),
    "a mesh that is too large": (
        ["ask", "{root}/model", "Hi", "--mesh", "fsdp=64,tensor=2"],
        [
            "--mesh 'fsdp=64,tensor=2'",
            "needs 128 devices",
            "has 8 cpu devices",
            "make data, fsdp or tensor smaller",
        ],
    ),
    "a mesh that does not divide": (
        ["ask", "{root}/model", "Hi", "--mesh", "fsdp=3,data=-1"],
        ["choose sizes", "or give data a number"],
    ),
    "a mesh with two open axes": (
        ["chat", "{root}/model", "--mesh", "fsdp=-1,data=-1"],
        ["--mesh", "give -1 to one axis only"],
    ),
    "an empty standard input": (["ask", "{root}/model", "-"], ["standard input is empty"]),
    "min-p without temperature": (
        ["ask", "{root}/model", "Hi", "--min-p", "0.1"],
        ["--min-p", "--temperature 0.7"],
    ),
    "a penalty of 0": (
        ["ask", "{root}/model", "Hi", "--repetition-penalty", "0"],
        ["repetition_penalty is 0"],
    ),
    "a run without a step": (["info", "{root}/run"], ["config.json", "does not exist"]),
    "sampling without temperature": (
        ["ask", "{root}/model", "Hi", "--top-k", "5"],
        ["temperature 0", "--temperature 0.7"],
    ),
    "top-p of 0": (
        ["ask", "{root}/model", "Hi", "--temperature", "1", "--top-p", "0"],
        ["top_p is 0.0", "0 < top_p <= 1"],
    ),
    "temperature nan": (["ask", "{root}/model", "Hi", "--temperature", "nan"], ["temperature"]),
}


def fails(arguments, *culprits):
    """The command ends with code 2 and a message of one screen that names the culprits."""
    result = CliRunner().invoke(app, arguments, input="", catch_exceptions=False)
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert all(culprit in result.stderr for culprit in culprits) and "run." not in result.stderr, (
        result.stderr
    )
    return result.stderr


@pytest.mark.parametrize("name", CASES)
def test_mistakes(name, good, monkeypatch):
    monkeypatch.setattr(InfiniteVL, "decode", lambda *_, **__: pytest.fail("the model was asked"))
    arguments, culprits = CASES[name]
    said = fails([argument.format(root=good) for argument in arguments], *culprits)
    assert said.startswith(("error: ", "[infinite_vl", "Usage: ")) and len(said.splitlines()) < 12


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "model", "Hi", "--max-new-tokens", "0"],
        ["ask", "model", "Hi", "--temperature", "-1"],
        ["ask", "model", "Hi", "--top-p", "1.5"],
        ["ask", "model", "Hi", "--seed", "x"],
        ["ask", "model", "Hi", "--dtype", "float8"],
        ["ask", "model", "Hi", "--picture", "a.png"],
        ["talk", "model"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_mistyped_options(arguments):
    fails(
        arguments,
        "Usage: ",
        arguments[-2] if arguments[-2].startswith("--") and arguments[-2] != "--picture" else "",
    )


FOLDERS = {
    "another family": (
        lambda f: change(f, "config.json", model_type="llama"),
        ["llama", "infinite_vl"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "no weights": (lambda f: shutil.rmtree(f / "params"), ["params"]),
    "other sizes": (lambda f: change(f, "config.json", intermediate_size=52), ["misshapen", "mlp"]),
    "a template that forgets": (
        lambda f: (f / "chat_template.jinja").write_text("{{ messages[-1].content }}<|im_end|>"),
        ["chat_template.jinja", "rewrites earlier turns"],
    ),
    "a template that is none": (
        lambda f: (f / "chat_template.jinja").write_text("{% if %}"),
        ["chat_template.jinja", "line 1"],
    ),
    "ids of another tokenizer": (
        lambda f: change(f, "config.json", image_token_id=5),
        ["image_token_id is 5", "268"],
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_damaged_folders(name, good, tmp_path):
    """`chat` refuses before it reads weights; so does `info` if the model is at fault."""
    damage, culprits = FOLDERS[name]
    shutil.copytree(good / "model", tmp_path / "model")
    damage(tmp_path / "model")
    fails(["chat", str(tmp_path / "model")], *culprits)
    if "template" not in name and "tokenizer" not in name:
        fails(["info", str(tmp_path / "model")], *culprits)


def test_a_bug_keeps_its_traceback(good, monkeypatch):
    monkeypatch.setattr(InfiniteVL, "from_pretrained", classmethod(lambda *_, **__: 1 / 0))
    result = CliRunner().invoke(app, ["ask", str(good / "model"), "Hi"])
    assert isinstance(result.exception, ZeroDivisionError) and result.exit_code == 1
