"""Which class of one side is which of the other: by name, by number where names say nothing.

A model has an output for each class that it knows, and data label their classes with numbers; the
two agree only if the names behind the numbers do.
"""

import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bmjax.data.sources import ArraySource, Dataset, NotLoaded, Source, name_of
from bmjax.errors import UserError

_NAMED = 10


@dataclass(frozen=True)
class ClassMatch:
    """Where the classes of data, or of another model, are among those that a model knows.

    Attributes:
        known: names of the classes that the model knows, in order of its outputs.
        places: for each class of the other side, in order, its number among `known`.
        warnings: a line for each thing the user should know.
    """

    known: tuple[str, ...]
    places: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether both sides have the same classes in the same order."""
        return self.places == tuple(range(len(self.known)))

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes that the model knows and the other side does not have."""
        present = set(self.places)
        return tuple(name for place, name in enumerate(self.known) if place not in present)


def match_classes(
    ours: Sequence[str], theirs: Sequence[str], us: str, them: str, remedy: str
) -> ClassMatch:
    """Finds the classes of data, or of another model, among those that a model knows.

    Names are compared in Unicode's composed form (NFC), capitals included; where both sides name
    their classes by numbers, as numbers, so that `01` is `1`. Of equal names the first is the
    first. Where one side has nothing but the numbers 0 to n - 1, as data without names have, and
    the other has n real names, number i is the i-th name.

    Args:
        ours: names of the classes that the model knows, in order.
        theirs: names of the others.
        us: what the model is called in a message, such as `the run in runs/a`.
        them: what the others are called.
        remedy: ends the message of an error.

    Returns:
        The match, with warnings where classes are matched by number, or some are absent.

    Raises:
        UserError: classes that the model does not know.

    Example:
        >>> match_classes(("ant", "bee"), ("bee", "ant"), "the run", "the data", "").places
        (1, 0)
    """
    ours, theirs = tuple(ours), tuple(theirs)
    places = _by_position(ours, theirs)
    if places is not None:
        shown = _some([f"{theirs[i]} is {ours[place]}" for i, place in enumerate(places)])
        line = f"only one of {us} and {them} has names for its classes, so they go by number: "
        return ClassMatch(ours, places, (line + shown,))
    our_keys, their_keys = _keys(ours, theirs)
    place_of = {key: place for place, key in enumerate(our_keys)}
    unknown = [name for name, key in zip(theirs, their_keys, strict=True) if key not in place_of]
    if unknown:
        raise UserError(
            f"{us} tells {len(ours)} classes apart, but does not know {len(unknown)} of the "
            f"{len(theirs)} of {them}: {_some(unknown)}. It knows {_some(ours)}. {remedy}"
        )
    match = ClassMatch(ours, tuple(place_of[key] for key in their_keys))
    if not match.absent:
        return match
    line = (
        f"{them} has {len(theirs)} of the {len(ours)} classes that {us} knows, and only they count "
        f"here; it has none of {_some(match.absent)}"
    )
    return replace(match, warnings=(line,))


def _by_position(ours: tuple[str, ...], theirs: tuple[str, ...]) -> tuple[int, ...] | None:
    """Returns the places of theirs where numbers on one side stand for names on the other."""
    if len(ours) != len(theirs) or set(map(_composed, ours)) & set(map(_composed, theirs)):
        return None
    count = range(len(ours))
    our_numbers, their_numbers = _numbers(ours), _numbers(theirs)
    if their_numbers and not our_numbers and sorted(their_numbers) == list(count):
        return their_numbers
    if our_numbers and not their_numbers and sorted(our_numbers) == list(count):
        return tuple(our_numbers.index(number) for number in count)
    return None


def _keys(
    ours: tuple[str, ...], theirs: tuple[str, ...]
) -> tuple[Sequence[Hashable], Sequence[Hashable]]:
    """Returns what the names of both sides are compared by; within a side, no two are equal."""
    our_numbers, their_numbers = _numbers(ours), _numbers(theirs)
    if our_numbers and their_numbers:
        return our_numbers, their_numbers
    return _occurrences(ours), _occurrences(theirs)


def _numbers(names: tuple[str, ...]) -> tuple[int, ...] | None:
    """Returns the numbers that all names are, each another; None where they are not."""
    if not all(name.isascii() and name.isdecimal() for name in names):
        return None
    numbers = tuple(map(int, names))
    return numbers if len(set(numbers)) == len(numbers) else None


def _occurrences(names: tuple[str, ...]) -> list[tuple[str, int]]:
    # ImageNet has two classes that are called crane.
    seen: Counter[str] = Counter()
    keys = []
    for name in map(_composed, names):
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def relabelled(dataset: Dataset, match: ClassMatch) -> Dataset:
    """Returns a dataset with the labels and the names of the classes that a model knows.

    Args:
        dataset: whose classes were matched.
        match: where they are among those of the model.
    """
    if match.is_identity:
        return replace(dataset, class_names=match.known)
    places = np.array(match.places, np.int32)

    def renumber(source: Source) -> Source:
        if isinstance(source, NotLoaded):
            return source
        labels = places[source.labels]
        if isinstance(source, ArraySource):
            return replace(source, labels=labels)
        return RelabelledSource(source, labels)

    return replace(
        dataset,
        train=renumber(dataset.train),
        validation=renumber(dataset.validation),
        test=renumber(dataset.test),
        class_names=match.known,
    )


@dataclass(frozen=True, eq=False)
class RelabelledSource:
    """A source with other labels.

    Attributes:
        source: the images.
        labels: of all examples: [examples] int32.
    """

    source: Source
    labels: np.ndarray

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels that every `image` has."""
        return self.source.image_shape

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.source[index], "label": int(self.labels[index])}

    def wide_image(self, index: int) -> np.ndarray:
        """Returns the image with its margin, where there is one."""
        return self.source.wide_image(index)

    def name(self, index: int) -> str:
        """See `sources.name_of`."""
        return name_of(self.source, index)
