"""Bad configurations of Hugging Face folders, met by the whole of an import and a load."""

import shutil

import pytest
from failing import config, fails, text
from torch_folders import hybrid_folder

from infinitevl_jax.checkpoints import import_folder, load_params


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """An intact folder to copy."""
    root = tmp_path_factory.mktemp("good")
    hybrid_folder(root / "hf")
    return root


def no_config(src):
    (src / "config.json").unlink()
    return ("config.json",)


CONFIGURATIONS = {
    "no-config": no_config,
    "config-not-json": text("config.json", "{,}", "not JSON"),
    "config-a-list": text("config.json", "[]"),
    "generation-config-not-json": text("generation_config.json", "{", "not JSON"),
    "other-family": config("'llama'", "infinite_vl", model_type="llama"),
    "no-family": config("None", drop=["model_type"]),
    "no-hidden-size": config("hidden_size", drop=["hidden_size"]),
    "size-in-quotes": config("hidden_size", "'32'", hidden_size="32"),
    "negative-size": config("vocab_size", "-5", vocab_size=-5),
    "heads-do-not-divide": config("num_attention_heads", num_attention_heads=3),
    "kv-heads-do-not-divide": config(
        "num_key_value_heads", num_key_value_heads=3, head_dim=16, num_attention_heads=4
    ),
    "other-depth": config("54 missing", num_hidden_layers=12),
    "gelu": config("hidden_act", "'gelu'", hidden_act="gelu"),
    "yarn": config(
        "rope_scaling",
        "'yarn'",
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]},
    ),
    "partial-rotary": config(
        "partial_rotary_factor",
        rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5},
    ),
    "mrope-sections": config(
        "mrope_section", rope_scaling={"type": "mrope", "mrope_section": [2, 3, 4]}
    ),
    "no-mrope-sections": config("mrope_section", rope_scaling=None),
    "quantised": config(
        "quantization_config", quantization_config={"quant_method": "awq", "bits": 4}
    ),
    "logit-softcap": config("final_logit_softcapping", final_logit_softcapping=30.0),
    "experts": config("num_experts", num_experts=8),
    "grouped-linear-heads": config("num_linear_key_value_heads", num_linear_key_value_heads=1),
    "conv-size": config("conv_size", conv_size=3),
    "negative-eigenvalues": config("allow_neg_eigval", allow_neg_eigval=True),
    "layer-types-too-short": config("layer_types", layer_types=["sliding_attention"]),
    "layer-type-unknown": config("chunked_attention", layer_types=["chunked_attention"] * 9),
    "window-of-nothing": config("sliding_window", sliding_window=0),
    "no-vision": config("vision_config", drop=["vision_config"]),
    "vision-a-list": config("vision_config", vision_config=[1]),
    "vision-gelu": config("vision_config", "hidden_act", vision={"hidden_act": "gelu"}),
    "vision-window": config("window_size", vision={"window_size": 7}),
    "vision-width": config("out_hidden_size", vision={"out_hidden_size": 64}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration(tmp_path, good, name):
    src = tmp_path / "src"
    shutil.copytree(good / "hf", src)
    culprits = CONFIGURATIONS[name](src)
    fails(tmp_path, lambda: import_folder(src, tmp_path / "ours"), *culprits)
    fails(tmp_path, lambda: load_params(src, scanned=False), *culprits)
