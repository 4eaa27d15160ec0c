"""Encoding only the new part of a conversation gives the ids of encoding all of it."""

import numpy as np
import pytest
from PIL import Image

from infinitevl_jax import InfiniteVLError
from infinitevl_jax.processing import ChatTemplate, Processor

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 84, 3), np.uint8))
FRAMES = [PICTURE] * 4


def user(*content):
    return {
        "role": "user",
        "content": [c if isinstance(c, dict) else {"type": "text", "text": c} for c in content],
    }


TURNS = [
    (user({"type": "image", "image": PICTURE}, "What is this?"), "A cat, I'd say: 猫 🦊."),
    (
        user(
            "And\n\nthis? ", {"type": "video", "video": FRAMES}, {"type": "image", "image": PICTURE}
        ),
        "Two things.\n  One of them   moves!",
    ),
    ({"role": "user", "content": "Thanks"}, "12,345.67 times\tgladly"),
    (user("Bye."), ""),
    (user("Really."), "Yes"),
]


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_turn_by_turn_gives_the_ids_of_the_whole(builtin, system):
    messages, held, prompt, before = list(system), np.zeros(0, np.int32), "", ""
    arrays = {}
    for question, answer in TURNS:
        messages.append(question)
        batch, prompt = builtin.continuation(messages, prompt)
        held = np.concatenate([held, batch["input_ids"][0]])
        whole = builtin(messages)
        np.testing.assert_array_equal(held, whole["input_ids"][0])
        assert prompt.startswith(before) and prompt.endswith(
            builtin.template.render([question], True).split("\n", 2)[2]
        )
        assert batch["attention_mask"].shape == batch["input_ids"].shape
        before = prompt
        for name in batch.keys() - {"input_ids", "attention_mask"}:
            arrays.setdefault(name, []).append(batch[name])
        held = np.concatenate([held, builtin.tokenizer.encode(answer)]).astype(np.int32)
        messages.append({"role": "assistant", "content": answer})
    # each image came once, with its turn
    assert (
        arrays.keys() == whole.keys() - {"input_ids", "attention_mask"}
        and len(arrays["pixel_values"]) == 2
    )
    for name, values in arrays.items():
        np.testing.assert_array_equal(np.concatenate(values), whole[name])


def with_template(text):
    return Processor(template=ChatTemplate(text, "folder/chat_template.jinja"))


def test_what_a_template_trims_off_an_answer_is_no_rewriting():
    trims = ChatTemplate.builtin().text.replace(
        'message["content"] -', 'message["content"] | trim -'
    )
    processor = with_template(trims)
    _, prompt = processor.continuation([user("Hi")])
    batch, _ = processor.continuation(
        [user("Hi"), {"role": "assistant", "content": "\n Hello \n"}, user("Bye")], prompt
    )
    assert (
        processor.decode(batch["input_ids"][0], False)
        == "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "template",
    [
        # drops earlier turns
        "{% for m in messages[-1:] %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        # counts messages ahead
        (
            "{{ messages | length }} messages: {% for m in messages %}{{ m.content }}<|im_end|>{%"
            " endfor %}"
        ),
        "{% for m in messages %}{{ m.content[:3] }}<|im_end|>{% endfor %}",  # cuts answers off
        (
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if"
            " add_generation_prompt %}<think></think>{% endif %}"
        ),
        # drops the answer
        (
            "{% for m in messages %}{{ m.role if m.role == 'assistant' else m.content"
            " }}<|im_end|>{% endfor %}"
        ),
    ],
)
def test_a_template_that_rewrites_earlier_turns_is_refused(template):
    processor = with_template(template)
    _, prompt = processor.continuation([user("Question")])
    messages = [user("Question"), {"role": "assistant", "content": "A long answer"}, user("More")]
    with pytest.raises(
        InfiniteVLError, match=r"folder/chat_template.jinja rewrites earlier turns[^>]*\n  -> "
    ):
        processor.continuation(messages, prompt)
