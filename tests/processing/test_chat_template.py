import json

import pytest

from infinitevl_jax.processing import ChatTemplate

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CHAT = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": "x"},
            {"type": "text", "text": "One?"},
            {"type": "video", "video": "y"},
        ],
    },
    {"role": "assistant", "content": "Two."},
]


def test_builtin_template():
    template = ChatTemplate.builtin()
    assert template.is_builtin
    text = template.render(CHAT, add_generation_prompt=True)
    assert text == (
        SYSTEM + "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>One?"
        "<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render(CHAT) == text.removesuffix("<|im_start|>assistant\n")


def test_own_system_message_replaces_the_default():
    text = ChatTemplate.builtin().render(
        [{"role": "system", "content": "  Be brief.\n"}, {"role": "user", "content": " <b>&\n"}]
    )
    assert (
        text == "<|im_start|>system\n  Be brief.\n<|im_end|>\n<|im_start|>user\n <b>&\n<|im_end|>\n"
    )


def test_folder_files_win_in_order(tmp_path):
    assert ChatTemplate.from_folder(tmp_path).is_builtin
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "default", "template": "one"}]})
    )
    assert ChatTemplate.from_folder(tmp_path).render(CHAT) == "one"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "two"}))
    assert ChatTemplate.from_folder(tmp_path).render(CHAT) == "two"
    (tmp_path / "chat_template.jinja").write_text("three\n")
    template = ChatTemplate.from_folder(tmp_path)
    assert template.render(CHAT) == "three" and template.source.endswith("chat_template.jinja")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # block lines are removed
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        (
            (
                "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{%"
                " endfor %}"
            ),
            "user",
        ),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}!", "Two.!"),
        ("{{ strftime_now('%Y') | length }}{{ bos_token }}{{ unknown }}", "4<s>"),
        (
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{%"
                " endfor %}{{ ns.n }}"
            ),
            "2",
        ),
    ],
)
def test_templates_are_rendered_as_hugging_face_does(template, text):
    assert ChatTemplate(template, "test").render(CHAT, bos_token="<s>") == text
