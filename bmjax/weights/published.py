"""What torchvision publishes: its ImageNet-1k weights of the ResNet family, as a table.

Every value is that of `torchvision.models.get_model_weights` in torchvision 0.29 (BSD-3-Clause);
`tests/test_weights_named.py` compares all of them where torchvision is installed.
"""

from dataclasses import dataclass

OFFICIAL_URL = "https://download.pytorch.org/models"


@dataclass(frozen=True)
class PublishedWeights:
    """One published set of weights, and how its images are to be prepared.

    Attributes:
        model: the name of the model.
        name: the name of the set, such as `imagenet-v2`.
        url: where the publisher keeps the file.
        crop_size: pixels of each side of the centre that the model sees.
        resize_size: pixels of the shorter side before the crop.
        interpolation: how to resize; the published accuracies were measured with it, smoothed
            when shrinking ("antialias").
        mean: per channel (RGB), subtracted from pixels in 0 to 1.
        std: per channel (RGB), by which the difference is divided.
        top1: accuracy on the 50,000 validation images of ImageNet-1k, in percent.
        top5: the same for the right class among the first five, in percent.
        num_params: how many numbers the model learns.
        file_mib: size of the file in MiB; float16 files are half as large as float32 ones.
    """

    model: str
    name: str
    url: str
    crop_size: int
    resize_size: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    top1: float
    top5: float
    num_params: int
    file_mib: float

    @property
    def file_name(self) -> str:
        """The last part of `url`."""
        return self.url.rsplit("/", 1)[1]

    @property
    def sha256_prefix(self) -> str:
        """The first eight hexadecimal digits of the file's SHA-256, which its name carries."""
        return self.file_name.rsplit("-", 1)[1].removesuffix(".pth")


# Model, version, SHA-256 prefix, resize, top-1, top-5, parameters, MiB.
_ROWS = (
    ("resnet18", 1, "f37072fd", 256, 69.758, 89.078, 11_689_512, 44.661),
    ("resnet34", 1, "b627a593", 256, 73.314, 91.42, 21_797_672, 83.275),
    ("resnet50", 1, "0676ba61", 256, 76.13, 92.862, 25_557_032, 97.781),
    ("resnet50", 2, "11ad3fa6", 232, 80.858, 95.434, 25_557_032, 97.79),
    ("resnet101", 1, "63fe2227", 256, 77.374, 93.546, 44_549_160, 170.511),
    ("resnet101", 2, "cd907fc2", 232, 81.886, 95.78, 44_549_160, 170.53),
    ("resnet152", 1, "394f9c45", 256, 78.312, 94.046, 60_192_808, 230.434),
    ("resnet152", 2, "f82ba261", 232, 82.284, 96.002, 60_192_808, 230.474),
    ("resnext50_32x4d", 1, "7cdf4587", 256, 77.618, 93.698, 25_028_904, 95.789),
    ("resnext50_32x4d", 2, "1a0047aa", 232, 81.198, 95.34, 25_028_904, 95.833),
    ("resnext101_32x8d", 1, "8ba56ff5", 256, 79.312, 94.526, 88_791_336, 339.586),
    ("resnext101_32x8d", 2, "110c445d", 232, 82.834, 96.228, 88_791_336, 339.673),
    ("resnext101_64x4d", 1, "173b62eb", 232, 83.246, 96.454, 83_455_272, 319.318),
    ("wide_resnet50_2", 1, "95faca4d", 256, 78.468, 94.086, 68_883_240, 131.82),
    ("wide_resnet50_2", 2, "9ba9bcbe", 232, 81.602, 95.758, 68_883_240, 263.124),
    ("wide_resnet101_2", 1, "32ee1156", 256, 78.848, 94.284, 126_886_696, 242.896),
    ("wide_resnet101_2", 2, "d733dc28", 232, 82.51, 96.02, 126_886_696, 484.747),
)

PUBLISHED = tuple(
    PublishedWeights(
        model=model,
        name=f"imagenet-v{version}",
        url=f"{OFFICIAL_URL}/{model}-{sha256_prefix}.pth",
        crop_size=224,
        resize_size=resize_size,
        interpolation="bilinear",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        top1=top1,
        top5=top5,
        num_params=num_params,
        file_mib=file_mib,
    )
    for model, version, sha256_prefix, resize_size, top1, top5, num_params, file_mib in _ROWS
)
