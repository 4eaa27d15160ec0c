"""Import then export gives the source back: name, dtype and bytes of every tensor, and every side
file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers
from jax.sharding import AxisType
from torch_folders import (
    BF16,
    HYBRID,
    hybrid_folder,
    hybrid_shapes,
    hybrid_tensors,
    read_folder,
    side_bytes,
    write_folder,
)

from infinitevl_jax.checkpoints import (
    export_folder,
    import_folder,
    inspect_folder,
    load_params,
    read_config,
    save_params,
)
from infinitevl_jax.checkpoints.files import copy_side_files
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.config.model import FULL, ModelConfig, TextConfig, VisionConfig
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.sharding import parameter_shardings

TEXT = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def qwen2(tied):
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**TEXT, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2)
    )


def qwen2_5_vl(tied):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    vision = dict(
        depth=4,
        hidden_size=32,
        intermediate_size=40,
        num_heads=2,
        out_hidden_size=32,
        fullatt_block_indexes=[1, 3],
        patch_size=4,
    )
    ids = dict(
        image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63
    )
    text = TEXT | dict(rope_parameters=rope, bos_token_id=1, eos_token_id=2)
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | {"window_size": 16},
        tie_word_embeddings=tied,
        **ids,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def random_params(config, *, scanned):
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        for name, leaf in parameters(config, scanned=scanned).items()
    }


def same(src, dst):
    a, b = read_folder(src), read_folder(dst)
    assert a.keys() == b.keys() and a
    assert [name for name in a if a[name] != b[name]] == []


def there_and_back(src, tmp_path):
    import_folder(src, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    same(src, tmp_path / "back")
    assert side_bytes(src) == side_bytes(tmp_path / "back")
    return tmp_path / "back"


@pytest.mark.parametrize(
    "make, tied, dtype, shard",
    [
        (qwen2, True, torch.float32, "1GB"),
        (qwen2, False, torch.bfloat16, "10KB"),
        (qwen2_5_vl, True, torch.bfloat16, "1GB"),
        (qwen2_5_vl, False, torch.float32, "30KB"),
    ],
    ids=["qwen2-tied", "qwen2-sharded", "qwen2_5_vl-tied", "qwen2_5_vl-sharded"],
)
def test_transformers(tmp_path, make, tied, dtype, shard):
    model = make(tied).to(dtype).eval()
    model.save_pretrained(tmp_path / "src", max_shard_size=shard)
    back = there_and_back(tmp_path / "src", tmp_path)
    for path in (
        tmp_path / "src"
    ).iterdir():  # even the files are the same, index and header included
        assert path.read_bytes() == (back / path.name).read_bytes(), path.name
    model, again = (
        type(model).from_pretrained(folder, dtype=dtype).eval()
        for folder in (tmp_path / "src", back)
    )
    batch = dict(input_ids=torch.arange(3, 19)[None])
    if make is qwen2_5_vl:
        ids = [5, 62, 60, 60, 60, 60, 63, 7, 8]
        batch = dict(
            input_ids=torch.tensor([ids]),
            mm_token_type_ids=torch.tensor([[int(i == 60) for i in ids]]),
            pixel_values=torch.randn(16, 96).to(dtype),
            image_grid_thw=torch.tensor([[1, 4, 4]]),
        )
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


@pytest.mark.parametrize("live", [False, True], ids=["published", "live"])
@pytest.mark.parametrize("head", [False, True], ids=["headless", "head"])
@pytest.mark.parametrize("shards", [1, 3])
def test_hybrid(tmp_path, live, head, shards):
    src = hybrid_folder(tmp_path / "src", live=live, head=head, shards=shards, mixed=shards == 3)
    there_and_back(src, tmp_path)


def test_nested_config_and_full_attention_spelling(tmp_path):
    """The newer shape of config.json, as the authors' training code writes it: the same model."""
    flat, text = dict(HYBRID), {}
    for key in list(flat):
        if key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "vocab_size",
            "sliding_window",
            "rms_norm_eps",
        ):
            text[key] = flat.pop(key)
        elif key.startswith(("num_", "linear_")):
            text[key] = flat.pop(key)
    rope = flat.pop("rope_scaling")
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": flat.pop("rope_theta"),
        "mrope_section": rope["mrope_section"],
    }
    text["layer_types"] = ["linear_attention" if i % 4 else "full_attention" for i in range(9)]
    text["dtype"] = flat.pop("torch_dtype")
    src = write_folder(tmp_path / "src", hybrid_tensors(), config=flat | {"text_config": text})
    assert read_config(src) == read_config(hybrid_folder(tmp_path / "flat"))
    there_and_back(src, tmp_path)


def test_missing_head_is_tied(tmp_path):
    """InfiniteVL's files may come without a head whatever config.json says."""
    src = hybrid_folder(tmp_path / "src", config={"tie_word_embeddings": False})
    there_and_back(src, tmp_path)
    assert read_config(src).text.tie_word_embeddings and read_config(src) == read_config(
        tmp_path / "ours"
    )
    assert "lm_head.kernel" not in load_params(src, scanned=True)[1]


def test_head_of_its_own(tmp_path):
    tensors = hybrid_tensors(head=True)
    tensors["lm_head.weight"] = (tensors["lm_head.weight"].astype(np.float32) * 2).astype(BF16)
    there_and_back(
        write_folder(tmp_path / "src", tensors, config=HYBRID | {"tie_word_embeddings": False}),
        tmp_path,
    )


def test_f16_and_f32(tmp_path):
    for dtype in (np.float16, np.float32):
        there_and_back(
            hybrid_folder(tmp_path / dtype.__name__ / "src", dtype=np.dtype(dtype)),
            tmp_path / dtype.__name__,
        )


def test_shards_without_index(tmp_path):
    src = hybrid_folder(tmp_path / "src", shards=2)
    (src / "model.safetensors.index.json").unlink()
    import_folder(src, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    same(src, tmp_path / "back")


@pytest.mark.parametrize("shards", [1, 2])
def test_torch_files(tmp_path, shards):
    """The same tensors as .bin files: imported bit for bit, exported as safetensors."""
    tensors = hybrid_tensors(mixed=True)
    src = write_folder(tmp_path / "safe", tensors)
    bin_folder = write_folder(tmp_path / "bin", tensors)
    (bin_folder / "model.safetensors").unlink()
    state = {
        name: (
            torch.from_numpy(v.view(np.int16).copy()).view(torch.bfloat16)
            if v.dtype == BF16
            else torch.from_numpy(v)
        )
        for name, v in tensors.items()
    }
    names, weight_map = list(state), {}
    for i in range(shards):
        file = (
            "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        )
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        torch.save(
            {n: state[n] for n in part},
            bin_folder / file,
            _use_new_zipfile_serialization=shards == 1,
        )
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (bin_folder / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    import_folder(bin_folder, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    same(src, tmp_path / "back")
    assert not list((tmp_path / "back").glob("*.bin*"))


def test_max_shard_size(tmp_path):
    src = hybrid_folder(tmp_path / "src", live=True)
    import_folder(src, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back", max_shard_size="20KB")
    same(src, tmp_path / "back")
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and all(path.stat().st_size < 40_000 for path in files)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read_folder(src).keys()


def test_names_are_the_published_ones(tmp_path):
    """The table against the names and shapes that these tests spell out."""
    src = hybrid_folder(tmp_path / "src")
    assert {name: shape for name, (_, shape, _) in read_folder(src).items()} == hybrid_shapes()
    assert inspect_folder(src).parameters == sum(np.prod(s) for s in hybrid_shapes().values())


@pytest.mark.parametrize("scanned", [True, False])
def test_trained_model_exports_like_its_source(tmp_path, scanned):
    """What training saves beside the source's side files: the source's names, order and files, new
    numbers."""
    src = hybrid_folder(tmp_path / "src", live=True, head=True, shards=2)
    config, params = load_params(src, scanned=scanned)
    params = {name: (p.astype(np.float32) * 2).astype(p.dtype) for name, p in params.items()}
    import_folder(src, tmp_path / "ours")
    for side in (src, tmp_path / "ours"):
        save_params(tmp_path / "step", params, config, side_files_from=side, overwrite=True)
        export_folder(tmp_path / "step", tmp_path / "back", overwrite=True)
        assert side_bytes(src) == side_bytes(tmp_path / "back")
        doubled = {
            name: (v.astype(np.float32) * 2).astype(BF16)
            for name, v in hybrid_tensors(live=True, head=True).items()
        }
        back = read_folder(tmp_path / "back")
        assert {name: v.tobytes() for name, v in doubled.items()} == {
            name: raw for name, (_, _, raw) in back.items()
        }
        assert sorted(p.name for p in (tmp_path / "back").glob("model*")) == sorted(
            p.name for p in src.glob("model*")
        )


def test_step_of_a_training_run(tmp_path):
    """A step folder as orbax's manager writes it, on a mesh, with the side files and the manifest
    beside."""
    src = hybrid_folder(tmp_path / "src", mixed=True)
    import_folder(src, tmp_path / "ours")
    config = read_config(src)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shardings = parameter_shardings(parameters(config, scanned=True), mesh)
    _, params = load_params(tmp_path / "ours", scanned=True, shardings=shardings)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(3, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
        manager.wait_until_finished()
    step = tmp_path / "run" / "3"
    copy_side_files(tmp_path / "ours", step)
    Manifest.read(tmp_path / "ours").write(step)
    export_folder(step, tmp_path / "back")
    same(src, tmp_path / "back")
    assert side_bytes(src) == side_bytes(tmp_path / "back")
    _, again = load_params(step, scanned=False)
    assert all(
        np.array_equal(value, again[name])
        for name, value in load_params(src, scanned=False)[1].items()
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"])
def test_born_here_loads_in_transformers(tmp_path, family):
    """A model without a past: published names, a config.json that transformers reads to the same
    shapes."""
    text = TextConfig(
        (FULL,) * 3,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        mrope_section=(2, 3, 3) if family == "qwen2_5_vl" else None,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    vision = VisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=40,
        num_heads=2,
        fullatt_block_indexes=(1,),
        out_hidden_size=32,
    )
    config = ModelConfig(
        text,
        vision if family == "qwen2_5_vl" else None,
        family,
        eos_token_ids=(2, 3),
        pad_token_id=0,
    )
    params = random_params(config, scanned=False)
    save_params(tmp_path / "ours", params, config)
    export_folder(tmp_path / "ours", tmp_path / "hf")
    assert read_config(tmp_path / "hf") == config
    loaded, again = load_params(tmp_path / "hf", scanned=False)
    assert loaded == config and all(np.array_equal(params[name], again[name]) for name in params)
    kind = (
        transformers.Qwen2ForCausalLM
        if family == "qwen2"
        else transformers.Qwen2_5_VLForConditionalGeneration
    )
    model, report = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    decoder = model.config.get_text_config()
    assert (
        decoder.rms_norm_eps == 1e-5
        and decoder.rope_parameters["rope_theta"] == 1e6
        and not model.config.tie_word_embeddings
    )
    assert model.config.dtype == torch.float32 and decoder.eos_token_id == [2, 3]


def test_born_hybrid(tmp_path):
    config = dataclasses.replace(read_config(hybrid_folder(tmp_path / "src")), eos_token_ids=(98,))
    params = random_params(config, scanned=True)
    save_params(tmp_path / "ours", params, config)
    export_folder(tmp_path / "ours", tmp_path / "hf")
    found = read_folder(tmp_path / "hf")
    assert {name: shape for name, (_, shape, _) in found.items()} == hybrid_shapes() and {
        d for d, _, _ in found.values()
    } == {"F32"}
    there_and_back(tmp_path / "hf", tmp_path / "again")
