import pytest

from bmjax.machine.shapes import advice


@pytest.mark.parametrize(
    ("platform", "kind", "number", "said"),
    [
        ("tpu", "TPU v5 lite", 8, ("for 8 devices: a multiple of 64 ", "one of 1024 ", "128 wide")),
        ("tpu", "TPU v6 lite (tpu:0)", 1, ("--batch-size: a multiple of 8 ", "one of 128 ", "256")),
        ("gpu", "NVIDIA H100 80GB HBM3", 8, ("multiples of 8 ",)),
    ],
)
def test_each_kind_of_device_has_its_sizes(platform, kind, number, said):
    lines = "\n".join(advice(platform, kind, number))
    assert all(part in lines for part in said), lines


@pytest.mark.parametrize("platform", ["cpu", None])
def test_others_have_none(platform):
    assert advice(platform, "cpu", 8) == []
