"""A data set of 24 small images, and a preset that trains a tiny hybrid on it."""

import io
from pathlib import Path

import tensorflow_datasets as tfds
from PIL import Image

COLOURS = {"red": (250, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 250), "black": (0, 0, 0)}

PRESET = """\
[model]
min_pixels = 64
max_pixels = 256
initializer_range = 0.5

[model.text]
layer_types = ["sliding_attention", "linear_attention", "sliding_attention", "linear_attention"]
hidden_size = 32
intermediate_size = 48
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
mrope_section = [2, 1, 1]
sliding_window = 16
num_linear_heads = 2
linear_head_dim = 16

[model.vision]
depth = 1
hidden_size = 32
intermediate_size = 48
num_heads = 2
patch_size = 4
window_size = 8
fullatt_block_indexes = [0]
out_hidden_size = 32

[run]
fsdp = 1

[train]
steps = 6
log_every = 1
checkpoint_every = 2

[train.data]
name = "tiny_vqa"
train = "train[:75%]"
held_out = "train[75%:]"
batch = 8
questions = 2
prefix_length = 6
length = 10

[train.optimizer]
peak_lr = 1e-3
"""


def prepare_tiny_vqa(folder: Path) -> Path:
    """Write the data set `tiny_vqa` to a folder."""

    class TinyVqa(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            texts = tfds.features.Sequence(tfds.features.Text())
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "questions": texts,
                "answers": texts,
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(24):
                colour, other = list(COLOURS)[i % 4], list(COLOURS)[i % 3]
                image = Image.new("RGB", (16, 16), (255, 240 - i, 255))
                image.paste(COLOURS[colour], (i % 5, i % 7, i % 5 + 8, i % 7 + 8))
                file = io.BytesIO()
                image.save(file, "PNG")
                questions = ["what color is it?", f"is it {other}?", "which color is there?"][
                    : 2 + i % 2
                ]
                answers = [colour, "yes" if colour == other else "no", colour][: len(questions)]
                yield i, {"image": file.getvalue(), "questions": questions, "answers": answers}

    TinyVqa(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def write_preset(folder: Path, data: Path, text: str = PRESET) -> Path:
    """Write the preset to a file. It trains into folder/run."""
    path = folder / "tiny.toml"
    text = text.replace("[train]\n", f'[train]\noutput = "{folder / "run"}"\n')
    path.write_text(text.replace("[train.data]\n", f'[train.data]\nfolder = "{data}"\n'))
    return path
