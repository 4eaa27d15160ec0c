"""config.json, in every shape that is about, to ModelConfig and back."""

import dataclasses
import json

import pytest

from infinitevl_jax.config.model import (
    FULL,
    LINEAR,
    SLIDING,
    ModelConfig,
    TextConfig,
    infinitevl_4b,
)
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families.huggingface import model_config, read_config, to_huggingface

# Qwen2.5-VL-3B-Instruct as published (transformers 4): flat, vision apart.
QWEN_VL_3B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
# InfiniteVL's file leaves the Gated DeltaNet out, and says things that change nothing.
INFINITE_VL = QWEN_VL_3B | {
    "architectures": ["InfiniteVLQwen2_5_VLForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_infinitevl.InfiniteVLConfig"},
    "attn_implementation": "flash_attention_2",
    "model_type": "infinite_vl",
    "sliding_window": 8192,
}


def nested(flat, **text):
    """The same as transformers 5 writes it."""
    top = (
        "architectures",
        "model_type",
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    )
    out = {key: flat[key] for key in (*top, "tie_word_embeddings", "vision_config") if key in flat}
    inner = {
        key: value
        for key, value in flat.items()
        if key not in out and key not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    section = (
        {"mrope_section": flat["rope_scaling"]["mrope_section"]} if "rope_scaling" in flat else {}
    )
    inner["rope_parameters"] = {"rope_type": "default", "rope_theta": flat["rope_theta"]} | section
    inner["dtype"] = out["dtype"] = "bfloat16"
    return out | {"text_config": inner | text}


def test_published_infinitevl():
    assert model_config(INFINITE_VL) == dataclasses.replace(
        infinitevl_4b(), eos_token_ids=(151645,)
    )


def test_published_qwen2_5_vl():
    config = model_config(QWEN_VL_3B)
    assert (
        config.text.layer_types == (FULL,) * 36
        and config.text.tie_word_embeddings
        and config.family == "qwen2_5_vl"
    )
    assert config.vision == infinitevl_4b().vision and config.text.mrope_section == (16, 24, 24)


@pytest.mark.parametrize("flat", [INFINITE_VL, QWEN_VL_3B], ids=["infinite_vl", "qwen2_5_vl"])
def test_nested_is_flat(flat):
    assert model_config(nested(flat)) == model_config(flat)


def test_training_code_says_full_attention():
    kinds = ["linear_attention" if i % 4 else "full_attention" for i in range(36)]
    assert model_config(INFINITE_VL | {"layer_types": kinds}) == model_config(INFINITE_VL)
    assert model_config(nested(INFINITE_VL, layer_types=kinds)) == model_config(INFINITE_VL)


def test_what_the_file_says_counts():
    vision = INFINITE_VL["vision_config"] | {"tokens_per_second": 4, "window_size": 56}
    hf = INFINITE_VL | {
        "rms_norm_eps": 1e-5,
        "norm_eps": 1e-4,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "rope_theta": 5e6,
    }
    config = model_config(
        hf
        | {
            "vision_config": vision,
            "expand_v": 1.5,
            "num_linear_heads": 8,
            "num_linear_key_value_heads": 8,
        }
    )
    text = config.text
    assert (text.rms_norm_eps, text.norm_eps, text.sliding_window, text.rope_theta) == (
        1e-5,
        1e-4,
        4096,
        5e6,
    )
    assert (text.linear_value_dim, text.num_linear_heads, text.tie_word_embeddings) == (
        192,
        8,
        False,
    )
    assert (config.vision.tokens_per_second, config.vision.window_size) == (4, 56)


def test_tie_in_text_config_of_older_nested_files():
    hf = nested(QWEN_VL_3B, tie_word_embeddings=True)
    del hf["tie_word_embeddings"]
    assert model_config(hf).text.tie_word_embeddings
    del hf["text_config"]["tie_word_embeddings"]
    assert not model_config(hf).text.tie_word_embeddings


QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "hidden_act": "silu",
}


def test_qwen2():
    config = model_config(QWEN2)
    assert (
        config.vision is None
        and config.text.num_key_value_heads == 4
        and config.text.head_dim == 16
    )
    assert (
        config.text.rope_theta == 1e4
        and config.text.mrope_section is None
        and not config.text.tie_word_embeddings
    )
    assert (
        config.eos_token_ids == () and config.pad_token_id == 0
    )  # an id outside the table is never looked up


def test_qwen2_windows():
    window = {"use_sliding_window": True, "sliding_window": 32}
    assert model_config(QWEN2 | window | {"max_window_layers": 3}).text.layer_types == (
        FULL,
        FULL,
        FULL,
        SLIDING,
    )
    assert (
        model_config(
            QWEN2 | window | {"use_sliding_window": False, "max_window_layers": 0}
        ).text.layer_types
        == (FULL,) * 4
    )
    kinds = [FULL, SLIDING, FULL, SLIDING]
    assert model_config(QWEN2 | window | {"layer_types": kinds}).text.layer_types == tuple(kinds)


def test_end_tokens(tmp_path):
    """generation_config.json wins; a list stays a list."""
    (tmp_path / "config.json").write_text(json.dumps(INFINITE_VL))
    assert read_config(tmp_path).eos_token_ids == (151645,)
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [151645, 151643], "pad_token_id": 151643}'
    )
    assert read_config(tmp_path).eos_token_ids == (151645, 151643)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"quantization_config": None},
        {"attention_dropout": 0.1, "attention_bias": True, "pretraining_tp": 1},
        {"hidden_act": "swish"},
        {"some_new_key": {"of": "a later writer"}},
    ],
)
def test_keys_that_change_nothing(keys):
    assert model_config(QWEN2 | keys) == model_config(QWEN2)


def hybrid_text(**changes):
    kinds = (SLIDING, LINEAR, LINEAR, SLIDING, LINEAR)
    return TextConfig(
        kinds,
        vocab_size=90,
        hidden_size=64,
        num_attention_heads=2,
        head_dim=16,
        mrope_section=None,
        **changes,
    )


@pytest.mark.parametrize(
    "config",
    [
        infinitevl_4b(),
        model_config(QWEN_VL_3B),
        model_config(
            QWEN2
            | {
                "use_sliding_window": True,
                "max_window_layers": 2,
                "eos_token_id": [7, 8],
                "head_dim": 32,
            }
        ),
        ModelConfig(
            hybrid_text(expand_v=1.0, linear_head_dim=24), None, pad_token_id=0, eos_token_ids=(1,)
        ),
        dataclasses.replace(
            infinitevl_4b(),
            vision=dataclasses.replace(
                infinitevl_4b().vision, tokens_per_second=2.5, rope_theta=5e3, rms_norm_eps=1e-5
            ),
        ),
    ],
    ids=["infinitevl", "qwen2_5_vl", "qwen2", "text-hybrid", "odd-vision"],
)
def test_written_configs_read_back(config):
    assert model_config(json.loads(json.dumps(to_huggingface(config)))) == config


HUGE = 10**30
ODD = (
    True,
    0,
    -1,
    0.5,
    2**31,
    2**63,
    HUGE,
    1e308,
    "",
    "x",
    "32",
    [],
    [1],
    [[1]],
    ["a"],
    [None],
    {},
    {"a": {"b": 1}},
    "a" * 5000,
)
TEXT_KEYS = (
    "hidden_size num_attention_heads num_key_value_heads num_hidden_layers intermediate_size"
    " vocab_size head_dim sliding_window rms_norm_eps rope_theta rope_scaling rope_parameters"
    " layer_types tie_word_embeddings initializer_range conv_size expand_v num_linear_heads"
    " num_linear_key_value_heads linear_head_dim norm_eps model_type architectures vision_config"
    " text_config eos_token_id image_token_id vision_start_token_id use_sliding_window"
    " max_window_layers hidden_act quantization_config num_experts"
)
VISION_KEYS = (
    "depth hidden_size intermediate_size num_heads in_channels patch_size temporal_patch_size"
    " spatial_merge_size window_size fullatt_block_indexes out_hidden_size tokens_per_second"
    " rms_norm_eps rope_parameters hidden_act"
)


def right_or_refused(hf, generation=None):
    """A configuration within the stated limits, or our error: nothing else, and soon."""
    try:
        config = model_config(hf, "config.json", generation)
    except InfiniteVLError as error:
        assert error.culprit.startswith("config.json") and len(str(error)) < 3000
        return None
    text, vision = config.text, config.vision
    sizes = [
        text.hidden_size,
        text.head_dim,
        text.vocab_size,
        text.num_key_value_heads,
        text.linear_head_dim,
        text.num_linear_heads,
    ]
    sizes += [text.rope_theta, text.num_hidden_layers]
    if vision is not None:
        sizes += [
            vision.depth,
            vision.num_heads,
            vision.patch_size,
            vision.temporal_patch_size,
            vision.window_size,
        ]
    assert (
        all(0 < size < 2**31 or size == text.rope_theta for size in sizes)
        and text.num_hidden_layers <= 128
    )
    return config


@pytest.mark.parametrize(
    "base", [INFINITE_VL, QWEN_VL_3B, QWEN2], ids=["infinite_vl", "qwen2_5_vl", "qwen2"]
)
def test_any_value_under_any_key(base):
    for key in TEXT_KEYS.split():
        for value in ODD:
            right_or_refused(base | {key: value})
            right_or_refused(
                nested(base, **{key: value})
                if "rope_scaling" in base
                else base | {"text_config": {key: value}}
            )


def test_any_value_under_any_key_of_vision():
    for key in VISION_KEYS.split():
        for value in ODD:
            right_or_refused(
                INFINITE_VL | {"vision_config": QWEN_VL_3B["vision_config"] | {key: value}}
            )


@pytest.mark.parametrize("value", [*ODD, float("nan"), float("inf")])
def test_any_end_token(value):
    for key in ("eos_token_id", "pad_token_id"):
        config = right_or_refused(QWEN2, {key: value})
        assert config is None or all(
            -1 <= token < 2**31 for token in (*config.eos_token_ids, config.pad_token_id)
        )


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_hidden_layers": 1000}, "num_hidden_layers"),
        ({"layer_types": [FULL] * 1000, "num_hidden_layers": 1000}, "num_hidden_layers"),
        (
            {"vision_config": QWEN_VL_3B["vision_config"] | {"depth": 10**6}},
            "vision_config: $.depth",
        ),
        (
            {"vision_config": QWEN_VL_3B["vision_config"] | {"num_heads": 0}},
            "vision_config: $.num_heads: 0",
        ),
        ({"vision_config": QWEN_VL_3B["vision_config"] | {"patch_size": 0}}, "patch_size"),
        (
            {"vision_config": QWEN_VL_3B["vision_config"] | {"spatial_merge_size": 0}},
            "spatial_merge_size",
        ),
        (
            {"vision_config": QWEN_VL_3B["vision_config"] | {"rope_parameters": [1]}},
            "rope_parameters",
        ),
        ({"model_type": ["qwen2"]}, "model_type is ['qwen2']"),
        ({"hidden_size": float("nan")}, "hidden_size"),
        ({"hidden_size": float("inf")}, "hidden_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [-16, 40, 40]}}, "mrope_section"),
        ({"layer_types": [SLIDING, {}]}, "layer_types[1]"),
        ({"num_linear_heads": 0}, "num_linear_heads"),
        ({"sliding_window": 2**31}, "sliding_window"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ],
)
def test_damaged_values_are_named(keys, said):
    with pytest.raises(InfiniteVLError) as caught:
        model_config(INFINITE_VL | keys)
    assert said in caught.value.culprit


def test_whole_numbers_with_a_point():
    """Some writers have 36.0 for 36, and [14, 14] for a square patch."""
    vision = INFINITE_VL["vision_config"] | {
        "patch_size": [14, 14],
        "depth": 32.0,
        "tokens_per_second": 2.0,
    }
    assert model_config(
        INFINITE_VL | {"num_hidden_layers": 36.0, "vision_config": vision}
    ) == model_config(INFINITE_VL)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"3",
        b"null",
        b'"x"',
        b"{" * 200_000,
        b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        b"\xff\xfe",
        b'{"a": NaN}',
    ]
    + [
        b'{"model_type": ' + b"9" * 5000 + b"}",
        b'{"model_type": "\\ud800"}',
        b'{"model_type": "qwen2", "hidden_size": 1e999}',
    ],
)
def test_files_that_are_no_configuration(tmp_path, content):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / "config.json").write_text(json.dumps(QWEN2))
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InfiniteVLError, match=name.replace(".", r"\.")):
            read_config(tmp_path)
        (tmp_path / name).unlink()
