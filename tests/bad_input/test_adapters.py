"""Bad LoRA adapters."""

import contextlib
import json
import time

import numpy as np
import pytest
from failing import fails
from torch_folders import HYBRID, hybrid_folder, safetensors_bytes

from infinitevl_jax.checkpoints import import_folder, load_params
from infinitevl_jax.checkpoints.lora import Adapter
from infinitevl_jax.errors import InfiniteVLError


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Intact folders to copy: Hugging Face's and ours."""
    root = tmp_path_factory.mktemp("good")
    import_folder(hybrid_folder(root / "hf"), root / "ours")
    return root


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def lora(*culprits, weights=None, drop_weights=False, **keys):
    def case(folder):
        folder.mkdir()
        content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | keys
        (folder / "adapter_config.json").write_text(json.dumps(content))
        values = {
            f"{Q}.lora_A.weight": np.ones((4, 32), np.float32),
            f"{Q}.lora_B.weight": np.ones((32, 4), np.float32),
        }
        values = {n: v for n, v in (values | (weights or {})).items() if v is not None}
        if not drop_weights:
            (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(values))
        return culprits

    return case


LONE = "base_model.model.model.layers.1.self_attn.q_proj.bias"
LOST = "base_model.model.model.layers.77.mlp.up_proj"
ADAPTERS = (
    {
        "no-weights": lora("adapter_model.safetensors", drop_weights=True),
        "other-kind": lora("adapter_config.json", "IA3", peft_type="IA3"),
        "dora": lora("adapter_config.json", "use_dora", use_dora=True),
        "fan-in-fan-out": lora("adapter_config.json", "fan_in_fan_out", fan_in_fan_out=True),
        "biases": lora("adapter_config.json", "bias", bias="all"),
        "rank": lora("layers.0.self_attn.q_proj", "r = 8", r=8),
        "no-rank": lora("layers.0.self_attn.q_proj", "r = 8", r=None),  # PEFT's default
        "rank-0": lora("adapter_config.json", "$.r: 0", r=0),
        "rank-negative": lora("adapter_config.json", "$.r: -4", r=-4),
        "rank-a-list": lora("adapter_config.json", "$.r", r=[4]),
        "rank-true": lora("adapter_config.json", "$.r: True", r=True),
        "alpha-nan": lora("adapter_config.json", lora_alpha=float("nan")),
        "alpha-infinite": lora("adapter_config.json", lora_alpha=float("inf")),
        "alpha-huge": lora("adapter_config.json", "lora_alpha: 1e+308", lora_alpha=1e308),
        "alpha-in-quotes": lora("adapter_config.json", "lora_alpha: '8'", lora_alpha="8"),
        "alpha-pattern-nan": lora("adapter_config.json", alpha_pattern={".*": float("nan")}),
        "alpha-pattern-huge": lora("alpha_pattern", alpha_pattern={".*": 1e30}),
        "alpha-pattern-a-list": lora("alpha_pattern", alpha_pattern=[1]),
        "rank-pattern-0": lora("rank_pattern", rank_pattern={"q_proj": 0}),
        "rank-pattern-a-list": lora("rank_pattern", rank_pattern=[1]),
        "rank-pattern-open": lora("rank_pattern", "'('", "no expression", rank_pattern={"(": 4}),
        "rank-pattern-star": lora(
            "rank_pattern", "'*q_proj'", "no expression", rank_pattern={"*q_proj": 4}
        ),
        "rank-pattern-long": lora("rank_pattern", rank_pattern={"q" * 5000: 4}),
        "sum-overflows": lora(
            f"{Q.removeprefix('base_model.model.')}.weight",
            "merged in",
            weights={
                f"{Q}.lora_{s}.weight": np.full((4, 32) if s == "A" else (32, 4), 1e19, np.float32)
                for s in "AB"
            },
        ),
        "product-overflows": lora(
            "inf",
            weights={
                f"{Q}.lora_{s}.weight": np.full((4, 32) if s == "A" else (32, 4), 3e38, np.float32)
                for s in "AB"
            },
        ),
        "twice-by-default": lora(
            "same matrix",
            "lora_A.default",
            weights={f"{Q}.lora_A.default.weight": np.zeros((4, 32), np.float32)},
        ),
        "twice-by-prefix": lora(
            "same matrix",
            weights={
                f"{Q.removeprefix('base_model.model.')}.lora_B.weight": np.zeros(
                    (32, 4), np.float32
                )
            },
        ),
        "twice-by-spelling": lora(
            "same matrix",
            weights={
                f"{Q.replace('model.layers', 'model.language_model.layers')}.lora_B.weight": (
                    np.zeros((32, 4), np.float32)
                )
            },
        ),
        "a-vector": lora("lora_A", weights={f"{Q}.lora_A.weight": np.ones(4, np.float32)}),
        "whole-numbers": lora("lora_A", weights={f"{Q}.lora_A.weight": np.ones((4, 32), np.int8)}),
        "one-side": lora(
            "layers.0.self_attn.q_proj", "lora_B", weights={f"{Q}.lora_B.weight": None}
        ),
        "width": lora(
            "layers.0.self_attn.q_proj",
            "[48, 32]",
            weights={f"{Q}.lora_B.weight": np.ones((48, 4), np.float32)},
        ),
        "whole-tensor": lora(LONE, weights={LONE: np.ones(16, np.float32)}),
        "embedding": lora(
            "lora_embedding_A",
            weights={
                "base_model.model.model.embed_tokens.lora_embedding_A": np.ones(
                    (4, 100), np.float32
                )
            },
        ),
        "nan": lora(
            f"{Q}.lora_A.weight",
            "nan",
            weights={f"{Q}.lora_A.weight": np.full((4, 32), np.nan, np.float32)},
        ),
        "target-not-there": lora(
            "model.layers.77.mlp.up_proj.weight",
            weights={
                f"{LOST}.lora_A.weight": np.ones((4, 32), np.float32),
                f"{LOST}.lora_B.weight": np.ones((48, 4), np.float32),
            },
        ),
    }
    | {
        # Each means more than W + scale * B A, and is refused by its name.
        f"{key}={value!r}"[:40]: lora("adapter_config.json", key, **{key: value})
        for key, value in (
            *(
                ("init_lora_weights", kind)
                for kind in (
                    "pissa",
                    "pissa_niter_16",
                    "olora",
                    "corda",
                    "loftq",
                    "lora_ga",
                    "mica",
                    "of 2027",
                )
            ),
            ("alora_invocation_tokens", [1, 2]),
            ("layer_replication", [[0, 4], [2, 5]]),
            ("modules_to_save", ["lm_head"]),
            ("trainable_token_indices", [1, 2]),
            ("trainable_token_indices", {"embed_tokens": [0]}),
            ("target_parameters", ["mlp.up"]),
            ("use_qalora", True),
            ("lora_bias", True),
            ("bias", "lora_only"),
            ("arrow_config", {"top_k": 3}),
            ("use_bdlora", {"nblocks": 2}),
            ("kasa_config", {"beta": 1e-4}),
            ("velora_config", {"x": 1}),
            ("monteclora_config", {"num_samples": 2}),
            ("megatron_config", {"a": 1}),
            ("ensure_weight_tying", True),
            ("a_key_of_2027", 1),
            ("a_key_of_2027", "on"),
            ("use_something_new", True),
            ("use_dora", 1),
            ("peft_type", ["LORA"]),
            ("peft_type", "ADALORA"),
        )
    }
    | {
        "empty": lora(
            "adapter_model.safetensors",
            "empty",
            weights={f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None},
        ),
        "not-a-folder": lambda folder: ("adapter_config.json",),
    }
)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(tmp_path, good, name):
    culprits = ADAPTERS[name](tmp_path / "lora")
    fails(
        tmp_path,
        lambda: import_folder(good / "hf", tmp_path / "ours", adapters=[tmp_path / "lora"]),
        *culprits,
    )


@pytest.mark.parametrize(
    "key, pattern",
    [
        ("rank_pattern", "(?R)"),
        ("alpha_pattern", "(.*)*x"),
        ("rank_pattern", "((a|a)*)*b"),
        ("alpha_pattern", r"(.+)+\1(.+)+\2y"),
    ],
)
def test_pattern_that_takes_for_ever(tmp_path, good, key, pattern):
    """PEFT would look for it until it is killed: an end in bounded time, whatever the pattern
    matches."""
    lora(**{key: {pattern: 4}})(tmp_path / "lora")
    began = time.monotonic()
    with contextlib.suppress(InfiniteVLError):
        load_params(good / "hf", scanned=False, adapters=[tmp_path / "lora"])
    assert time.monotonic() - began < 10


def test_damaged_configuration(tmp_path, good):
    """Any value of any type under any key: right, or our error."""
    values = (
        True,
        0,
        -1,
        2**70,
        1e308,
        "",
        "x",
        [],
        [[1]],
        {},
        {"a": {"b": 1}},
        {".*": None},
        {"": 4},
    )
    lora()(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    for key in (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "bias",
        "peft_type",
        "init_lora_weights",
        "use_dora",
    ):
        for value in values:
            file.write_text(json.dumps({"r": 4, "lora_alpha": 8, key: value}))
            with contextlib.suppress(InfiniteVLError):
                assert np.isfinite(
                    Adapter(tmp_path / "lora").pairs[
                        Q.removeprefix("base_model.model.") + ".weight"
                    ][2]
                )


def test_adapter_alone_is_no_model(tmp_path):
    lora(base_model_name_or_path="hustvl/InfiniteVL")(tmp_path / "lora")
    (tmp_path / "lora" / "config.json").write_text(json.dumps(HYBRID))
    fails(
        tmp_path,
        lambda: import_folder(tmp_path / "lora", tmp_path / "ours"),
        "adapter",
        "hustvl/InfiniteVL",
        "--adapter",
    )


def test_adapter_on_ours(tmp_path, good):
    lora()(tmp_path / "lora")
    fails(
        tmp_path,
        lambda: load_params(good / "ours", scanned=True, adapters=[tmp_path / "lora"]),
        "merged on import",
    )
