"""Sizes that the units of an accelerator compute without padding."""

# Rows and columns of a TPU's registers.
_ROWS, _COLUMNS = 8, 128
# Sides of a TPU's matrix units, where they are wider than a register.
_WIDE_UNITS = {"TPU v6": 256}
# Of a GPU's tensor cores: channels in bfloat16 that are not a multiple are padded.
_CHANNELS = 8


def advice(platform: str | None, kind: str, number: int) -> list[str]:
    """Returns a line for each kind of size that the devices like.

    Args:
        platform: `cpu`, `gpu`, `tpu`; None: there is no device.
        kind: of the devices, as JAX names them.
        number: of the devices that share a batch.
    """
    if platform == "gpu":
        return [
            f"channels, widths and classes: in bfloat16, multiples of {_CHANNELS} fill the tensor "
            "cores; others are padded, or computed outside of them"
        ]
    if platform != "tpu":
        return []
    side = next((side for name, side in _WIDE_UNITS.items() if name in kind), _COLUMNS)
    shared = f" for {number} devices" if number > 1 else ""
    return [
        f"--batch-size{shared}: a multiple of {number * _ROWS} fills the rows of the registers "
        f"({_ROWS} x {_COLUMNS}), one of {number * _COLUMNS} their columns too, in which the "
        "examples of an mlp, and of layers with few channels, lie",
        f"widths and classes: the compiler pads them to multiples of {_COLUMNS}, and the matrix "
        f"units are {side} wide: a width of 100 is computed as one of {_COLUMNS}",
    ]
