"""Draw docs/lockstep.png: a residual block, wide and narrow in lockstep.   python docs/lockstep.py"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

WIDE, NARROW, SHARED, BRANCH = "#c9d3dd", "#b7cdf5", "#f3dca6", "#d9eed2"


def main() -> None:
    figure = Figure(figsize=(11, 4.9), layout="constrained")
    ax = figure.subplots()
    ax.set_xlim(0, 22.4)
    ax.set_ylim(-1.3, 8.8)
    ax.axis("off")
    top, middle, bottom = 6.4, 3.9, 1.4

    def box(x, y, text, color, width=1.9):
        patch = FancyBboxPatch((x - width / 2, y - 0.5), width, 1.0, "round,pad=0.05", fc=color, ec="#555555")
        ax.add_patch(patch)
        ax.text(x, y, text, ha="center", va="center", fontsize=9)

    def arrow(a, b, bend=0.0, style="-|>", color="#333333"):
        line = FancyArrowPatch(
            a, b, arrowstyle=style, mutation_scale=11, color=color, connectionstyle=f"arc3,rad={bend}", lw=1.2
        )
        ax.add_patch(line)

    ax.text(0.1, top, "wide,\nC channels", va="center", fontsize=10, weight="bold")
    ax.text(0.1, bottom, "narrow,\nk channels", va="center", fontsize=10, weight="bold")
    for left, index in ((3.4, 1), (11.4, 2)):
        box(left + 0.3, middle, "α wide\n+ (1-α) E(narrow)", SHARED, 2.5)
        box(left + 3.1, middle, f"conv W$_{index}$\n(shared)", SHARED)
        box(left + 0.3, bottom, f"E$_{index}$: k → C", BRANCH)
        box(left + 3.1, bottom, f"R$_{index}$: C → k", BRANCH)
        behind = "BatchNorm\nReLU" if index == 1 else "BatchNorm"
        box(left + 5.6, top, behind, WIDE)
        box(left + 5.6, bottom, behind, NARROW)
        arrow((left + 0.3, bottom + 0.55), (left + 0.3, middle - 0.6))
        arrow((left + 1.6, middle), (left + 2.1, middle))
        arrow((left + 3.1, middle - 0.55), (left + 3.1, bottom + 0.55))
        arrow((left + 4.05, bottom), (left + 4.6, bottom))
        arrow((left + 4.05, middle + 0.2), (left + 4.9, top - 0.6), bend=0.2)
    arrow((1.9, top), (3.3, middle + 0.6), bend=-0.1)
    arrow((1.9, bottom), (2.7, bottom))
    arrow((9.95, top), (11.3, middle + 0.6), bend=-0.1)
    arrow((9.95, bottom), (10.7, bottom))
    for y, color in ((top, WIDE), (bottom, NARROW)):
        box(19.3, y, "+\nReLU", color, 1.1)
        arrow((17.95, y), (18.7, y))
        arrow((19.9, y), (21.2, y))
    arrow((1.9, top + 0.3), (19.3, top + 0.6), bend=-0.16, color="#8a8a8a")
    arrow((1.0, bottom - 0.75), (19.3, bottom - 0.6), bend=0.13, color="#8a8a8a")
    ax.text(10.6, 8.45, "shortcut, in C channels", ha="center", fontsize=9, color="#555555")
    ax.text(
        10.6,
        -1.1,
        "shortcut, in k channels: still a plain addition",
        ha="center",
        fontsize=9,
        color="#555555",
    )
    ax.text(
        20.2,
        middle,
        "α = 0: only the lower row is\nleft, and R·W·E is one\nordinary layer k → k",
        fontsize=9,
        ha="center",
        va="center",
    )
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
