import json

import numpy as np
import pytest
from PIL import Image

from infinitevl_jax import InfiniteVL
from infinitevl_jax.config.model import ModelConfig, TextConfig, VisionConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing import Processor


def picture(height, width, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def user(*content):
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else part for part in content
        ],
    }


def image(source, **options):
    return {"type": "image", "image": source, **options}


def assistant(text):
    return {"role": "assistant", "content": text}


CONVERSATIONS = [
    [user(image(picture(100, 150)), "What is this?")],
    [user("Compare: ", image(picture(64, 64, 1)), " and\n", image(picture(300, 90, 2)), "图？ 🦊")],
    [
        {"role": "system", "content": "Be brief."},
        user("Hi"),
        assistant("Hello."),
        user("  again\n\n", image(picture(57, 201, 3))),
    ],
    [{"role": "user", "content": "text alone"}],
]


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["one", "two", "turns", "text"])
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(builtin, reference, conversation, prompt):
    ours = builtin(conversation, add_generation_prompt=prompt)
    theirs = reference.apply_chat_template(
        conversation,
        tokenize=True,
        add_generation_prompt=prompt,
        return_dict=True,
        return_tensors="np",
    )
    assert set(ours) == set(theirs) - {"mm_token_type_ids"}
    for name in ("input_ids", "attention_mask", "image_grid_thw"):
        if name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])
    if "pixel_values" in theirs:
        np.testing.assert_allclose(
            ours["pixel_values"], theirs["pixel_values"], rtol=1e-6, atol=1e-6
        )


def test_batch_equals_transformers(builtin, reference):
    ours = builtin(CONVERSATIONS)
    theirs = reference.apply_chat_template(
        CONVERSATIONS,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="np",
        padding=True,
    )
    for name in ("input_ids", "attention_mask", "image_grid_thw"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    np.testing.assert_allclose(ours["pixel_values"], theirs["pixel_values"], rtol=1e-6, atol=1e-6)


def test_a_batch_from_transformers_passes_unchanged(builtin, reference):
    """transformers' BatchFeature, as numpy and as torch, works in the model and in generation."""
    text = TextConfig(
        layer_types=("sliding_attention", "linear_attention"),
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        mrope_section=(2, 3, 3),
        num_linear_heads=2,
        linear_head_dim=16,
    )
    vision = VisionConfig(
        depth=1,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=32,
        fullatt_block_indexes=(0,),
    )
    model = InfiniteVL.random(ModelConfig(text, vision))
    ours = builtin(CONVERSATIONS[:2])
    for tensors in ("np", "pt"):
        theirs = reference.apply_chat_template(
            CONVERSATIONS[:2],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors=tensors,
            padding=True,
        )
        assert "mm_token_type_ids" in theirs
        np.testing.assert_allclose(model(**theirs).logits, model(**ours).logits, atol=1e-5)
        new = model.generate(**theirs, max_new_tokens=3)
        np.testing.assert_array_equal(new, model.generate(**ours, max_new_tokens=3))
        assert new.shape == (2, 3)


def test_padding_sides(builtin):
    left, right = builtin(CONVERSATIONS), builtin(CONVERSATIONS, padding_side="right")
    for row, conversation in enumerate(CONVERSATIONS):
        alone = builtin(conversation)["input_ids"][0]
        assert left["attention_mask"][row].sum() == right["attention_mask"][row].sum() == len(alone)
        np.testing.assert_array_equal(left["input_ids"][row, -len(alone) :], alone)
        np.testing.assert_array_equal(right["input_ids"][row, : len(alone)], alone)
    assert (left["input_ids"][left["attention_mask"] == 0] == 151_643).all()


def test_video_and_image_in_one_conversation(builtin):
    frames = np.stack([np.asarray(picture(112, 140, seed)) for seed in range(5)])
    video = {"type": "video", "video": frames, "fps": 4, "min_pixels": 784, "max_pixels": 112 * 140}
    batch = builtin([user(video, image(picture(56, 56)), "What moves?")])
    assert batch["video_grid_thw"].tolist() == [[3, 8, 10]] and batch[
        "image_grid_thw"
    ].tolist() == [[1, 4, 4]]
    assert batch["pixel_values_videos"].shape == (240, 1176) and batch["pixel_values"].shape == (
        16,
        1176,
    )
    np.testing.assert_array_equal(batch["second_per_grid_ts"], [0.5])  # not truncated to 0
    ids = batch["input_ids"][0]
    assert (ids == 151_656).sum() == 60 and (ids == 151_655).sum() == 4
    assert {"int32", "float32", "float64"} == {str(value.dtype) for value in batch.values()}


def test_item_options_replace_the_processors(builtin):
    grid = builtin(
        [user(image(picture(560, 560), max_pixels=280 * 280), image(picture(560, 560)), "?")]
    )["image_grid_thw"]
    assert grid.tolist() == [[1, 20, 20], [1, 40, 40]]
    grid = builtin(
        [user(image(picture(560, 560), resized_height=112, resized_width=224, min_pixels=None))]
    )["image_grid_thw"]
    assert grid.tolist() == [[1, 8, 16]]


def test_folder_settings_and_their_overrides(byte_folder):
    write = lambda name, value: (byte_folder / name).write_text(json.dumps(value))  # noqa: E731
    vision = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
    write("config.json", {"image_token_id": 268, "video_token_id": 269, "vision_config": vision})
    assert (
        Processor.from_pretrained(byte_folder).images.factor == 8
    )  # geometry from config.json alone
    write(
        "preprocessor_config.json",
        {
            "size": {"shortest_edge": 64, "longest_edge": 1024},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
    )
    processor = Processor.from_pretrained(byte_folder)
    assert (processor.images.min_pixels, processor.images.max_pixels, processor.images.mean) == (
        64,
        1024,
        (0.5, 0.5, 0.5),
    )
    assert (processor.videos.min_pixels, processor.videos.max_pixels, processor.videos.mean) == (
        100_352,
        602_112,
        (0.5, 0.5, 0.5),
    )
    write(
        "preprocessor_config.json",
        {"min_pixels": 128, "max_pixels": 2048, "patch_size": 4, "merge_size": 2},
    )
    processor = Processor.from_pretrained(
        byte_folder,
        max_pixels=512,
        video_min_pixels=64,
        video_max_pixels=256,
        fps=1.0,
        max_frames=8,
    )
    assert (processor.images.min_pixels, processor.images.max_pixels) == (128, 512)
    assert (processor.videos.max_pixels, processor.videos.fps, processor.videos.max_frames) == (
        256,
        1.0,
        8,
    )
    batch = processor([user(image(picture(16, 32)), "a")])
    assert batch["image_grid_thw"].tolist() == [[1, 4, 8]] and batch["pixel_values"].shape == (
        32,
        96,
    )
    assert (batch["input_ids"] == 268).sum() == 8
    write(
        "processor_config.json",
        {
            "image_processor": {"size": {"shortest_edge": 16, "longest_edge": 256}},
            "video_processor": {"fps": 3},
        },
    )
    processor = Processor.from_pretrained(byte_folder)
    assert (processor.images.max_pixels, processor.videos.fps) == (256, 3)


def test_answers_are_masked_with_their_end_token(builtin):
    chat = [
        user(image(picture(56, 56)), "Colour?"),
        assistant("Red."),
        user("Sure?"),
        assistant(" Yes\n🦊"),
    ]
    example = builtin.encode_example(chat)
    said = example["answer_mask"]
    assert said.dtype == bool and said.shape == example["input_ids"].shape
    assert builtin.decode(example["input_ids"][said], False) == "Red.<|im_end|> Yes\n🦊<|im_end|>"
    last = builtin.encode_example(chat, turns="last")
    np.testing.assert_array_equal(last["input_ids"], example["input_ids"])
    assert builtin.decode(last["input_ids"][last["answer_mask"]], False) == " Yes\n🦊<|im_end|>"
    np.testing.assert_array_equal(last["pixel_values"], builtin(chat[:1])["pixel_values"])


@pytest.mark.parametrize("answer", ["Red.", "\nRed", " 12", "\n\n\n", "", "say <|im_end|> twice"])
def test_the_prompt_of_an_example_is_what_generation_sees(builtin, answer):
    chat = [user(image(picture(56, 56)), "Colour?"), assistant(answer)]
    example = builtin.encode_example(chat)
    prompt = builtin(chat[:1])["input_ids"][0]
    np.testing.assert_array_equal(example["input_ids"][: len(prompt)], prompt)
    assert not example["answer_mask"][: len(prompt)].any()
    ids = example["input_ids"][len(prompt) :]
    assert builtin.decode(ids, False) == answer + "<|im_end|>\n"
    assert example["answer_mask"][len(prompt) :].tolist() == [True] * (len(ids) - 1) + [False]


def test_a_folders_own_template_and_tokenizer(byte_folder):
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}{% if"
        " add_generation_prompt %}[assistant] {% endif %}"
    )
    (byte_folder / "chat_template.jinja").write_text(template)
    processor = Processor.from_pretrained(byte_folder)
    batch = processor([user("a", "b")])  # a list of texts reaches a text template as one string
    assert processor.decode(batch["input_ids"][0], False) == "[user] ab<|im_end|>[assistant] "
    example = processor.encode_example([user("a"), assistant("é")])
    assert processor.decode(example["input_ids"][example["answer_mask"]], False) == "é<|im_end|>"


def test_limit(builtin):
    chat = [user(image(picture(280, 280)), "What?")]
    length = builtin(chat)["input_ids"].shape[1]
    assert builtin(chat, max_length=length)["input_ids"].shape == (1, length)
    with pytest.raises(InfiniteVLError, match=f"{length} tokens, 1 over the limit of {length - 1}"):
        builtin(chat, max_length=length - 1)


def test_decode(builtin):
    ids = np.asarray([[151_644, 9707, 151_645], [9707, 0, 151_643]])
    assert builtin.batch_decode(ids) == ["Hello", "Hello!"]
    assert builtin.decode(ids[0], skip_special_tokens=False) == "<|im_start|>Hello<|im_end|>"
    stream = builtin.stream()
    assert stream.push([9707, 0]) + stream.finish() == "Hello!"


def test_a_conversation_of_very_many_answers_is_refused_at_once(builtin):
    chat = [user("a"), assistant("b")] * 300
    with pytest.raises(InfiniteVLError, match="300 answers to learn from, more than 256"):
        builtin.encode_example(chat)
    assert builtin.encode_example(chat[:40])["answer_mask"].sum() == 40
    assert builtin.encode_example(chat, turns="last")["answer_mask"].sum() == 2


class Awkward:
    def __repr__(self):
        raise RuntimeError("no")


def deep(depth=100_000):
    value = "x"
    for _ in range(depth):
        value = [value]
    return value


ODD = {"deep": deep(), "awkward": Awkward(), "deep inside": {"a": deep()}, "digits": -(10**5000)}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    "place", ["message", "role", "part", "type", "min_pixels", "max_length", "padding_side"]
)
def test_values_that_cannot_be_quoted_are_refused(builtin, odd, place):
    odd = ODD[odd]
    part = {"type": "image", "image": Image.new("RGB", (28, 28))}
    chat, settings = [{"role": "user", "content": [part]}], {}
    if place == "message":
        chat[0] = odd
    elif place == "role":
        chat[0]["role"] = odd
    elif place == "part":
        chat[0]["content"][0] = odd
    elif place in ("type", "min_pixels"):
        part[place] = odd
    else:
        settings[place] = odd
    with pytest.raises(InfiniteVLError) as caught:
        builtin(chat, **settings)
    assert len(str(caught.value)) < 600
