"""Datasets by name: one row for each kind."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from bmjax.config.paths import user_path
from bmjax.data import hints, preprocess
from bmjax.data.sources import (
    SPLITS,
    ArraySource,
    Dataset,
    DatasetSpec,
    NotLoaded,
    Source,
    all_images,
    names_of,
)


def load_dataset(
    name: str,
    image_size: int | None = None,
    *,
    transform: preprocess.EvaluationTransform | None = None,
    split_seed: int = 0,
    memory_gib: float = 4.0,
    splits: Sequence[str] = SPLITS,
    channels: int = 3,
    max_unreadable: float = 0.01,
    meanwhile: Callable[[DatasetSpec], None] | None = None,
) -> Dataset:
    """Loads a dataset, preparing it in the cache folder first where that is needed.

    Args:
        name: `mnist5k`, `npz:PATH`, `folder:PATH` or `tfds:NAME`. All that follows but
            `image_size` is for the last two and is ignored for the others.
        image_size: side in pixels that every image is resized to; None keeps its own. Pictures of
            folders and TFDS are not squashed but resized to 8/7 of it and cut; None there keeps
            pictures that all have one size of at most 512 pixels, and makes 224 pixels of others.
        transform: what every picture goes through, in place of what `image_size` says.
        split_seed: of the examples that become a split the data does not have.
        memory_gib: GiB of decoded images up to which they are kept in memory; more are decoded
            when they are asked for.
        splits: of train, validation and test those that will be used; no other is decoded.
        channels: 1 for gray, 3 for RGB.
        max_unreadable: share of all files that may be left out as they cannot be decoded, in
            [0, 1]; unless it is 0, five may always be. `warnings` names them.
        meanwhile: called with what is already known, while other threads decode the images; not
            called where there is nothing to decode. What it raises ends the loading.

    Raises:
        UserError: an unknown name, a missing file, data that is no labelled images, or a setting
            out of range.
    """
    kind, colon, path = name.partition(":")
    if kind in ("folder", "tfds") and path:
        from bmjax.data.kinds.prepare import Options

        options = Options(
            image_size=image_size,
            transform=transform,
            split_seed=split_seed,
            memory_gib=memory_gib,
            splits=tuple(splits),
            channels=channels,
            max_unreadable=max_unreadable,
            meanwhile=meanwhile,
        )
        if kind == "folder":
            from bmjax.data.kinds import folder

            return folder.load(path, options)
        from bmjax.data.kinds import tfds

        return tfds.load(path, options)
    if name == "mnist5k":
        from bmjax.data.kinds import mnist5k

        dataset = mnist5k.load()
    elif kind == "npz" and colon:
        from bmjax.data.kinds import npz

        dataset = npz.load(user_path(path), name)
    else:
        raise hints.unknown(name)
    return resized(dataset, image_size) if image_size else dataset


def resized(dataset: Dataset, size: int) -> Dataset:
    """Returns the dataset with every image resized to `size` by `size` pixels."""
    if dataset.image_shape[:2] == (size, size):
        return dataset

    def resize(source: Source) -> ArraySource:
        images = preprocess.resize_all(all_images(source), size)
        return ArraySource(images, source.labels, names=names_of(source))

    train, validation, test = (resize(dataset.split(name)) for name in SPLITS)
    return Dataset(dataset.name, train, validation, test, dataset.class_names)


def with_channels(dataset: Dataset, channels: int) -> Dataset:
    """Returns the dataset with gray images repeated in three channels, where those are asked for.

    Other differences in the number of channels are left as they are.
    """
    if dataset.image_shape[2] != 1 or channels != 3:
        return dataset

    def repeat(source: Source) -> Source:
        if isinstance(source, NotLoaded):
            return replace(source, image_shape=(*source.image_shape[:2], 3))
        images = np.repeat(all_images(source), 3, axis=-1)
        return ArraySource(images, source.labels, names=names_of(source))

    train, validation, test = (repeat(dataset.split(name)) for name in SPLITS)
    return replace(dataset, train=train, validation=validation, test=test)
