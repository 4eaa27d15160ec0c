"""Encoded rows become training batches of one shape."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.data.encoded import Branch, EncodedConversation, EncodedRow
from infinitevl_jax.inputs.batch import TokenSequence, join_sequences
from infinitevl_jax.inputs.model_inputs import DecoderInputs, build_inputs
from infinitevl_jax.inputs.packing import Packing
from infinitevl_jax.inputs.patches import bucket


def group_questions(
    counts: Sequence[int], images: int, branches: int
) -> Iterator[list[tuple[int, list[int]]]]:
    """Cut a split into groups of at most `images` rows and `branches` questions.

    counts: questions of each row. Yields lists of (row, which of its questions). A row that does
      not fit continues in the next group.
    """
    group: list[tuple[int, list[int]]] = []
    used = 0
    for row, count in enumerate(counts):
        done = 0
        while done < count:
            if len(group) == images or used == branches:
                yield group
                group, used = [], 0
            take = min(count - done, branches - used)
            group.append((row, list(range(done, done + take))))
            done, used = done + take, used + take
    if group:
        yield group


def branch_batch(
    rows: Sequence[EncodedRow],
    questions: Sequence[Sequence[int]],
    config: ModelConfig,
    data: DataConfig,
    images: int,
    branches: int,
) -> TrainBatch:
    """A batch in the form of branches: images, and some of their questions.

    Args:
      rows: at most `images` of them, which fit the shapes (`Encoder.within`); missing ones are
        padding.
      questions: which questions of each row; at most `branches` in all. Where no row has more than
        its share of them, the questions of each row take that many rows of branches.
    """
    if not rows:
        return _without_tokens(
            branch_batch([_BLANK], [[0]], config, data, images=images, branches=branches)
        )
    # one shape for all batches and processes: an image has two tokens beside those of its patches
    unit = config.vision.merge_unit if config.vision else 0
    patches = bucket(unit * (data.prefix_length - 2)) if unit else 0
    lengths = [len(row.prefix.tokens) for row in rows]
    packing = Packing.one_per_row(lengths, data.prefix_length, images, patches)
    prefixes = join_sequences([row.prefix for row in rows])
    prefix = build_inputs(config, **prefixes, packing=packing)
    share = branches // images
    fill = share if all(len(which) <= share for which in questions) else 0
    chosen = [
        (branch, parent)
        for parent, (row, which) in enumerate(zip(rows, questions, strict=True))
        for branch in [row.branches[i] for i in which] + [_NONE] * (fill - len(which))
    ]
    asked = [branch for branch, _ in chosen]
    texts = join_sequences([branch.inputs for branch in asked], branches, data.length)
    lengths = [len(branch.inputs.tokens) for branch in asked]
    parents = np.minimum(np.arange(branches) // share if fill else 0, images - 1)
    parents = np.broadcast_to(parents, branches).astype(np.int32)
    parents[: len(chosen)] = [parent for _, parent in chosen]
    return TrainBatch(
        prefix.patches,
        prefix.decoder,
        build_inputs(config, **texts).decoder,
        parents,
        *_targets(asked, Packing.one_per_row(lengths, data.length, branches)),
    )


def packed_batch(
    conversations: Sequence[EncodedConversation], packing: Packing, config: ModelConfig
) -> TrainBatch:
    """A batch in the form of rows. packing: has a place for each conversation, in this order."""
    batch = join_sequences([conversation.inputs for conversation in conversations])
    inputs = build_inputs(config, **batch, packing=packing)
    targets, weights = _targets([conversation.branch for conversation in conversations], packing)
    return TrainBatch(inputs.patches, None, inputs.decoder, None, targets, weights)


def _targets(branches: Sequence[Branch], packing: Packing) -> tuple[np.ndarray, np.ndarray]:
    """The token that follows each input, and whether it belongs to an answer, as `TrainBatch` has
    them."""
    targets = packing.lay_out([branch.tokens[1:] for branch in branches])
    weights = packing.lay_out([branch.answer[1:] for branch in branches], dtype=np.float32)
    return targets, weights


def rows_batch(
    rows: Sequence[Sequence[EncodedConversation]], data: DataConfig, config: ModelConfig
) -> TrainBatch:
    """A batch of packed rows. Each has the conversations that are given for it; none is padding."""
    packing = empty_packing(data, len(rows))
    for number, row in enumerate(rows):
        for conversation in row:
            packing.put(number, conversation.tokens, conversation.patches)
    conversations = [conversation for row in rows for conversation in row]
    if conversations:
        return packed_batch(conversations, packing, config)
    packing.put(0, 1)
    blank = EncodedConversation(_BLANK.branches[0])
    return _without_tokens(packed_batch([blank], packing, config))


_NONE = Branch(np.zeros(0, np.int32), np.zeros(0, bool), ("", ""))
_BLANK = EncodedRow(
    TokenSequence(np.zeros(1, np.int32)),
    [Branch(np.zeros(2, np.int32), np.zeros(2, bool), ("", ""))],
)


def _without_tokens(batch: TrainBatch) -> TrainBatch:
    """The batch with all its tokens turned to padding."""

    def empty(inputs: DecoderInputs) -> DecoderInputs:
        return inputs._replace(token_index=np.full_like(inputs.token_index, -1))

    return batch._replace(
        prefix=batch.prefix and empty(batch.prefix), branches=empty(batch.branches)
    )


def join_rows(rows: Sequence[TrainBatch]) -> TrainBatch:
    """One batch of several with packed rows, in this order."""

    def join(parts: Sequence, axis: int = 0):
        return None if parts[0] is None else np.concatenate(parts, axis)

    branches = DecoderInputs(
        *(
            join([getattr(row.branches, name) for row in rows], axis=int(name == "positions"))
            for name in DecoderInputs._fields
        )
    )
    return TrainBatch(
        jax.tree.map(lambda *parts: np.concatenate(parts), *[row.patches for row in rows]),
        None,
        branches,
        None,
        join([row.targets for row in rows]),
        join([row.weights for row in rows]),
    )


class PackedRows:
    """Conversations in the order in which they come, each in the first row that has room."""

    def __init__(self, config: ModelConfig, data: DataConfig, rows: int):
        self.config = config
        self.packing = empty_packing(data, rows)
        self.conversations: list[EncodedConversation] = []

    def add(self, conversation: EncodedConversation) -> bool:
        """Take a conversation that fits the shapes (`Encoder.within`). False: no row has room."""
        fits = self.packing.add(conversation.tokens, conversation.patches)
        if fits:
            self.conversations.append(conversation)
        return fits

    def batch(self) -> TrainBatch:
        """The batch of what was taken."""
        return packed_batch(self.conversations, self.packing, self.config)


def empty_packing(data: DataConfig, rows: int) -> Packing:
    """`rows` rows of the shape that `data` gives them."""
    return Packing(rows, data.length, data.patches)
