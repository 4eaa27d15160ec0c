"""The batches of configs/easy_vqa.toml, bit for bit those of before sources had options."""

import hashlib
from pathlib import Path

import jax
import numpy as np

from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.mixture import open_mixture
from infinitevl_jax.data.pipeline import train_batches
from infinitevl_jax.train.setup import prepare_start

PRESET = Path(__file__).resolve().parents[2] / "configs" / "easy_vqa.toml"

# of the first four batches at e695780, with train.data.opening_steps=2
DIGESTS = {
    0: "ff73dcbab8b52333acf80b30eeddaa3fc1d51b576ad5cd751aa62b2f4b40f182",
    1: "c157855435f2419a72ebd349a37f9273313e3e94efa43daf6244c882c9185cb0",
}


def test_batches_are_those_of_before(tmp_path):
    changes = [f"train.data.folder={tmp_path / 'data'}", "train.data.options.opening_steps=2"]
    preset = load_preset(PRESET, changes)
    data, mixture = preset.train.data, open_mixture(preset.train.data)
    start = prepare_start(preset.model, mixture, tmp_path, 0)
    encoder = Encoder(mixture, start.processor, start.config)
    for seed, expected in DIGESTS.items():
        batches, digest = train_batches(encoder, start.config, data, seed), hashlib.sha256()
        for _ in range(4):
            for leaf in jax.tree.leaves(next(batches)):
                digest.update(np.ascontiguousarray(leaf).tobytes())
                digest.update(str((leaf.dtype, leaf.shape)).encode())
        batches.close()
        assert digest.hexdigest() == expected, seed
