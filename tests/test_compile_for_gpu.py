"""The check and the table of experiments/compile_for_gpu.py, without its compiler."""

import json

import pytest

from experiments import compile_for_gpu
from experiments.compile_for_gpu import problems, read, table, write

ROW = {
    **dict.fromkeys(compile_for_gpu.FIGURES, 0),
    "precision": "bfloat16",
    "topology": "h100:8",
    "model": "cnn",
    "job": "training",
    "contender": "bmjax",
    "batch": 8192,
    "convolutions": json.dumps({"bf16 NHWC": 5}),
    "output_bytes": 100,
    "alias_bytes": 99,
    "all_reduces": 2,
    "temp_bytes": 1000,
    "bytes_accessed": 5e9,
    "flops": 2e12,
}
KEPT = {"all_reduces": "2", "temp_bytes": "1000"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"temp_bytes": 1049}, []),
        ({"temp_bytes": 1060}, ["temporaries are 1.06 times as large"]),
        ({"temp_bytes": 940}, ["temporaries are 0.94 times as large"]),
        ({"host_transfers": 1}, ["1 transfers to the host"]),
        ({"all_reduces": 3}, ["3 all-reduces instead of 2"]),
        ({"alias_bytes": 80}, ["80 of 100 bytes are written over"]),
        ({"alias_bytes": 0, "job": "prediction"}, []),
        ({"convolutions": '{"f32 NHWC": 1}'}, ["convolutions are {'f32 NHWC': 1}"]),
        ({"convolutions": '{"f32 NHWC": 1}', "precision": "float32"}, []),
    ],
)
def test_what_is_wrong_with_a_row_is_said(changed, said):
    assert problems({**ROW, **changed}, KEPT) == said


def test_a_row_without_another_to_compare_with_is_wrong():
    assert problems(ROW, None) == ["there is no row to compare with"]


def test_rows_are_kept_in_order_and_shown_beside_plain_linens(tmp_path):
    plain = {**ROW, "contender": "plain Linen", "temp_bytes": 2000, "bytes_accessed": 1e10}
    one = {**ROW, "topology": "h100"}
    path = tmp_path / "rows.csv"
    write(path, [plain, ROW, one])
    rows = read(path)
    assert [row["topology"] for row in rows] == ["h100", "h100:8", "h100:8"]
    assert [row["contender"] for row in rows] == ["bmjax", "bmjax", "plain Linen"]
    _, _, alone, beside, last = table(rows)
    assert "| 5 | 0 | - | 2 |" in alone
    assert "| 0.50, 0.50 | 2 |" in beside
    assert "| 10 | 0 | - | 2 |" in last
    assert read(tmp_path / "none.csv") == []
