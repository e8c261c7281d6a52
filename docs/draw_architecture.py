"""Draw docs/architecture.svg: the model list, how a pipeline cuts it, how tensor parallelism cuts one block.

python docs/draw_architecture.py --output docs/architecture.svg
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

VISION, TEXT, ADAPTOR, WIRE = "#cfe3f5", "#d8efd3", "#f7dfc3", "#444444"
STAGES = ("#f3f6fa", "#fbf6ee")


def box(axes, x, y, width, height, text, colour, size=9, weight="normal"):
    """A labelled box; returns the middles of its left and right edge."""
    axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.12", fc=colour, ec=WIRE, lw=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=size, weight=weight)
    return (x, y + height / 2), (x + width, y + height / 2)


def arrow(axes, start, end, bend=0.0):
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=WIRE, lw=1, connectionstyle=style)
    )


def stem(axes):
    """The fused first pipeline block: both towers, the adaptor, the token embedding, the splice."""
    axes.add_patch(FancyBboxPatch((0.2, 3.75), 9.0, 4.75, "round,pad=0,rounding_size=0.2", fc="white", ec=WIRE, lw=1.6))
    axes.text(0.45, 8.15, "Stem: the fused first pipeline block", weight="bold", size=10.5, va="center")
    _, image = box(axes, 0.45, 6.2, 1.25, 0.9, "image", "white")
    sam_in, sam = box(
        axes, 2.3, 6.9, 2.6, 1.0, "SAM-B, 1024 px\nwindowed + global attention\nneck, 2 strided convs", VISION, 8
    )
    sig_in, sig = box(axes, 2.3, 5.4, 2.6, 1.0, "SigLIP-L, 384 px", VISION)
    ada_in, ada = box(axes, 5.55, 6.15, 1.6, 1.0, "adaptor\n(linear per tower,\nGELU, linear)", ADAPTOR, 8)
    _, tokens = box(axes, 0.45, 4.1, 1.25, 0.9, "tokens", "white")
    emb_in, emb = box(axes, 2.3, 4.1, 4.85, 0.9, "token embedding (vocabulary cut over TP)", TEXT)
    box(axes, 7.7, 4.1, 1.2, 3.05, "splice:\nimage\nfeatures\ntake the\nplaces of\ntheir\nplace-\nholders", "white", 8)
    arrow(axes, image, sam_in)
    arrow(axes, image, sig_in)
    arrow(axes, sam, ada_in)
    arrow(axes, sig, ada_in)
    arrow(axes, ada, (7.7, ada[1]))
    arrow(axes, tokens, emb_in)
    arrow(axes, emb, (7.7, emb[1]))


def tensor_parallel(axes):
    """One block on two tensor ranks."""
    axes.add_patch(FancyBboxPatch((9.6, 3.75), 6.2, 4.75, "round,pad=0,rounding_size=0.2", fc="white", ec=WIRE, lw=1.6))
    axes.text(9.85, 8.15, "Block on TP 2, with sequence parallelism", weight="bold", size=10.5, va="center")
    for y, rank in ((6.35, 0), (4.65, 1)):
        axes.text(9.85, y + 0.95, f"tensor rank {rank}", size=8, color="#666666", va="bottom")
        box(axes, 9.85, y, 0.95, 0.85, "norm\n[T/2, D]", "white", 7.5)
        box(axes, 11.65, y, 1.35, 0.85, "q k v | gate up\ncolumns", TEXT, 7.5)
        box(axes, 13.2, y, 1.0, 0.85, "o | down\nrows", TEXT, 7.5)
        axes.text(15.25, y + 0.42, "[T/2, D]", size=8, ha="center", va="center")
        arrow(axes, (10.8, y + 0.42), (11.1, y + 0.42))
        arrow(axes, (11.42, y + 0.42), (11.65, y + 0.42))
        arrow(axes, (13.0, y + 0.42), (13.2, y + 0.42))
        arrow(axes, (14.2, y + 0.42), (14.42, y + 0.42))
    for x, text in ((11.1, "all-gather"), (14.42, "reduce-scatter")):
        axes.add_patch(
            FancyBboxPatch((x, 4.55), 0.32, 2.75, "round,pad=0,rounding_size=0.08", fc=ADAPTOR, ec=WIRE, lw=1)
        )
        axes.text(x + 0.16, 5.92, text, rotation=90, ha="center", va="center", size=8)
    axes.text(9.85, 4.15, "Activations outside the region are cut along the tokens,", size=8, va="center")
    axes.text(9.85, 3.93, "weights inside it over heads and channels.", size=8, va="center")


def model_list(axes):
    """The list of layers, cut into pipeline stages."""
    names = ["Stem", *(f"Block {i}" for i in range(6)), "Head + loss"]
    colours = [VISION, *[TEXT] * 6, ADAPTOR]
    axes.text(0.2, 3.2, "The model is a list; a pipeline stage is a slice of it", weight="bold", size=10.5, va="center")
    for stage in range(2):
        x = 0.2 + stage * 7.9
        axes.add_patch(
            FancyBboxPatch((x, 1.0), 7.7, 1.9, "round,pad=0,rounding_size=0.2", fc=STAGES[stage], ec=WIRE, ls="--")
        )
        axes.text(x + 0.2, 2.65, f"stage {stage}", size=9, va="center", color="#666666")
    for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
        x = 0.45 + index * 1.87 + (0.35 if index >= 4 else 0)
        box(axes, x, 1.3, 1.5, 0.95, name, colour, 9, "bold" if index == 0 else "normal")
        if index < len(names) - 1:
            arrow(axes, (x + 1.5, 1.77), (x + 1.87 + (0.35 if index == 3 else 0), 1.77))
    axes.text(
        0.2,
        0.55,
        "Only hidden states [T, D] cross a stage border: images, token ids and document borders stay with the rank "
        "and are looked up by micro-batch.",
        size=8.5,
        va="center",
    )


def draw() -> plt.Figure:
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "megavl", "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=(13.2, 7.1))
        axes.set(xlim=(0, 16), ylim=(0.2, 8.7))
        axes.axis("off")
        figure.subplots_adjust(0, 0, 1, 1)
        stem(axes)
        tensor_parallel(axes)
        model_list(axes)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="picture to write (.svg or .png)")
    arguments = parser.parse_args()
    # No date, so that the same script writes the same file.
    metadata = {"Date": None} if arguments.output.suffix == ".svg" else {}
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "megavl"}):
        draw().savefig(arguments.output, metadata=metadata, dpi=100)


if __name__ == "__main__":
    main()
