"""Special tokens that a text only spells.

What a model said is data: an answer that spells <|image_pad|> or <|im_end|> is words, no picture
  and
no end. In an assistant's text such spellings are broken up by a guard, which the template carries
along and the tokenizer never sees.
"""

from infinitevl_jax.config import special_tokens
from infinitevl_jax.errors import InfiniteVLError

GUARD = "\ufdd0\ufdd1"  # noncharacters: Unicode keeps them out of all text
# What decides where pictures stand and turns end. Others (boxes, tool calls) are an answer's own to
# use.
CONTROL = (
    *special_tokens.VISION_TOKENS.values(),
    special_tokens.START_OF_TURN,
    special_tokens.END_OF_TURN,
    special_tokens.END_OF_TEXT,
)


def guard(text: str) -> str:
    """The text with every spelled control token broken up."""
    for token in CONTROL:
        text = text.replace(token, token[:2] + GUARD + token[2:])
    return text


def check_unicode(text: str, where: str) -> None:
    """Raises InfiniteVLError for text that no encoding can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InfiniteVLError(
            f"{where} holds half of a character, U+{ord(text[error.start]):04X}, at place"
            f" {error.start}",
            "cut text between characters, or replace what was cut: text.encode('utf-8',"
            " 'replace').decode()",
        ) from None


def check_spelling(text: str, where: str, placeholders: dict[str, str]) -> None:
    """Raises InfiniteVLError for text that spells a picture's placeholder where no picture is."""
    for kind, token in placeholders.items():
        if token in text:
            raise InfiniteVLError(
                f"{where} spells out {token} in its text, which stands for {kind} tokens and has no"
                f" {kind} here",
                f'pass pictures as items, {{"type": "{kind}", "{kind}": ...}}, and take the token'
                " out of the text, or space it out",
            )
    if GUARD in text:
        raise InfiniteVLError(
            f"{where} holds the noncharacters U+FDD0 U+FDD1", "take them out: they are no text"
        )
