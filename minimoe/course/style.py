"""How every figure looks: one palette, one set of sizes, and an alt text that no figure can be shown without."""

import base64
import html
import io
from functools import cache

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.figure import Figure

# Paul Tol's "light" scheme (SRON technical note 3.2): made for labelled cells, told apart by colour-blind readers.
EXPERT_COLOURS = ("#77AADD", "#EE8866", "#EEDD88", "#44BB99", "#FFAABB", "#BBCC33", "#99DDFF", "#DDDDDD")
# And two of his "bright" scheme, for two series in one plot.
MAIN, PALE = "#4477AA", "#CCDDEE"
# Curves differ in colour, dash and marker at once, to be told apart in greyscale too (his "bright" scheme again).
SERIES = (
    {"color": "#4477AA", "linestyle": "-", "marker": "o"},
    {"color": "#EE6677", "linestyle": "--", "marker": "s"},
    {"color": "#228833", "linestyle": "-.", "marker": "^"},
    {"color": "#AA3377", "linestyle": ":", "marker": "D"},
    {"color": "#222222", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
)
INK, QUIET = "#222222", "#595959"
WIDTH = 6.8  # inches: a notebook's column, and still readable on a phone

RC = {
    "font.size": 11,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "figure.labelsize": 10,
    "axes.titlesize": 11,  # lighter than that of the figure
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "hatch.linewidth": 0.8,
    "svg.hashsalt": "minimoe",  # the same drawing gives the same file
}
_DPI = 160
# Scripts that matplotlib's own font lacks, where the machine has a font for them.
_WIDE_FONTS = (
    "Noto Sans Mono CJK SC",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
)


def expert_colour(expert: int) -> str:
    """The fill of an expert, light enough for dark text. Beyond eight they repeat: always write the number too."""
    return EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]


@cache
def token_fonts() -> list[str]:
    """The font families for tokens: one that comes with matplotlib, then an installed one with Chinese characters."""
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans Mono", *[name for name in _WIDE_FONTS if name in installed][:1]]


def new_figure(height: float, *, width: float = WIDTH) -> Figure:
    """An empty figure of `width` x `height` inches that belongs to no window and to no global state."""
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def describe(figure: Figure, alt: str) -> None:
    """Give `figure` its alt text, on one line: what a reader who does not see it needs to know."""
    figure.set_label(" ".join(alt.split()))


def render(figure: Figure, kind: str) -> bytes:
    """The bytes of `figure` as "png" or "svg", without a date or a version in them."""
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    buffer = io.BytesIO()
    with mpl.rc_context(RC):
        figure.savefig(buffer, format=kind, facecolor="white", metadata=metadata)
    return buffer.getvalue()


def image_tag(figure: Figure) -> str:
    """`figure` as an HTML image, because JupyterLab and nbconvert show a bare PNG without its alt text. Raises
    ValueError where the figure was never described."""
    alt = figure.get_label()
    if not alt:
        raise ValueError("this figure has no alt text: wanted `describe(figure, alt)` before it is shown")
    data = base64.b64encode(render(figure, "png")).decode()
    width = round(figure.get_figwidth() * 100)
    return (
        f'<img alt="{html.escape(alt)}" width="{width}" style="max-width: 100%; height: auto" '
        f'src="data:image/png;base64,{data}">'
    )


def show(figure: Figure) -> None:
    """Show `figure` in a notebook, with its alt text. Raises what `image_tag` raises."""
    from IPython.display import display

    display({"text/html": image_tag(figure), "text/plain": figure.get_label()}, raw=True)
