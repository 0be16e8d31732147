"""A digest of image files, taken while they are read to be decoded."""

import bisect
import functools
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from bmjax.data.kinds.files import Encoded
from bmjax.data.kinds.kept import is_remembered, remembered_of
from bmjax.data.kinds.prepare import num_threads
from bmjax.errors import UserError
from bmjax.machine.progress import stage

# Files of more in all are told apart by their sizes, as reading them takes too long.
_READ_BYTES = 2**30
# Of files that were read before those in front of them; beyond that they are read once more.
_WAITING_BYTES = 2**26
# Files that are read at a time.
_BLOCK = 32
_WHAT = "content"
# File names need not be valid text.
_ANY_NAME = ("utf-8", "surrogateescape")


@dataclass(eq=False)
class Content:
    """Computes a digest of image files, of those that are read meanwhile from what is read.

    It is over split, name, label and bytes of every image, in order; where they take more than
    1 GiB in all, over their sizes in place of their bytes.

    Attributes:
        parts: the encoded images of each split.
        sizes: of their files, in bytes.
    """

    parts: Mapping[str, Encoded]
    sizes: Mapping[str, Sequence[int]]

    def __post_init__(self) -> None:
        self._reads = sum(map(sum, self.sizes.values())) <= _READ_BYTES
        self._digest = hashlib.sha256()
        self._lock = threading.Lock()
        # Files in order; how many the digest has; and those that came before their turn.
        self._place = 0
        self._waiting: dict[int, bytes] = {}
        self._waiting_bytes = 0
        self._splits = [split for split, part in self.parts.items() if len(part)]
        lengths = [len(self.parts[split]) for split in self._splits]
        self._firsts = [sum(lengths[:number]) for number in range(len(lengths))]
        self._number = sum(lengths)

    def __call__(self) -> str:
        """Returns 64 hexadecimal digits.

        Raises:
            UserError: a file can no longer be read, or the cache folder cannot be written.
        """
        return self._value

    def listening(self) -> dict[str, Encoded]:
        """Returns the parts, which tell `note` what is read of them where that is of use."""
        if not self._reads or is_remembered(list(self.parts.values()), _WHAT):
            return dict(self.parts)
        return {
            split: replace(part, on_read=functools.partial(self.note, split))
            for split, part in self.parts.items()
        }

    def note(self, split: str, index: int, data: bytes) -> None:
        """Takes the bytes of a file; of any file, at any time before the call, in any thread."""
        place = self._firsts[self._splits.index(split)] + index
        with self._lock:
            if place < self._place or place in self._waiting:
                return
            self._waiting[place] = data
            self._waiting_bytes += len(data)
            while self._place in self._waiting:
                data = self._waiting.pop(self._place)
                self._waiting_bytes -= len(data)
                self._add(data)
            if self._waiting_bytes > _WAITING_BYTES:
                self._waiting.clear()
                self._waiting_bytes = 0

    @functools.cached_property
    def _value(self) -> str:
        if not self._reads:
            return self._finish()
        return str(remembered_of(list(self.parts.values()), _WHAT, self._finish))

    def _finish(self) -> str:
        rest = self._read_rest() if self._reads else (b"" for _ in range(self._number))
        for data in rest:
            self._add(data)
        self._waiting.clear()
        return self._digest.hexdigest()

    def _read_rest(self) -> Iterator[bytes]:
        """Yields the files that are not in the digest yet, several of them read at a time."""
        rest = range(self._place, self._number)
        with (
            ThreadPoolExecutor(4 * num_threads()) as executor,
            stage("reading files for their digest", len(rest), line=False) as advance,
        ):
            for first in rest[::_BLOCK]:
                block = range(first, min(first + _BLOCK, self._number))
                yield from executor.map(self._read, block)
                advance(len(block))

    def _read(self, place: int) -> bytes:
        if place in self._waiting:
            return self._waiting[place]
        split, index = self._find(place)
        part = self.parts[split]
        try:
            return part.reader.read(part.keys[index])
        except PermissionError as error:
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}). Check its permissions."
            ) from error
        except OSError:  # a broken link, which is left out of the dataset
            return b""

    def _add(self, data: bytes) -> None:
        split, index = self._find(self._place)
        part = self.parts[split]
        length = len(data) if self._reads else self.sizes[split][index]
        head = f"{split}\0{part.keys[index]}\0{part.labels[index]}\0{length}\0"
        self._digest.update(head.encode(*_ANY_NAME))
        self._digest.update(data)
        self._place += 1

    def _find(self, place: int) -> tuple[str, int]:
        number = bisect.bisect_right(self._firsts, place) - 1
        return self._splits[number], place - self._firsts[number]
