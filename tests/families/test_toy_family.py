"""A family from this file alone: config.json and tensors spelled otherwise, without a change to the
package.

Its model: Gated DeltaNet with fewer key heads than value heads, and one layer of full attention
with heads of 256 channels, of which a quarter turns, normalised queries and keys and an output
gate.
"""

import dataclasses
from functools import partial
from typing import Annotated, Any

import jax
import msgspec
import numpy as np
import pytest
from msgspec import Meta
from torch_folders import BF16, read_folder, write_folder

from infinitevl_jax import InfiniteVL
from infinitevl_jax.checkpoints import export_folder, import_folder, read_config, save_params
from infinitevl_jax.cli import info
from infinitevl_jax.config.model import FULL, LINEAR, ModelConfig, TextConfig
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.config.train import OptimizerConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families import ConfigFile, Family, register_family
from infinitevl_jax.families.huggingface import model_config, to_huggingface
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.nn.params import initialize, parameters
from infinitevl_jax.sharding import make_mesh, parameter_shardings
from infinitevl_jax.train.optimizer import make_optimizer
from infinitevl_jax.train.step import (
    init_state,
    model_of,
    put_batch,
    state_shardings,
    supervised_loss,
    train_step,
)

LETTERS = {"d": LINEAR, "f": FULL}
VALUE_HEADS, KEY_HEADS = 4, 2


class ToyKeys(msgspec.Struct):
    """The file's keys; all are required."""

    n_embd: Annotated[int, Meta(ge=1, le=1 << 20)]
    n_inner: int
    n_vocab: int
    n_layer: int
    pattern: Annotated[str, Meta(pattern="^[df]+$")]
    n_head: int
    n_head_kv: int
    head_width: int
    rotary_base: float
    rotary_share: float
    qk_norm: bool
    gate: bool
    delta: list[int]  # key heads, value heads, width of a key, width of a value
    epsilon: float
    tied: bool
    stop: list[int]
    pad: int


def read(file: ConfigFile) -> ModelConfig:
    file.decoder.check({"bias": (True,)})
    keys = file.decoder.read(ToyKeys)
    if len(keys.pattern) != keys.n_layer:
        raise InfiniteVLError(
            f"pattern has {len(keys.pattern)} letters, n_layer is {keys.n_layer}",
            "give a letter for every layer",
        )
    key_heads, value_heads, key_width, value_width = keys.delta
    text = TextConfig(
        layer_types=tuple(LETTERS[letter] for letter in keys.pattern),
        vocab_size=keys.n_vocab,
        hidden_size=keys.n_embd,
        intermediate_size=keys.n_inner,
        num_attention_heads=keys.n_head,
        num_key_value_heads=keys.n_head_kv,
        head_dim=keys.head_width,
        rope_theta=keys.rotary_base,
        mrope_section=None,
        rms_norm_eps=keys.epsilon,
        tie_word_embeddings=keys.tied,
        partial_rotary_factor=keys.rotary_share,
        query_key_norm=keys.qk_norm,
        attention_output_gate=keys.gate,
        num_linear_heads=value_heads,
        num_linear_key_heads=key_heads,
        linear_head_dim=key_width,
        expand_v=value_width / key_width,
    )
    ends = {"eos_token_ids": tuple(keys.stop), "pad_token_id": keys.pad}
    return ModelConfig(text, None, "toy", **ends)


def write(config: ModelConfig) -> dict[str, Any]:
    text = config.text
    letters = {kind: letter for letter, kind in LETTERS.items()}
    if other := set(text.layer_types) - letters.keys():
        raise InfiniteVLError(f"layer_types has {other}", "toys have two types of layers")
    widths = [text.linear_head_dim, text.linear_value_dim]
    return {
        "model_type": config.family,
        "n_embd": text.hidden_size,
        "n_inner": text.intermediate_size,
        "n_vocab": text.vocab_size,
        "n_layer": text.num_hidden_layers,
        "pattern": "".join(letters[kind] for kind in text.layer_types),
        "n_head": text.num_attention_heads,
        "n_head_kv": text.num_key_value_heads,
        "head_width": text.head_dim,
        "rotary_base": text.rope_theta,
        "rotary_share": text.partial_rotary_factor,
        "qk_norm": text.query_key_norm,
        "gate": text.attention_output_gate,
        "delta": [text.linear_key_heads, text.num_linear_heads, *widths],
        "epsilon": text.rms_norm_eps,
        "tied": text.tie_word_embeddings,
        "stop": list(config.eos_token_ids),
        "pad": config.pad_token_id,
    }


TENSOR_NAMES = (
    (r"^layers\.", "transformer.h."),
    (r"\.self_attn\.q_(proj|norm)\.", r".mixer.query_\1."),
    (r"\.self_attn\.k_(proj|norm)\.", r".mixer.key_\1."),
    (r"\.self_attn\.v_proj\.", ".mixer.value_proj."),
    (r"\.self_attn\.", ".mixer."),
    (r"(query|key|value)_proj", r"\1"),
    (r"\.input_layernorm\.", ".ln_1."),
    (r"\.post_attention_layernorm\.", ".ln_2."),
    (r"\.mlp\.(gate|up|down)_proj\.", r".ffn.\1."),
    (r"^embed_tokens\.", "transformer.wte."),
    (r"^norm\.", "transformer.ln_f."),
    (r"^lm_head\.", "output."),
)
TOY = Family("toy", read, write, TENSOR_NAMES)
register_family(TOY)

CONFIG = {
    "architectures": ["ToyForCausalLM"],
    "model_type": "toy",
    "n_embd": 32,
    "n_inner": 40,
    "n_vocab": 100,
    "n_layer": 4,
    "pattern": "ddfd",
    "n_head": 2,
    "n_head_kv": 1,
    "head_width": 256,
    "rotary_base": 10000.0,
    "rotary_share": 0.25,
    "qk_norm": True,
    "gate": True,
    "delta": [KEY_HEADS, VALUE_HEADS, 8, 16],
    "epsilon": 1e-6,
    "tied": False,
    "stop": [98],
    "pad": 0,
    "note": "a key that changes nothing",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """The toy's tensors, spelled out."""
    width, inner = 32, 40
    out = {"transformer.wte.weight": (100, width)}
    for i, letter in enumerate("ddfd"):
        layer, mixer = f"transformer.h.{i}.", f"transformer.h.{i}.mixer."
        out |= {layer + "ln_1.weight": (width,), layer + "ln_2.weight": (width,)}
        out |= {layer + f"ffn.{name}.weight": (inner, width) for name in ("gate", "up")}
        out |= {layer + "ffn.down.weight": (width, inner)}
        if letter == "f":
            # beside each head's query stands its gate
            for name, features in (("query", 2 * 2 * 256), ("key", 256), ("value", 256)):
                out |= {f"{mixer}{name}.weight": (features, width)}
                out |= {f"{mixer}{name}.bias": (features,)}
            out |= {mixer + "query_norm.weight": (256,), mixer + "key_norm.weight": (256,)}
            out |= {mixer + "o_proj.weight": (width, 2 * 256)}
            continue
        keys, values = KEY_HEADS * 8, VALUE_HEADS * 16
        for name, short, features in (("query", "q", keys), ("key", "k", keys)):
            out |= {f"{mixer}{name}.weight": (features, width)}
            out |= {f"{mixer}{short}_conv1d.weight": (features, 1, 4)}
        out |= {mixer + "value.weight": (values, width), mixer + "v_conv1d.weight": (values, 1, 4)}
        out |= {f"{mixer}{name}_proj.weight": (VALUE_HEADS, width) for name in "ab"}
        out |= {mixer + "g_proj.weight": (values, width), mixer + "o_proj.weight": (width, values)}
        out |= {mixer + "A_log": (VALUE_HEADS,), mixer + "dt_bias": (VALUE_HEADS,)}
        out |= {mixer + "o_norm.weight": (16,)}
    return out | {"transformer.ln_f.weight": (width,), "output.weight": (100, width)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Hugging Face folder, imported and exported again."""
    root, rng = tmp_path_factory.mktemp("toy"), np.random.default_rng(0)
    tensors = {
        name: (rng.normal(size=shape) * 0.3).astype(np.float32 if "ln_" in name else BF16)
        for name, shape in shapes().items()
    }
    write_folder(root / "hf", tensors, config=CONFIG, shards=2, side=False)
    import_folder(root / "hf", root / "ours")
    export_folder(root / "ours", root / "back")
    return root


def tokens(rows=2, length=20):
    return np.random.default_rng(1).integers(1, 90, (rows, length))


def test_config_json_is_read_and_written():
    config = model_config(CONFIG)
    text = config.text
    assert text.layer_types == (LINEAR, LINEAR, FULL, LINEAR) and text.rotary_dim == 64
    assert (text.linear_key_heads, text.num_linear_heads) == (KEY_HEADS, VALUE_HEADS)
    assert text.query_key_norm and text.attention_output_gate and text.head_dim == 256
    spelled = {key: value for key, value in CONFIG.items() if key not in ("architectures", "note")}
    assert to_huggingface(config) == spelled and model_config(spelled) == config


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"bias": False}, "config.json: bias = False"),
        ({"pattern": "ddfx"}, "config.json: $.pattern"),
        ({"n_layer": 5}, "config.json: pattern has 4 letters"),
        ({"rotary_share": 2.0}, "config.json: partial_rotary_factor is 2"),
        ({"n_head_kv": 3}, "config.json: num_attention_heads 2"),
    ],
)
def test_what_it_refuses(keys, said):
    with pytest.raises(InfiniteVLError) as caught:
        model_config(CONFIG | keys)
    assert caught.value.culprit.startswith(said)


def test_every_tensor_comes_back(folders):
    before, after = read_folder(folders / "hf"), read_folder(folders / "back")
    assert before == after and len(before) == len(shapes())
    names = [sorted(path.name for path in (folders / name).iterdir()) for name in ("hf", "back")]
    assert names[0] == names[1]
    assert (folders / "hf/config.json").read_bytes() == (folders / "back/config.json").read_bytes()


@pytest.fixture(scope="module")
def models(folders):
    return [InfiniteVL.from_pretrained(folders / name) for name in ("hf", "ours")]


def test_it_runs(models):
    theirs, ours = models
    assert theirs.config == ours.config == model_config(CONFIG)
    logits = np.asarray(theirs(tokens()).logits)
    np.testing.assert_array_equal(logits, ours(tokens()).logits)
    assert np.isfinite(logits).all() and logits.std() > 0.1


def test_it_generates_from_its_cache(models):
    prompt = tokens()
    said = np.asarray(models[1].generate(prompt, max_new_tokens=6))
    whole = np.concatenate([prompt, said], 1)
    logits = np.asarray(models[0](whole[:, :-1]).logits)[:, prompt.shape[1] - 1 :]
    np.testing.assert_array_equal(logits.argmax(-1), said)


def test_info(folders):
    facts = info.describe(folders / "ours")
    assert facts == info.describe(folders / "hf") | {
        "folder": str(folders / "ours"),
        "kind": "ours",
    }
    assert facts["family"] == "toy" and facts["vision"] is None
    assert facts["layers"] == {"Gated DeltaNet": 3, "full attention": 1}
    assert facts["parameters"] == sum(int(np.prod(shape)) for shape in shapes().values())
    assert f"recurrent_state {VALUE_HEADS} x 8 x 16 x 4 bytes" in facts["cache"]["formula"]
    assert "toy" in info.as_table(facts)


def test_a_training_step(folders):
    config, run = read_config(folders / "ours"), RunConfig(fsdp=1)
    known, mesh = parameters(config, scanned=True), make_mesh(run)
    optimizer = make_optimizer(OptimizerConfig(peak_lr=1e-2, warmup=0.0), 4, known)
    ids = tokens(4, 24)
    labels, weights = np.roll(ids, -1, 1).astype(np.int32), np.ones(ids.shape, np.float32)
    data = TrainBatch(None, None, build_inputs(config, ids).decoder, None, labels, weights)
    with jax.set_mesh(mesh):
        params = initialize(config, jax.random.key(0), scanned=True)
        params = jax.device_put(params, parameter_shardings(known, mesh))
        state = init_state(params, list(params), optimizer)
        state = jax.device_put(state, state_shardings(state, known, mesh))
        step = jax.jit(partial(train_step, supervised_loss(model_of(config, run)), optimizer))
        data, losses = put_batch(data, mesh), []
        for _ in range(4):
            state, metrics = step(state, data)
            losses.append(float(metrics.loss))
    assert losses[-1] < 0.9 * losses[0]


def test_a_model_born_here_has_the_same_names(tmp_path):
    config = model_config(CONFIG)
    model = InfiniteVL.random(config)
    save_params(tmp_path / "ours", model.params, config)
    export_folder(tmp_path / "ours", tmp_path / "hf")
    assert {name: shape for name, (_, shape, _) in read_folder(tmp_path / "hf").items()} == shapes()
    again = InfiniteVL.from_pretrained(tmp_path / "hf")
    assert again.config == config
    assert again.params.keys() == model.params.keys()
    for name, value in model.params.items():
        np.testing.assert_array_equal(again.params[name], value)


def renamed(name: str, tensor_names) -> Family:
    """The toy under another name, with other tensor names."""
    return dataclasses.replace(
        TOY,
        name=name,
        read=lambda file: dataclasses.replace(read(file), family=name),
        tensor_names=tensor_names,
    )


def test_names_as_transformers_spells_its_live_modules(tmp_path):
    """A family may have on the hub what others have in memory alone."""
    nested = ((r"^(layers|embed_tokens|norm)\.", r"model.language_model.\1."),)
    register_family(renamed("nested_toy", nested))
    config = dataclasses.replace(model_config(CONFIG), family="nested_toy")
    model = InfiniteVL.random(config)
    save_params(tmp_path / "ours", model.params, config)
    export_folder(tmp_path / "ours", tmp_path / "hf")
    names = set(read_folder(tmp_path / "hf"))
    assert "model.language_model.layers.2.self_attn.q_norm.weight" in names
    assert names >= {"lm_head.weight", "model.language_model.norm.weight"}
    import_folder(tmp_path / "hf", tmp_path / "again")
    export_folder(tmp_path / "again", tmp_path / "back")
    assert read_folder(tmp_path / "back") == read_folder(tmp_path / "hf")


def test_two_tensors_of_one_name(tmp_path):
    names = (*TENSOR_NAMES, (r"\.ffn\.(gate|up)\.", ".ffn.wide."))
    register_family(renamed("short_toy", names))
    config = CONFIG | {"model_type": "short_toy"}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes().items()}
    write_folder(tmp_path / "hf", tensors, config=config, side=False)
    with pytest.raises(
        InfiniteVLError, match="short_toy gives several tensors the name .*ffn.wide"
    ):
        import_folder(tmp_path / "hf", tmp_path / "ours")


def test_families_are_known_by_name():
    with pytest.raises(InfiniteVLError, match="infinite_vl, qwen2, qwen2_5_vl, toy"):
        model_config(CONFIG | {"model_type": "llama"})
    with pytest.raises(InfiniteVLError, match="'toy' is registered already"):
        register_family(dataclasses.replace(TOY, tensor_names=()))
    register_family(TOY)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("infinite_vl", {"partial_rotary_factor": 0.5}),
        ("infinite_vl", {"num_linear_key_heads": 8}),
        ("qwen2", {"query_key_norm": True}),
        ("qwen2", {"attention_output_gate": True}),
    ],
)
def test_the_others_refuse_what_they_cannot_say(family, changes):
    kinds = (LINEAR,) if family == "infinite_vl" else (FULL,)
    config = ModelConfig(TextConfig(kinds, mrope_section=None, **changes), None, family)
    with pytest.raises(InfiniteVLError) as caught:
        to_huggingface(config)
    assert next(iter(changes)) in caught.value.culprit and family in caught.value.culprit
