"""Convert between Hugging Face (PyTorch) folders and this project's. Torch is not needed.

python convert_torch.py import  InfiniteVL/ infinitevl-jax/
python convert_torch.py import  Qwen2.5-VL-3B/ merged/ --adapter my-lora/
python convert_torch.py export  infinitevl-jax/ InfiniteVL-again/
python convert_torch.py export  runs/sft/checkpoints/1000/ tuned/ --max-shard-size 2GB
python convert_torch.py export  runs/sft/ tuned/          # the run's newest step
python convert_torch.py inspect InfiniteVL/
"""

import argparse
import os
import sys
from pathlib import Path

from infinitevl_jax.command import run
from infinitevl_jax.errors import InfiniteVLError

# nothing is computed: do not reserve a GPU
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def parser() -> argparse.ArgumentParser:
    """Argument parser of the command."""
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(
        dest="command", required=True, metavar="import | export | inspect"
    )

    def command(
        name: str, src: str, summary: str, dst: str | None = None
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.add_argument("src", metavar="SRC", help=src)
        if dst:
            sub.add_argument("dst", metavar="DST", help=dst)
            sub.add_argument(
                "--overwrite",
                action="store_true",
                help="replace a checkpoint at DST, once the new one is complete",
            )
        return sub

    theirs = "Hugging Face folder: config.json with safetensors or .bin weights"
    add = command(
        "import",
        theirs,
        "Hugging Face folder -> ours",
        "our folder: params/, infinitevl_jax.json and the side files",
    )
    add.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER",
        help="PEFT LoRA folder to merge; repeat for several",
    )
    add = command(
        "export",
        "our folder, or a step of a training run",
        "ours -> Hugging Face folder",
        "Hugging Face folder",
    )
    add.add_argument(
        "--max-shard-size", metavar="SIZE", help="such as 5GB; default: the source's own shards"
    )
    command("inspect", "either kind of folder", "say what a checkpoint is")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    args = parser().parse_args(arguments)
    from infinitevl_jax.checkpoints import export_folder, import_folder, inspect_folder
    from infinitevl_jax.checkpoints.newest import checkpoint_folder

    try:
        args.src = checkpoint_folder(Path(args.src))
        if args.command == "import":
            import_folder(
                args.src, args.dst, adapters=args.adapter, overwrite=args.overwrite, progress=True
            )
        elif args.command == "export":
            export_folder(
                args.src,
                args.dst,
                max_shard_size=args.max_shard_size,
                overwrite=args.overwrite,
                progress=True,
            )
        if args.command != "inspect":
            print(f"wrote {args.dst}")
        print(inspect_folder(args.src if args.command == "inspect" else args.dst))
    except InfiniteVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run(main)
