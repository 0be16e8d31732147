import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.metrics import ClassificationSums, summarize

of_batch = jax.jit(ClassificationSums.of_batch)


def reference(logits, labels):
    """The same metrics example by example, in float64, from their definitions."""
    logits = logits.astype(np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    predicted = logits.argmax(-1)
    classes = logits.shape[1]
    confidence, hit = probabilities.max(-1), predicted == labels
    calibration = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            calibration += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    precision, recall, f1 = [], [], []
    for each in range(classes):
        true_positive = np.sum((predicted == each) & (labels == each))
        p = true_positive / max(np.sum(predicted == each), 1)
        r = true_positive / max(np.sum(labels == each), 1)
        precision.append(p)
        recall.append(r)
        f1.append(2 * p * r / (p + r) if p + r else 0.0)
    top5 = np.mean(
        [label in np.argsort(-row)[:5] for row, label in zip(logits, labels, strict=True)]
    )
    return {
        "loss": -np.log(probabilities[np.arange(len(labels)), labels]).mean(),
        "accuracy": hit.mean(),
        "top5_accuracy": top5,
        "expected_calibration_error": calibration,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "macro_f1": np.mean(f1),
    }


def draw(num=203, classes=8):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes - 1, num)  # the last class never occurs
    logits = rng.normal(0, 1.5, (num, classes)).astype(np.float32)
    logits[np.arange(num), labels] += 2
    return logits, labels


def test_matches_the_definitions_in_float64():
    logits, labels = draw()
    sums = of_batch(jnp.array(logits), jnp.array(labels), jnp.ones(203, bool))
    got, expected = summarize(sums), reference(logits, labels)
    assert got["examples"] == 203
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert np.sum(got["confusion"]) == 203


def test_padding_changes_nothing_and_batches_add_up():
    logits, labels = draw()
    whole = of_batch(jnp.array(logits), jnp.array(labels), jnp.ones(203, bool))
    padded = np.concatenate([logits, np.full((5, 8), 1e3, np.float32)])
    padded_labels = np.concatenate([labels, np.full(5, 3)])
    mask = np.arange(208) < 203
    parts = [
        of_batch(
            jnp.array(padded[i : i + 16]),
            jnp.array(padded_labels[i : i + 16]),
            jnp.array(mask[i : i + 16]),
        )
        for i in range(0, 208, 16)
    ]
    total = functools.reduce(operator.add, parts, ClassificationSums.zeros(8))
    chex.assert_trees_all_close(total, whole, rtol=1e-5)


def test_calibration_of_a_constant_worked_out_by_hand():
    # Confidence 0.75 four times, right once: |1/4 - 3/4|.
    logits = jnp.tile(jnp.array([[0.0, jnp.log(3.0)]]), (4, 1))
    sums = of_batch(logits, jnp.array([0, 0, 0, 1]), jnp.ones(4, bool))
    assert summarize(sums)["expected_calibration_error"] == pytest.approx(0.5, abs=1e-6)


def test_equal_logits_are_no_free_hit():
    logits = jnp.zeros((10, 10))
    sums = of_batch(logits, jnp.arange(10), jnp.ones(10, bool))
    got = summarize(sums)
    assert got["accuracy"] == pytest.approx(0.1)
    assert got["top5_accuracy"] == pytest.approx(0.5)
    broken = of_batch(logits * jnp.nan, jnp.arange(10), jnp.ones(10, bool))
    assert int(broken.top5) == 0


def test_fewer_than_five_classes_are_all_in_the_top_five():
    logits, labels = jax.random.normal(jax.random.key(0), (20, 3)), jnp.arange(20) % 3
    sums = of_batch(logits, labels, jnp.ones(20, bool))
    assert summarize(sums)["top5_accuracy"] == 1.0


def test_nothing_to_summarize_is_an_error():
    with pytest.raises(ValueError, match="no example"):
        summarize(ClassificationSums.zeros(3))
