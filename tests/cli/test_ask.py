"""`infinitevl ask`: the answer on stdout, the rest on stderr."""

import os
import subprocess
import sys

import pytest
import typer
from quick import QUICK
from typer.testing import CliRunner

from infinitevl_jax import InfiniteVL, InfiniteVLError, Processor
from infinitevl_jax.checkpoints import packaged
from infinitevl_jax.cli import app
from infinitevl_jax.serve.conversation import end_tokens
from infinitevl_jax.serve.generation import Defaults
from infinitevl_jax.serve.sampling import Sampling


def expected(folder, model, content, **settings):
    """The answer by the Python interface."""
    processor = Processor.from_pretrained(folder)
    batch = processor([{"role": "user", "content": content}])
    return processor.decode(
        model.generate(**batch, eos_token_ids=end_tokens(model, processor), **settings)[0]
    )


def test_an_image_and_a_question(run, folder, model, picture):
    result = run("ask", folder, "What is it?", "--image", picture, "--max-new-tokens", 8)
    answer = expected(
        folder,
        model,
        [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}],
        max_new_tokens=8,
    )
    assert result.exit_code == 0 and answer and result.stdout == answer + "\n"
    for said in ("infinite_vl", "parameters", "float32", "cpu", "a second", "read ", "first after"):
        assert said in result.stderr, result.stderr


def test_a_question_alone_goes_to_the_packaged_model(run, folder, model, picture, monkeypatch):
    """By its name or without one, from wherever the package keeps it; a folder comes first."""
    monkeypatch.setattr(packaged, "MODELS", folder.parent / "none")
    result = run("ask", "What is it?", "--image", picture)
    assert result.exit_code == 2 and "without weights of the model 'tiny'" in result.stderr
    monkeypatch.setattr(packaged, "MODELS", folder.parent)
    assert folder.name == packaged.TINY
    arguments = ["What is it?", "--image", picture, "--max-new-tokens", 8]
    answers = [run("ask", *name, *arguments).stdout for name in ([], ["tiny"], [folder])]
    assert answers[0] == answers[1] == answers[2] != "\n"
    assert run("info", "tiny").stdout == run("info", folder).stdout
    for words, culprit in (([folder], "is missing"), (["What", "is", "it"], "words: is it")):
        result = run("ask", *words)
        assert result.exit_code == 2 and culprit in result.stderr
    assert packaged.check_size(folder) < packaged.LARGEST
    monkeypatch.setattr(packaged, "LARGEST", 1000)
    with pytest.raises(InfiniteVLError, match="at most 1,000"):
        packaged.check_size(folder)


def test_models_of_the_package_are_small():
    names = {path.name for path in packaged.MODELS.glob("*") if path.is_dir()}
    assert names <= set(packaged.NAMES)
    assert all(packaged.check_size(packaged.MODELS / name) > 0 for name in names)


def test_two_images_and_a_video(run, folder, model, picture, film):
    result = run(
        "ask",
        folder,
        "Well?",
        "--video",
        film,
        "--image",
        picture,
        "--image",
        picture,
        "--max-new-tokens",
        3,
    )
    content = [{"type": "image", "image": picture}] * 2 + [
        {"type": "video", "video": film},
        {"type": "text", "text": "Well?"},
    ]
    assert result.stdout == expected(folder, model, content, max_new_tokens=3) + "\n"


def test_sampling_goes_by_the_seed(run, folder, model):
    options = ["--max-new-tokens", 8, "--temperature", 1.5, "--top-k", 20, "--top-p", 0.9]
    one, again, other = (
        run("ask", folder, "Hi", *options, "--seed", seed).stdout for seed in (1, 1, 2)
    )
    assert one == again != other
    sampling = Sampling(1.5, 20, 0.9)
    assert one == expected(folder, model, "Hi", max_new_tokens=8, sampling=sampling, seed=1) + "\n"


def test_words_come_one_by_one(run, folder, model, monkeypatch):
    """Each piece is printed before the next token is read."""
    order, echo, decode = [], typer.echo, model.decode

    def print_piece(text="", **options):
        order.append("print") if text and options.get("nl") is False else None
        echo(text, **options)

    def look(*args, **options):
        for token in decode(*args, **options):
            order.append("token")
            yield token

    monkeypatch.setattr(typer, "echo", print_piece)
    monkeypatch.setattr(model, "decode", look)
    result = run("ask", folder, "Hi", "--max-new-tokens", 5)
    assert len(result.stdout) == 6 and order == ["token", "print"] * 5


def test_a_question_from_standard_input_with_a_system_message(run, folder, model):
    processor = Processor.from_pretrained(folder)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    batch = processor(messages)
    answer = processor.decode(
        model.generate(**batch, eos_token_ids=end_tokens(model, processor), max_new_tokens=6)[0]
    )
    result = run("ask", folder, "-", "--system", "Be brief.", "--max-new-tokens", 6, typed="Who?\n")
    assert result.exit_code == 0 and result.stdout == answer + "\n"
    assert f"read {batch['input_ids'].size} tokens" in result.stderr


def test_min_p_and_a_penalty(run, folder, model):
    options = [
        "--max-new-tokens",
        8,
        "--temperature",
        1.5,
        "--min-p",
        0.2,
        "--repetition-penalty",
        1.5,
    ]
    sampling = Sampling(1.5, min_p=0.2, repetition_penalty=1.5)
    assert (
        run("ask", folder, "Hi", *options).stdout
        == expected(folder, model, "Hi", max_new_tokens=8, sampling=sampling) + "\n"
    )


def test_the_checkpoint_penalty_is_the_default(run, folder, model, monkeypatch):
    monkeypatch.setattr(model, "defaults", Defaults(repetition_penalty=1.6))
    asked = [
        run("ask", folder, "Hi", "--max-new-tokens", 8, *more).stdout
        for more in ((), ("--repetition-penalty", 1))
    ]
    penalties = [Sampling(repetition_penalty=1.6), Sampling()]
    assert asked == [
        expected(folder, model, "Hi", max_new_tokens=8, sampling=sampling) + "\n"
        for sampling in penalties
    ]
    assert asked[0] != asked[1]


def test_ends_at_the_end_of_the_turn(model, folder):
    """The template's <|im_end|> ends an answer though config.json names another token."""
    processor = Processor.from_pretrained(folder)
    assert model.config.eos_token_ids == (256,)
    assert (
        end_tokens(model, processor) == (256, 258)
        and processor.tokenizer.token_id("<|im_end|>") == 258
    )


@pytest.mark.parametrize("command", [[], ["ask"], ["chat"], ["stream"], ["info"]])
def test_help_has_examples(run, command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert all(f"infinitevl {name}" in result.stdout for name in command), result.stdout


def test_help_does_not_load_jax():
    code = (
        "import sys; from infinitevl_jax.cli import app; app(['ask', '-h'], standalone_mode=False);"
        " assert 'jax' not in sys.modules"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode
        == 0
    )


def test_in_a_process_of_its_own(folder, model):
    """A fresh process that loads the weights."""
    command = [
        sys.executable,
        "-m",
        "infinitevl_jax",
        "ask",
        str(folder),
        "Hi",
        "--max-new-tokens",
        "4",
        "--dtype",
        "float32",
    ]
    environment = os.environ | {"XLA_FLAGS": QUICK}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(folder, model, "Hi", max_new_tokens=4) + "\n"
    assert "Traceback" not in done.stderr and "computing in float32" in done.stderr


def test_dtype_and_mesh_reach_the_loader(folder, model, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        InfiniteVL,
        "from_pretrained",
        classmethod(lambda cls, folder, **options: seen.update(options) or model),
    )
    options = ["--max-new-tokens", "2", "--dtype", "bfloat16", "--mesh", "fsdp=2, tensor=-1"]
    result = CliRunner().invoke(app, ["ask", str(folder), "Hi", *options], catch_exceptions=False)
    assert result.exit_code == 0 and "x 8 (fsdp=2, tensor=-1)" in result.stderr
    assert seen["dtype"] == "bfloat16" and dict(seen["mesh"].shape) == {
        "data": 1,
        "fsdp": 2,
        "tensor": 4,
        "context": 1,
    }
    assert seen["progress"]
