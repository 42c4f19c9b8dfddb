"""Measure every claim of the article on 1×1 convolutions, on this machine.

Each claim is shown beside what was measured: the cost of 512→32 channels, a 1×1 filter as a
weighting, the extra non-linearity, and 1×1 + global average pooling in place of Flatten + Linear.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from onebyone.cli.arguments import (
    add_output,
    free_folder,
    positive,
    progress,
    say,
    show,
)
from onebyone.errors import OutputError

EPILOG = """examples:
  onebyone article
  onebyone article --data fashion-mnist --out runs/article-fashion

The digits take a few minutes, Fashion-MNIST some twenty. An interrupted measurement goes on where
it stopped when the same command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone article``."""
    parser.add_argument(
        "--data", default="digits", metavar="DATA", help="digits (default), mnist, fashion-mnist"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="at most N examples of each part of the data"
    )
    parser.add_argument(
        "--seeds", type=positive, default=5, metavar="N", help="trainings of each network (5)"
    )
    parser.add_argument(
        "--epochs", type=positive, metavar="N", help="of each training (by the data's size)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the data's split (0)")
    add_output(parser, "folder for article.html and article.json (runs/article-DATA)")


def run(args: argparse.Namespace) -> None:
    """Measure the article."""
    from onebyone.article import measure_article, render_article
    from onebyone.article.tables import article_tables
    from onebyone.data import load_data
    from onebyone.records import write_text

    data = load_data(args.data, seed=args.seed, limit=args.limit)
    out = Path(args.out or Path("runs") / f"article-{args.data}")
    _check_folder(out)
    try:
        with progress("article") as update:
            record = measure_article(
                data,
                seeds=args.seeds,
                epochs=args.epochs,
                folder=out / "trainings",
                progress=update,
            )
    except KeyboardInterrupt:
        sys.stderr.write(f"Stopped. The same command goes on from {out}/trainings.\n")
        raise
    record.save(out / "article.json")
    write_text(out / "article.html", render_article(record))
    show(record, args, *article_tables(record))
    say(args, f"Page: {out}/article.html")


def _check_folder(out: Path) -> None:
    """Check that a folder is new, empty, or an article's.

    Raises:
        OutputError: If it has other content.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"The output must be a folder, but {out} is a file.")
    known = {"trainings", "article.json", "article.html"}
    other = [path.name for path in out.iterdir() if path.name not in known] if out.exists() else []
    if other:
        raise OutputError(
            f"The output folder must be new, empty, or an article's, but {out} has other files, "
            f"such as {other[0]!r}. Choose another folder, such as {free_folder('article')}."
        )
