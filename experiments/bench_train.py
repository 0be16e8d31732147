"""Steady-state training speed of the MLP: bmjax's epoch as one call against PyTorch's usual loops.

The same network (784-128-64-10, ReLU), the same optimizer (SGD with momentum 0.9), the same
batch size, the same 3,500 digits, without augmentation. Two loops of PyTorch, both with a shuffling
DataLoader and `loss.item()` each step:

- `script`: the data as most scripts have it, a Dataset whose items are made when they are asked
  for, as torchvision's MNIST does: a PIL image through torchvision's own ToTensor and Normalize.
- `tensors`: a TensorDataset of the finished, normalised tensors, the fastest DataLoader there is.

bmjax holds uint8 on the device, normalises at every step, and reads its losses once per call.
After a warm-up all take turns in one process, and the ratios are taken turn by turn.

    uv run --extra torch python experiments/bench_train.py --turns 30

On two virtual cores of an AMD EPYC, a busy machine, jax 0.10.2, torch 2.15.0, torchvision 0.29.2,
medians of 30 turns:

    bmjax       167,795 images/s (123,602 to 193,550)
    script        7,488 images/s (4,196 to 9,177)
    tensors      52,451 images/s (35,416 to 68,708)
    bmjax / script     22.3 (16.0 to 36.4)
    bmjax / tensors     3.2 (2.2 to 4.7)

Another run, of 20 turns, gave 21.9 (18.8 to 32.0) and 3.0 (2.5 to 4.6).
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
from jax.tree_util import Partial
from PIL import Image
from torchvision import transforms

from bmjax import create_model, load_dataset
from bmjax.compiled import make_train_steps, zero_totals
from bmjax.config import AugmentConfig, OptimConfig
from bmjax.data import Dataset, loader, preprocess
from bmjax.data.sources import all_images
from bmjax.optim import make_optimizer
from bmjax.parallel import Parallel
from bmjax.train import classification_loss, create_state

LEARNING_RATE = 0.02
# One epoch of bmjax is over in milliseconds: a turn takes several, to be timed well.
EPOCHS_PER_TURN = {"bmjax": 20, "script": 1, "tensors": 1}


class Digits(torch.utils.data.Dataset):
    """Items made when they are asked for, the way torchvision's MNIST makes them."""

    def __init__(self, dataset: Dataset):
        self.images = torch.tensor(all_images(dataset.train)[..., 0])
        self.labels = torch.tensor(dataset.train.labels).long()
        statistics_ = preprocess.pixel_statistics(all_images(dataset.train))
        self.transform = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Normalize(statistics_["mean"], statistics_["std"]),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = Image.fromarray(self.images[index].numpy())
        return self.transform(picture), int(self.labels[index])


def bmjax_turn(dataset: Dataset, batch_size: int) -> Callable[[], float]:
    """Returns a function that trains one turn with bmjax and gives the mean loss."""
    model = create_model("mlp", dataset.num_classes)
    statistics_ = preprocess.pixel_statistics(all_images(dataset.train))
    config = OptimConfig(optimizer="sgd", nesterov=False, weight_decay=0.0)
    optimizer = make_optimizer(config, lambda _: LEARNING_RATE)
    state = create_state(model, optimizer, dataset.image_shape, seed=0)
    loss_fn = classification_loss(model, statistics_)
    arrays = {"image": all_images(dataset.train), "label": dataset.train.labels}
    parallel = Parallel("jit", jax.devices()[:1])
    view = loader.make_view(
        AugmentConfig(augment=False), dataset.image_shape[:2], statistics_["mean"]
    )
    steps = make_train_steps(parallel, optimizer, batch_size, view)
    held = {
        "state": parallel.put(state),
        "totals": parallel.put(zero_totals(loss_fn, state, dataset.image_shape)),
        "loss_fn": parallel.put(Partial(loss_fn)),
    }
    on_device = parallel.put(arrays)
    batches = loader.num_batches(len(dataset.train), batch_size)

    def turn() -> float:
        loss, done = 0.0, int(held["state"].step)
        for _ in range(EPOCHS_PER_TURN["bmjax"]):
            done += batches
            held["state"], held["totals"] = steps(
                held["state"], held["totals"], held["loss_fn"], on_device, np.int32(done)
            )
            totals = parallel.get(held["totals"])  # as `fit` reads them
            loss = float(totals["loss"] / totals["count"])
        return loss

    return turn


def pytorch_turn(dataset: Dataset, batch_size: int, name: str) -> Callable[[], float]:
    """Returns a function that trains one turn with PyTorch and gives the mean loss."""
    torch.manual_seed(0)
    items: torch.utils.data.Dataset = Digits(dataset)
    if name == "tensors":
        finished = torch.stack([items[index][0] for index in range(len(dataset.train))])
        items = torch.utils.data.TensorDataset(finished, torch.tensor(dataset.train.labels).long())
    batches = torch.utils.data.DataLoader(items, batch_size=batch_size, shuffle=True)
    model = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(784, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def turn() -> float:
        total = 0.0
        for _ in range(EPOCHS_PER_TURN[name]):
            total = 0.0
            for batch, labels in batches:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(batch), labels)
                loss.backward()
                optimizer.step()
                total += loss.item() * len(labels)
        return total / len(dataset.train)

    return turn


def main() -> None:
    """Lets the two take turns and prints medians and the ratio's spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch-size", type=int, default=64, help="(default: 64)")
    parser.add_argument("--turns", type=int, default=20, help="counted turns (default: 20)")
    arguments = parser.parse_args()
    dataset = load_dataset("mnist5k")
    turns = {
        "bmjax": bmjax_turn(dataset, arguments.batch_size),
        "script": pytorch_turn(dataset, arguments.batch_size, "script"),
        "tensors": pytorch_turn(dataset, arguments.batch_size, "tensors"),
    }
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    losses: dict[str, float] = {}
    for number in range(arguments.turns + 2):
        for name, turn in turns.items():
            begin = time.perf_counter()
            losses[name] = turn()
            seconds = time.perf_counter() - begin
            if number >= 2:  # the first turns compile and warm up
                speeds[name].append(len(dataset.train) * EPOCHS_PER_TURN[name] / seconds)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, jax {jax.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, batch {arguments.batch_size}"
    )
    for name, values in speeds.items():
        print(
            f"{name:8} {statistics.median(values):>10,.0f} images/s (median; "
            f"{min(values):,.0f} to {max(values):,.0f}), last loss {losses[name]:.4f}"
        )
    for name in ("script", "tensors"):
        pairs = zip(speeds["bmjax"], speeds[name], strict=True)
        ratios = [ours / theirs for ours, theirs in pairs]
        print(
            f"bmjax / {name:8} {statistics.median(ratios):>6.1f} (median of {len(ratios)} turns; "
            f"{min(ratios):.1f} to {max(ratios):.1f})"
        )


if __name__ == "__main__":
    main()
