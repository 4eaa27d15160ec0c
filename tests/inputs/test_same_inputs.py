"""One conversation gives equal model inputs wherever it is used: for generation, in a training row
beside other conversations, on a branch of its image, and for evaluation."""

import dataclasses

import numpy as np
import pytest
from tiny_run import write_preset

from infinitevl_jax import InfiniteVL
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.data.collate import PackedRows, branch_batch
from infinitevl_jax.data.conversation import as_turns, from_questions
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.sources.tfds import Dataset
from infinitevl_jax.eval.vqa import answer_branches
from infinitevl_jax.train.setup import prepare_start

PER_TOKEN = ("tokens", "token_index", "positions", "is_vision")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("run")
    preset = load_preset(write_preset(folder, tiny_data))
    dataset = Dataset("tiny_vqa", tiny_data, "train")
    start = prepare_start(preset.model, dataset, folder, 0)
    return preset.train.data, start, dataset


class OneQuestion:
    """A data set of five rows with one question each, the second without an image."""

    title = "one question"

    def __init__(self, dataset):
        image = as_turns(dataset[5]).image
        self.rows = [
            from_questions(image, ["is it red?"], ["no"]),
            from_questions(b"", ["is it blue?"], ["yes"]),
        ]
        self.rows += [
            from_questions(as_turns(dataset[i]).image, ["what color is it?"], ["red"])
            for i in (1, 7, 9)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number]


def tokens_of(inputs, patches, row, segment=0, patch_row=0):
    """What the model computes on for one sequence: its tokens, and for each vision token what the
    tower reads of its patches (pixels, places, and which other patches it sees)."""
    here = (inputs.token_index[row] >= 0) & (inputs.segment_ids[row] == segment)
    found = {
        "tokens": inputs.tokens[row, here],
        "token_index": inputs.token_index[row, here],
        "positions": None if inputs.positions is None else inputs.positions[:, row, here],
        "is_vision": np.zeros(here.sum(), bool),
    }
    if inputs.vision_index is None:
        return found
    place = inputs.vision_index[row, here]
    found["is_vision"] = place >= 0
    unit = 4  # patches of a vision token
    at = (place[place >= 0][:, None] * unit + np.arange(unit)).reshape(-1)
    found["pixels"] = patches.pixels[patch_row, at]
    found["row_column"] = patches.row_column[patch_row, at]
    assert (patches.patch_index[patch_row, at] == at).all()
    for name in ("window_ids", "slice_ids"):
        ids = getattr(patches, name)[patch_row]
        found[name] = ids[at] - ids[at].min(initial=ids.max())
        # no patch of another image has one of these ids
        assert np.isin(ids, ids[at]).sum() == len(at)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def assert_same_prompt(found, expected):
    """`found` holds the answer's only word as well; its end of turn is predicted, never read."""
    prompt = len(expected["tokens"])
    assert len(found["tokens"]) == prompt + 1
    cut = {name: found[name][..., :prompt] for name in PER_TOKEN}
    assert_same(found | cut, expected)


def spy(model):
    """The inputs of every call that `model` makes of its compiled programs. Vision tokens have
    their places among those that were encoded, also where a prompt's chunk has them side by
    side."""
    run, calls, merged = model.programs, [], []
    encode, merge, forward = run.encode, run.merge, run.forward

    def seen_encode(params, patches):
        calls.append(patches)
        return encode(params, patches)

    def seen_merge(vision, encoded, index):
        merged.append(index)
        return merge(vision, encoded, index)

    def seen_forward(params, inputs, *rest, **named):
        seen = inputs
        if merged:  # one group
            seen = inputs._replace(vision_index=merged.pop().reshape(inputs.tokens.shape))
        calls.append(seen)
        return forward(params, inputs, *rest, **named)

    run.encode, run.merge, run.forward = seen_encode, seen_merge, seen_forward
    return calls


@pytest.fixture(scope="module")
def generation(made):
    """What `generate` computes on for the first row's question."""
    _, start, dataset = made
    row = as_turns(OneQuestion(dataset)[0])
    model = InfiniteVL.random(start.config, 0)
    content = [{"type": "image", "image": row.image}, {"type": "text", "text": row.questions[0]}]
    batch = start.processor([{"role": "user", "content": content}])
    calls = spy(model)
    model.generate(**batch, max_new_tokens=1)
    patches, inputs = calls
    found = tokens_of(inputs, patches, 0)
    assert found["is_vision"].sum() > 0 and found["pixels"].any()
    return found


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 1, 0, 3], [1, 0]])
def test_a_packed_training_row(made, generation, order):
    data, start, dataset = made
    encoder = Encoder(OneQuestion(dataset), start.processor, start.config)
    packed = PackedRows(start.config, dataclasses.replace(data, length=32, patches=64), 2)
    for number in order:
        assert packed.add(encoder.conversation(number))
    row = packed.packing.places[order.index(0)].row
    before = [place.row for place in packed.packing.places[: order.index(0)]].count(row)
    batch = packed.batch()
    assert (batch.branches.segment_ids.max(1) > 0).any()
    found = tokens_of(batch.branches, batch.patches, row, segment=before, patch_row=row)
    assert_same_prompt(found, generation)


def continued(prefix, branch):
    """A prefix and what follows it on a cache, as one sequence: the device counts both the token
    index and, of text, the positions on from where the cache ends (`VLM.decode`)."""
    assert branch["positions"] is None
    following = prefix["positions"].max() + 1 + branch["token_index"]
    return prefix | {
        "tokens": np.concatenate([prefix["tokens"], branch["tokens"]]),
        "token_index": np.concatenate(
            [prefix["token_index"], len(prefix["tokens"]) + branch["token_index"]]
        ),
        "positions": np.concatenate(
            [prefix["positions"], np.broadcast_to(following, (3, len(following)))], 1
        ),
        "is_vision": np.concatenate([prefix["is_vision"], branch["is_vision"]]),
    }


def test_a_training_branch(made, generation):
    data, start, dataset = made
    encoder = Encoder(OneQuestion(dataset), start.processor, start.config)
    rows = [encoder[i] for i in (2, 0, 3)]
    batch = branch_batch(rows, [[0]] * 3, start.config, data, 4, 5)
    assert batch.parents.tolist() == [0, 1, 2, 3, 3]
    prefix = tokens_of(batch.prefix, batch.patches, 1, patch_row=1)
    found = continued(prefix, tokens_of(batch.branches, None, 1))
    assert_same_prompt(found, generation)


def test_evaluation(made, generation):
    _, start, dataset = made
    encoder = Encoder(OneQuestion(dataset), start.processor, start.config)
    model = InfiniteVL.random(start.config, 0)
    calls = spy(model)
    rows = [encoder[i] for i in (2, 0, 3)]
    options = dict(images=4, branches=5, max_new_tokens=1)
    answer_branches(model, start.processor, rows, [[0]] * 3, **options)
    patches, prefix, branch = calls
    found = continued(tokens_of(prefix, patches, 1), tokens_of(branch, None, 1))
    assert_same(found, generation)


def test_a_whole_conversation_evaluated_at_once(made, generation):
    """A call of the model, which pads to a bucket, in a batch padded on the left."""
    _, start, dataset = made
    row, model = as_turns(OneQuestion(dataset)[0]), InfiniteVL.random(start.config, 0)
    content = [{"type": "image", "image": row.image}, {"type": "text", "text": row.questions[0]}]
    batch = start.processor([{"role": "user", "content": content}])
    batch["input_ids"] = np.pad(batch["input_ids"], [(0, 0), (3, 0)])
    batch["attention_mask"] = np.pad(batch["attention_mask"], [(0, 0), (3, 0)])
    calls = spy(model)
    model(**batch)
    patches, inputs = calls
    assert inputs.tokens.shape == (1, 64)
    assert_same(tokens_of(inputs, patches, 0), generation)
