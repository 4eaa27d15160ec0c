"""Words to write into pictures: of a list, or invented. Some are held out by name."""

import functools
import random
from pathlib import Path

from infinitevl_jax.data.drawing.fonts import CHARACTERS
from infinitevl_jax.data.drawing.split import TEST, place
from infinitevl_jax.errors import InfiniteVLError, shown
from infinitevl_jax.reading import read_bytes

LIST_BYTES = 1 << 26
ONSETS = (
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sc sh sk sl sm sn sp st"
    " str sw t th tr tw v w wh y z"
).split()
VOWELS = "a a a e e e i i o o u ai ea ee ie oa oo ou y".split()
NO_CODA = "."
CODAS = (
    ". . . . b ck d f ft g k l ld ll lt m mp n nd ng nk nt p r rd rk rm rn rt s ss st t th x"
).split()


class Words:
    """Words of one part of the data."""

    def __init__(self, part: str, share: float, listed: tuple[str, ...] = ()):
        """
        Args:
          part: "train" or "test". share: of all words that is held out for "test".
          listed: lower-case words to choose from; without them words are invented.
        """
        self.part, self.share = part, share
        own = sorted((word for word in listed if self.has(word)), key=lambda w: (len(w), w))
        self._words = own
        self._upto = [0] * (max(map(len, own), default=0) + 1)  # words of at most so many letters
        for word in own:
            self._upto[len(word)] += 1
        for length in range(1, len(self._upto)):
            self._upto[length] += self._upto[length - 1]

    def has(self, word: str) -> bool:
        """Whether a word belongs to this part. Its case does not matter."""
        return (place(word.lower()) < self.share) == (self.part == TEST)

    def word(self, rng: random.Random, longest: int = 12) -> str:
        """A word in lower case, of at most `longest` letters (3 or more)."""
        if self._words:
            count = self._upto[min(longest, len(self._upto) - 1)]
            if not count:
                raise self._too_few(1, longest)
            return self._words[rng.randrange(count)]
        while True:
            found = "".join(_syllable(rng) for _ in range(rng.choice((1, 1, 2, 2, 2, 3))))
            if 2 <= len(found) <= longest and self.has(found):
                return found

    def words(self, rng: random.Random, count: int, longest: int = 12) -> list[str]:
        """Different words."""
        found: dict[str, None] = {}
        for _ in range(100 * count):
            found[self.word(rng, longest)] = None
            if len(found) == count:
                return list(found)
        raise self._too_few(count, longest)

    def _too_few(self, count: int, longest: int) -> InfiniteVLError:
        return InfiniteVLError(
            f"the list of words has no {count} different ones of at most {longest} letters for"
            f" the {self.part} split",
            "name a longer list: train.data.options.words",
        )


def open_words(file: str, part: str, share: float) -> Words:
    """Words of a text file, one a line, or invented ones with "".

    Lines that are not plain letters, or longer than 12, are no words. Case is ignored.

    Raises:
      InfiniteVLError: the file cannot be read, or has no words for one of the parts.
    """
    if not file:
        return Words(part, share)
    found = Words(part, share, _listed(file))
    if not found._words:
        raise InfiniteVLError(
            f"{file} has no words for the {part} split", "list more words, one a line"
        )
    return found


@functools.cache
def _listed(file: str) -> tuple[str, ...]:
    try:
        lines = read_bytes(Path(file), LIST_BYTES).decode("utf-8").split()
    except UnicodeDecodeError as error:
        raise InfiniteVLError(
            f"the list of words {shown(file)} is not UTF-8: {error}", "write it again as UTF-8"
        ) from None
    letters = set(CHARACTERS)
    fit = {w.lower() for w in lines if w.isalpha() and 2 <= len(w) <= 12 and set(w) <= letters}
    return tuple(sorted(fit))


def _syllable(rng: random.Random) -> str:
    coda = rng.choice(CODAS)
    return rng.choice(ONSETS) + rng.choice(VOWELS) + (coda if coda != NO_CODA else "")


def cased(rng: random.Random, word: str) -> str:
    """A word as it is, with a capital, or in capitals."""
    kind = rng.random()
    return word if kind < 0.5 else word.capitalize() if kind < 0.8 else word.upper()


def price(rng: random.Random, most: int = 100) -> int:
    """A price in cents."""
    return rng.choice((rng.randrange(10, 1000), rng.randrange(10, 100 * most)))


def money(cents: int) -> str:
    """A price as receipts print it."""
    return f"{cents // 100}.{cents % 100:02d}"
