"""python train.py CONFIG [key=value ...]: train as a preset says; the same command goes on with a run that was stopped."""

import argparse
import sys

EXAMPLES = """examples:
  python train.py configs/easy_vqa.toml                                       train the small model, seven to ten minutes on two cores
  python train.py configs/easy_vqa.toml train.output=runs/two train.seed=2    another run beside it
  python train.py configs/easy_vqa.toml run.fsdp=4 run.tensor=2               on eight devices
  python train.py configs/easy_vqa.toml run.ops.gated_delta_rule=xla          with one implementation only (left out: the first that can)
Ctrl-C saves after the step at hand; the same command goes on from there."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a preset, such as configs/easy_vqa.toml")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes to it, such as train.optimizer.peak_lr=1e-4")
    arguments = parser.parse_args()

    from infinitevl_jax import InfiniteVLError

    try:
        from infinitevl_jax.config.presets import load_preset
        from infinitevl_jax.training.loop import train

        return 0 if train(load_preset(arguments.config, arguments.changes)).finished else 130
    except InfiniteVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
