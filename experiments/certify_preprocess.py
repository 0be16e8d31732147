"""Is our preprocessing torchvision's? Every pixel of photographs, in all modes and odd sizes.

    uv run --extra torch python experiments/certify_preprocess.py --images FOLDER

On 300 of 3,409 photographs of clothes (CC0; shorter side 224, longer up to 524), drawn by seed 0;
torch 2.15, torchvision 0.29, Pillow 13.0; 2.6 minutes of processor time on an AMD EPYC:

                                     Pillow backend              tensor backend
    transform             compared largest   differ largest   differ     by > 1
    256/224 bilinear          2732       0    0.00%       1   14.43%   0.00000%
    232/224 bilinear          2732       0    0.00%       1   14.35%   0.00000%
    72/64 bilinear            2732       0    0.00%       1   10.79%   0.00000%
    256/224 bicubic           2732       0    0.00%      10   16.37%   0.00383%
    232/224 bicubic           2732       0    0.00%      11   16.12%   0.00374%
    72/64 bicubic             2732       0    0.00%       8   11.89%   0.00336%

                                     Pillow backend              tensor backend
    bilinear, by picture  compared largest   differ largest   differ     by > 1
    as it is                   900       0    0.00%       1   15.54%   0.00000%
    gray JPEG                  900       0    0.00%       1   15.35%   0.00000%
    gray + alpha               900       0    0.00%       1   15.36%   0.00000%
    RGBA                       900       0    0.00%       1   15.54%   0.00000%
    palette                    900       0    0.00%       1   10.30%   0.00000%
    palette + alpha            900       0    0.00%       1   10.30%   0.00000%
    CMYK JPEG                  900       0    0.00%       1   15.54%   0.00000%
    EXIF turned                900       0    0.00%       1   15.53%   0.00000%
    37 x 500                   114       0    0.00%       1   15.34%   0.00000%
    1 x 1000                     3       0    0.00%       0    0.00%   0.00000%
    1000 x 1                     3       0    0.00%       0    0.00%   0.00000%
    tiled 5 x 5                 90       0    0.00%       1    8.67%   0.00000%
    500 x 37                   114       0    0.00%       1   15.02%   0.00000%
    225 x 223                  114       0    0.00%       1   16.07%   0.00000%
    50 x 40                    114       0    0.00%       1   17.45%   0.00000%
    63 x 64                    111       0    0.00%       1   17.61%   0.00000%
    301 x 257                  111       0    0.00%       1   16.20%   0.00000%
    224 x 224                  111       0    0.00%       1   16.63%   0.00000%
    256 x 256                  111       0    0.00%       1    8.97%   0.00000%

                                     Pillow backend              tensor backend
    bicubic, by picture   compared largest   differ largest   differ     by > 1
    as it is                   900       0    0.00%      10   16.68%   0.00575%
    gray JPEG                  900       0    0.00%      10   16.47%   0.00216%
    gray + alpha               900       0    0.00%       9   16.46%   0.00196%
    RGBA                       900       0    0.00%      10   16.68%   0.00575%
    palette                    900       0    0.00%      10   14.68%   0.00129%
    palette + alpha            900       0    0.00%      10   14.68%   0.00129%
    CMYK JPEG                  900       0    0.00%      10   16.70%   0.00503%
    EXIF turned                900       0    0.00%      11   16.66%   0.00547%
    37 x 500                   114       0    0.00%       6   16.72%   0.00852%
    1 x 1000                     3       0    0.00%       0    0.00%   0.00000%
    1000 x 1                     3       0    0.00%       0    0.00%   0.00000%
    tiled 5 x 5                 90       0    0.00%       8    9.64%   0.00736%
    500 x 37                   114       0    0.00%       2   16.08%   0.00007%
    225 x 223                  114       0    0.00%       6   17.11%   0.00324%
    50 x 40                    114       0    0.00%       6   19.01%   0.00814%
    63 x 64                    111       0    0.00%       9   18.91%   0.01076%
    301 x 257                  111       0    0.00%       6   16.80%   0.00215%
    224 x 224                  111       0    0.00%       8   17.73%   0.00368%
    256 x 256                  111       0    0.00%       6    8.77%   0.00107%

    Pillow backend: the same to the bit
    tensor backend, bilinear: within 1/255

Each picture is a file that both `decode` and torchvision's loader, made upright by EXIF, read.
Every tenth picture is read as gray, with one channel, and all others as RGB. Compared are
`EvaluationTransform` and torchvision's `ImageClassification`, before the normalisation, on both of
its backends: of a Pillow picture, which must be the same to the bit, and of a uint8 tensor, which
must be within 1/255 where bilinear. Differences are in units of 1/255. Where bicubic, torchvision
differs from itself by more: its Pillow backend clips overshoots to 0 to 255 after each axis,
the tensor backend at the end alone. That is printed, and no reason to fail. A failure is exit
code 1.
"""

import argparse
import io
import random
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv
from torchvision.transforms._presets import ImageClassification

from bmjax.data.preprocess import EvaluationTransform, decode

TRANSFORMS = [
    EvaluationTransform(resize, crop, interpolation)
    for interpolation in ("bilinear", "bicubic")
    for resize, crop in ((256, 224), (232, 224), (72, 64))
]
# Width and height: long, smaller than the crop, of odd margins, and of no margin at all.
SIZES = [(37, 500), (500, 37), (225, 223), (50, 40), (63, 64), (301, 257), (224, 224), (256, 256)]
# Resized to a shorter side of 256 this takes a gigabyte, so that there is one of each.
EXTREMES = [(1, 1000), (1000, 1)]


def encode(picture: Image.Image, kind: str = "PNG", orientation: int = 1) -> bytes:
    """Returns a picture as an image file with an EXIF orientation."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    picture.save(file, kind, exif=exif, **({"quality": 90} if kind == "JPEG" else {}))
    return file.getvalue()


def variants(photograph: bytes, index: int, sizes: list[tuple[int, int]]) -> Iterator:
    """Yields (name, image file) for a photograph as it is, in all modes, turned, and resized."""
    rgb = Image.open(io.BytesIO(photograph)).convert("RGB")
    alpha = Image.linear_gradient("L").resize(rgb.size)
    translucent = rgb.copy()
    translucent.putalpha(alpha)
    gray_alpha = rgb.convert("L")
    gray_alpha.putalpha(alpha)
    palette = rgb.quantize(64)
    transparent = palette.copy()
    transparent.info["transparency"] = bytes(range(0, 256, 4))
    yield "as it is", photograph
    yield "gray JPEG", encode(rgb.convert("L"), "JPEG")
    yield "gray + alpha", encode(gray_alpha)
    yield "RGBA", encode(translucent)
    yield "palette", encode(palette)
    yield "palette + alpha", encode(transparent)
    yield "CMYK JPEG", encode(rgb.convert("CMYK"), "JPEG")
    yield "EXIF turned", encode(rgb, "JPEG", 2 + index % 7)
    for size in sizes:
        yield f"{size[0]} x {size[1]}", encode(rgb.resize(size), "JPEG")
    if index % 10 == 0:
        yield "tiled 5 x 5", encode(Image.fromarray(np.tile(np.asarray(rgb), (5, 5, 1))), "JPEG")


def load(file: bytes, channels: int) -> Image.Image:
    """Reads as torchvision's datasets do, but upright."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about transparency that gets lost
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    return picture.convert("L") if channels == 1 else picture


def theirs(ours: EvaluationTransform, picture: Image.Image | torch.Tensor) -> np.ndarray:
    """Returns torchvision's pixels, [height, width, channels], in units of 1/255."""
    assert isinstance(ours.resize_size, int)
    assert isinstance(ours.crop_size, int)
    transform = ImageClassification(
        resize_size=ours.resize_size,
        crop_size=ours.crop_size,
        interpolation=InterpolationMode(ours.interpolation),
        mean=(0.0,),
        std=(1.0,),
    )
    return (transform(picture) * 255).round().permute(1, 2, 0).numpy().astype(int)


class Differences:
    """Counts of the absolute differences between pixels, in units of 1/255."""

    def __init__(self) -> None:
        self.pictures = 0
        self.counts = {"Pillow": np.zeros(256, int), "tensor": np.zeros(256, int)}

    def add(self, of: dict[str, np.ndarray]) -> None:
        """Counts one picture's differences on each backend."""
        self.pictures += 1
        for backend, difference in of.items():
            self.counts[backend] += np.bincount(difference.ravel(), minlength=256)

    def largest(self, backend: str) -> int:
        """Returns the largest difference."""
        return int(np.flatnonzero(self.counts[backend]).max())

    def share(self, backend: str, beyond: int) -> float:
        """Returns the share of pixels that differ by more than `beyond`, in per cent."""
        counts = self.counts[backend]
        return 100 * float(counts[beyond + 1 :].sum() / counts.sum())

    def row(self, name: str) -> str:
        """Returns a line of the table."""
        return (
            f"{name:<22}{self.pictures:>8}"
            f"{self.largest('Pillow'):>8}{self.share('Pillow', 0):>8.2f}%"
            f"{self.largest('tensor'):>8}{self.share('tensor', 0):>8.2f}%"
            f"{self.share('tensor', 1):>10.5f}%"
        )


def compare(file: bytes, channels: int) -> Iterator[tuple[EvaluationTransform, dict]]:
    """Yields each transform with the absolute differences on both backends for an image file."""
    decoded, picture = decode(io.BytesIO(file), channels), load(file, channels)
    for transform in TRANSFORMS:
        ours = transform.apply(decoded).astype(int)
        yield (
            transform,
            {
                "Pillow": abs(ours - theirs(transform, picture)),
                "tensor": abs(ours - theirs(transform, tv.pil_to_tensor(picture))),
            },
        )


def certify(paths: list[Path]) -> int:
    """Prints the tables; returns the exit code."""
    tables: dict[str, defaultdict[str, Differences]] = {
        "transform": defaultdict(Differences),
        "bilinear, by picture": defaultdict(Differences),
        "bicubic, by picture": defaultdict(Differences),
    }
    for index, path in enumerate(paths):
        sizes = [SIZES[index % len(SIZES)], *(EXTREMES if index == 0 else [])]
        for name, file in variants(path.read_bytes(), index, sizes):
            for transform, difference in compare(file, 1 if index % 10 == 9 else 3):
                kind = transform.interpolation
                size = f"{transform.resize_size}/{transform.crop_size} {kind}"
                tables["transform"][size].add(difference)
                tables[f"{kind}, by picture"][name].add(difference)
    for title, table in tables.items():
        print(
            f"{'':<30}{'Pillow backend':>17}{'tensor backend':>28}\n{title:<22}{'compared':>8}"
            f"{'largest':>8}{'differ':>9}{'largest':>8}{'differ':>9}{'by > 1':>11}"
        )
        print("\n".join(found.row(name) for name, found in table.items()) + "\n")
    found = tables["transform"]
    same = max(one.largest("Pillow") for one in found.values()) == 0
    near = max(one.largest("tensor") for name, one in found.items() if "bilinear" in name) <= 1
    print(f"Pillow backend: {'the same to the bit' if same else 'DIFFERS'}")
    print(f"tensor backend, bilinear: {'within' if near else 'NOT within'} 1/255")
    return 0 if same and near else 1


def write_golden(folder: Path) -> None:
    """Writes two tiny JPEG files and torchvision's pixels of them, for the tests."""
    noise = np.random.default_rng(0).normal(0, 12, (45, 61, 3))
    across, down = np.meshgrid(np.linspace(0, 255, 61), np.linspace(0, 255, 45))
    pixels = np.stack([across, down, 255 - across], -1) + noise
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(picture).ellipse((8, 5, 30, 25), fill=(250, 245, 10))
    ImageDraw.Draw(picture).rectangle((40, 20, 44, 44), fill=(5, 0, 20))
    files = {
        "turned.jpg": encode(picture, "JPEG", 6),
        "cmyk.jpg": encode(picture.convert("CMYK"), "JPEG"),
    }
    golden = {}
    for name, file in files.items():
        (folder / name).write_bytes(file)
        for resize, crop, kind in ((24, 20, "bilinear"), (24, 21, "bicubic"), (16, 20, "bilinear")):
            pixels = theirs(EvaluationTransform(resize, crop, kind), load(file, 3))
            golden[f"{name} {resize} {crop} {kind}"] = pixels.astype(np.uint8)
    np.savez_compressed(folder / "golden.npz", **golden)  # type: ignore[arg-type]


def main() -> int:
    """Certifies, or writes the fixtures of the tests."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, help="folder with JPEG files, at any depth")
    parser.add_argument("--sample", type=int, default=300, help="how many of them, drawn by chance")
    parser.add_argument("--golden", type=Path, help="write the tests' fixtures to this folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.golden:
        write_golden(args.golden)
        return 0
    if args.images is None:
        parser.error("name a folder with --images")
    paths = sorted(
        path for path in args.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
    )
    if not paths:
        parser.error(f"there is no JPEG file in {args.images}")
    return certify(random.Random(0).sample(paths, min(args.sample, len(paths))))


if __name__ == "__main__":
    sys.exit(main())
