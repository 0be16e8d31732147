from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.errors import UserError
from bmjax.models import Architecture, contract, create_model, find
from tests.own_models import Normalized, Patches, bridged

IMAGES = jnp.ones((2, 12, 12, 1))


def check(model, own=True, several=False, num_classes=3):
    make: Any = type(model)
    record = Architecture("mine", make, own=own)
    contract.check_module(record, model, num_classes, (12, 12, 1), several)


class OnlyImages(nn.Module):
    out: Any = 3

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.out, name="head")(images.reshape(len(images), -1))


class ModeByOrder(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        hidden = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(3)(hidden)


@pytest.mark.parametrize("model", [OnlyImages(), ModeByOrder(), Patches(3), Normalized(3)])
def test_modules_that_keep_the_contract_are_not_complained_of(model):
    check(model)


def test_an_nnx_module_keeps_it_too():
    check(bridged(3))


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, images, deterministic=True):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=deterministic)(images.reshape(2, -1)))


class NoMode(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(images.reshape(2, -1)))


class ModeForgotten(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(images.reshape(2, -1)))


class StatisticsWithoutMode(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=True)(images.reshape(2, -1)))


class Integers(nn.Module):
    @nn.compact
    def __call__(self, images):
        number = self.param("number", lambda key: jnp.zeros(3, jnp.int32))
        return nn.Dense(3)(images.reshape(2, -1)) + number[None]


class Cached(nn.Module):
    @nn.compact
    def __call__(self, images):
        self.variable("cache", "seen", lambda: jnp.zeros(()))
        return nn.Dense(3)(images.reshape(2, -1))


class NoParams(nn.Module):
    @nn.compact
    def __call__(self, images):
        return images.reshape(2, -1)[:, :3]


class Pair(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(3)(images.reshape(2, -1)), 0


class Fails(nn.Module):
    @nn.compact
    def __call__(self, images):
        raise KeyError("theirs")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Deterministic(), "takes deterministic, but it is told of training by train.* Rename"),
        (NoMode(), r"asks for random numbers in evaluation mode too\. Add train: bool = False"),
        (ModeForgotten(), r"evaluation mode too\. Give its Dropout deterministic=not train"),
        (StatisticsWithoutMode(), "has batch_stats, but its call takes no train"),
        (Integers(), "param number of the model 'mine' is of type int32"),
        (Cached(), "has variables in 'cache', but a run keeps params and batch_stats alone"),
        (NoParams(), "has no params"),
        (OnlyImages(5), r"logits of shape \(2, 5\) for 2 images of 3 classes"),
        (OnlyImages((3, 3)), r"cannot take images of shape \(12, 12, 1\)"),
        (Pair(), "gives logits a tuple for 2 images"),
        (Fails(), r"cannot take images of shape .*: KeyError: 'theirs'"),
    ],
)
def test_what_does_not_fit_is_named(model, message):
    with pytest.raises(UserError, match=message):
        check(model)


def test_statistics_of_each_device_by_itself_are_refused():
    class NoAxis(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            norm = nn.BatchNorm(use_running_average=not train)
            return nn.Dense(3)(norm(images.reshape(2, -1)))

    check(NoAxis())
    check(Normalized(3), several=True)
    with pytest.raises(UserError, match="no attribute axis_name: under --parallel pmap each"):
        check(NoAxis(), several=True)


def test_images_that_one_of_ours_cannot_take_are_named():
    with pytest.raises(UserError, match=r"cnn cannot take these images: .* too small"):
        contract.check_module(find("cnn"), create_model("cnn", 3), 3, (2, 2, 1))


def test_the_mode_is_told_whatever_its_default():
    model = Patches(3)  # whose own default is training
    variables = contract.init(model, jax.random.key(0), IMAGES)
    first, second = (contract.apply(model, variables, IMAGES) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    keys = jax.random.split(jax.random.key(1))
    dropped = [contract.apply(model, variables, IMAGES, train=True, key=key) for key in keys]
    assert (dropped[0] != dropped[1]).any()
    again = contract.apply(model, variables, IMAGES, train=True, key=keys[0])
    np.testing.assert_array_equal(again, dropped[0])


def test_features_are_those_sown_or_what_the_head_is_given():
    model = Patches(3)
    variables = contract.init(model, jax.random.key(0), IMAGES)
    features = contract.features_before(model, variables, IMAGES, "classifier")
    head = variables["params"]["classifier"]
    logits = features @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(logits, contract.apply(model, variables, IMAGES), atol=1e-6)
    net = bridged(3)
    variables = contract.init(net, jax.random.key(0), IMAGES)
    assert contract.features_before(net, variables, IMAGES, "head").shape == (2, 4)
    with pytest.raises(UserError, match=r"needs what goes into the last layer.*pre_logits"):
        contract.features_before(
            OnlyImages(), contract.init(OnlyImages(), jax.random.key(0), IMAGES), IMAGES, "nothing"
        )
