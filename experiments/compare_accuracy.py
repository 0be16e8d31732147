"""Top-1 accuracy of a torchvision ResNet on a folder of images, here and by torchvision itself.

    uv run --extra torch python experiments/compare_accuracy.py resnet18-cifar10.pth cifar10 \
        --image-size 64

With a ResNet-18 trained on CIFAR-10 at 64 px, on its 10,000 test images, Python 3.11, jax 0.10.2,
torch 2.15, torchvision 0.29:

    bmjax 8663 of 10000 right, 86.63%; torchvision 8663 right, 86.63%; 10000 predictions agree
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from bmjax import load_dataset, load_run
from bmjax.config import ConvertConfig
from bmjax.data.preprocess import EvaluationTransform
from bmjax.data.sources import all_images
from bmjax.weights.convert_command import convert


def predict_by_bmjax(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Returns predictions and labels of the test split, through `folder:` and a converted run."""
    transform = EvaluationTransform(args.image_size, args.image_size)
    name = f"folder:{args.folder}"
    dataset = load_dataset(name, transform=transform, splits=("test",))
    with tempfile.TemporaryDirectory() as folder:
        size = args.image_size
        out = str(Path(folder) / "run")
        convert(
            ConvertConfig(
                str(args.weights),
                out,
                args.model,
                image_size=size,
                resize_size=size,
                class_names=dataset.class_names,
            )
        )
        probabilities = load_run(out).predict(all_images(dataset.test))
    return np.argmax(probabilities, axis=1), dataset.test.labels


def predict_by_torchvision(args: argparse.Namespace) -> np.ndarray:
    """Returns the predictions of torchvision's model, transforms and folder reader."""
    import torch
    import torchvision
    from torchvision import transforms

    size = args.image_size
    steps = [
        transforms.Resize(size, antialias=True),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    files = torchvision.datasets.ImageFolder(args.folder / "test", transforms.Compose(steps))
    state_dict = torch.load(args.weights, map_location="cpu", weights_only=True)
    model = getattr(torchvision.models, args.model)(num_classes=len(files.classes))
    model.load_state_dict(state_dict)
    model.eval()
    parts = []
    with torch.no_grad():
        for images, _ in torch.utils.data.DataLoader(files, 250):
            parts.append(model(images).argmax(1).numpy())
    return np.concatenate(parts)


def main() -> None:
    """Prints both accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, help="a torchvision checkpoint")
    parser.add_argument("folder", type=Path, help="holds train/CLASS and test/CLASS")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64, help="shorter side, in pixels")
    args = parser.parse_args()
    ours, labels = predict_by_bmjax(args)
    theirs = predict_by_torchvision(args)
    right = [int(np.sum(predictions == labels)) for predictions in (ours, theirs)]
    print(
        f"bmjax {right[0]} of {len(labels)} right, {right[0] / len(labels):.2%}; torchvision "
        f"{right[1]} right, {right[1] / len(labels):.2%}; {np.sum(ours == theirs)} predictions "
        "agree"
    )


if __name__ == "__main__":
    main()
