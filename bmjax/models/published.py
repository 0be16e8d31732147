"""The weights that torchvision publishes for a model, as a record."""

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


def imagenet_weights(
    model: str,
    version: int,
    sha256_prefix: str,
    resize_size: int,
    top1: float,
    top5: float,
    num_params: int,
    file_mib: float,
) -> PublishedWeights:
    """Returns the record of `imagenet-v1` or `imagenet-v2` of a model at 224 pixels."""
    return PublishedWeights(
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
