"""Train a small hybrid model on easy-VQA, convert it to PyTorch format and back, and score it.

The converted model answers all official test questions.

    python examples/pixels_to_answers.py [--seed 0] [--output runs/easy_vqa] [key=value ...]
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

# use this checkout, installed or not
sys.path[0] = str(Path(__file__).resolve().parent.parent)

PRESET = Path(__file__).resolve().parent.parent / "configs" / "easy_vqa.toml"


def convert_there_and_back(checkpoint: Path, run: Path) -> Path:
    """Export a checkpoint to a Hugging Face folder, import it again and compare all bits.

    Returns:
      The imported folder.
    """
    import numpy as np

    from infinitevl_jax.checkpoints import export_folder, import_folder, load_params

    torch_folder, back = run / "huggingface", run / "reimported"
    for folder in (torch_folder, back):
        if folder.exists():
            shutil.rmtree(folder)
    export_folder(checkpoint, torch_folder)
    import_folder(torch_folder, back)
    old, new = (load_params(folder, scanned=True)[1] for folder in (checkpoint, back))
    if old.keys() != new.keys() or any(
        np.asarray(old[k]).tobytes() != np.asarray(new[k]).tobytes() for k in old
    ):
        raise SystemExit(f"parameters changed on their way through {torch_folder}")
    print(f"converted to {torch_folder} and back: {len(new)} parameters, all bits equal")
    return back


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/easy_vqa")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes to the preset")
    arguments = parser.parse_args()
    began = time.monotonic()

    import jax
    from tqdm import tqdm

    from infinitevl_jax import InfiniteVL, Processor
    from infinitevl_jax.cli import logs
    from infinitevl_jax.config.presets import load_preset
    from infinitevl_jax.data.conversation import as_turns
    from infinitevl_jax.data.encode import Encoder
    from infinitevl_jax.data.sources.tfds import Dataset
    from infinitevl_jax.eval.picture import draw_samples
    from infinitevl_jax.eval.vqa import answer_blind, answer_split, score
    from infinitevl_jax.train.loop import train

    preset = load_preset(
        PRESET,
        [f"train.seed={arguments.seed}", f"train.output={arguments.output}", *arguments.changes],
    )
    with logs.shown(sys.stdout):
        outcome = train(preset)
    if not outcome.finished:
        raise SystemExit(130)
    trained = time.monotonic() - began

    folder = convert_there_and_back(outcome.checkpoint, outcome.run)
    model, processor = InfiniteVL.from_pretrained(folder), Processor.from_pretrained(folder)
    data = preset.train.data
    test, known = (Dataset(data.name, data.folder, split) for split in ("test", "train"))
    rows, known = ([as_turns(row) for row in split] for split in (test, known))
    began_answers = time.monotonic()
    answers = answer_split(
        model,
        processor,
        Encoder(test, processor, model.config),
        progress=lambda x: tqdm(x, desc="test questions"),
    )
    mine, blind = score(rows, answers), score(rows, answer_blind(known, rows))
    answered = time.monotonic() - began_answers

    results = {
        "seed": arguments.seed,
        "device": jax.devices()[0].device_kind,
        "parameters": model.parameter_count,
        "steps": outcome.step,
        "test_questions": mine.questions,
        "accuracy": mine.all,
        "test_questions_not_yes_no": mine.questions_other,
        "accuracy_not_yes_no": mine.other,
        "blind_accuracy": blind.all,
        "blind_accuracy_not_yes_no": blind.other,
        "seconds_training": round(trained, 1),
        "seconds_answering": round(answered, 1),
        "seconds_in_all": round(time.monotonic() - began, 1),
    }
    aside = outcome.run / ".results.json.partial"
    aside.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    os.replace(aside, outcome.run / "results.json")
    shown = [(i, i % len(rows[i].questions)) for i in range(min(20, len(rows)))]
    draw_samples([(rows[i], j, answers[i][j]) for i, j in shown], outcome.run / "samples.png")
    print(
        f"{mine.questions:,} test questions, each asked alone after its image: {mine.all:.1%} right"
        f" (blind {blind.all:.1%})"
    )
    print(
        f"{mine.questions_other:,} of them not yes/no: {mine.other:.1%} right (blind"
        f" {blind.other:.1%})"
    )
    print(
        f"sample answers {outcome.run / 'samples.png'}, loss {outcome.run / 'loss.png'}, figures"
        f" {outcome.run / 'results.json'}"
    )
    print(f"{results['seconds_in_all']:.0f} s in all")


if __name__ == "__main__":
    from infinitevl_jax.command import run

    run(main)
