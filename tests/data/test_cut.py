"""Conversations that are larger than a row, and what the model reads of images and videos."""

import jax
import numpy as np
import pytest
from own_data import byte_processor, encoder_of, learnt, rows_of, words, write_film, write_photos
from own_data import write_rows as write
from tiny_folder import tiny_config

from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.data.collate import join_rows, rows_batch
from infinitevl_jax.errors import BadRow
from infinitevl_jax.inputs.model_inputs import build_inputs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two turns with an image each, then one with a video; and a processor."""
    folder = tmp_path_factory.mktemp("cut")
    write_photos(folder)
    write_film(folder / "film.mp4")
    row = {
        "images": ["a.png", "b.png"],
        "videos": ["film.mp4"],
        "conversations": [
            {"from": "human", "value": "<image>One?"},
            {"from": "gpt", "value": "First."},
            {"from": "human", "value": "<image>Two?"},
            {"from": "gpt", "value": "Second."},
            {"from": "human", "value": "<video>Three?"},
            {"from": "gpt", "value": "Third."},
            {"from": "human", "value": "Bye, <image>"},
        ],
    }
    row["images"].append("c.png")  # behind the last answer: not read
    processor = byte_processor(folder / "words")
    return encoder_of(rows_of(write(folder / "rows.json", [row])), processor), processor


def test_what_follows_the_last_answer_is_left_out(made):
    encoder, processor = made
    whole = encoder.conversation(0)
    assert words(whole.branch.tokens, processor).endswith("Third.<|im_end|>")
    assert len(whole.grids) == 2 and len(whole.video_grids) == len(whole.seconds) == 1
    assert len(whole.pixels) == whole.grids.prod(1).sum()


def test_cut_to_every_length(made):
    """A row holds whole images, and what is kept is the beginning; the model can read all of it."""
    encoder, processor = made
    whole = encoder.conversation(0)
    text = whole.branch.tokens.tolist()
    kept = {}
    for length in range(20, whole.tokens + 1):
        data = DataConfig(length=length, patches=400, too_long="cut")
        try:
            piece = encoder.within(data).conversation(0)
        except BadRow as row:
            assert "no token of it bears loss within its first" in row.reason
            continue
        assert piece.tokens <= length and piece.branch.tokens.tolist() == text[: piece.tokens + 1]
        assert piece.branch.answer[-1]
        batch = rows_batch([[piece]], data, tiny_config())
        assert (batch.branches.token_index[0] >= 0).sum() == piece.tokens
        assert (batch.patches.patch_index >= 0).sum() == piece.patches
        images = 0 if piece.grids is None else len(piece.grids)
        kept[length] = (images, int(piece.video_grids is not None), learnt(piece, processor))
    assert list(kept.values()) == sorted(kept.values(), key=lambda k: len(k[2]))
    assert {k[:2] for k in kept.values()} == {(1, 0), (2, 0), (2, 1)}
    assert kept[whole.tokens][2].count("<|im_end|>") == 3
    assert any(said == "Firs" for _, _, said in kept.values())


@pytest.mark.parametrize("patches", [0, 1])
def test_patches_that_do_not_fit_end_it(made, patches):
    encoder, processor = made
    whole = encoder.conversation(0)
    limit = int(whole.grids[0].prod()) + patches
    piece = encoder.within(DataConfig(patches=limit, too_long="cut")).conversation(0)
    assert len(piece.grids) == 1 and learnt(piece, processor) == "First.<|im_end|>"
    with pytest.raises(BadRow, match="takes [0-9]+ patches, train.data.patches is"):
        encoder.within(DataConfig(patches=limit)).conversation(0)


def test_the_model_reads_what_the_processor_made(made):
    """Positions, tokens and pixels of images and videos in a packed row, beside another."""
    encoder, processor = made
    config, data = tiny_config(), DataConfig(length=400, patches=800, batch=1)
    piece, source = encoder.conversation(0), encoder.dataset[0]
    messages = [dict(m) for m in source.messages[:6]]
    inputs = build_inputs(config, **processor(messages, add_generation_prompt=False))
    batch = rows_batch([[piece, piece]], data, config)
    for segment in range(2):
        here = batch.branches.segment_ids[0] == segment
        here &= batch.branches.token_index[0] >= 0
        count = int(here.sum())
        assert count == piece.tokens
        for name in ("tokens", "token_index"):
            alone = getattr(inputs.decoder, name)[0, :count]
            np.testing.assert_array_equal(getattr(batch.branches, name)[0, here], alone)
        alone = inputs.decoder.positions[:, 0, :count]
        np.testing.assert_array_equal(batch.branches.positions[:, 0, here], alone)
        place, there = batch.branches.vision_index[0, here], inputs.decoder.vision_index[0, :count]
        np.testing.assert_array_equal(place >= 0, there >= 0)
        for a, b in zip(place[place >= 0], there[there >= 0], strict=True):
            np.testing.assert_array_equal(
                batch.patches.pixels[0, 4 * a : 4 * a + 4],
                inputs.patches.pixels[0, 4 * b : 4 * b + 4],
            )


def test_rows_are_joined_as_they_are(made):
    encoder, _ = made
    config, data = tiny_config(), DataConfig(length=200, patches=400, batch=2)
    contents = [[encoder.conversation(0)], []]
    rows = [rows_batch([content], data, config) for content in contents]
    batch = join_rows(rows)
    for a, b in zip(
        jax.tree.leaves(batch), jax.tree.leaves(rows_batch(contents, data, config)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert (batch.branches.token_index[1] == -1).all() and not batch.weights[1].any()
    assert (batch.patches.patch_index[1] == -1).all() and (
        batch.branches.vision_index[1] == -1
    ).all()
    np.testing.assert_array_equal(batch.branches.positions[:, 0], rows[0].branches.positions[:, 0])


def test_a_conversation_that_bears_loss_throughout_is_no_document(made, monkeypatch):
    """It is cut or skipped, and not divided."""
    encoder, processor = made
    tokens = np.arange(20)
    example = {"input_ids": tokens, "answer_mask": np.ones(20, bool)}
    monkeypatch.setattr(type(processor), "encode_example", lambda *a, **k: dict(example))
    encoder = encoder_of(encoder.dataset, processor)
    with pytest.raises(BadRow, match="takes 19 tokens, train.data.length is 8"):
        encoder.within(DataConfig(length=8)).pieces(0)
    cut = encoder.within(DataConfig(length=8, too_long="cut")).pieces(0)
    assert [piece.branch.tokens.tolist() for piece in cut] == [list(range(9))]
