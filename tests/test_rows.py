import chex
import numpy as np
import pytest

from bmjax.data.rows import Rows


@pytest.mark.parametrize("shape", [(3, 8, 8, 16), (2, 3, 5, 7, 3), (2, 28, 28, 1), (0, 4, 4, 3)])
def test_rows_hold_the_images_folded_or_not(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    leading, length = shape[:-3], int(np.prod(shape[-3:]))
    for folded in (False, True):
        rows = Rows.of(images, folded)
        tiles = -(-length // 1024)
        assert rows.values.shape == (*leading, *((8 * tiles, 128) if folded else (length,)))
        assert rows.shape == shape
        np.testing.assert_array_equal(rows.images(), images)
        outline = Rows.outline(leading, shape[-3:], folded, None)
        chex.assert_trees_all_equal_shapes_and_dtypes(outline, rows)
    # Where nothing is to be filled up, it is the same memory.
    assert not images.size or np.shares_memory(images, Rows.of(images).values)
