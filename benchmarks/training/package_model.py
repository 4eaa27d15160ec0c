"""Write the model of a run as one that comes with the package, in bfloat16.

Example:

    python -m benchmarks.training.package_model runs/tiny_vlm/seed_0/hybrid/long

Adapters are merged. Decays stay in float32. The folder infinitevl_jax/models/tiny is refused if it
has more than 12 MB.
"""

import argparse
import tempfile
from pathlib import Path

import jax.numpy as jnp

from infinitevl_jax.checkpoints import export_folder, load_params, save_params
from infinitevl_jax.checkpoints.newest import checkpoint_folder
from infinitevl_jax.checkpoints.packaged import MODELS, TINY, check_size

EXACT = ("A_log", "dt_bias")  # parameters that stay in float32


def package(run: Path, folder: Path) -> int:
    """Write a folder with safetensors in bfloat16. Returns its bytes."""
    source = checkpoint_folder(run)
    config, params = load_params(source, scanned=False)
    narrow = {
        name: value if name.endswith(EXACT) else value.astype(jnp.bfloat16)
        for name, value in params.items()
    }
    with tempfile.TemporaryDirectory() as work:
        small, made = Path(work) / "small", Path(work) / "made"
        save_params(small, narrow, config, side_files_from=source)
        export_folder(small, made)
        check_size(made)
        export_folder(small, folder, overwrite=True)
    return check_size(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder, or a step of it")
    parser.add_argument("--to", type=Path, default=MODELS / TINY, help="default: %(default)s")
    options = parser.parse_args()
    print(f"{options.to}: {package(options.run, options.to):,} bytes")


if __name__ == "__main__":
    from infinitevl_jax.command import run

    run(main)
