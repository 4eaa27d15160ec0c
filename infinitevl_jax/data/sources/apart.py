"""Each question of a source as a row of its own, with the pictures before it."""

from infinitevl_jax.data.conversation import Conversation, as_turns, turn
from infinitevl_jax.data.sources import Source, record_of
from infinitevl_jax.errors import InfiniteVLError


class Apart:
    """Rows of one question. A row of the source that cannot be read is one row here."""

    def __init__(self, source: Source):
        """Reads all rows of the source once, to count their questions."""
        self.source, self.title = source, source.title
        self._places = [
            (number, question)
            for number in range(len(source))
            for question in range(_questions(source, number))
        ]

    def __len__(self) -> int:
        return len(self._places)

    def record(self, number: int) -> int:
        """Number of the row in the source's file."""
        return record_of(self.source, self._places[number][0])

    def __getitem__(self, number: int) -> Conversation:
        row, question = self._places[number]
        turns = as_turns(self.source[row])
        asked = turns.questions[question], turns.answers[question]
        return Conversation(turn(turns.pictures, *asked))


def _questions(source: Source, number: int) -> int:
    try:
        return len(as_turns(source[number]).questions)
    except InfiniteVLError:  # told when the row is used
        return 1
