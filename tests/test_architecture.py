import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.errors import UserError
from bmjax.models import Architecture, TorchNames, architectures, contract, create_model, find
from bmjax.train.optim import depth_scales, path_of, trainable_mask


def paths_of(name):
    init = partial(contract.init, create_model(name, 3))
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    return params, [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("mlp", ["hidden1", "hidden2"]),
        ("cnn_tiny", ["stage1", "stage2"]),
        ("resnet8", ["stem", "stage1", "stage2", "stage3"]),
        ("resnet_tiny", ["stem", "stage1", "stage2", "stage3", "stage4"]),
    ],
)
def test_every_param_of_a_family_is_in_a_stage_or_the_head(name, stages):
    architecture = find(name)
    params, paths = paths_of(name)
    assert architecture.stages_of(reversed(paths)) == stages
    rest = [path for path in paths if architecture.stage_of(path) is None]
    assert rest == ["head/bias", "head/kernel"]
    assert architecture.num_classes(params) == 3
    assert list(architecture.without_head(params)) == [key for key in params if key != "head"]
    # So freezing and learning rates by layer work for each.
    scales = depth_scales(params, 0.5, architecture)
    assert scales["head"]["kernel"] == 1.0
    assert min(jax.tree.leaves(scales)) == 0.5 ** len(stages)
    frozen = trainable_mask(params, [stages[0]], architecture)
    assert not all(jax.tree.leaves(frozen))


def test_stages_are_ordered_by_their_numbers_as_numbers():
    architecture = find("resnet18")
    layers = ["pre_logits", "stage10", "stage9", "stem", "stage1_block1"]
    assert architecture.stages_among(layers) == ["stem", "stage9", "stage10"]
    assert architecture.compared_stages(layers) == ["stage9", "stage10"]


def test_every_family_says_what_it_has():
    for each in architectures():
        assert find(each.name) is each
        assert each.family
        assert not each.own
        assert all(weights.model == each.name for weights in each.published)
    with pytest.raises(dataclasses.FrozenInstanceError):
        find("mlp").name = "other"  # type: ignore[misc]


TRANSFORMER = TorchNames(
    (
        (r"class_token|pos_embedding", "unused"),
        (r"features_(\d+)/(\w+)", lambda number, part: f"features.{number - 1}.{part}"),
        (r"encoder/layer(\d+)/dense", "encoder.layers.encoder_layer_{}.mlp.0"),
        (r"heads/head", "heads.head"),
    ),
    leaves={"kernel": "weight", "bias": "bias", "gamma": "layer_scale"},
)


def test_names_of_other_families_fit_the_same_record():
    paths = [
        "params/heads/head/bias",
        "params/encoder/layer10/dense/kernel",
        "params/encoder/layer2/dense/kernel",
        "params/features_3/block/gamma",
        "params/heads/head/kernel",
    ]
    named = [TRANSFORMER.variable(path) for path in sorted(paths, key=TRANSFORMER.rank)]
    assert named == [
        "features.2.block.layer_scale",
        "encoder.layers.encoder_layer_2.mlp.0.weight",
        "encoder.layers.encoder_layer_10.mlp.0.weight",
        "heads.head.weight",
        "heads.head.bias",
    ]
    with pytest.raises(KeyError):
        TRANSFORMER.layer("nothing")


NESTED = Architecture("vit", lambda num_classes: None, head="heads/head")
PARAMS = {
    "heads": {"head": {"kernel": np.ones((4, 3)), "bias": np.zeros(3)}, "norm": {"scale": 1}},
    "pos_embedding": np.ones(2),
}


def test_a_head_may_lie_deep():
    assert NESTED.num_classes(PARAMS) == 3
    assert NESTED.without_head(PARAMS) == {
        "heads": {"norm": {"scale": 1}},
        "pos_embedding": PARAMS["pos_embedding"],
    }
    new = NESTED.with_head(NESTED.without_head(PARAMS), {"kernel": np.ones((4, 5))})
    assert NESTED.num_classes(new) == 5
    assert new["heads"]["norm"] == {"scale": 1}
    mask = trainable_mask(
        {"heads": {"head": {"kernel": np.ones(1)}}, "pos_embedding": np.ones(1)},
        ["backbone"],
        NESTED,
    )
    assert mask == {"heads": {"head": {"kernel": True}}, "pos_embedding": False}


def test_a_head_that_is_not_there_is_said():
    with pytest.raises(
        UserError, match=r"no dense layer 'heads/head'.* pos_embedding.*head=\.\.\."
    ):
        trainable_mask({"pos_embedding": np.ones(2)}, ["backbone"], NESTED)


def test_params_without_a_stage_are_named_where_learning_rates_differ():
    vit = dataclasses.replace(NESTED, stages=(("layer{}", r"layer(\d+)/.*"),))
    params = {**PARAMS, "layer1": {"kernel": np.ones(2)}}
    with pytest.raises(UserError, match=r"have none: heads/norm/scale, pos_embedding\. Add them"):
        depth_scales(params, 0.5, vit)
    with pytest.raises(UserError, match=r"vit has no stages to decay over"):
        depth_scales(params, 0.5, NESTED)
