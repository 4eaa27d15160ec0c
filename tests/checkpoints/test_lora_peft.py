"""An adapter made by peft: trained on with the same logits, and written as peft wrote it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from infinitevl_jax.checkpoints import export_adapter, load_params
from infinitevl_jax.checkpoints.adapter_folder import load_adapter
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.nn.params import functional, parameters
from infinitevl_jax.sharding import make_mesh, parameter_shardings
from infinitevl_jax.train.checkpoints import Checkpoints
from infinitevl_jax.train.lora import with_lora
from infinitevl_jax.train.step import TrainState
from pallas_kernels.testing.parity import rel_rms

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own
TOKENS = np.arange(1, 24)[None]
TARGETS = (r"layers\.\d+\.self_attn\.(q|v)_proj", r"layers\.\d+\.mlp\.down_proj")


class Adapted:
    """A Qwen2 with an adapter of random matrices, as peft saves it, and its logits."""

    def __init__(self, folder):
        import peft  # 6 seconds, which every worker would spend on collecting this file

        torch.manual_seed(0)
        config = transformers.Qwen2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64,
            initializer_range=0.3,
        )
        model = transformers.Qwen2ForCausalLM(config).eval()
        self.base, self.folder = folder / "base", folder / "adapter"
        model.save_pretrained(self.base)
        options = {"r": 4, "lora_alpha": 6, "use_rslora": True}
        names = ["q_proj", "v_proj", "down_proj"]
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, **options))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        adapted.save_pretrained(self.folder)
        with torch.no_grad():
            self.logits = adapted(input_ids=torch.tensor(TOKENS)).logits.numpy()


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return Adapted(tmp_path_factory.mktemp("peft"))


def settings(adapted, **changes):
    given = {"rank": 4, "alpha": 6.0, "use_rslora": True, "targets": TARGETS} | changes
    return LoraConfig(from_=str(adapted.folder), **given)


def loaded(adapted, lora, scanned=False):
    """Base and adapter."""
    config, base = load_params(adapted.base, scanned=scanned)
    known = parameters(config, scanned=scanned, lora=lora)
    places = parameter_shardings(known, make_mesh(RunConfig(fsdp=1)))
    return config, base, load_adapter(lora, config, known, places)


@pytest.mark.parametrize("scanned", [False, True])
def test_it_computes_what_peft_computes(adapted, scanned):
    lora = settings(adapted)
    config, base, adapters = loaded(adapted, lora, scanned)
    model = functional(config, scanned=scanned, lora=lora)(base | adapters)
    inputs = build_inputs(config, TOKENS).decoder
    logits = model.logits(model.decode(model.embed(inputs, None), inputs)[0])
    assert rel_rms(logits, adapted.logits) <= 1e-5


def test_it_is_written_as_peft_wrote_it(adapted, tmp_path):
    lora = settings(adapted)
    config, base, adapters = loaded(adapted, lora)
    known = parameters(config, scanned=False, lora=lora)
    manifest = with_lora(Manifest(), lora, known, list(adapters))
    state = TrainState(adapters, base, {}, jnp.asarray(7))
    Checkpoints(tmp_path / "run", adapted.base, manifest, 1).save(state, {})
    export_adapter(tmp_path / "run" / "checkpoints" / "7", tmp_path / "adapter")
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "adapter", adapted.folder)
    )
    assert ours.keys() == theirs.keys() and len(ours) == 18
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    ours, theirs = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path / "adapter", adapted.folder)
    )
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    same = ("peft_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "fan_in_fan_out")
    assert [ours[key] for key in same] == [theirs[key] for key in same]


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"targets": TARGETS[:1]}, "only the adapter has model.layers.0.mlp.down_proj.weight"),
        ({"targets": (*TARGETS, r".*\.up_proj")}, "only train.lora.targets has model.layers.0.mlp"),
        ({"rank": 8}, "has rank 4 and scale 3, train.lora gives 8"),
        ({"use_rslora": False}, "train.lora gives 4 and 1.5"),
    ],
)
def test_another_adapter_is_refused(adapted, changes, culprit):
    with pytest.raises(InfiniteVLError, match=culprit):
        loaded(adapted, settings(adapted, **changes))


@pytest.mark.parametrize(
    ("edit", "culprit"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "has lora_A"),
        ({"alpha_pattern": {"q_proj": 2}}, "scale 1, train.lora gives 4 and 3"),
        ({"lora_dropout": 0.1}, "lora_dropout is 0.1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_is_more_than_lora_is_refused(adapted, tmp_path, edit, culprit):
    path = adapted.folder / "adapter_config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | edit))
    try:
        with pytest.raises(InfiniteVLError, match=culprit):
            loaded(adapted, settings(adapted))
    finally:
        path.write_text(before)
