"""Settings of the commands that train nothing."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from bmjax.config.names import check_flat_names, unset
from bmjax.config.training import DeviceConfig, Imports, Precision


@check_flat_names
@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a run on a split: loss, accuracy, calibration, errors by class, speed.

    Or two runs on the same images: which is better, whether that is more than chance, and where
    each is right alone.

    Attributes:
        path: Folder of the run.
        other: Folder of another run, which it is compared with.
        data: Dataset to measure on; none given: the run's own.
        image_size: Side in pixels that images are resized to; none given: the run's.
        split: Part of the dataset.
        max_unreadable: Share of all image files of the dataset that may be left out as they cannot
            be decoded, in [0, 1]; unless it is 0, five may always be. Of the run's own data, what
            it was trained with counts where that is more.
        checkpoint: Params of the latest checkpoint, or those with the best validation accuracy.
        batch_size: Images at once, rounded up to what divides over the devices.
        json: Print one JSON object instead of tables.
        imports: A file of Python, or a module, that registers models of your own by
            bmjax.register_model; give the flag once for each.
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    other: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN2")] = None
    data: str | None = None
    image_size: int | None = None
    split: Literal["train", "validation", "test", "all"] = "test"
    max_unreadable: float = 0.01
    checkpoint: Literal["latest", "best"] = "latest"
    batch_size: int = 256
    json: bool = False
    imports: Imports = ()
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __post_init__(self) -> None:
        """Reads 0 and an empty word as not given."""
        unset(self, other="", data="", image_size=0)


@check_flat_names
@dataclass(frozen=True)
class CalibrateConfig:
    """Fit a run's confidence on validation: temperature, sets of classes, what is unfamiliar.

    What is fitted is kept in the run, for predict --calibrated; how it does is measured on test.

    Attributes:
        path: Folder of the run.
        data: Dataset whose validation split it is fitted on; none given: the run's own.
        image_size: Side in pixels that images are resized to; none given: the run's.
        coverage: How often sets of classes are to have the right one, in (0, 1).
        familiar: Share of the validation images that count as familiar, in (0, 1); what is further
            from training than the others is flagged.
        max_unreadable: Share of all image files of the dataset that may be left out as they cannot
            be decoded, in [0, 1]; unless it is 0, five may always be. Of the run's own data, what
            it was trained with counts where that is more.
        checkpoint: Params of the latest checkpoint, or those with the best validation accuracy.
        batch_size: Images at once, rounded up to what divides over the devices.
        json: Print one JSON object instead of tables.
        imports: A file of Python, or a module, that registers models of your own by
            bmjax.register_model; give the flag once for each.
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    data: str | None = None
    image_size: int | None = None
    coverage: float = 0.9
    familiar: float = 0.95
    max_unreadable: float = 0.01
    checkpoint: Literal["latest", "best"] = "latest"
    batch_size: int = 256
    json: bool = False
    imports: Imports = ()
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __post_init__(self) -> None:
        """Reads 0 and an empty word as not given."""
        unset(self, data="", image_size=0)


@dataclass(frozen=True)
class PredictConfig:
    """Classify images with a run.

    A file that is no image is named, the others are classified, and the exit code is 2.

    Attributes:
        path: Folder of the run.
        images: Image files of any format that Pillow reads; folders, for the images in them and
            below; or -, for one image from standard input.
        top: Classes shown per image, the likeliest first (at least 1).
        checkpoint: Params of the latest checkpoint, or those with the best validation accuracy.
        calibrated: Use what bmjax calibrate kept in the run: calibrated probabilities, the set of
            classes that has the right one as often as was asked for, and a flag on images unlike
            those of training.
        sets: How sets are made, with --calibrated: lac gives the smallest ones; aps larger ones
            where the run is unsure; class-conditional ones that cover each class as often.
        json: Print one JSON object per image and line, with the probabilities of all classes.
        csv: Print a table in CSV: file, class, label (its number), probability, and the probability
            of each class.
        imports: A file of Python, or a module, that registers models of your own by
            bmjax.register_model; give the flag once for each.
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    top: int = 3
    checkpoint: Literal["latest", "best"] = "latest"
    calibrated: bool = False
    sets: Literal["lac", "aps", "class-conditional"] = "lac"
    json: bool = False
    csv: bool = False
    imports: Imports = ()


@dataclass(frozen=True)
class ConvertConfig:
    """Convert between torchvision's weights and bmjax's, strictly, and prove it.

    The ending of --out says what is written: .pth, .pt or .safetensors for torchvision's names
    and layouts; .msgpack for Flax variables; none for a run's folder, which evaluate, predict and
    distill take.

    Attributes:
        path: A torchvision checkpoint (.pth, .pt or .safetensors), Flax variables (.msgpack), a
            run's folder, or imagenet-v1 or imagenet-v2 for torchvision's published weights.
        out: What to write; nothing that exists is overwritten.
        model: Name of the model; a run knows its own.
        weights_key: Which state dict of a checkpoint with several, such as state_dict_ema; or the
            prefix of the names to read. None given: the plain one, and it is said.
        certify: Compare with torchvision (which the extra torch brings): outputs, gradients and
            one training step, written to OUT.certificate.txt and .json; nothing else is written
            where it fails.
        images: Folder of photographs for the certificate; none given: digits of mnist5k.
        image_size: Side in pixels of the images that the model takes; none given: the weights'
            own, or 224.
        resize_size: Shorter side in pixels that images are resized to before the middle is cut
            out; none given: the weights' own, or 8/7 of the image size.
        class_names: Names of the classes, in order; none given: ImageNet's where there are 1000,
            numbers otherwise.
        imports: A file of Python, or a module, that registers models of your own by
            bmjax.register_model; give the flag once for each.
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    out: str
    model: str | None = None
    weights_key: str | None = None
    certify: bool = False
    images: str | None = None
    image_size: int | None = None
    resize_size: int | None = None
    class_names: tuple[str, ...] = ()
    imports: Imports = ()

    def __post_init__(self) -> None:
        """Reads 0 and an empty word as not given."""
        unset(self, model="", weights_key="", images="", image_size=0, resize_size=0)


@dataclass(frozen=True)
class DoctorConfig:
    """Say what there is to compute with, and what is missing.

    With it the compiler's flags that the environment or bmjax sets, by whom, and hints on the batch
    sizes, widths and numbers of classes that fill the units of a TPU or GPU.

    Attributes:
        expect: What is to be computed on; where JAX does not, that is a problem. Any: what there
            seems to be.
        json: Print one JSON object instead of a table.
    """

    expect: Literal["any", "cpu", "gpu", "tpu"] = "any"
    json: bool = False


@dataclass(frozen=True)
class BenchConfig:
    """Time training and inference on random images in memory, against what one would use instead.

    Contenders take turns in one process. bmjax, alone or first, is what the others are compared
    with: 2 means that the first was twice as fast.

    Attributes:
        model: Model to train: mlp, cnn, resnet18, resnet34 or resnet50; bmjax alone takes any.
        image_size: Side of the images in pixels.
        batch_size: Images of a step.
        precision: Type that is computed with; params stay float32. Auto: bfloat16 on a TPU, and on
            a GPU that has it, float32 on a CPU.
        teacher: ResNet that teaches the model; none given: plain training.
        contenders: bmjax, linen, torch, torch-nchw, torch-compiled, torch-dataloader or keras; none
            given: the first two, and torch and torch-compiled where PyTorch is installed.
        steps: Batches of a turn.
        turns: Turns that count, after two that compile and warm up.
        compile_for: Run nothing, but compile for TPUs or GPUs that need not be there, such as
            v5e:2x4, h100 or h100:8, and count memory, traffic and collectives; of the contenders,
            bmjax and linen can. Needs pip install "jax[tpu]" or "jax[cuda12]".
        jobs: What is compiled, with --compile-for: training, "random views" (crops and flips),
            "affine views", streamed, "divided data" (8 GB of images), "device statistics",
            distillation, evaluation or prediction; none given: training, and distillation with
            --teacher.
        optimizer: Of bmjax's program, with --compile-for.
        remat: The same: blocks of a ResNet are computed again backward, as in training.
        remat_stages: The same, of some stages alone.
        shard_state: The same: each device keeps a part of the optimizer's state.
        shard_params: The same: params are divided over groups of so many devices.
        json: Print one JSON object instead of a table.
        imports: A file of Python, or a module, that registers models of your own by
            bmjax.register_model; give the flag once for each.
    """

    model: str = "resnet18"
    image_size: int = 64
    batch_size: int = 64
    precision: Precision = "auto"
    teacher: str | None = None
    contenders: tuple[str, ...] = ()
    steps: int = 2
    turns: int = 10
    compile_for: str | None = None
    jobs: tuple[str, ...] = ()
    optimizer: Literal["sgd", "adam", "adamw", "lion"] = "sgd"
    remat: bool = False
    remat_stages: tuple[int, ...] = ()
    shard_state: bool = False
    shard_params: int = 1
    json: bool = False
    imports: Imports = ()


@dataclass(frozen=True)
class VerifyResumeConfig:
    """Kill and resume a training, and prove that it ends bit for bit as if it was never stopped.

    What is trained comes after --, without --out: -- train --model cnn, or finetune or distill with
    their flags; none given: train --model mlp --epochs 20. It is done once whole, then once for
    each kill; params, optimizer's state, running average, key, metrics and results must be equal.

    Attributes:
        kills: Runs that are killed and resumed (at least 1).
        kills_per_run: Times that each of them is killed before it may end (at least 1).
        at: Moments, in turn: start, of Python; compile, of the first step, with nothing compiled
            before; epoch, anywhere in the training; save and clean-up, of a checkpoint; end, after
            the last checkpoint. Each comes with SIGKILL and with SIGTERM.
        seed: Of what is random about the moments.
        out: Folder for the runs; those that are equal are removed.
        json: Print one JSON object instead of lines.
        imports: As of the command that is verified, which it is handed on to.
    """

    kills: int = 20
    kills_per_run: int = 1
    at: tuple[Literal["start", "compile", "epoch", "save", "clean-up", "end"], ...] = (
        "start",
        "compile",
        "epoch",
        "save",
        "clean-up",
        "end",
    )
    seed: int = 0
    out: str = "runs/verify-resume"
    json: bool = False
    imports: Imports = ()
    command: Annotated[tuple[str, ...], tyro.conf.Suppress] = (
        "train",
        "--model",
        "mlp",
        "--epochs",
        "20",
    )
