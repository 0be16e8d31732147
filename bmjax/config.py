"""What can be set, and its defaults: frozen dataclasses that the command line is made from.

Nothing here imports JAX, so that help texts and wrong flags are answered at once. The
attributes' descriptions are the help texts of the flags.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

DEFAULT_EPOCHS = {"mlp": 100}


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
        clip_norm: Largest global L2 norm of the gradient, larger ones are scaled down; 0 turns
            it off.
    """

    optimizer: Literal["sgd", "adam", "adamw", "lion"] = "adamw"
    learning_rate: float = 3e-3
    schedule: Literal["constant", "cosine", "one-cycle"] = "cosine"
    warmup_epochs: float = 1.0
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-2
    clip_norm: float = 0.0


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
        devices: Number of devices; 0 takes all. More than a CPU has become virtual ones.
        memory_gib: Most GiB that decoded images may take; a larger folder is read again and again
            while training, to the same result.
    """

    parallel: Literal["jit", "pmap"] = "jit"
    devices: int = 0
    memory_gib: float = 4.0


@dataclass(frozen=True)
class RunConfig:
    """The folder of the run, and how often it is saved.

    Attributes:
        resume: Go on with the run in --out; its settings are taken from there.
        save_minutes: Most minutes of work that a killed machine can cost; a checkpoint is also
            saved at each tenth of the epochs.
        keep: Number of newest checkpoints kept (at least 1); each also holds the best params.
        tensorboard: Write event files for TensorBoard.
    """

    resume: bool = False
    save_minutes: float = 1.0
    keep: int = 3
    tensorboard: bool = True


@dataclass(frozen=True)
class BaseConfig:
    """What training and distillation have in common.

    Attributes:
        data: Dataset: mnist5k; folder:PATH with a folder of images per class, in train,
            validation and test or not; tfds:NAME, prepared in array_record; or npz:PATH with
            arrays image and label (or train_image, ...).
        image_size: Side in pixels of the images that the model takes; 0 keeps the dataset's own,
            or takes 224 where images have different sizes.
        split_seed: Seed by which a validation split is cut from train, where there is none.
        hidden_sizes: Widths of the hidden layers where the model is mlp; none given: 128 64.
        norm: Normalisation of a ResNet: batch; frozen, by the running statistics in training
            too; or group, which sees one example at a time.
        epochs: Passes over the training split; 0 takes the model's default: 100 for mlp, 20 for
            the others.
        batch_size: Examples per update, over all devices together.
        accumulate: Parts that a batch is split into, one after the other, to save memory; the
            update is that of the whole batch.
        label_smoothing: Share of the target spread evenly over the classes, in [0, 1).
        class_weights: Weights of the classes in the loss; balanced: in inverse proportion to how
            many training examples they have.
        patience: Epochs without a better validation accuracy after which training ends, and the
            params of the best epoch are reported; 0: never.
        precision: Precision of the computation; params, statistics and losses are float32
            always.
        ema_decay: Decay of the running average of the params that is evaluated instead;
            none at 0.
        seed: Seed of the initial params, the order of the data and the views.
        out: Folder of the run; none given: runs/MODEL, or runs/distill for distillation.
    """

    data: str = "mnist5k"
    image_size: int = 0
    split_seed: int = 0
    hidden_sizes: tuple[int, ...] = ()
    norm: Literal["batch", "frozen", "group"] = "batch"
    epochs: int = 0
    batch_size: int = 64
    accumulate: int = 1
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    patience: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    ema_decay: float = 0.0
    seed: int = 0
    out: str = ""
    optim: OptimConfig = field(default_factory=OptimConfig)
    views: AugmentConfig = field(default_factory=AugmentConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class TrainConfig(BaseConfig):
    """Train a model from scratch.

    Attributes:
        model: Name of the model: mlp, cnn, cnn_tiny, resnet18, resnet34, resnet50, resnet101,
            resnet152, resnext50_32x4d, resnext101_32x8d, resnext101_64x4d, wide_resnet50_2,
            wide_resnet101_2 or resnet_tiny; or for images of about 32 pixels resnet8, 14, 20, 32,
            44, 56 and 110, and each of them four times as wide, such as resnet8x4.
    """

    model: str = "mlp"

    def resolved(self) -> "TrainConfig":
        """Returns the config with the defaults that depend on the model filled in."""
        return dataclasses.replace(
            self,
            epochs=self.epochs or DEFAULT_EPOCHS.get(self.model, 20),
            out=self.out or f"runs/{self.model}",
        )


def _finetune_optim() -> OptimConfig:
    return OptimConfig(optimizer="adamw", learning_rate=1e-3, weight_decay=0.05)


def _finetune_views() -> AugmentConfig:
    return AugmentConfig(crop=0.6, flip=0.5, shift=0.0, rotate=0.0, scale=0.0)


@dataclass(frozen=True)
class FinetuneConfig(BaseConfig):
    """Fine-tune pretrained weights: a new head of the data's classes, then all of the model.

    Attributes:
        data: Dataset: folder:PATH with a folder of images per class, in train, validation and
            test or not; tfds:NAME, prepared in array_record; npz:PATH; or mnist5k.
        model: Name of the ResNet that the weights are of; a run knows its own, and needs none.
        weights: What to begin with: a torchvision checkpoint (.pth, .pt or .safetensors), Flax
            variables (.msgpack), a run's folder, or imagenet-v1 or imagenet-v2 for torchvision's
            published weights.
        image_size: Side in pixels of the images that the model takes; 0 takes that of published
            weights or of a run, or 224.
        epochs: Passes over the training split, at least 1.
        head: How the last layer begins: by a linear probe, the best logistic regression on the
            features of the weights as they are; random; or kept, where the weights have the
            data's classes.
        head_epochs: First epochs in which the head alone learns.
        freeze: What stays as it is: backbone (all but the head), stem, stage1, stage2, ..., or
            regular expressions that match whole paths of params. Its normalisations use their
            running statistics, and it costs no gradient and no memory of the optimizer.
        layer_decay: Factor of the learning rate from each stage to the one before it, in (0, 1].
        out: Folder of the run; none given: runs/finetuned-MODEL.
        probe_only: Stop after the linear probe; the run holds the weights with that head.
        find_learning_rate: Train nothing; try growing learning rates, and write the loss by
            learning rate and a plot of it next to --out.
    """

    data: str = ""
    epochs: int = 12
    label_smoothing: float = 0.1
    model: str = ""
    weights: str = ""
    head: Literal["probe", "random", "keep"] = "probe"
    head_epochs: int = 0
    freeze: tuple[str, ...] = ()
    layer_decay: float = 1.0
    probe_only: bool = False
    find_learning_rate: bool = False
    optim: OptimConfig = field(default_factory=_finetune_optim)
    views: AugmentConfig = field(default_factory=_finetune_views)

    def train_config(self) -> TrainConfig:
        """Returns the settings of the training itself."""
        common = {item.name: getattr(self, item.name) for item in dataclasses.fields(BaseConfig)}
        out = self.out or "-".join(["runs/finetuned", *filter(None, [self.model])])
        return dataclasses.replace(TrainConfig(**common, model=self.model), out=out).resolved()


@dataclass(frozen=True)
class DistillConfig(BaseConfig):
    """Distil a teacher into a student; with no teacher given, do the whole tour.

    The tour trains a teacher first, then the student alone as well as with the teacher: the
    same views, for the same number of steps, to compare them.

    Attributes:
        epochs: Passes of the student over the training split; 0 takes the model's default.
        teacher: Folder of the teacher's run; none given: train one first.
        teacher_model: Model that is trained as the teacher where no --teacher is given.
        teacher_epochs: Epochs of that teacher (at least 1).
        student: Name of the student's model, as of `bmjax train --model`.
        temperature: Temperature T of both softmaxes (positive).
        alpha: Weight of the distillation loss, in [0, 1]; the cross entropy has 1 - alpha.
    """

    epochs: int = 80
    teacher: str = ""
    teacher_model: str = "cnn"
    teacher_epochs: int = 10
    student: str = "mlp"
    temperature: float = 4.0
    alpha: float = 0.9

    def train_config(self, model: str, out: str, **changes: Any) -> TrainConfig:
        """Returns the settings to train `model` with, those in common being this config's."""
        common = {item.name: getattr(self, item.name) for item in dataclasses.fields(BaseConfig)}
        return TrainConfig(**{**common, "model": model, "out": out, **changes}).resolved()


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a run on a split: loss, accuracy, calibration, errors by class, speed.

    Attributes:
        path: Folder of the run.
        data: Dataset to measure on; none given: the run's own.
        image_size: Side in pixels that images are resized to; 0 takes the run's.
        split: Part of the dataset.
        checkpoint: Params of the latest checkpoint, or those with the best validation accuracy.
        batch_size: Images at once, rounded up to what divides over the devices.
        json: Print one JSON object instead of tables.
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    data: str = ""
    image_size: int = 0
    split: Literal["train", "validation", "test", "all"] = "test"
    checkpoint: Literal["latest", "best"] = "latest"
    batch_size: int = 256
    json: bool = False
    device: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass(frozen=True)
class PredictConfig:
    """Classify image files with a run.

    Attributes:
        path: Folder of the run.
        images: Image files of any format that Pillow reads.
        top: Classes shown per image, the likeliest first (at least 1).
        checkpoint: Params of the latest checkpoint, or those with the best validation accuracy.
        json: Print one JSON object per image, with the probabilities of all classes.
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    top: int = 3
    checkpoint: Literal["latest", "best"] = "latest"
    json: bool = False


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
        model: Name of the ResNet; a run knows its own.
        certify: Compare with torchvision (which the extra torch brings): outputs, gradients and
            one training step, written to OUT.certificate.txt and .json; nothing else is written
            where it fails.
        images: Folder of photographs for the certificate; none given: digits of mnist5k.
        image_size: Side in pixels of the images that the model takes; 0 takes the weights' own,
            or 224.
        resize_size: Shorter side in pixels that images are resized to before the middle is cut
            out; 0 takes the weights' own, or 8/7 of the image size.
        class_names: Names of the classes, in order; none given: ImageNet's where there are 1000,
            numbers otherwise.
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    out: str
    model: str = ""
    certify: bool = False
    images: str = ""
    image_size: int = 0
    resize_size: int = 0
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class DoctorConfig:
    """Say what there is to compute with, and what is missing.

    Attributes:
        json: Print one JSON object instead of a table.
    """

    json: bool = False
