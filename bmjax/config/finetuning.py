"""Settings of fine-tuning."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from bmjax.config.names import check_flat_names, unset
from bmjax.config.training import AugmentConfig, BaseConfig, OptimConfig, TrainConfig


def _finetune_optim() -> OptimConfig:
    return OptimConfig(optimizer="adamw", learning_rate=1e-3, weight_decay=0.05)


def _finetune_views() -> AugmentConfig:
    return AugmentConfig(crop=0.6, flip=0.5, shift=0.0, rotate=0.0, scale=0.0)


@check_flat_names
@dataclass(frozen=True)
class FinetuneConfig(BaseConfig):
    """Fine-tune pretrained weights: a new head of the data's classes, then all of the model.

    Attributes:
        data: Dataset: folder:PATH with a folder of images per class, in train, validation and
            test or not; tfds:NAME, prepared in array_record; npz:PATH; or mnist5k.
        model: Name of the model that the weights are of; a run knows its own, and needs none.
        weights: What to begin with: a torchvision checkpoint (.pth, .pt or .safetensors), Flax
            variables (.msgpack), a run's folder, or imagenet-v1 or imagenet-v2 for torchvision's
            published weights.
        weights_key: Which state dict of a checkpoint with several, such as state_dict_ema; or the
            prefix of the names to read. None given: the plain one, and it is said.
        image_size: Side in pixels of the images that the model takes; none given: that of
            published weights or of a run, or 224.
        epochs: Passes over the training split, at least 1.
        head: How the last layer begins: by a linear probe, the best logistic regression on the
            features of the weights as they are; random; or kept, where the weights have the
            data's classes.
        head_epochs: First epochs in which the head alone learns.
        freeze: What stays as it is: backbone (all but the head), a stage of the model (of ResNets
            stem, stage1, stage2, ...), or regular expressions that match whole paths of params.
            Its normalisations use their running statistics, and it costs no gradient and no memory
            of the optimizer.
        layer_decay: Factor of the learning rate from each stage to the one before it, in (0, 1].
        out: Folder of the run; none given: runs/finetuned-MODEL.
        probe_only: Stop after the linear probe; the run holds the weights with that head.
        find_learning_rate: Train nothing; try growing learning rates, and write the loss by
            learning rate and a plot of it next to --out.
    """

    data: str | None = None
    epochs: int = 12
    label_smoothing: float = 0.1
    model: str | None = None
    weights: str | None = None
    weights_key: str | None = None
    head: Literal["probe", "random", "keep"] = "probe"
    head_epochs: int = 0
    freeze: tuple[str, ...] = ()
    layer_decay: float = 1.0
    probe_only: bool = False
    find_learning_rate: bool = False
    optim: OptimConfig = field(default_factory=_finetune_optim)
    views: AugmentConfig = field(default_factory=_finetune_views)

    def __post_init__(self) -> None:
        """Reads an empty word as not given."""
        super().__post_init__()
        unset(self, model="", weights="", weights_key="")

    def train_config(self) -> TrainConfig:
        """Returns the settings of the training itself; without a model, its name is to be set."""
        common = {item.name: getattr(self, item.name) for item in dataclasses.fields(BaseConfig)}
        out = self.out or "-".join(["runs/finetuned", *filter(None, [self.model])])
        named = {"model": self.model} if self.model else {}
        return TrainConfig(**{**common, **named, "out": out}).resolved()
