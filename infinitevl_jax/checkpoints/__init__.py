"""Hugging Face folders <-> ours, in both directions through one weight table."""

from typing import TYPE_CHECKING

from infinitevl_jax.checkpoints.load import load_params
from infinitevl_jax.checkpoints.reading import read_config
from infinitevl_jax.checkpoints.save import save_params

__all__ = [
    "export_adapter",
    "export_folder",
    "import_folder",
    "inspect_folder",
    "load_params",
    "read_config",
    "save_params",
]

if TYPE_CHECKING:
    from infinitevl_jax.checkpoints.adapter_folder import export_adapter
    from infinitevl_jax.checkpoints.exporter import export_folder
    from infinitevl_jax.checkpoints.importer import import_folder
    from infinitevl_jax.checkpoints.inspect import inspect_folder
else:
    # Loading a Hugging Face folder needs neither orbax nor tqdm.
    def __getattr__(name: str):
        if name == "import_folder":
            from infinitevl_jax.checkpoints.importer import import_folder as found
        elif name == "export_folder":
            from infinitevl_jax.checkpoints.exporter import export_folder as found
        elif name == "export_adapter":
            from infinitevl_jax.checkpoints.adapter_folder import export_adapter as found
        elif name == "inspect_folder":
            from infinitevl_jax.checkpoints.inspect import inspect_folder as found
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return found
