"""Where a conversation goes on after an answer that the model holds, whatever the answer's words
are.

The template is shown a stand-in for each answer, so that nothing a model said can change the text
around it.
"""

from infinitevl_jax.errors import InfiniteVLError

STAND_IN = "\ufdd2answer {}\ufdd2"


def without_answers(messages: list[dict]) -> list[dict]:
    """The messages with a stand-in for the words of each assistant turn."""
    return [
        (
            {**message, "content": STAND_IN.format(i)}
            if message["role"] == "assistant" and isinstance(message["content"], str)
            else message
        )
        for i, message in enumerate(messages)
    ]


def after_answer(whole: str, prompt: str, messages: list[dict], source: str) -> tuple[int, str]:
    """What follows the last answer.

    Args:
      whole: the text of `messages` (from `without_answers`), which begins with `prompt` and the
        last answer.
      source: how an error names the template.

    Returns:
      The number of the first message after the last answer, and the text from there on.

    Raises:
      InfiniteVLError: there is no answer, or prompt and answer do not stand at the beginning.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or set(messages[answers[-1]]) != {"role", "content"}:
        raise InfiniteVLError(
            "messages holds no answer in words to the prompt",
            "pass the whole conversation: the question, the answer to it as text, and what follows",
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
