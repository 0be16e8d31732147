"""Settings of training: what all commands that train have in common, and `train` itself."""

import dataclasses
import shlex
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from bmjax.config.names import check_flat_names, unset
from bmjax.config.paths import with_user_paths

# Fields that say which of several processes this one is, and how they find each other.
PROCESSES = ("coordinator", "num_processes", "process_id")


# What the devices compute best in, decided once they are known.
AUTO = "auto"
# How exactly it is computed, see `machine.precision`.
Precision = Literal["auto", "float32", "tf32", "bfloat16"]

# A flag that is given once for each.
Imports = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(name="import", metavar="FILE"),
]


@dataclass(frozen=True)
class OptimConfig:
    """How the params are updated.

    Attributes:
        optimizer: The update rule.
        learning_rate: Peak learning rate, reached after the warm-up (positive).
        schedule: How the learning rate goes on after the warm-up: stays, or falls to 0 along a
            cosine; one-cycle rises from 1/25 of the peak and falls to 1/250,000 of it.
        warmup_epochs: Epochs over which the learning rate rises to its peak, linearly
            (one-cycle: along a cosine); at most half the run.
        momentum: Momentum of sgd, in [0, 1).
        nesterov: Nesterov's form of sgd's momentum instead of the classical one.
        weight_decay: Pull of the kernels towards 0; biases and normalisation are left alone.
            adamw and lion: decoupled, times the learning rate; sgd and adam: added to the
            gradient.
        clip_norm: Largest global L2 norm of the gradient, larger ones are scaled down; none given:
            any.
    """

    optimizer: Literal["sgd", "adam", "adamw", "lion"] = "adamw"
    learning_rate: float = 3e-3
    schedule: Literal["constant", "cosine", "one-cycle"] = "cosine"
    warmup_epochs: float = 1.0
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-2
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        """Reads 0 as no limit."""
        unset(self, clip_norm=0)


@dataclass(frozen=True)
class AugmentConfig:
    """Random views of the training images; each amount is drawn per image, uniformly if not said.

    Attributes:
        crop: Least share of the image's area that a random resized crop takes, in (0, 1], with
            sides in a ratio of 3/4 to 4/3; 1 resizes nothing.
        flip: Probability of a flip left to right.
        shift: Largest shift as a share of the image's side, each way.
        rotate: Largest rotation in degrees, each way.
        scale: Largest change of size: 0.12 gives factors from 0.88 to 1.12.
        policy: Further changes of shape and colour: TrivialAugment, one of 14 at a random
            strength; RandAugment, two of 14 at strength 9 of 30.
        erase: Probability that a random rectangle is erased.
        mixup: Alpha of mixup's Beta distribution; 0 turns it off. With cutmix on too, each batch
            takes one of the two.
        cutmix: Alpha of CutMix's Beta distribution; 0 turns it off.
        augment: Train on random views, not on the images as they are.
        view_passes: Epochs after which order and views repeat; none given: every epoch has new
            ones.
    """

    crop: float = 1.0
    flip: float = 0.0
    shift: float = 0.1
    rotate: float = 12.0
    scale: float = 0.12
    policy: Literal["none", "trivial", "rand"] = "none"
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: bool = True
    view_passes: int | None = None

    def __post_init__(self) -> None:
        """Reads 0 as never."""
        unset(self, view_passes=0)

    @property
    def affine(self) -> bool:
        """Whether images are shifted, rotated or scaled."""
        return bool(self.shift or self.rotate or self.scale)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others of their batch."""
        return self.augment and bool(self.mixup or self.cutmix)


@dataclass(frozen=True)
class DeviceConfig:
    """Where it runs.

    Attributes:
        parallel: How several devices share a batch; both give the same numbers.
        devices: Number of devices of each process; none given: all. More than a CPU has become
            virtual ones.
        memory_gib: Most GiB that decoded images may take; a larger folder is read again and again
            while training, to the same result.
        shard_state: Each device keeps and moves a part of the optimizer's state and of averaged
            params, instead of all of it, for large models; with --parallel jit.
        shard_params: Divide the params, too, over groups of so many devices, which gather a layer's
            for its use, for models larger than a device; with --parallel jit. 1: each has all.
        coordinator: For several processes that train one run, each started with the same flags:
            HOST:PORT of the first; or auto, as JAX finds them on a TPU pod slice, in SLURM, Open
            MPI or Kubernetes.
        num_processes: Number of processes; none given: as JAX finds it.
        process_id: Number of this process, from 0; the one of number 0 reads and writes the run's
            folder. None given: as JAX finds it.
    """

    parallel: Literal["jit", "pmap"] = "jit"
    devices: int | None = None
    memory_gib: float = 4.0
    shard_state: bool = False
    shard_params: int = 1
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        """Reads 0, an empty word and -1 as not given."""
        unset(self, devices=0, coordinator="", num_processes=0, process_id=-1)


@dataclass(frozen=True)
class RunConfig:
    """The folder of the run, and how often it is saved.

    Attributes:
        resume: Go on with the run in --out; its settings are taken from there. Other --epochs,
            --learning-rate, --schedule, --warmup-epochs and --clip-norm may be given: from there
            on the schedule begins anew for the epochs that are left.
        save_minutes: Most minutes of work that a killed machine can cost; a checkpoint is also
            saved at each tenth of the epochs.
        keep: Number of newest checkpoints kept while it trains (at least 1); each also holds the
            best params. A finished run keeps the last one.
        tensorboard: Write event files for TensorBoard.
        profile: Trace some of the first steps into the folder profile of the run, to be read by
            TensorBoard's profiler, or by Perfetto (perfetto_trace.json.gz).
    """

    resume: bool = False
    save_minutes: float = 1.0
    keep: int = 3
    tensorboard: bool = True
    profile: bool = False


@dataclass(frozen=True)
class BaseConfig:
    """What training and distillation have in common.

    Attributes:
        data: Dataset: mnist5k; folder:PATH with a folder of images per class, in train,
            validation and test or not; tfds:NAME, prepared in array_record; or npz:PATH with
            arrays image and label (or train_image, ...).
        image_size: Side in pixels of the images that the model takes; none given: the dataset's
            own, or 224 where images have different sizes.
        split_seed: Seed by which a validation split is cut from train, where there is none.
        max_unreadable: Share of all image files of the dataset that may be left out as they cannot
            be decoded, in [0, 1]; unless it is 0, five may always be. They are named.
        hidden_sizes: Widths of the hidden layers where the model is mlp; none given: 128 64.
        norm: Normalisation of a ResNet: batch; frozen, by the running statistics in training
            too; or group, which sees one example at a time.
        epochs: Passes over the training split; none given: the model's default, 100 for mlp, 20
            for the others.
        batch_size: Examples per update, over all devices together.
        accumulate: Parts that a batch is split into, one after the other, to save memory; the
            gradient is that of the whole batch, but batch normalisation, and losses that compare
            examples with each other, see one part at a time.
        batch_statistics: Whose examples batch normalisation takes mean and variance of: global, the
            whole batch's, on any number of devices the same; or device, those of each device's own
            part, as PyTorch's DistributedDataParallel does, which exchanges nothing forward.
        remat: Compute each block of a ResNet again backward, instead of keeping what is inside, to
            save memory on GPU and TPU; XLA undoes it on CPU.
        remat_stages: Stages of a ResNet, counted from 1, whose blocks are computed again, instead
            of all: the first have the largest images; none given: as --remat says.
        label_smoothing: Share of the target spread evenly over the classes, in [0, 1).
        class_weights: Weights of the classes in the loss; balanced: in inverse proportion to how
            many training examples they have.
        patience: Epochs without a better validation accuracy after which training ends, and the
            params of the best epoch are reported; none given: it goes on to the last epoch.
        precision: Precision of the computation; params, statistics and losses are float32
            always. Auto: bfloat16 on a TPU, and on a GPU that has it (NVIDIA: from Ampere on),
            float32 on a CPU, and for a model without an attribute dtype; the run keeps which.
            Products of float32 are those of float32 on GPU and TPU too. With tf32, faster there,
            a GPU rounds the factors to 10 bits, a TPU makes each product of three in bfloat16,
            and a CPU computes as in float32.
        ema_decay: Decay of the running average of params and running statistics that is
            evaluated instead; none at 0.
        seed: Seed of the initial params, the order of the data and the views.
        out: Folder of the run; none given: runs/MODEL, or runs/distill for distillation.
        imports: A file of Python, or a module, that registers models of your own by
            bmjax.register_model; give the flag once for each. It is given anew to every command,
            --resume too: a run never says what is imported.
    """

    data: str | None = "mnist5k"
    image_size: int | None = None
    split_seed: int = 0
    max_unreadable: float = 0.01
    hidden_sizes: tuple[int, ...] = ()
    norm: Literal["batch", "frozen", "group"] = "batch"
    epochs: int | None = None
    batch_size: int = 64
    accumulate: int = 1
    batch_statistics: Literal["global", "device"] = "global"
    remat: bool = False
    remat_stages: tuple[int, ...] = ()
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    patience: int | None = None
    precision: Precision = "auto"
    ema_decay: float = 0.0
    seed: int = 0
    out: str | None = None
    imports: Imports = ()
    optim: OptimConfig = field(default_factory=OptimConfig)
    views: AugmentConfig = field(default_factory=AugmentConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Reads 0 and an empty word as not given."""
        unset(self, data="", image_size=0, epochs=0, patience=0, out="")

    @property
    def import_flags(self) -> str:
        """What a command that goes on needs for the user's own models, with a space before it."""
        return "".join(f" --import {shlex.quote(name)}" for name in self.imports)

    @property
    def data_name(self) -> str:
        """The dataset's name, of settings that name one."""
        if self.data is None:
            raise ValueError("the settings name no data.")
        return self.data

    @property
    def num_epochs(self) -> int:
        """Passes over the training split, of settings that are resolved."""
        if self.epochs is None:
            raise ValueError("the settings are not resolved: epochs is not given.")
        return self.epochs

    @property
    def folder(self) -> str:
        """Where the run goes, of settings that are resolved."""
        if self.out is None:
            raise ValueError("the settings are not resolved: out is not given.")
        return self.out


@check_flat_names
@dataclass(frozen=True)
class TrainConfig(BaseConfig):
    """Train a model from scratch.

    Attributes:
        model: Name of the model: mlp, cnn, cnn_tiny, resnet18, resnet34, resnet50, resnet101,
            resnet152, resnext50_32x4d, resnext101_32x8d, resnext101_64x4d, wide_resnet50_2,
            wide_resnet101_2 or resnet_tiny; or for images of about 32 pixels resnet8, 14, 20, 32,
            44, 56 and 110, and each of them four times as wide, such as resnet8x4; or one of
            your own, see --import.
    """

    model: str = "mlp"

    def resolved(self) -> "TrainConfig":
        """Returns the config with the folder filled in.

        How many epochs the model takes by default its architecture says, which no config knows of:
        see `bmjax.models.build.resolve`.
        """
        return dataclasses.replace(self, out=with_user_paths(self).out or f"runs/{self.model}")
