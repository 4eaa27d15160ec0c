"""Images and videos of a prompt, encoded group by group as its parts need them.

Memory follows the part and the group, not the prompt: a group is a run of temporal slices with at
most so many patches, encoded when the first part needs it and dropped after the last.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jax import Array

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.inputs.frame import Frame
from infinitevl_jax.inputs.model_inputs import DecoderInputs
from infinitevl_jax.inputs.patches import Patches, bucket
from infinitevl_jax.nn.fused_params import FusedParams
from infinitevl_jax.serve.programs import Programs

GROUP = 4096  # patches encoded at once


@dataclass(frozen=True)
class GroupEncoder:
    """Encodes images and videos group by group.

    Attributes:
      encode: patches -> [1, tokens, width].
      merge: as `infinitevl_jax.serve.programs.merge`.
      unit: patches of a vision token.
      most: patches encoded at once, at most; a temporal slice is never divided.
    """

    encode: Callable[[Patches | Frame], Array]
    merge: Callable[[Array | None, Array, np.ndarray], Array]
    unit: int
    most: int

    def __call__(
        self, patches: Patches | Frame | None, parts: Iterable[DecoderInputs]
    ) -> Iterator[tuple[DecoderInputs, Array | None]]:
        """Parts of a prompt in their order, each with its vision tokens [1, rows * length, width].

        vision_index of the results refers to these. None: the part has no images.
        """
        groups = [] if patches is None else _groups(patches, self.most, self.unit)
        encoded: dict[int, Array] = {}
        for part in parts:
            index, vision = part.vision_index, None
            if not groups or index is None or not (np.asarray(index) >= 0).any():
                yield part, None
                continue
            shape, index = index.shape, np.asarray(index).reshape(-1)
            for number, (tokens, group) in enumerate(groups):
                inside = (index >= tokens.start) & (index < tokens.stop)
                if not inside.any():
                    encoded.pop(number, None)
                    continue
                if number not in encoded:
                    encoded[number] = self.encode(group())
                place = np.where(inside, index - tokens.start, -1).astype(np.int32)
                vision = self.merge(vision, encoded[number], place)
            own = np.where(index >= 0, np.arange(index.size, dtype=np.int32), -1)
            yield part._replace(vision_index=own.reshape(shape)), vision


def group_encoder(
    run: Programs,
    params: FusedParams,
    config: ModelConfig,
    most: int = GROUP,
    stage: Callable[[Patches | Frame], Patches | Frame] = lambda patches: patches,
) -> GroupEncoder:
    """The encoder of a model.

    most: patches at once. stage: where they are put first, such as a `Staging`.
    """
    unit = 1 if config.vision is None else config.vision.merge_unit
    return GroupEncoder(lambda patches: run.encode(params, stage(patches)), run.merge, unit, most)


def _groups(
    patches: Patches | Frame, most: int, unit: int
) -> list[tuple[range, Callable[[], Patches | Frame]]]:
    """Runs of whole temporal slices: the tower's tokens that each gives, and how to make it.

    patches: one packed row, or a frame, which is one slice.
    """
    if isinstance(patches, Frame):
        return [(range(patches.layout.patch_index.shape[1] // unit), lambda: patches)]
    valid = int((patches.patch_index[0] >= 0).sum())
    ids = patches.slice_ids[0, :valid]
    ends = [*np.flatnonzero(np.diff(ids)) + 1, valid] if valid else []
    found, begin, before = [], 0, 0
    for end in ends:
        if end - begin > most and before > begin:
            found.append((begin, before))
            begin = before
        before = end
    if valid:
        found.append((begin, valid))
    return [(range(a // unit, b // unit), _Cut(patches, a, b)) for a, b in found]


@dataclass(frozen=True)
class _Cut:
    """Patches `start` to `stop` of a packed row as a packed row of their own."""

    patches: Patches
    start: int
    stop: int

    def __call__(self) -> Patches:
        count = self.stop - self.start
        more = bucket(count) - count

        def cut(x: np.ndarray, fill: int) -> np.ndarray:
            padding = [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)
            return np.pad(x[:, self.start : self.stop], padding, constant_values=fill)

        p = self.patches
        index = np.pad(np.arange(count, dtype=np.int32), (0, more), constant_values=-1)
        return Patches(
            pixels=cut(p.pixels, 0),
            row_column=cut(p.row_column, 0),
            patch_index=index[None],
            window_ids=cut(p.window_ids, -1),
            slice_ids=cut(p.slice_ids, -1),
            slice_reach=p.slice_reach,
        )
