"""A program of somebody else's, as pyright sees it: names of the package have their types.

`assert_type` is an error where a type is another or unknown, an ignored error where there is none.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import jax
import numpy as np

import infinitevl_jax
from infinitevl_jax import InfiniteVL, InfiniteVLError, InfiniteVLWarning, Processor, Sampling
from infinitevl_jax.checkpoints import export_folder, import_folder, load_params, read_config
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.config.presets import Preset, load_preset
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.serve.output import Output
from pallas_kernels.attention import Mask, attention


def answer(folder: Path, question: str) -> str:
    model, processor = InfiniteVL.from_pretrained(folder), Processor.from_pretrained(folder)
    assert_type(model, InfiniteVL)
    assert_type(model, infinitevl_jax.InfiniteVL)
    assert_type(model.config, ModelConfig)
    assert_type(processor, Processor)
    batch = processor([{"role": "user", "content": question}])
    assert_type(batch, dict[str, np.ndarray])
    tokens = model.generate(**batch, max_new_tokens=8, sampling=Sampling(temperature=0.7))
    assert_type(tokens, np.ndarray)
    assert_type(model.stream(**batch), Iterator[np.ndarray])
    return assert_type(processor.decode(tokens[0]), str)


def call(model: InfiniteVL, batch: dict[str, np.ndarray]) -> jax.Array:
    output = model(batch["input_ids"], cache=model.init_cache(1), use_cache=True)
    assert_type(output, Output)
    assert_type(output.cache, Cache | None)
    return assert_type(output.logits, jax.Array)


def convert(source: Path, folder: Path) -> None:
    try:
        import_folder(source, folder)
        export_folder(folder, "again", max_shard_size="2GB")
    except InfiniteVLError as error:
        print(assert_type(error.culprit, str), assert_type(error.cure, str))
    assert_type(read_config(folder), ModelConfig)
    config, params = load_params(folder, scanned=False)
    assert_type(config, ModelConfig)
    assert_type(params, dict[str, jax.Array])
    assert_type(load_preset("easy_vqa", ["train.seed=1"]), Preset)


def operator(q: jax.Array) -> jax.Array:
    output, logsumexp = attention(q, q, q, mask=Mask(window=8))
    assert_type(logsumexp, jax.Array)
    return assert_type(output, jax.Array)


WARNING: type[UserWarning] = InfiniteVLWarning
misspelt = infinitevl_jax.InfiniteVl  # pyright: ignore[reportAttributeAccessIssue]
