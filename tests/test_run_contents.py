import dataclasses

import jax.numpy as jnp
import numpy as np

from bmjax.train.loop import fit
from bmjax.train.run_contents import contents, differences


def test_runs_are_told_apart_by_all_they_leave_behind(small, shapes, quiet, tmp_path):
    config = dataclasses.replace(small, epochs=2)
    found = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        fit(dataclasses.replace(config, out=str(tmp_path / name), seed=seed), shapes, console=quiet)
        found.append(contents(tmp_path / name))
    one, same, other = found
    assert differences(one, same) == []
    assert {".: settings", ".: step", ".: metrics", ".: meta"} < set(one)
    parts = {name.partition("/")[0] for name in one if "/" in name}
    assert parts == {".: state", ".: best"}
    lines = differences(one, other)
    for name in (".: state/state/key", ".: state/state/params", ".: best/params", ".: metrics, 0"):
        assert any(line.startswith(name) for line in lines), name


def test_what_differs_is_said_with_its_place():
    one = {
        "a": np.array([[1.0, np.nan], [3.0, 4.0]], np.float32),
        "b": np.zeros((), np.int32),
        "c": [1, 2, 3],
        "d": jnp.ones(3, jnp.bfloat16),
        "e": {"same": 1, "inner": {"x": 1, "y": 2}, "gone": 0},
        "gone": 1,
    }
    one = {name: np.asarray(v) if name == "d" else v for name, v in one.items()}
    assert differences(one, dict(one)) == []
    other = {
        "a": np.array([[1.0, np.nan], [3.5, 4.0]], np.float32),
        "b": np.zeros((), np.int64),
        "c": [1, 5],
        "d": np.asarray(jnp.array([1, 1, 1.0078125], jnp.bfloat16)),
        "e": {"same": 1, "inner": {"x": 1, "y": 3}},
        "new": 1,
    }
    assert differences(one, other) == [
        "a: 1 of 4 numbers, by 0.5 at most, the first at [1, 0]: 3.0 and 3.5",
        "b: int32[] and int64[]",
        "c, 1: 2 and 5",
        "c: 3 and 2 of them",
        "d: 1 of 3 numbers, by 0.00781 at most, the first at [2]: 1.0 and 1.0078125",
        "e, gone is missing",
        "e, inner, y: 2 and 3",
        "gone is missing",
        "new is new",
    ]
    negative = {"a": np.array([0.0])}
    assert differences(negative, {"a": np.array([-0.0])}) != []
