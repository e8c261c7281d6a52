"""Chart pairs: charts drawn from numbers, with the table of the numbers or the code that drew them.

The numbers are measured: what the modules of the standard library are made of, and the values of functions.
"""

import random
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")  # before pyplot: no window, also where there is a display

import matplotlib.pyplot as plt
import numpy as np
from corpus.library import Source
from PIL import Image

_COLOURS = ("steelblue", "indianred", "seagreen", "darkorange", "slateblue", "teal", "goldenrod")
_CURVES = (
    "np.sin(x)",
    "np.cos(x)",
    "x ** 2",
    "np.sqrt(x)",
    "np.exp(-x)",
    "np.sin(x) * x",
    "np.log(x + 1)",
    "x ** 3 - x",
)
# Type that can still be read when the picture is scaled down to 128 px.
_STYLE = {
    "figure.figsize": (3.2, 2.6),
    "figure.dpi": 100,
    "font.size": 15,
    "axes.titlesize": 17,
    "lines.linewidth": 3,
    # Room for seven letters at the left; laying out each chart by measuring it would take twice as long.
    "figure.subplot.left": 0.3,
    "figure.subplot.right": 0.96,
    "figure.subplot.bottom": 0.12,
    "figure.subplot.top": 0.88,
}


@dataclass(frozen=True)
class Measurement:
    """One number for each of a few modules."""

    measure: str
    names: tuple[str, ...]
    values: tuple[int, ...]

    def table(self) -> str:
        """As a markdown table."""
        rows = "".join(f"| {name} | {value} |\n" for name, value in zip(self.names, self.values, strict=True))
        return f"| module | {self.measure} |\n| --- | --- |\n{rows}"


def measure(modules: list[Source], rng: random.Random) -> Measurement:
    """Draw two to four modules with short names and one thing to count in them."""
    chosen = rng.sample(modules, rng.randint(2, 4))
    name = rng.choice(sorted(chosen[0].measures))
    return Measurement(name, tuple(m.name for m in chosen), tuple(m.measures[name] for m in chosen))


def chartable(sources: list[Source]) -> list[Source]:
    """The modules whose name fits under a bar and whose numbers are not all nought."""
    return [
        s for s in sources if s.measures and len(s.name) <= 7 and "." not in s.name and min(s.measures.values()) > 0
    ]


def plot_code(measurement: Measurement, rng: random.Random) -> str:
    """A short plotting script for a measurement, or for a curve."""
    colour = rng.choice(_COLOURS)
    head = "import matplotlib.pyplot as plt\n"
    if rng.random() < 0.3:
        curve, stop, points = rng.choice(_CURVES), rng.randint(2, 12), rng.choice((20, 50, 100))
        return (
            f"{head}import numpy as np\nx = np.linspace(0, {stop}, {points})\ny = {curve}\n"
            f'plt.plot(x, y, color="{colour}")\nplt.title("y = {curve.replace("np.", "")}")\n'
        )
    data = f"names = {list(measurement.names)}\nvalues = {list(measurement.values)}\n"
    draw = {
        "bar": f'plt.bar(names, values, color="{colour}")\n',
        "barh": f'plt.barh(names, values, color="{colour}")\n',
        "pie": "plt.pie(values, labels=names)\n",
    }
    # Names that do not fit side by side are set below each other.
    kind = rng.choice(("bar", "barh", "pie")) if sum(map(len, measurement.names)) <= 15 else "barh"
    return f'{head}{data}{draw[kind]}plt.title("{measurement.measure}")\n'


def _picture(figure: plt.Figure) -> Image.Image:
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())  # [H, W, 4]
    plt.close(figure)
    return Image.fromarray(pixels[..., :3].copy())  # the ground is opaque


def run_plot(code: str) -> Image.Image:
    """The picture, RGB, that a plotting script makes."""
    with matplotlib.rc_context(_STYLE):
        exec(code, {})
        return _picture(plt.gcf())


def draw_bars(measurement: Measurement, rng: random.Random) -> Image.Image:
    """The picture, RGB, of a measurement as labelled bars with their values."""
    colour = rng.choice(_COLOURS)
    with matplotlib.rc_context(_STYLE):
        figure, axes = plt.subplots()
        bars = axes.barh(measurement.names, measurement.values, color=colour)
        axes.bar_label(bars, padding=3)
        axes.set_xlim(0, 1.35 * max(measurement.values))
        axes.set_xticks([])
        axes.invert_yaxis()  # the first module on top, as in the table
        axes.set_title(measurement.measure)
        return _picture(figure)
