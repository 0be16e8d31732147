"""A checkpoint's names brought to those of a model: prefixes, heads, and what is no weight."""

import collections
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from bmjax.errors import UserError, listed
from bmjax.weights.state_dicts import the_plain_one, unwrapped

# What heads are called. What stands below them may be the parts of an nn.Sequential.
_HEADS = {"fc", "head", "heads", "classifier", "linear", "last_linear", "logits"}
_PART = re.compile(r"\d+|fc|head|linear|classifier")
# Left there by counters of operations, by averages of a model, and by losses.
_NO_WEIGHTS = re.compile(
    r"(.+\.)?(total_ops|total_params|_extra_state)"
    r"|n_averaged"
    r"|(criterion|criteria|loss|losses|loss_fn|loss_func|metrics?)(\..+)?"
)
_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")
# Some names of one block are also those of the stem: a prefix has to explain more than that.
_LEAST_SHARE = 1 / 3


@dataclass(frozen=True, eq=False)
class Fitted:
    """A state dict with a model's own names as far as they were found.

    Attributes:
        arrays: by name.
        notes: what to tell the user, a line each, without the name of the file.
    """

    arrays: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()


def fit_names(
    arrays: Mapping[str, np.ndarray],
    expected: Collection[str],
    *,
    head: str = "fc",
    keep_head: bool = True,
    where: str = "the state dict",
) -> Fitted:
    """Brings the names of a state dict to those that a model has; values stay as they are.

    The prefix before the model's names is found by what stands below it, whatever it is; what
    wrappers put anywhere into names (`module`, `_orig_mod`) is taken out. What stands outside of
    the prefix is left out, save for a head; so is what is no weight (`total_ops`, the weights of
    a loss, `_extra_state`). A head of another name becomes the model's, and one without bias gets
    one of zeros. Nothing else is changed: what the model lacks stays, for the caller to refuse.

    Args:
        arrays: by name.
        expected: the model's names.
        head: where the model has its head.
        keep_head: whether the head is wanted; without it, all that may be one is left out.
        where: what messages call the state dict.

    Raises:
        UserError: the model is there more than once, and it isn't clear which is meant.
    """
    names = dict(zip(_unwrapped(arrays, expected), arrays, strict=True))
    backbone = {name for name in expected if not _is_under(name, head)}
    prefix = _prefix_of(names, backbone, where)
    under, outside = {}, {}
    for name, old in names.items():
        if name.startswith(prefix):
            under[name.removeprefix(prefix)] = old
        else:
            outside[_beside(name, prefix)] = old
    notes = []
    if keep_head:
        found = _find_head(arrays, under, outside, expected, head)
        if found and f"{head}.weight" not in under:
            place = under if f"{found}.weight" in under else outside
            old = place[f"{found}.weight"].removesuffix(".weight")
            notes.append(f"its head {old} is taken as {head}.")
            for leaf in ("weight", "bias"):
                if f"{found}.{leaf}" in place:
                    under[f"{head}.{leaf}"] = place.pop(f"{found}.{leaf}")
    else:
        under = {name: old for name, old in under.items() if not _may_be_head(name, expected, head)}
        outside = {n: old for n, old in outside.items() if not _may_be_head(n, expected, head)}
    no_weights = [n for n in under if n not in expected and _NO_WEIGHTS.fullmatch(n)]
    if no_weights:
        notes.append(f"left out, as no weights: {listed(no_weights)}.")
    if outside:
        notes.append(f"left out, as not under the prefix {prefix}: {listed(outside.values())}.")
    taken = {n: arrays[old] for n, old in under.items() if n not in no_weights}
    if keep_head and f"{head}.bias" in expected and f"{head}.bias" not in taken:
        weight = taken.get(f"{head}.weight")
        if weight is not None and weight.ndim == 2:
            taken[f"{head}.bias"] = np.zeros(len(weight), weight.dtype)
            notes.append("its head has no bias; it gets one of zeros.")
    return Fitted(taken, tuple(notes))


def explain(names: Collection[str], expected: Collection[str], head: str = "fc") -> str:
    """Returns the likely cause where names don't fit a model, with the remedy, or nothing."""
    missing = [name for name in expected if name not in names]
    if any("embedder.embedder." in name or ".encoder.stages." in name for name in names):
        return (
            "These are the names of Hugging Face's transformers, which are others than "
            "torchvision's: take the weights of the same model by timm or torchvision."
        )
    if names and all(re.match(r"\d+\.", name) for name in names):
        return (
            "Its names begin with numbers, as of an nn.Sequential (fastai's learners are): put "
            "its parts into torchvision's model with torch, and save that one's state_dict()."
        )
    if missing and all(name.endswith(_STATISTICS) for name in missing):
        return (
            "It lacks the running statistics alone, as of named_parameters(): save the model's "
            "state_dict()."
        )
    heads = sorted(
        {name.rpartition(".")[0] for name in names if _may_be_head(name, expected, head)}
    )
    if missing and all(_is_under(name, head) for name in missing):
        if len(heads) > 1:
            return (
                f"Its head has several layers ({listed(heads)}), and the model's one. "
                "bmjax finetune leaves it out and begins with a new one."
            )
        return "It has no head of the model's kind: bmjax finetune gives it a new one."
    return ""


def under_one_prefix(names: Iterable[str]) -> str:
    """Returns the prefix that all names have in common, such as `backbone.`; it may be empty."""
    split = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(f"{parts[0]}.")
    return "".join(common) if len(split) > 1 else ""


def _unwrapped(names: Collection[str], expected: Collection[str]) -> list[str]:
    """Returns the names without wrappers, unless the model has such parts or names would clash."""
    plain = [unwrapped(name) for name in names]
    usual = all(unwrapped(name) == name for name in expected)
    return plain if usual and len(set(plain)) == len(plain) else list(names)


def _prefix_of(names: Collection[str], backbone: Collection[str], where: str) -> str:
    """Returns the prefix under which most of the model's names stand; it may be empty."""
    counts = collections.Counter[str]()
    deepest = max((name.count(".") + 1 for name in backbone), default=0)
    for name in names:
        parts = name.split(".")
        for begin in range(max(0, len(parts) - deepest), len(parts)):
            if ".".join(parts[begin:]) in backbone:
                counts["".join(f"{part}." for part in parts[:begin])] += 1
    most = max(counts.values(), default=0)
    if most < _LEAST_SHARE * len(backbone):
        return ""
    best = {prefix.removesuffix("."): prefix for prefix in counts if counts[prefix] == most}
    if "" in best:
        return ""
    chosen = next(iter(best)) if len(best) == 1 else the_plain_one(best)
    if chosen is None:
        raise UserError(
            f"{where} holds the model several times, under the prefixes {listed(best)}. Say which "
            f"by --weights-key, such as --weights-key {next(iter(best))}."
        )
    return best[chosen]


def _find_head(
    arrays: Mapping[str, np.ndarray],
    under: Mapping[str, str],
    outside: Mapping[str, str],
    expected: Collection[str],
    head: str,
) -> str:
    """Returns the only linear layer that can be the head; empty where there is none, or several."""
    if f"{head}.weight" in under:
        return head
    layers = {
        name.rpartition(".")[0]: arrays[old].ndim
        for part in (under, outside)
        for name, old in part.items()
        if name.endswith(".weight") and _may_be_head(name, expected, head)
    }
    return next(iter(layers)) if list(layers.values()) == [2] else ""


def _may_be_head(name: str, expected: Collection[str], head: str) -> bool:
    """Tells whether it is of a layer of a head, and of none of the model's other layers."""
    first, *inside = name.split(".")[:-1] or [""]
    named_so = first in _HEADS and all(map(_PART.fullmatch, inside))
    return _is_under(name, head) or (named_so and name not in expected)


def _is_under(name: str, head: str) -> bool:
    return name.startswith(f"{head}.")


def _beside(name: str, prefix: str) -> str:
    """Returns a name without what it shares with a prefix that it isn't under."""
    parts = name.split(".")
    for part in prefix.split("."):
        if len(parts) < 2 or parts[0] != part:
            break
        parts = parts[1:]
    return ".".join(parts)
