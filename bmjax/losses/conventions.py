"""How distillation's weights are called elsewhere, and what they are worth here.

Every convention's loss is `label_weight * CE + divergence_weight * KL`: CE is the cross entropy
with the label, KL is `KL(softmax(teacher / T) || softmax(student / T))` summed over the classes
(without T^2), both averaged over the batch. Two losses in the same ratio of these weights are
proportional: the same minimum, and gradients that differ by one positive factor only. That factor
is left to the learning rate. Label smoothing, mixing of images and a head of its own for the
teacher (DeiT) are not part of a convention.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bmjax import errors


@dataclass(frozen=True)
class Convention:
    """How one program or paper writes the loss.

    Attributes:
        name: what it is called here.
        formula: the loss, in its own names; KL is summed over the classes, of which there are K.
        shares: from the settings, named and with the defaults as there, to the weights of the
            label and of the distillation, without T^2 and K. The first setting is the mixing
            weight that `convert_weight` takes and gives.
        typed: the settings as one types or writes them there.
        defaults: their defaults there.
        source: where that stands.
        on_label: whether the mixing weight multiplies the label's loss; else the distillation's.
        squared_temperature: whether T^2 is inside.
        reduction: of the KL over the classes; over the batch it is the mean everywhere.
        plain_alone: whether a label's weight of 0 leaves the KL alone: no weight, no T^2.
    """

    name: str
    formula: str
    shares: Callable[..., tuple[float, float]]
    typed: str
    defaults: str
    source: str
    on_label: bool = True
    squared_temperature: bool = True
    reduction: Literal["sum", "mean"] = "sum"
    plain_alone: bool = False

    @property
    def settings(self) -> dict[str, inspect.Parameter]:
        """The settings by name, the mixing weight first."""
        return dict(inspect.signature(self.shares).parameters)


def _timm(
    task_loss_weight: float | None = None, distill_loss_weight: float | None = None
) -> tuple[float, float]:
    if distill_loss_weight is not None:
        return 1.0 if task_loss_weight is None else task_loss_weight, distill_loss_weight
    return (1.0, 1.0) if task_loss_weight is None else (task_loss_weight, 1 - task_loss_weight)


_TABLE = (
    Convention(
        name="bmjax",
        formula="(1 - alpha) CE + alpha T^2 KL",
        shares=lambda alpha=0.9: (1 - alpha, alpha),
        typed="--alpha {divergence} --temperature {temperature}",
        defaults="--alpha 0.9 --temperature 4",
        source="bmjax/distill/tour.py",
        on_label=False,
    ),
    Convention(
        # The soft loss there is a cross entropy: KL plus a constant. Whether the "relative weight
        # of 0.5" of the labels (section 4.1) is a half or a third of both is open.
        name="hinton",
        formula="label_weight CE + (1 - label_weight) T^2 KL",
        shares=lambda label_weight: (label_weight, 1 - label_weight),
        typed="weight {label} on the labels, {divergence} on the soft targets, T = {temperature}",
        defaults="none; the labels' weight considerably lower than the other",
        source="Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 2",
    ),
    Convention(
        # beta weighs a third loss, which --distill kd does not have; yet it must be given.
        name="repdistiller",
        formula="gamma CE + alpha T^2 KL",
        shares=lambda alpha, gamma=1.0, beta=0.0: (gamma, alpha),
        typed="-r {label} -a {divergence} -b 0 --kd_T {temperature}",
        defaults="-r 1 --kd_T 4; -a and -b have none",
        source="RepDistiller at 7fd6eff: train_student.py, helper/loops.py, distiller_zoo/KD.py",
        on_label=False,
    ),
    Convention(
        name="torchdistill",
        formula="alpha CE + beta T^2 KL",
        shares=lambda alpha, beta=None: (alpha, 1 - alpha if beta is None else beta),
        typed="KDLoss(temperature: {temperature}, alpha: {label}, beta: {divergence})",
        defaults="beta: 1 - alpha, reduction: batchmean; temperature and alpha have none",
        source="torchdistill 1.1.5: torchdistill/losses/mid_level.py",
        plain_alone=True,
    ),
    Convention(
        name="timm",
        formula="task_loss_weight CE + distill_loss_weight T^2 KL",
        shares=_timm,
        typed="--task-loss-weight {label} --distill-loss-weight {divergence} "
        "--kd-temperature {temperature}",
        defaults="--kd-temperature 4; of the weights: both 1; distill's alone given: the task's 1; "
        "the task's alone given: distill's is 1 - task's",
        source="timm 1.0.23 to 1.0.31: timm/task/distillation.py; train.py at c89927a",
    ),
    Convention(
        # Its KL clips probabilities below 1e-7, which is left out here.
        name="keras",
        formula="student_loss_weight CE + (1 - student_loss_weight) T^2 KL",
        shares=lambda student_loss_weight=0.5: (student_loss_weight, 1 - student_loss_weight),
        typed="Distiller(student_loss_weight={label}, "
        "distillation_losses=LogitsDistillation(temperature={temperature}))",
        defaults="student_loss_weight=0.5, temperature=3.0",
        source="Keras 3.12.0 to 3.15.1: keras/src/distillation",
    ),
    Convention(
        # After issue 869 of keras-io (May 2022) the example got T^2: the loss of keras, with alpha.
        name="keras-2020",
        formula="alpha CE + (1 - alpha) KL",
        shares=lambda alpha=0.1: (alpha, 1 - alpha),
        typed="Distiller.compile(alpha={label}, temperature={temperature})",
        defaults="alpha=0.1, temperature=3",
        source="keras-io at 1da2fde: examples/vision/knowledge_distillation.py",
        squared_temperature=False,
    ),
    Convention(
        # The mean over all elements is PyTorch's kl_div with reduction="mean".
        name="deit",
        formula="(1 - distillation_alpha) CE + distillation_alpha T^2 KL / K",
        shares=lambda distillation_alpha=0.5: (1 - distillation_alpha, distillation_alpha),
        typed="--distillation-type soft --distillation-alpha {divergence} "
        "--distillation-tau {temperature}",
        defaults="--distillation-alpha 0.5 --distillation-tau 1",
        source="DeiT: losses.py at ae4dba9, main.py at 100e3cd",
        on_label=False,
        reduction="mean",
    ),
)
CONVENTIONS = {convention.name: convention for convention in _TABLE}


def as_weights(
    convention: str, temperature: float, num_classes: int | None = None, **settings: float
) -> tuple[float, float]:
    """Returns what a convention's settings put in front of CE and of KL.

    `shares * (1, factor)`, with `factor = T^2` where T^2 is inside and `1 / num_classes` where the
    KL is averaged over the classes, too; see the top of this module for CE and KL.

    Args:
        convention: one of CONVENTIONS.
        temperature: T, positive.
        num_classes: at least 2; needed where the KL is averaged over the classes.
        **settings: as they are called there, such as `alpha=0.9`; those left out have the default
            there. A single mixing weight is in [0, 1], one of several is at least 0.

    Returns:
        The weights of the cross entropy and of the plain KL: at least 0, not both 0.

    Raises:
        UserError: an unknown convention or setting.
        ValueError: a setting that is missing, or a number outside its range.
    """
    known = _look_up(convention)
    for name, value in settings.items():
        if name not in known.settings:
            raise errors.unknown_name(f"setting of {convention}", name, known.settings)
        if len(known.settings) == 1:
            _check_share(name, value)
    for name, parameter in known.settings.items():
        if parameter.default is parameter.empty and name not in settings:
            raise ValueError(f"{convention} has no default for {name}: it must be given.")
    label, divergence = known.shares(**settings)
    if not (label >= 0 and divergence >= 0 and 0 < label + divergence < math.inf):
        raise ValueError(
            f"{convention}: the weights of the label and of the distillation are {label:g} and "
            f"{divergence:g}, but both must be at least 0 and finite, and one above 0."
        )
    factor = _factor(known, temperature, num_classes)
    return (0.0, 1.0) if known.plain_alone and label == 0 else (float(label), divergence * factor)


def convert_weight(
    weight: float, temperature: float, source: str, target: str, num_classes: int | None = None
) -> float:
    """Returns the mixing weight of `target` whose loss is proportional to that of `source`.

    The ratio of the label's share to the distillation's is multiplied by the ratio of the two
    conventions' factors (`as_weights`), then both are divided by their sum. Where a convention has
    several free weights they add up to 1 (RepDistiller: `-r 1-a -a a`).

    Args:
        weight: the source's mixing weight, in [0, 1].
        temperature: T, positive, the same in both.
        source: one of CONVENTIONS.
        target: one of CONVENTIONS.
        num_classes: at least 2; needed where either averages the KL over the classes.

    Returns:
        The target's mixing weight, in [0, 1].

    Raises:
        UserError: an unknown convention.
        ValueError: a number outside its range, or a missing number of classes.
    """
    label, divergence = _shares(weight, temperature, source, target, num_classes)
    return label if _look_up(target).on_label else divergence


def called_elsewhere(
    alpha: float, temperature: float, num_classes: int
) -> list[tuple[Convention, str]]:
    """Returns the settings that give bmjax's loss up to a factor, in every other convention.

    Args:
        alpha: bmjax's weight of the distillation, in [0, 1].
        temperature: T, positive.
        num_classes: at least 2.

    Returns:
        Each convention with its settings as one types or writes them. The weights are rounded to
        four significant digits of the smaller of the two, as 0.9999 would not say what is left.

    Raises:
        ValueError: a number outside its range.
    """
    rows = []
    for convention in _TABLE[1:]:
        shares = _shares(alpha, temperature, "bmjax", convention.name, num_classes)
        label, divergence = (_plain(share, min(shares)) for share in shares)
        numbers = {"label": label, "divergence": divergence}
        numbers["temperature"] = _plain(temperature, temperature)
        rows.append((convention, convention.typed.format(**numbers)))
    return rows


def _look_up(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise errors.unknown_name("convention", name, CONVENTIONS)
    return CONVENTIONS[name]


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, but it must be in [0, 1].")


def _factor(convention: Convention, temperature: float, num_classes: int | None) -> float:
    """Returns what the convention multiplies the KL by, beside its weight."""
    if not 1e-100 < temperature < 1e100:
        raise ValueError(
            f"the temperature is {temperature}, but it must be positive: in (1e-100, 1e100)."
        )
    if num_classes is not None and (num_classes < 2 or num_classes % 1 != 0):
        raise ValueError(f"num_classes is {num_classes}, but it must be a whole number from 2 on.")
    factor = float(temperature) ** 2 if convention.squared_temperature else 1.0
    if convention.reduction == "sum":
        return factor
    if num_classes is None:
        raise ValueError(f"{convention.name} averages over the classes: num_classes must be given.")
    return factor / num_classes


def _shares(
    weight: float, temperature: float, source: str, target: str, num_classes: int | None
) -> tuple[float, float]:
    """Returns the target's weights of the label and of the distillation, which add up to 1."""
    old, new = _look_up(source), _look_up(target)
    _check_share(f"{next(iter(old.settings))} of {source}", weight)
    label, divergence = (weight, 1 - weight) if old.on_label else (1 - weight, weight)
    divergence *= _factor(old, temperature, num_classes) / _factor(new, temperature, num_classes)
    total = label + divergence
    return label / total, divergence / total


def _plain(value: float, scale: float) -> str:
    """Returns a number in plain digits, to four significant digits of `scale`."""
    decimals = max(0, 3 - math.floor(math.log10(scale))) if scale > 0 else 4
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
