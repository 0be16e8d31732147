"""Which of the things in a checkpoint are the weights: state dicts found by what they hold."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bmjax.errors import listed
from bmjax.weights.pickles import Inert
from bmjax.weights.tensors import BadFileError, Tensor, is_float

# What training programs call the state dict of the model itself within a checkpoint.
PLAIN_KEYS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module"),
    *("weights", "model_weights", "params"),
)
# What wrappers of a model put before its names: DataParallel, torch.compile, FSDP, Lightning.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged?|shadow|polyak)($|[._])", re.IGNORECASE)
# What else checkpoints hold tensors for.
_OTHER_STATE = re.compile(
    r"optimizer|^optim$|^opt$|sched|scaler|(^|_)rng(_|$)|_extra_state$|^callbacks$|^loops$",
    re.IGNORECASE,
)
_MAX_DEPTH = 4
_MAX_LISTED = 100
# Few bytes of a pickle can refer to a thing many times over; this bounds what is made of them.
_MAX_VISITS = 200_000
_MAX_NAME = 2_000


@dataclass(frozen=True)
class Chosen:
    """A state dict of a file.

    Attributes:
        named: its tensors by name.
        key: where it stands, joined by dots; empty where the file is nothing else.
        others: keys of the other state dicts that could have been meant.
    """

    named: Mapping[str, Tensor]
    key: str = ""
    others: tuple[str, ...] = ()


def choose(value: Any, key: str | None = None) -> Chosen:
    """Finds the state dict in what a pickle held.

    Entries that are no tensors are left out, and so are the states of optimizers.

    Args:
        value: as `pickles.load` gives it.
        key: of the state dict, or the prefix of the names to take; none given: the only one, or
            the plain one where the others are averages of it.

    Raises:
        BadFileError: there is none, none under that key, or it isn't clear which is meant.
    """
    found = dict(_Search().state_dicts(value))
    if not found:
        raise BadFileError(_nothing(value))
    if key:
        return _by_key(found, key)
    if len(found) == 1:
        ((only, named),) = found.items()
        return Chosen(named, only)
    plain = the_plain_one(found)
    if plain is None:
        raise BadFileError(
            f"holds several state dicts ({listed(found)}). Say which by --weights-key, such as "
            f"--weights-key {next(iter(found))}."
        )
    return Chosen(found[plain], plain, tuple(name for name in found if name != plain))


def choose_names(named: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Returns what stands under the prefix `key` among names, without it.

    Raises:
        BadFileError: nothing does; the message says which prefixes there are.
    """
    under = {
        rest: value
        for name, value in named.items()
        for rest in (_below(name, key), _below(unwrapped(name), key))
        if rest
    }
    if not under:
        raise BadFileError(_no_such_prefix(key, named))
    return under


def the_plain_one(keys: Collection[str]) -> str | None:
    """Returns the key of the model itself among those of state dicts; None if that isn't clear."""
    plain = [key for key in keys if not _AVERAGED.search(key)]
    averaged = {_without_average(key): key for key in keys if key not in plain}
    known = [key for key in plain if key.split(".")[-1] in PLAIN_KEYS]
    outermost = min((key.count(".") for key in known), default=0)
    known = [key for key in known if key.count(".") == outermost]
    if not known:
        known = [key for key in plain if key in averaged]
    if not known:
        known = [key for rest, key in averaged.items() if rest.split(".")[-1] in PLAIN_KEYS]
    return known[0] if len(known) == 1 else None


def _without_average(key: str) -> str:
    return _AVERAGED.sub(lambda found: found[1] and found[3], key).strip("._")


def unwrapped(name: str) -> str:
    """Returns a name without the parts that wrappers of a model put anywhere into it."""
    *parts, leaf = name.split(".")
    return ".".join([*(part for part in parts if part not in WRAPPERS), leaf])


def _by_key(found: Mapping[str, Mapping[str, Tensor]], key: str) -> Chosen:
    ends = [name for name in found if name == key or name.endswith(f".{key}")]
    if key in found or len(ends) == 1:
        name = key if key in found else ends[0]
        return Chosen(found[name], name)
    best = found.get(the_plain_one(found) or "", next(iter(found.values())))
    if any(_below(name, key) or _below(unwrapped(name), key) for name in best):
        return Chosen(choose_names(best, key), key)
    keys = [name for name in found if name]
    raise BadFileError(_no_such_key(key, keys) if keys else _no_such_prefix(key, best))


def _no_such_key(key: str, known: Collection[str]) -> str:
    return (
        f"holds no state dict {key!r}, as --weights-key asks for. Those there are: "
        f"{listed(known)}. Give one of them, or leave --weights-key out."
    )


def _no_such_prefix(key: str, names: Collection[str]) -> str:
    return (
        f"holds a single state dict, and none of its names stands under {key!r}, as --weights-key "
        f"asks for; they begin with {listed(sorted({name.split('.')[0] for name in names}))}. "
        "Leave --weights-key out."
    )


def _below(name: str, prefix: str) -> str:
    return name[len(prefix) + 1 :] if name.startswith(f"{prefix}.") else ""


class _Search:
    """Finds all state dicts. What is referred to several times is found at each of its places."""

    def __init__(self) -> None:
        self._tensors: dict[int, dict[str, Tensor]] = {}
        self._visits = 0

    def state_dicts(self, value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
        """Returns where each stands, its parts joined by dots, and its tensors."""
        self._visits += 1
        if self._visits > _MAX_VISITS:
            raise BadFileError(
                "holds too many dictionaries within each other. Load it with torch if you trust "
                "it, and save model.state_dict() alone."
            )
        own = self._own(value, path)
        inside: list[tuple[str, Any]] = []
        if len(path) < _MAX_DEPTH:
            for key, inner in _children(value, path):
                inside += self.state_dicts(inner, (*path, key))
        largest = max((len(named) for _, named in inside), default=0)
        # Beside a state dict stand a few tensors of other use, and within one a few of extras.
        return [(".".join(path), own)] if len(own) > largest else inside

    def _own(self, value: Any, path: tuple[str, ...]) -> dict[str, Tensor]:
        if id(value) not in self._tensors:
            self._tensors[id(value)] = _tensors_of(value)
        own = self._tensors[id(value)]
        holds_weights = any(tensor.shape and is_float(tensor.dtype) for tensor in own.values())
        bare = not path and isinstance(value, dict) and len(own) == len(value)
        return own if holds_weights or bare else {}


def _as_dict(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Inert):
        return value.items or {}
    return value if isinstance(value, dict) else {}


def _children(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple) and not path:
        yield from ((str(number), inner) for number, inner in enumerate(value[:_MAX_LISTED]))
    entries = _as_dict(value)
    if "param_groups" in entries:
        return
    for key, inner in entries.items():
        nested = isinstance(key, str) and isinstance(inner, dict | Inert)
        if nested and not _OTHER_STATE.search(key):
            yield key, inner


def _tensors_of(value: Any) -> dict[str, Tensor]:
    if _is_module(value):
        return dict(_module_tensors(value))
    return {
        name: tensor
        for name, tensor in _as_dict(value).items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def _is_module(value: Any) -> bool:
    """Tells whether it is a whole model, as `torch.save(model)` keeps it."""
    return isinstance(value, Inert) and {"_modules", "_parameters"} <= (value.state or {}).keys()


def _module_tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and tensors that the `state_dict()` of a whole model would have."""
    todo, visits = [("", value)], 0
    while todo:
        prefix, module = todo.pop()
        state = module.state or {}
        parts = {kind: _as_dict(state.get(kind)) for kind in ("_parameters", "_buffers")}
        inner = _as_dict(state.get("_modules"))
        visits += 1 + sum(map(len, parts.values())) + len(inner)
        if visits > _MAX_VISITS or len(prefix) > _MAX_NAME:
            raise BadFileError("holds a model of too many parts. Save its state_dict() alone.")
        for entries in parts.values():
            for name, tensor in entries.items():
                if isinstance(tensor, Tensor):
                    yield f"{prefix}{name}"[:_MAX_NAME], tensor
        modules = [(f"{prefix}{name}.", part) for name, part in inner.items() if _is_module(part)]
        todo += reversed(modules)


def _nothing(value: Any) -> str:
    """Returns what to say of a file without a state dict."""
    if isinstance(value, Inert) and value.kind:
        return (
            f"holds an object of {value.kind[:100]} and no named tensors. Load it with torch and "
            "save model.state_dict()."
        )
    if not isinstance(value, dict):
        return (
            "holds no dictionary of named tensors. Load it with torch and save model.state_dict()."
        )
    return (
        f"holds no state dict; its keys are {listed(repr(key)[:60] for key in value)}. Load it "
        "with torch and save model.state_dict()."
    )


def to_said(path: object, chosen: Chosen) -> str:
    """Returns what to tell the user where there was a choice of state dicts, or nothing."""
    if not chosen.others:
        return ""
    return (
        f"note: {path} holds {len(chosen.others) + 1} state dicts. {chosen.key} is read, and not "
        f"{listed(chosen.others)}; --weights-key says otherwise."
    )
