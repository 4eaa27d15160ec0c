"""Train a preset: python train.py CONFIG [key=value ...]. A stopped run resumes."""

import argparse
import sys
from pathlib import Path

from infinitevl_jax.command import run

EXAMPLES = """examples:
  # train the small model: seven to ten minutes on two cores
  python train.py configs/easy_vqa.toml
  # another run beside it
  python train.py configs/easy_vqa.toml train.output=runs/two train.seed=2
  # on eight devices
  python train.py configs/easy_vqa.toml run.fsdp=4 run.tensor=2
  # with one implementation of an operator (otherwise the first that takes the case)
  python train.py configs/easy_vqa.toml run.ops.gated_delta_rule=xla
Ctrl-C saves after the step at hand; the same command goes on from there."""


def main() -> int:
    """Train as the command line says. Returns the exit status: 0, 2 (usage), 130 (Ctrl-C)."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="a preset, such as configs/easy_vqa.toml")
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="key=value",
        help="changes to it, such as train.optimizer.peak_lr=1e-4",
    )
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="compile anew, and keep nothing in the user's cache folder",
    )
    arguments = parser.parse_args()
    if arguments.config is None:
        parser.print_help(sys.stderr)
        presets = sorted((Path(__file__).parent / "configs").glob("*.toml"))
        print(
            "\nerror: name a preset. Those that come along:"
            f" {', '.join(f'configs/{p.name}' for p in presets)}",
            file=sys.stderr,
        )
        return 2

    from infinitevl_jax import compilation
    from infinitevl_jax.config.presets import load_preset
    from infinitevl_jax.train.loop import train

    preset = load_preset(arguments.config, arguments.changes)
    with compilation.kept(
        not arguments.no_compilation_cache, lambda text: print(text, file=sys.stderr)
    ):
        return 0 if train(preset).finished else 130


if __name__ == "__main__":
    run(main)
