"""Continuing a conversation after an answer that is already in the model's cache.

The template renders a placeholder for each answer, so that an answer's text cannot change the text
around it.
"""

from infinitevl_jax.errors import InfiniteVLError

STAND_IN = "\ufdd2answer {}\ufdd2"


def without_answers(messages: list[dict]) -> list[dict]:
    """Replace the text of each assistant turn by a placeholder."""
    return [
        (
            {**message, "content": STAND_IN.format(i)}
            if message["role"] == "assistant" and isinstance(message["content"], str)
            else message
        )
        for i, message in enumerate(messages)
    ]


def after_answer(whole: str, prompt: str, messages: list[dict], source: str) -> tuple[int, str]:
    """The prompt text after the last answer.

    Args:
      whole: rendered text of `messages`.
      prompt: rendered text before the last answer.
      messages: from `without_answers`.
      source: name of the template, for errors.

    Returns:
      The index of the first message after the last answer, and the text from there on.

    Raises:
      InfiniteVLError: there is no answer, or the text does not start with prompt and answer.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or set(messages[answers[-1]]) != {"role", "content"}:
        raise InfiniteVLError(
            "messages holds no answer in words to the prompt",
            "pass the whole conversation: the question, its answer as text, and the next turns",
        )
    said, rest = STAND_IN.format(answers[-1]), whole[len(prompt) :].lstrip()
    if not whole.startswith(prompt) or not rest.startswith(said) or rest.count(said) > 1:
        raise InfiniteVLError(
            f"chat template {source} rewrites earlier turns, so the model cannot go on from what it"
            " holds",
            "ask single questions, or use a template that only appends (without a file the built-in"
            " one is used)",
        )
    return answers[-1] + 1, rest.removeprefix(said)
