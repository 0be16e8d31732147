"""The sizes of a convolution, and the three arrays that take part in it."""

from typing import Literal, NamedTuple

Role = Literal["output", "images", "kernel"]
ROLES: tuple[Role, ...] = ("images", "kernel", "output")


class Geometry(NamedTuple):
    """All sizes of a convolution, in pixels; `channels` and `features` are of all groups.

    And the precision of its products, as `jax.default_matmul_precision` has it: a primitive is
    lowered when nothing knows any more in what precision it was asked for.
    """

    batch: int
    height: int
    width: int
    channels: int
    rows: int
    columns: int
    features: int
    stride: int
    top: int
    bottom: int
    left: int
    right: int
    groups: int
    precision: str | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """All of it but the precision."""
        sizes: tuple[int, ...] = self[:-1]
        return sizes

    def shape(self, role: Role) -> tuple[int, int, int, int]:
        """Returns the shape of the images, of the kernel, or of the output."""
        if role == "images":
            return self.batch, self.height, self.width, self.channels
        if role == "kernel":
            return self.rows, self.columns, self.channels // self.groups, self.features
        height = (self.height + self.top + self.bottom - self.rows) // self.stride + 1
        width = (self.width + self.left + self.right - self.columns) // self.stride + 1
        return self.batch, height, width, self.features

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Zeros on each side, ((top, bottom), (left, right))."""
        return (self.top, self.bottom), (self.left, self.right)
