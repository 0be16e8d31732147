"""PyTorch: the same networks, eager or compiled, channels-last or not."""

import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from bmjax.bench.workload import (
    ALPHA,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASSES,
    PIXEL_MEAN,
    PIXEL_STD,
    TEMPERATURE,
    Workload,
    normalized,
)


class _Flat(torch.nn.Module):
    """Flattens with channels innermost, as bmjax does; of channels-last memory that is a view."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.permute(0, 2, 3, 1).flatten(1)


def _mlp(workload: Workload) -> torch.nn.Module:
    nn, inputs = torch.nn, workload.image_size**2 * workload.channels
    return nn.Sequential(
        _Flat(),
        *(nn.Linear(inputs, 128), nn.ReLU()),
        *(nn.Linear(128, 64), nn.ReLU()),
        nn.Linear(64, NUM_CLASSES),
    )


def _cnn(workload: Workload) -> torch.nn.Module:
    nn, side = torch.nn, workload.image_size // 4
    return nn.Sequential(
        *(nn.Conv2d(workload.channels, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        _Flat(),
        nn.Linear(128 * side * side, NUM_CLASSES),
    )


def torch_model(workload: Workload, name: str) -> torch.nn.Module:
    """Returns the network `name` as PyTorch and torchvision have it."""
    own = {"mlp": _mlp, "cnn": _cnn}
    if name in own:
        return own[name](workload)
    return getattr(torchvision.models, name)(num_classes=NUM_CLASSES)


class Torch:
    """A plain PyTorch loop over tensors that lie in memory, `loss.item()` each step."""

    def __init__(
        self, workload: Workload, steps: int, compiled: bool = False, channels_last: bool = True
    ):
        kind = "compiled" if compiled else "eager"
        layout = ", channels-last" if channels_last else ""
        self.name = f"PyTorch {kind}{layout}"
        self._workload, self._steps = workload, steps
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        form = torch.channels_last if channels_last else torch.contiguous_format

        def put(module: torch.nn.Module) -> torch.nn.Module:
            return module.to(self._device).to(memory_format=form)

        rounds = workload.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rounds
        torch.manual_seed(0)
        plain = put(torch_model(workload, workload.model))
        data = workload.data(steps)
        images = torch.from_numpy(normalized(data["image"])).permute(0, 3, 1, 2)
        self._images = images.contiguous(memory_format=form).to(self._device)
        self._labels = torch.from_numpy(data["label"]).long().to(self._device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            plain.eval()(self._images[: workload.batch_size])
        self.flops = counter.get_total_flops() // workload.batch_size
        self._plain = plain
        self._model: Any = torch.compile(plain) if compiled else plain
        self._teacher: Any = None
        if workload.teacher:
            teacher = put(torch_model(workload, workload.teacher)).eval().requires_grad_(False)
            self._teacher = torch.compile(teacher) if compiled else teacher
        self._optimizer = torch.optim.SGD(plain.parameters(), LEARNING_RATE, MOMENTUM)
        self._threads = self._best_threads()

    def _best_threads(self) -> int:
        """Returns as many threads as train fastest: all or one, which is better for tiny models."""
        self._model.train()
        most, seconds = torch.get_num_threads(), {}
        for threads in {most, 1}:
            torch.set_num_threads(threads)
            self._step(0)
            begin = time.perf_counter()
            for _ in range(3):
                self._step(0)
            seconds[threads] = time.perf_counter() - begin
        torch.set_num_threads(most)
        return min(seconds, key=lambda threads: seconds[threads])

    def variables(self) -> list[np.ndarray]:
        """See `Contender`."""
        return [each.detach().cpu().numpy() for each in self._plain.parameters()]

    def _cast(self) -> Any:
        if self._workload.precision == "bfloat16":
            return torch.autocast(self._device.type, torch.bfloat16)
        return nullcontext()

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self._cast():
            logits = self._model(images)
        entropy = functional.cross_entropy(logits.float(), labels)
        if self._teacher is None:
            return entropy
        with torch.no_grad(), self._cast():
            taught = self._teacher(images)
        between = functional.kl_div(
            functional.log_softmax(logits.float() / TEMPERATURE, 1),
            functional.log_softmax(taught.float() / TEMPERATURE, 1),
            reduction="batchmean",
            log_target=True,
        )
        return ALPHA * TEMPERATURE**2 * between + (1 - ALPHA) * entropy

    def train(self) -> float:
        """See `Contender`."""
        torch.set_num_threads(self._threads)
        self._model.train()
        size, value = self._workload.batch_size, 0.0
        for first in range(0, self._steps * size, size):
            value = self._step(first)
        return value

    def _step(self, first: int) -> float:
        part = slice(first, first + self._workload.batch_size)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self._images[part], self._labels[part])
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def infer(self) -> None:
        """See `Contender`."""
        torch.set_num_threads(self._threads)
        self._model.eval()
        with torch.inference_mode(), self._cast():
            self._model(self._images[: self._workload.batch_size])
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def compiled(workload: Workload, steps: int) -> Torch:
    """Returns PyTorch with `torch.compile`, channels-last."""
    return Torch(workload, steps, compiled=True)


def contiguous(workload: Workload, steps: int) -> Torch:
    """Returns eager PyTorch with its usual memory layout."""
    return Torch(workload, steps, channels_last=False)


class _Digits(torch.utils.data.Dataset):
    """Items made when they are asked for, the way torchvision's MNIST makes them."""

    def __init__(self, workload: Workload, steps: int):
        data = workload.data(steps)
        self.images = torch.from_numpy(data["image"][..., 0])
        self.labels = torch.from_numpy(data["label"]).long()
        self.transform = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Normalize([PIXEL_MEAN], [PIXEL_STD]),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = Image.fromarray(self.images[index].numpy())
        return self.transform(picture), int(self.labels[index])


class DataLoaderScript(Torch):
    """The usual script: a shuffling DataLoader, torchvision's per-item transforms."""

    def __init__(self, workload: Workload, steps: int):
        super().__init__(workload, steps, channels_last=False)
        self.name = "PyTorch DataLoader"
        self._loader = torch.utils.data.DataLoader(
            _Digits(workload, steps), batch_size=workload.batch_size, shuffle=True
        )

    def train(self) -> float:
        """See `Contender`."""
        torch.set_num_threads(self._threads)
        self._model.train()
        value = 0.0
        for images, labels in self._loader:
            self._optimizer.zero_grad()
            loss = self._loss(images, labels)
            loss.backward()
            self._optimizer.step()
            value = loss.item()
        return value
