"""Conversations: answers broken off or left standing, undo and reset, questions that are none.

What a tidy conversation holds, one holds in which old answers were left open.
"""

import functools
from random import Random

from infinitevl_jax.serve.conversation import Conversation

from ..case import Case, Place
from ..values import BAD
from .calls import model
from .messages import odd_objects, processor


@functools.cache
def warm(words) -> None:
    """Compile what conversations need, off the clock."""
    talk = Conversation(model(), words)
    for _ in range(4):
        list(talk.ask("question 7", max_new_tokens=4))


def make(rng: Random, place: Place) -> Case:
    words = processor(place)
    warm(words)
    steps = [
        (
            rng.choice(["ask", "ask", "stop", "leave", "leave", "undo", "reset", "odd"]),
            rng.randrange(1, 4),
            rng.randrange(100),
        )
        for _ in range(5)
    ]
    odd = rng.choice([*BAD, *odd_objects()])

    def play(tidy: bool) -> tuple:
        talk, left = Conversation(model(), words), []
        for what, count, number in steps:
            if what == "undo":
                talk.undo()
            elif what == "reset":
                talk.reset()
            elif what != "odd":
                answer = talk.ask(f"question {number}", max_new_tokens=4)
                for _ in range(99 if what == "ask" else count):
                    if next(answer, None) is None:
                        break
                if what == "stop" or tidy:
                    answer.close()
                left.append(answer)
        for answer in left:  # whoever still holds an old answer goes on with it
            try:
                list(answer)
            except ValueError:
                pass
        return talk.messages, talk.tokens

    def action():
        if any(what == "odd" for what, _, _ in steps):
            talk = Conversation(model(), words)
            before = "".join(talk.ask("hello", max_new_tokens=3))
            list(talk.ask(odd, max_new_tokens=3))
            return before, odd
        return play(False)

    def check(found):
        if any(what == "odd" for what, _, _ in steps):
            return "" if isinstance(odd, str | list) else f"accepted the question {odd!r:.60}"
        wanted = play(True)
        # The last answer that was left standing is still the conversation's: it may have gone on.
        if steps[-1][0] == "leave":
            return (
                ""
                if [m["role"] for m in found[0]] == [m["role"] for m in wanted[0]]
                else f"other turns: {found[0]!r:.150}"
            )
        return (
            "" if found == wanted else f"holds something else: {found!r:.120} for {wanted!r:.120}"
        )

    label = ", ".join(what for what, _, _ in steps) + (
        f" ({odd!r:.50})" if any(w == "odd" for w, _, _ in steps) else ""
    )
    return Case(f"conversation: {label}", action, check)
