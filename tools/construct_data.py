"""Image-text pairs from files that are none yet: notebooks, pages, PDF files in, a folder for preprocess_data.py out.

    python tools/construct_data.py plots  --input NOTEBOOKS --output DIR    a diagram and the code that drew it
    python tools/construct_data.py render --input PAGES --output DIR        rendered pages and the text they show
    python tools/construct_data.py pdf    --input PDFS --output DIR         PDF pages and their text layer

Inputs are files, and folders of which all files of the kind are read. DIR gets documents.jsonl, images/ and
dropped.tsv, which says what was left out by which rule. See docs/data.md.
"""

import argparse
import signal
import sys

from megavl.data.construct.collect import Summary, collect, find
from megavl.data.construct.sample import Construction
from megavl.data.construct.template import TEMPLATES
from megavl.data.errors import DataError
from megavl.data.progress import ProgressBar


def main() -> int:
    arguments = parse_arguments()
    # A polite kill unwinds like Ctrl-C, so that no worker or browser stays behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run(arguments)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed; pip install 'megavl[construct]' brings it", file=sys.stderr)
        return 1
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files and folders, in this order")
    common.add_argument("--output", required=True, metavar="DIR", help="folder that is made")
    common.add_argument("--workers", type=number(1, 1024), default=1, metavar="N", help="processes; default 1")
    dpi = argparse.ArgumentParser(add_help=False)
    dpi.add_argument("--dpi", type=number(36, 600), default=144, metavar="N", help="pixels per inch; default 144")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="plots|render|pdf")
    plots = kinds.add_parser("plots", parents=[common], help="notebooks (.ipynb) to diagrams and their code")
    plots.add_argument("--min-lines", type=number(1, 1000), default=5, metavar="N", help="of code; default 5")
    render = kinds.add_parser("render", parents=[common, dpi], help="HTML, EPUB, markdown to pages and their text")
    render.add_argument(
        "--templates",
        nargs="+",
        choices=TEMPLATES,
        default=list(TEMPLATES),
        metavar="T",
        help=f"of {', '.join(TEMPLATES)}",
    )
    pdf = kinds.add_parser("pdf", parents=[common, dpi], help="PDF files to pages and their text")
    pdf.add_argument("--min-chars", type=number(1, 10_000), default=50, metavar="N", help="of a page; default 50")
    return parser.parse_args()


def number(least: int, most: int):
    """What parses an integer between two bounds."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text}: an integer from {least} to {most}")
        return int(text)

    return parse


def construction(arguments: argparse.Namespace) -> Construction:
    """What the command line asks for; only its own libraries are imported."""
    match arguments.kind:
        case "plots":
            from megavl.data.construct.plots import Plots

            return Plots(arguments.min_lines)
        case "render":
            from megavl.data.construct.render import Render

            return Render(tuple(arguments.templates), arguments.dpi)
        case _:
            from megavl.data.construct.pdf import Pdf

            return Pdf(arguments.dpi, arguments.min_chars)


def run(arguments: argparse.Namespace) -> None:
    """Construct, and say what was made and what was left out."""
    rule = construction(arguments)
    paths = find(arguments.input, rule.suffixes)
    with ProgressBar(arguments.kind, len(paths), "files") as bar:

        def report(files: int, summary: Summary) -> None:
            bar.advance(files, f"{summary.samples:,} samples")

        summary = collect(rule, paths, arguments.output, arguments.workers, report)
    print(f"{arguments.output}: {summary.samples:,} samples of {len(paths):,} files in {bar.elapsed_s:.1f} s")
    for reason, count in summary.dropped.most_common():
        print(f"  dropped {count:,}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
