"""`infinitevl chat`: input, output and commands."""

import signal

import pytest

from infinitevl_jax.serve.conversation import Conversation


@pytest.fixture
def asked(monkeypatch):
    """Contents that reach the model, with their conversation."""
    log, ask = [], Conversation.ask
    monkeypatch.setattr(
        Conversation,
        "ask",
        lambda self, content, **rest: log.append((content, self)) or ask(self, content, **rest),
    )
    return log


def text(line):
    return {"type": "text", "text": line}


def test_turns_pictures_and_commands(run, folder, picture, film, asked):
    typed = (
        f"Hello\n\n/image '{picture}'\n/video {film}\nWhat are"
        " these?\n/undo\n/undo\n/help\nBye\n/reset\nHello\n/quit\nnever read\n"
    )
    result = run("chat", folder, "--max-new-tokens", 4, typed=typed)
    assert result.exit_code == 0, result.stderr
    seen = [
        {"type": "image", "image": str(picture)},
        {"type": "video", "video": str(film)},
        text("What are these?"),
    ]
    assert [content for content, _ in asked] == [
        [text("Hello")],
        seen,
        [text("Bye")],
        [text("Hello")],
    ]
    answers = result.stdout.splitlines()
    assert len(answers) == 4 and all(answers) and answers[0] == answers[3]
    for said in (
        "computing in float32",
        "1 waiting",
        "2 waiting",
        "is taken back",
        "nothing to take back",
        "/undo   ",
        "a new conversation",
    ):
        assert said in result.stderr, said
    assert result.stderr.count("first after") == 4
    conversation = asked[0][1]
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]


def test_mistakes_do_not_end_a_conversation(run, folder, tmp_path, asked):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    typed = (
        f"/image\n/image /no/such.png\n/image {tmp_path}/broken.png\n/imagine\nIt spells"
        " <|image_pad|>\nHello\n"
    )
    result = run("chat", folder, "--max-new-tokens", 3, typed=typed)
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for error, culprit in zip(
        errors,
        ["/image has no path", "/no/such.png", "broken.png", "/imagine", "<|image_pad|>"],
        strict=True,
    ):
        assert culprit in error
    assert asked[-1][0] == [text("Hello")]


def test_interrupting_ends_the_answer_alone(run, folder, model, asked, monkeypatch):
    """Ctrl-C after the second token; the next turn continues from there."""
    decode, pressed = model.decode, []

    def press(*args, **settings):
        for i, made in enumerate(decode(*args, **settings), 1):
            if i == 2 and not pressed:
                pressed.append(signal.getsignal(signal.SIGINT))
                signal.raise_signal(signal.SIGINT)
            yield made

    monkeypatch.setattr(model, "decode", press)
    usual = signal.getsignal(signal.SIGINT)
    result = run("chat", folder, "--max-new-tokens", 5, typed="One\nTwo\n")
    first, second = result.stdout.splitlines()
    assert result.exit_code == 0 and len(first) == 2 and len(second) == 5
    assert signal.getsignal(signal.SIGINT) is usual and pressed[0] is not usual
    messages = asked[0][1].messages
    assert [message["content"] for message in messages] == [
        [text("One")],
        first,
        [text("Two")],
        second,
    ]


def test_the_seed_goes_on(run, folder):
    """The same conversation twice gives the same samples, but each answer has its own seed."""
    options = ["--temperature", 3, "--max-new-tokens", 6]
    one = run("chat", folder, *options, typed="Hi\n/reset\nHi\n").stdout
    assert one == run("chat", folder, *options, typed="Hi\n/reset\nHi\n").stdout
    assert len(set(one.splitlines())) == 2
