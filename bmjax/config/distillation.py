"""Settings of distillation."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from bmjax.config.names import check_flat_names, unset
from bmjax.config.training import BaseConfig, TrainConfig

# In place of a teacher: the running average of the student's own params.
EMA_TEACHER = "ema"


@check_flat_names
@dataclass(frozen=True)
class DistillConfig(BaseConfig):
    """Distil a teacher into a student; with no teacher given, do the whole tour.

    The tour trains a teacher first, then the student alone as well as with the teacher: the
    same views, for the same number of steps, to compare them.

    Attributes:
        epochs: Passes of the student over the training split.
        teacher: A run's folder, or a torchvision checkpoint (.pth, .pt or .safetensors); several
            of them are an ensemble; ema is the running average of the student's own params. None
            given: train one first.
        teacher_weights: Weights of the teachers' logits in their mean; none given: the same.
        teacher_model: Model of a teacher that is a file, or that is trained where no --teacher is
            given. A teacher that takes images of another size than --image-size sees the student's
            views resized, and is measured at its own.
        weights_key: Which state dict of a teacher that is a checkpoint with several, such as
            state_dict_ema; or the prefix of the names to read. None given: the plain one, and it
            is said.
        teacher_epochs: Epochs of the teacher that is trained (at least 1).
        student: Name of the student's model, as of `bmjax train --model`.
        student_weights: What the student begins with: a run's folder, a torchvision checkpoint
            (.pth, .pt or .safetensors), Flax variables (.msgpack), or imagenet-v1 or imagenet-v2
            for torchvision's published weights. Its head is kept where the classes are the same.
            None given: random params.
        generations: How often the student is distilled; from the second time on from itself as
            the time before made it (born-again networks).
        method: Loss between the logits of both: kd, the divergence of softened predictions
            (Hinton); dkd, the same decoupled; dist, by correlations; mse or cosine of the logits.
        temperature: Temperature T of both softmaxes (positive); mse and cosine have none.
        alpha: Weight of the loss between logits, in [0, 1]; the cross entropy has 1 - alpha.
        decoupled_alpha: Weight in dkd of the part about the label (at least 0).
        decoupled_beta: Weight in dkd of the part about the other classes (at least 0).
        features: Loss between features, added to that of the logits: hint (FitNets), attention
            (attention transfer), similarity (similarity-preserving), relational (RKD, distances
            and angles), contrastive (CRD, negatives from the batch).
        feature_weight: Weight of the loss between features; none given: the usual one, hint 100,
            attention 1000, similarity 3000, relational 1, contrastive 0.8.
        layers: Layers whose features are compared, as STUDENT=TEACHER, such as stage2=stage3;
            none given: stages, counted from the last one, or pre_logits.
        teacher_cache: Folder that keeps the teacher's logits on all views, to ask it only once;
            it is made if it is not there. With --view-passes they are few. None given: it is
            asked at every step.
        cache_top: Logits of each view that the cache keeps, the largest, in float16; none given:
            all of them, in float32.
        explain_loss: Train nothing; show what each part of the loss contributes on the first
            batch, and what the settings are called elsewhere.
    """

    epochs: int = 80
    teacher: tuple[str, ...] = ()
    teacher_weights: tuple[float, ...] = ()
    teacher_model: str = "cnn"
    weights_key: str | None = None
    teacher_epochs: int = 10
    student: str = "mlp"
    student_weights: str | None = None
    generations: int = 1
    method: Literal["kd", "dkd", "dist", "mse", "cosine"] = "kd"
    temperature: float = 4.0
    alpha: float = 0.9
    decoupled_alpha: float = 1.0
    decoupled_beta: float = 8.0
    features: Literal["none", "hint", "attention", "similarity", "relational", "contrastive"] = (
        "none"
    )
    feature_weight: float | None = None
    layers: tuple[str, ...] = ()
    teacher_cache: str | None = None
    cache_top: int | None = None
    explain_loss: bool = False

    def __post_init__(self) -> None:
        """Reads 0 and an empty word as not given."""
        super().__post_init__()
        unset(self, weights_key="", feature_weight=0, student_weights="")
        unset(self, teacher_cache="", cache_top=0)

    @property
    def follows_student(self) -> bool:
        """Whether the teacher is the running average of the student's own params."""
        return self.teacher == (EMA_TEACHER,)

    def loss_settings(self) -> dict[str, Any]:
        """Returns the settings that the loss depends on, as JSON keeps them."""
        names = (
            *("teacher_weights", "method", "temperature", "alpha", "decoupled_alpha"),
            *("decoupled_beta", "features", "feature_weight", "layers", "cache_top"),
        )
        values = {name: getattr(self, name) for name in names}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def train_config(self, model: str, out: str, **changes: Any) -> TrainConfig:
        """Returns the settings to train `model` with, those in common being this config's."""
        common = {item.name: getattr(self, item.name) for item in dataclasses.fields(BaseConfig)}
        return TrainConfig(**{**common, "model": model, "out": out, **changes}).resolved()
