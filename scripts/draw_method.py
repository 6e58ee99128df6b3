"""Draws the figure of modeling/README.md: what SAN computes, stage by stage, with the shapes of a ViT-B/16.

    python scripts/draw_method.py modeling/method.png

Needs matplotlib (supervision, an extra of this package, has it).
"""

import sys


CLIP, ADAPTER, DATA = "#d7e3f4", "#fbe3c4", "#f2f2f2"
# Centre, size, text, colour: in inches of a figure of 12 x 6.4.
BOXES = {
    "image": (0.95, 3.2, 1.4, 0.9, "image\n640 x 864", DATA),
    "words": (0.95, 0.6, 1.4, 0.7, "class names\nin 14 templates", DATA),
    "shallow": (3.6, 1.95, 2.1, 1.0, "CLIP, layers 1-9\n(image at half size)\n20 x 27 tokens of 768", CLIP),
    "adapter": (3.6, 4.4, 2.1, 1.1, "side adapter, 8 layers\n100 queries and\n40 x 54 patches of 240", ADAPTER),
    "decoder": (6.6, 4.4, 1.9, 1.0, "mask decoder\nqueries x pixels", ADAPTER),
    "deep": (6.6, 1.95, 1.9, 1.0, "CLIP, layers 10-12\n+ 100 recognition\ntokens", CLIP),
    "text": (3.6, 0.6, 2.1, 0.7, "CLIP's text tower", CLIP),
    "masks": (9.35, 4.4, 1.8, 0.9, "mask logits\n100 x 40 x 54", DATA),
    "embeds": (9.35, 1.95, 1.8, 0.9, "mask embeddings\n100 x 512", DATA),
    "classes": (9.35, 0.6, 1.8, 0.7, "class embeddings\nC x 512", DATA),
    "logits": (11.7, 1.3, 1.5, 0.9, "class logits\n100 x (C + 1)", DATA),
    "labels": (11.7, 3.4, 1.7, 1.1, "label map\nsum over queries,\nbest class", DATA),
}
# From, to, text, place of the text, bend.
ARROWS = [
    ("image", "adapter", "", None),
    ("image", "shallow", "", None),
    ("shallow", "adapter", "fusion: feature maps\nafter layers 0, 3, 6, 9", (3.6, 3.22)),
    ("adapter", "decoder", "", None),
    ("shallow", "deep", "tokens", (5.15, 2.12)),
    ("decoder", "masks", "", None),
    ("decoder", "deep", "attention biases\n12 heads x 100 x 20 x 27", (6.6, 3.22)),
    ("deep", "embeds", "", None),
    ("words", "text", "", None),
    ("text", "classes", "", None),
    ("masks", "labels", "", None),
    ("embeds", "logits", "", None),
    ("classes", "logits", "", None),
    ("logits", "labels", "", None),
]


def edge(box: tuple, toward: tuple) -> tuple[float, float]:
    """The point of a box's edge on the line to another box's centre."""
    x, y, width, height = box[:4]
    dx, dy = toward[0] - x, toward[1] - y
    scale = min(width / 2 / abs(dx) if dx else 1e9, height / 2 / abs(dy) if dy else 1e9)
    return x + dx * scale, y + dy * scale


def main(path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch

    figure, axes = pyplot.subplots(figsize=(12, 5.5), dpi=110)
    axes.set(xlim=(0.1, 12.6), ylim=(0, 5.5))
    axes.set_axis_off()
    for x, y, width, height, text, color in BOXES.values():
        corner = (x - width / 2, y - height / 2)
        axes.add_patch(
            FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.02", facecolor=color, edgecolor="#555")
        )
        axes.text(x, y, text, ha="center", va="center", fontsize=9)
    for start, end, text, place in ARROWS:
        tail, head = edge(BOXES[start], BOXES[end]), edge(BOXES[end], BOXES[start])
        axes.annotate(
            "", xy=head, xytext=tail, arrowprops={"arrowstyle": "-|>", "color": "#333", "shrinkA": 2, "shrinkB": 2}
        )
        if place is not None:
            axes.text(*place, text, ha="center", va="center", fontsize=9, style="italic", backgroundcolor="white")
    axes.text(0.3, 5.3, "blue: CLIP, frozen    orange: the side network, trained (8 M parameters)", fontsize=10)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.05)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
