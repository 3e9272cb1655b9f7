"""Draws which bucket a picture goes to, by its width and height.

python benchmarks/bucket_map.py --pixels 256,512 --out docs/images/buckets.png
"""

import argparse

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from data.buckets import bucket_of, bucket_sizes
from data.config import DataConfig

MOST = 1400  # pixels of a side
STEP = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", default="256,512", help="data.pixels, separated by commas")
    parser.add_argument("--max-aspect", type=float, default=DataConfig.max_aspect)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    pixels = [int(side) for side in arguments.pixels.split(",")]
    sizes = bucket_sizes(DataConfig(pixels=pixels, max_aspect=arguments.max_aspect))
    sides = np.arange(STEP, MOST, STEP)
    height_n, width_n = (axis.ravel() for axis in np.meshgrid(sides, sides, indexing="ij"))
    bucket_n, fits_n = bucket_of(sizes, np.stack([height_n, width_n], 1), 1.0)
    shown = np.where(fits_n, bucket_n + 1, 0).reshape(len(sides), -1)
    hues = np.random.default_rng(3).permutation(len(sizes)) / len(sizes)
    colors = [(0.93, 0.93, 0.93, 1.0), *colormaps["rainbow"](hues)]
    figure = Figure((11, 5.4), layout="constrained")
    where, outlines = figure.subplots(1, 2)
    where.imshow(shown, origin="lower", extent=(0, MOST, 0, MOST), cmap=ListedColormap(colors), alpha=0.75)
    for number, size in enumerate(sizes):
        here = np.argwhere(shown == number + 1)
        if len(here):
            y, x = np.median(here, axis=0) * STEP
            where.annotate(str(size), (x, y), ha="center", va="center", fontsize=7)
        corner = -size.width / 2, -size.height / 2
        outlines.add_patch(Rectangle(corner, size.width, size.height, fill=False, ec=colors[number + 1], lw=2))
    where.set_title("bucket by the size of a picture (grey: left out)", loc="left", fontsize=10)
    where.set_xlabel("width of the picture, pixels")
    where.set_ylabel("height of the picture, pixels")
    reach = max(max(size) for size in sizes) / 2 + 20
    outlines.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    outlines.set_title(f"the {len(sizes)} buckets of data.pixels={pixels}", loc="left", fontsize=10)
    outlines.set_xlabel("pixels")
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
