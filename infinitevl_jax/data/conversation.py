"""The one row type: a conversation, or a document, and its view as questions about pictures."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from infinitevl_jax.errors import InfiniteVLError


class Conversation(NamedTuple):
    """A row of a source.

    Attributes:
      messages: as `Processor.encode_example` takes them: system, user, assistant and tool turns
        with text, images and videos in any order. The loss is on what the assistant says.
        "weight": 0 in an assistant's message takes the loss off it.
      tools: JSON schemas of functions for the chat template.
      text: a document in place of messages, with the loss on all of its tokens.
      complete: the document ends here, and does not go on in another row.
    """

    messages: Sequence[dict[str, Any]] = ()
    tools: Sequence[dict[str, Any]] | None = None
    text: str | None = None
    complete: bool = True


class Turns(NamedTuple):
    """A conversation as pictures and independent questions about them."""

    pictures: list[dict[str, Any]]  # content items
    questions: list[str]
    answers: list[str]

    @property
    def image(self) -> Any:
        """Source of the first picture, None if there is none."""
        return self.pictures[0]["image"] if self.pictures else None


def from_questions(image: Any, questions: Sequence[str], answers: Sequence[str]) -> Conversation:
    """One turn for each question. The image (bytes or a path; b"" is none) comes before the first,
    as in the model's evaluation."""
    messages: list[dict[str, Any]] = []
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        picture = [{"type": "image", "image": image}] if image and i == 0 else []
        messages += turn(picture, question, answer)
    return Conversation(messages)


def turn(pictures: Sequence[dict[str, Any]], question: str, answer: str) -> list[dict[str, Any]]:
    """Messages of one question and its answer."""
    content = [*pictures, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def as_turns(row: Conversation) -> Turns:
    """A row as questions about its pictures.

    Raises:
      InfiniteVLError: it is not pictures, followed by questions and answers in plain text.
    """
    pictures: list[dict[str, Any]] = []
    questions: list[str] = []
    answers: list[str] = []
    for i, message in enumerate(row.messages):
        role = ("user", "assistant")[i % 2]
        if message.get("role") != role or set(message) > {"role", "content"}:
            raise _not_questions(f"message {i} is not a plain {role} turn")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = list(parts or ())
        while i == 0 and parts and parts[0].get("type") == "image":
            pictures.append(parts.pop(0))
        if len(parts) != 1 or parts[0].get("type") != "text":
            raise _not_questions(f"message {i} is not one text" + (" after images" * (i == 0)))
        (questions if role == "user" else answers).append(parts[0]["text"])
    if row.text is not None or row.tools or not answers or len(questions) != len(answers):
        raise _not_questions("it does not end with an answer")
    return Turns(pictures, questions, answers)


def texts(row: Conversation) -> Iterator[str]:
    """All texts of a row."""
    if row.text is not None:
        yield row.text
    for message in row.messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]


def _not_questions(reason: str) -> InfiniteVLError:
    return InfiniteVLError(
        f"the conversation is not a list of questions about its images: {reason}",
        "train.data.questions=0 packs whole conversations",
    )
