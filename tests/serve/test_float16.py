"""A float16 checkpoint: its bytes are kept, float32 computes."""

import json

import numpy as np
import pytest
from torch_folders import hybrid_tensors, read_folder, write_folder

from infinitevl_jax import InfiniteVL, InfiniteVLError, InfiniteVLWarning
from infinitevl_jax.checkpoints import export_folder, import_folder, save_params
from pallas_kernels.testing.parity import rel_rms


def test_float16_is_kept_on_disk_and_computed_in_float32(tmp_path):
    """Activations of 10^6, which float16 cannot hold; on export the same bytes come back, by both
    ways."""
    tensors = {name: value.astype(np.float16) for name, value in hybrid_tensors().items()}
    for name, factor in (("up", 100), ("down", 300)):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] *= np.float16(factor)
    write_folder(tmp_path / "half", tensors, shards=1)
    with pytest.warns(
        InfiniteVLWarning, match="float16.*computing in float32.*dtype='bfloat16'"
    ) as said:
        own = InfiniteVL.from_pretrained(tmp_path / "half")
    assert (
        len(said) == 1
        and own.dtype == np.float32
        and {p.dtype.name for p in own.params.values()} == {"float16"}
    )
    ids = np.array([[1, 2, 3, 4, 5]])
    wide = InfiniteVL.from_pretrained(tmp_path / "half", dtype="float32")
    out = own(ids, output_hidden_states=True)
    assert np.abs(out.hidden_states[1]).max() > 65504
    assert rel_rms(out.logits, wide(ids).logits) <= 1e-6
    with pytest.raises(InfiniteVLError, match="float16"):
        InfiniteVL(own.config, own.params, dtype="float16")

    import_folder(tmp_path / "half", tmp_path / "ours")
    save_params(tmp_path / "saved", own.params, own.config, side_files_from=tmp_path / "half")
    save_params(tmp_path / "born", own.params, own.config)
    assert json.loads((tmp_path / "born" / "config.json").read_text())["torch_dtype"] == "float16"
    for name in ("ours", "saved"):
        export_folder(tmp_path / name, tmp_path / f"{name}-back")
        assert read_folder(tmp_path / f"{name}-back") == read_folder(tmp_path / "half")
