"""`infinitevl data`."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer


def data(
    config: Annotated[
        str,
        typer.Argument(metavar="PRESET", show_default=False, help="A preset, as for train."),
    ],
    changes: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE",
            show_default=False,
            help="Changes to it, such as train.data.path=my.json.",
        ),
    ] = [],  # noqa: B006
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Rows of each source to show.")
    ] = 1,
    skipped: Annotated[
        int, typer.Option("--skipped", min=0, help="Unusable rows of each source to list.")
    ] = 10,
    rows: Annotated[
        int, typer.Option("--rows", min=0, help="Look at so many of each source only; 0: at all.")
    ] = 0,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="The held-out rows instead of those to train on.")
    ] = False,
):
    """Show what a run would train on: counts, lengths, packing, unusable rows, and samples.

    Tokens that bear loss are green in a terminal, and in [[ ]] elsewhere.

    \b
    infinitevl data easy_vqa
    infinitevl data my_preset.toml train.data.path=my.json train.data.images=photos
    infinitevl data my_preset.toml --samples 5 --held-out
    infinitevl data my_preset.toml --rows 1000 train.data.workers=8
    """
    from tqdm import tqdm

    from infinitevl_jax.cli import host

    host.stay_on_the_host()

    from infinitevl_jax.config.presets import load_preset
    from infinitevl_jax.data.encode import Encoder
    from infinitevl_jax.data.mixture import open_mixture
    from infinitevl_jax.data.summary import summarise
    from infinitevl_jax.train.setup import prepare_start

    preset = load_preset(config, changes)
    settings, seed = preset.train.data, preset.train.seed
    training = open_mixture(settings)
    mixture = open_mixture(settings, held_out=True) if held_out else training
    mixture = mixture.sample(rows) if rows else mixture
    with tempfile.TemporaryDirectory() as folder:
        start = prepare_start(preset.model, training, Path(folder), seed)
        encoder = Encoder(mixture, start.processor, start.config)
        found = summarise(
            encoder,
            settings,
            seed,
            lambda found: tqdm(found, desc="rows", leave=False, dynamic_ncols=True, disable=None),
        )
        typer.echo("\n".join(_table(found, settings)))
        for line in _skipped(found, mixture, skipped):
            typer.echo(line)
        for line in _samples(encoder, settings, samples):
            typer.echo(line)


def _table(found, settings) -> list[str]:
    """Figures of each source and of all, in columns; then what an epoch is."""
    from infinitevl_jax.data.summary import QUANTILES

    parts = dict(found.sources)
    if len(parts) > 1:
        parts["all"] = found.all
    head = ["source", "rows", "skipped", "passes", "of an epoch", "tokens", "with loss", "patches"]
    whole = sum(sum(part.tokens) * part.weight for part in found.sources.values())
    lines = [[*head, *(f"{q} %" for q in QUANTILES)]]
    for name, part in parts.items():
        drawn = sum(part.tokens) * part.weight / max(whole, 1)
        passes = ["", ""] if name == "all" else [f"{part.weight:g}", f"{drawn:.1%}"]
        figures = [part.rows, part.rows - part.usable, *passes]
        figures += [sum(part.tokens), sum(part.loss), sum(part.patches), *part.lengths()]
        texts = [f"{figure:,}" if isinstance(figure, int) else figure for figure in figures]
        lines.append([name or "the data", *texts])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    out.append("The columns in % are quantiles of the tokens of a row.")
    if settings.questions:
        out.append(
            f"an epoch: {found.steps:,} steps of {settings.batch} images with"
            f" {settings.questions} questions each"
        )
    else:
        out.append(
            f"an epoch: {found.steps:,} steps of {settings.batch} rows of {settings.length:,}"
            f" tokens, {found.filled:.1%} of them used (lookahead {settings.lookahead})"
        )
    return out


def _skipped(found, mixture, count: int) -> list[str]:
    lines = []
    for name, part in found.sources.items():
        if not part.skipped or not count:
            continue
        lines.append(f"\nskipped, {mixture.sources[name].title}:")
        shown = list(part.skipped.items())[:count]
        lines += [f"  row {index}: {reason}" for index, reason in shown]
        if len(part.skipped) > len(shown):
            lines.append(f"  and {len(part.skipped) - len(shown):,} more")
    return lines


def _samples(encoder, settings, count: int):
    """The first usable rows of each source, rendered."""
    from infinitevl_jax.data.summary import render
    from infinitevl_jax.errors import BadRow

    colour = sys.stdout.isatty()

    def mark(text: str) -> str:
        return typer.style(text, fg="green") if colour else f"[[{text}]]"

    rows = encoder if settings.questions else encoder.within(settings)
    first = 0
    for name, size in encoder.dataset.sizes.items():
        shown = 0
        for number in range(first, first + size):
            if shown == count:
                break
            try:
                piece = rows.pieces(number)[0]
            except BadRow:
                continue
            shown += 1
            learnt, row = int(piece.branch.answer[1:].sum()), encoder.dataset.place(number)[1]
            yield (
                f"\n{name or 'the data'}, row {row}: {piece.tokens:,} tokens, {learnt:,} with loss"
            )
            yield render(piece.branch, encoder.processor, mark)
        first += size
