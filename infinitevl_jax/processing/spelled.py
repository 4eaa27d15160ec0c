"""Control tokens that are spelled out in text.

In an assistant's text <|image_pad|> or <|im_end|> are words: they do not stand for an image or end
the turn. A guard breaks such spellings up. It passes through the template and is removed before
tokenization.
"""

from infinitevl_jax import special_tokens
from infinitevl_jax.errors import InfiniteVLError

GUARD = "\ufdd0\ufdd1"  # noncharacters, which do not occur in text
# tokens that mark images and turns; others (boxes, tool calls) may occur in answers
CONTROL = (
    *special_tokens.VISION_TOKENS.values(),
    special_tokens.START_OF_TURN,
    special_tokens.END_OF_TURN,
    special_tokens.END_OF_TEXT,
)


def guard(text: str) -> str:
    """Break up every spelled control token."""
    for token in CONTROL:
        text = text.replace(token, token[:2] + GUARD + token[2:])
    return text


def check_unicode(text: str, where: str) -> None:
    """Raise InfiniteVLError for text that cannot be encoded as UTF-8."""
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
    """Raise InfiniteVLError for text that spells an image or video placeholder."""
    for kind, token in placeholders.items():
        if token in text:
            raise InfiniteVLError(
                f"{where} spells out {token} in its text, which stands for {kind} tokens and has no"
                f" {kind} here",
                f'pass pictures as items, {{"type": "{kind}", "{kind}": ...}}, and take the token'
                " out of the text, or space it out",
            )
    if GUARD in text:
        raise InfiniteVLError(f"{where} holds the noncharacters U+FDD0 U+FDD1", "remove them")
