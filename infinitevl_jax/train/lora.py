"""LoRA in a run: the adapters before the first step, and what its checkpoints say of them."""

from collections.abc import Mapping, Sequence

import jax
import msgspec
from jax.sharding import Mesh

from infinitevl_jax.checkpoints.adapter_folder import load_adapter
from infinitevl_jax.checkpoints.manifest import Lora, Manifest
from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.lora import initialize_adapters, is_adapter
from infinitevl_jax.nn.params import Parameter, Params
from infinitevl_jax.sharding import parameter_shardings
from infinitevl_jax.train.setup import existing_folder


def first_adapters(
    config: ModelConfig,
    known: Mapping[str, Parameter],
    lora: LoraConfig | None,
    mesh: Mesh,
    seed: int,
) -> Params:
    """The adapters before the first step, new ones or those of a PEFT folder; none without
    `lora`.

    Raises:
      InfiniteVLError: the folder's adapter is not one that `lora` can go on from.
    """
    if lora is None:
        return {}
    shardings = parameter_shardings(known, mesh)
    if lora.from_ is None:
        return initialize_adapters(known, jax.random.key(seed), shardings)
    existing_folder(lora.from_, "train.lora.from")
    return load_adapter(lora, config, known, shardings)


def with_lora(
    manifest: Manifest,
    lora: LoraConfig | None,
    known: Mapping[str, Parameter],
    trained: Sequence[str],
) -> Manifest:
    """The manifest of checkpoints whose parameters include adapters.

    Args:
      known: all parameters. trained: names of those that train.

    Raises:
      InfiniteVLError: an adapter would not train.
    """
    if lora is None:
        return manifest
    if frozen := [name for name in known if is_adapter(name) and name not in trained]:
        raise InfiniteVLError(
            f"train.trainable does not match {known[frozen[0]].layers[0]}, which train.lora adds",
            r"add '.*\.lora_[ab]' to train.trainable, or leave train.trainable out",
        )
    others = any(not is_adapter(name) for name in trained)
    found = Lora(rank=lora.rank, alpha=lora.alpha, use_rslora=lora.use_rslora, base_trained=others)
    return msgspec.structs.replace(manifest, lora=found)
