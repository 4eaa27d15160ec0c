"""Texts packed into one row, told apart by position ids that start anew: each has the logits that
it has alone."""

import numpy as np
import pytest
from tiny_folder import full_attention_config, tiny_config, tiny_model

from infinitevl_jax import InfiniteVLError
from infinitevl_jax.inputs.segments import split_packed
from pallas_kernels.testing.parity import rel_rms

TEXTS = [
    np.arange(10, 33),
    np.array([77]),
    np.arange(100, 115),
]  # the first is longer than the window
PACKED = np.concatenate(TEXTS)[None]
PLACE = np.concatenate([np.arange(len(text)) for text in TEXTS])[None]


@pytest.fixture(scope="module")
def hybrid():
    return tiny_model(tiny_config())


def alone(model):
    width = max(map(len, TEXTS))
    ids = np.stack([np.pad(text, (0, width - len(text))) for text in TEXTS])
    mask = np.stack([np.arange(width) < len(text) for text in TEXTS])
    logits = model(ids, mask).logits
    return np.concatenate([row[keep] for row, keep in zip(np.asarray(logits), mask, strict=True)])


@pytest.mark.parametrize("axes", [None, 3, 4])
def test_packed_texts_have_the_logits_that_they_have_alone(hybrid, axes):
    positions = PLACE if axes is None else np.broadcast_to(PLACE, (axes, *PLACE.shape))
    assert rel_rms(hybrid(PACKED, position_ids=positions).logits[0], alone(hybrid)) <= 1e-5


def test_full_attention_and_padding_keep_them_apart_too():
    model = tiny_model(full_attention_config())
    ids, positions = (np.pad(x, [(0, 0), (3, 0)], constant_values=1) for x in (PACKED, PLACE))
    mask = np.arange(ids.shape[1])[None] >= 3
    assert rel_rms(model(ids, mask, positions).logits[0, 3:], alone(model)) <= 1e-5


def test_a_cache_holds_one_sequence_a_row(hybrid):
    for call in (
        lambda: hybrid(PACKED, position_ids=PLACE, use_cache=True),
        lambda: hybrid.generate(PACKED, position_ids=PLACE),
    ):
        with pytest.raises(
            InfiniteVLError, match=r"start anew inside a row[^>]*\n  -> pass one row a sequence"
        ):
            call()


def split(positions, vision=None):
    positions = np.asarray(positions)
    vision = np.zeros(positions.shape[-1], bool) if vision is None else np.asarray(vision, bool)
    segment, ordinal = split_packed(positions, vision, "sequence 0")
    return segment.tolist(), ordinal.tolist()


def test_where_sequences_begin():
    assert split([5, 6, 7]) == ([0, 0, 0], [0, 1, 2])
    assert split([0, 0, 1, 0]) == ([0, 1, 1, 2], [0, 0, 1, 0])
    image = [[0, 1, 1, 1, 1, 3, 0, 1], [0, 1, 1, 2, 2, 3, 0, 1], [0, 1, 2, 1, 2, 3, 0, 1]]
    assert split(image, [0, 1, 1, 1, 1, 0, 0, 0]) == ([0] * 6 + [1, 1], [*range(6), 0, 1])
    assert split([[4, 9, 10]] * 3) == (
        [0, 0, 0],
        [0, 1, 2],
    )  # three axes are chosen freely as long as time does not fall
    picture_first = [[0, 0, 0, 0, 2, 0, 0], [0, 0, 1, 1, 2, 0, 0], [0, 1, 0, 1, 2, 0, 1]]
    assert split(picture_first, [1, 1, 1, 1, 0, 1, 1]) == ([0] * 5 + [1, 1], [0, 1, 2, 3, 4, 0, 1])


@pytest.mark.parametrize(
    "positions", [[0, 1, 5, 6], [0, 1, 2, 1, 2], [3, 2, 1, 0], [[0, 1, 2, 1]] * 3, [[0, 1, 1]] * 4]
)
def test_what_neither_goes_on_nor_starts_anew_is_refused(positions):
    with pytest.raises(
        InfiniteVLError, match=r"position_ids of sequence 0 go from \d to \d at token \d\n  -> "
    ):
        split(positions)
