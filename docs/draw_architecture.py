"""Draw docs/architecture.svg: the stems of both families, how ranks share a block and its experts, the model list.

python docs/draw_architecture.py --output docs/architecture.svg
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

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


def panel(axes, x, y, width, height, title):
    """A frame with a title, in which a part is explained."""
    frame = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.2", fc="white", ec=WIRE, lw=1.6)
    axes.add_patch(frame)
    axes.text(x + 0.25, y + height - 0.35, title, weight="bold", size=10.5, va="center")


def exchange(axes, x, y, height, text):
    """A collective between the ranks that lie on top of each other."""
    axes.add_patch(FancyBboxPatch((x, y), 0.32, height, "round,pad=0,rounding_size=0.08", fc=ADAPTOR, ec=WIRE, lw=1))
    axes.text(x + 0.16, y + height / 2, text, rotation=90, ha="center", va="center", size=8)


def stem(axes):
    """The fused first pipeline block: both towers, the adaptor, the token embedding, the splice."""
    panel(axes, 0.2, 3.75, 9.0, 4.75, "Stem, the fused first pipeline block: DeepSeek-VL")
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
    panel(axes, 9.6, 3.75, 6.2, 4.75, "Block on TP 2, with sequence parallelism")
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
    exchange(axes, 11.1, 4.55, 2.75, "all-gather")
    exchange(axes, 14.42, 4.55, 2.75, "reduce-scatter")
    axes.text(9.85, 4.15, "Activations outside the region are cut along the tokens,", size=8, va="center")
    axes.text(9.85, 3.93, "weights inside it over heads and channels.", size=8, va="center")


def tiles(axes):
    """What the stem of VL2 has in place of two towers."""
    panel(axes, 0.2, -0.75, 9.0, 4.2, "Stem: DeepSeek-VL2")
    _, image = box(axes, 0.45, 0.75, 1.25, 0.9, "image", "white")
    axes.add_patch(Rectangle((2.4, 1.65), 0.8, 0.8, fc="white", ec=WIRE, lw=1))
    axes.text(2.8, 2.62, "overview", size=8, ha="center")
    for row in range(2):
        for column in range(3):
            axes.add_patch(Rectangle((2.2 + 0.42 * column, 0.0 + 0.42 * row), 0.38, 0.38, fc="white", ec=WIRE, lw=1))
    axes.text(2.8, -0.35, "1 to 9 local tiles", size=8, ha="center")
    tower_in, tower = box(axes, 4.1, 0.6, 1.6, 1.2, "SigLIP-SO400M\nof each tile,\n384 px", VISION, 8)
    ada_in, ada = box(axes, 6.15, 0.6, 1.5, 1.2, "adaptor\n(2 x 2 patches\nare one; linear,\nGELU, linear)", ADAPTOR, 8)
    line = "tokens:\n\n14 rows of\nthe overview,\na separator,\nrows across\nlocal tiles;\nbehind each\na newline"
    splice, _ = box(axes, 8.0, -0.35, 1.0, 3.1, line, "white", 7.5)
    arrow(axes, image, (2.35, 2.05))
    arrow(axes, image, (2.15, 0.42))
    arrow(axes, (3.25, 2.05), tower_in)
    arrow(axes, (3.5, 0.42), tower_in)
    arrow(axes, tower, ada_in)
    arrow(axes, ada, splice)


def experts(axes):
    """The routed experts of one layer on two expert ranks."""
    panel(axes, 9.6, -0.75, 6.2, 4.2, "Experts on EP 2")
    for y, rank, held in ((1.6, 0, "0 to E/2 - 1"), (0.1, 1, "E/2 to E - 1")):
        axes.text(9.85, y + 0.85, f"expert rank {rank}", size=8, color="#666666", va="bottom")
        box(axes, 9.85, y, 0.95, 0.75, "router:\nk of E", "white", 7.5)
        box(axes, 11.75, y, 1.4, 0.75, f"experts\n{held}", TEXT, 7.5)
        box(axes, 14.2, y, 0.95, 0.75, "weighted\nsum", "white", 7.5)
        for start, stop in ((10.8, 11.1), (11.42, 11.75), (13.15, 13.5), (13.82, 14.2)):
            arrow(axes, (start, y + 0.37), (stop, y + 0.37))
    exchange(axes, 11.1, 0.0, 2.45, "all-to-all")
    exchange(axes, 13.5, 0.0, 2.45, "all-to-all")
    axes.text(9.85, -0.22, "Shared experts are computed while rows are under way.", size=8, va="center")
    axes.text(9.85, -0.46, "No token is dropped.", size=8, va="center")


def model_list(axes):
    """The list of layers, cut into pipeline stages."""
    names = ["Stem", *(f"Block {i}" for i in range(6)), "Head + loss"]
    colours = [VISION, *[TEXT] * 6, ADAPTOR]
    title = "The model is a list; a pipeline stage is a slice of it"
    axes.text(0.2, -1.3, title, weight="bold", size=10.5, va="center")
    for stage in range(2):
        x = 0.2 + stage * 7.9
        axes.add_patch(
            FancyBboxPatch((x, -3.5), 7.7, 1.9, "round,pad=0,rounding_size=0.2", fc=STAGES[stage], ec=WIRE, ls="--")
        )
        axes.text(x + 0.2, -1.85, f"stage {stage}", size=9, va="center", color="#666666")
    for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
        x = 0.45 + index * 1.87 + (0.35 if index >= 4 else 0)
        box(axes, x, -3.2, 1.5, 0.95, name, colour, 9, "bold" if index == 0 else "normal")
        if index < len(names) - 1:
            arrow(axes, (x + 1.5, -2.73), (x + 1.87 + (0.35 if index == 3 else 0), -2.73))
    axes.text(
        0.2,
        -3.95,
        "Only hidden states [T, D] cross a stage border: images, token ids and document borders stay with the rank "
        "and are looked up by micro-batch.",
        size=8.5,
        va="center",
    )


def draw() -> plt.Figure:
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "megavl", "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=(13.2, 10.8))
        axes.set(xlim=(0, 16), ylim=(-4.25, 8.7))
        axes.axis("off")
        figure.subplots_adjust(0, 0, 1, 1)
        stem(axes)
        tensor_parallel(axes)
        tiles(axes)
        experts(axes)
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
