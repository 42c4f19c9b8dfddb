"""Measure every claim of the article on 1×1 convolutions, on this machine.

Each claim is shown beside the measurement: the cost of 512→32 channels, a 1×1 filter as a
weighting, the extra non-linearity, and 1×1 + global average pooling in place of Flatten + Linear.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from onebyone.cli.arguments import add_output, add_seed
from onebyone.cli.output import progress, say, show
from onebyone.cli.values import whole

EPILOG = """examples:
  onebyone article
  onebyone article --data fashion-mnist --out runs/article-fashion

The digits take a few minutes, Fashion-MNIST about twenty. To resume an interrupted measurement,
give the same command again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone article``."""
    parser.add_argument(
        "--data", default="digits", metavar="DATA", help="digits (default), mnist, fashion-mnist"
    )
    parser.add_argument(
        "--limit",
        type=whole("limit"),
        metavar="N",
        help="at most N examples of each part of the data",
    )
    parser.add_argument(
        "--seeds", type=whole("seeds"), default=5, metavar="N", help="trainings of each network (5)"
    )
    parser.add_argument(
        "--epochs",
        type=whole("epochs", least=1),
        metavar="N",
        help="of each training (by the data's size)",
    )
    add_seed(parser, "seed of the data's split (0)")
    add_output(parser, "folder for article.html and article.json (runs/article-DATA)")


def run(args: argparse.Namespace) -> None:
    """Measure the article."""
    from onebyone.article import measure_article, render_article
    from onebyone.article.tables import article_tables
    from onebyone.core.locks import locked
    from onebyone.core.write_files import check_folder, write_text
    from onebyone.data import load_data

    data = load_data(args.data, seed=args.seed, limit=args.limit)
    out = Path(args.out or Path("runs") / f"article-{args.data}")
    known = ("trainings", "article.json", "article.html")
    check_folder(out, owner="an article's", marks=known, known=known)
    try:
        with locked(out), progress("article") as update:
            record = measure_article(
                data,
                seeds=args.seeds,
                epochs=args.epochs,
                folder=out / "trainings",
                progress=update,
            )
    except KeyboardInterrupt:
        sys.stderr.write(f"Stopped. The same command resumes from {out}/trainings.\n")
        raise
    record.save(out / "article.json")
    write_text(out / "article.html", render_article(record))
    show(record, args, *article_tables(record))
    say(args, f"Page: {out}/article.html")
