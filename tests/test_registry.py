import sys
import types
from functools import partial
from importlib import metadata
from typing import Any, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import bmjax
from bmjax.errors import UserError
from bmjax.models import MLP, TorchNames, architecture_of, find, registry
from tests.own_models import PATCHES, Bridged, Patches, bridged

pytestmark = pytest.mark.usefixtures("own_names")


def test_a_registered_model_is_made_by_name():
    bmjax.register_model("patches", Patches, **PATCHES)
    assert "patches" in bmjax.list_models()
    model = bmjax.create_model("patches", num_classes=5, width=6)
    assert model == Patches(5, width=6)
    assert find("patches").epochs == 20
    bmjax.register_model("factory", lambda num_classes, dtype=None: MLP(num_classes, dtype=dtype))
    assert find("factory").options == ("dtype",)
    assert find("patches").options == ()
    assert bmjax.create_model("factory", 2, dtype=jnp.bfloat16) == MLP(2, dtype=jnp.bfloat16)


CELL = """
import chex
import flax.linen as nn
import jax
class Net(nn.Module):
    num_classes: int
    def __call__(self, images):
        return images
bmjax.register_model("net", Net)
"""


def test_a_cell_of_a_notebook_may_run_twice():
    notebook = {"bmjax": bmjax, "__name__": "__main__"}
    exec(CELL, notebook)
    first = find("net").make
    exec(CELL, notebook)
    assert find("net").make is notebook["Net"] is not first
    bmjax.register_model("half", partial(Patches, width=4))
    bmjax.register_model("half", partial(Patches, width=4))


@pytest.mark.parametrize(
    ("name", "make", "options", "message"),
    [
        ("mlp", Patches, {}, "a model 'mlp' already, one of bmjax's own. Choose another name"),
        ("mine", nn.Dense, {}, r"a model 'mine' already, made by tests\.own_models\.Patches"),
        ("mine", partial(Patches, width=3), {}, "a model 'mine' already"),
        ("a/b", Patches, {}, "'a/b' cannot be the name of a model"),
        ("--x", Patches, {}, "cannot be the name"),
        ("other", Patches(3), {}, r"needs what makes it: a class of flax\.linen\.Module"),
        ("other", lambda: Patches(3), {}, r"called as make\(num_classes=N\).*Add num_classes"),
        ("other", lambda num_classes, width: None, {}, "defaults for the others"),
        ("other", Patches, {"stages": {"a": "("}}, r"'\(', which is no regular expression"),
        ("other", Patches, {"stages": {"a{}": "b"}}, "1 places for numbers, but 'b' has 0 groups"),
        ("other", Patches, {"options": ["width"]}, "option 'width', but settings only know of"),
        ("other", Patches, {"epochs": 0}, "epochs of the model 'other' is 0"),
    ],
)
def test_misuse_is_named(name, make, options, message):
    bmjax.register_model("mine", Patches)
    before = bmjax.list_models()
    with pytest.raises(UserError, match=message):
        bmjax.register_model(name, make, **options)
    assert bmjax.list_models() == before


def test_torch_names_of_ones_own_convert_both_ways():
    names = TorchNames(
        (("embed", "patch.proj"), (r"block(\d+)", "blocks.{}.fc"), ("classifier", "h"))
    )
    shape = (12, 12, 3)
    bmjax.register_model("linear", Linear, head="classifier", torch=names, image_shape=shape)
    model = bmjax.create_model("linear", 4)
    params = model.init(jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    state_dict = bmjax.to_torchvision({"params": params}, "linear")
    assert {name: value.shape for name, value in state_dict.items()} == {
        "patch.proj.weight": (5, 3, 4, 4),
        "patch.proj.bias": (5,),
        "blocks.1.fc.weight": (6, 5),
        "blocks.1.fc.bias": (6,),
        "h.weight": (4, 6),
        "h.bias": (4,),
    }
    back = bmjax.from_torchvision(state_dict, "linear")
    chex.assert_trees_all_equal(back["params"], params)
    headless = {name: value for name, value in state_dict.items() if name[:2] != "h."}
    assert "classifier" not in bmjax.from_torchvision(headless, "linear", head=False)["params"]


class Linear(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images):
        hidden = nn.Conv(5, (4, 4), (4, 4), name="embed")(images).mean((1, 2))
        hidden = nn.Dense(6, name="block1")(hidden)
        return nn.Dense(self.num_classes, name="classifier")(hidden)


def test_what_makes_no_linen_module_is_said_when_it_is_made():
    make: Any = lambda num_classes: Bridged  # noqa: E731
    bmjax.register_model("wrong", make)
    with pytest.raises(UserError, match=r"'wrong' gives a .*Wrap an NNX module by .*ToLinen"):
        bmjax.create_model("wrong", 3)


def test_an_unknown_model_says_how_ones_own_is_known():
    bmjax.register_model("patches", Patches)
    with pytest.raises(UserError, match=r"unknown model 'patchez'.*mean patches.*--import FILE"):
        bmjax.create_model("patchez", 3)


def announce(monkeypatch, **made):
    """Lets an installed package announce models under `bmjax.models`."""
    package = types.ModuleType("their_package")
    vars(package).update(made)
    monkeypatch.setitem(sys.modules, "their_package", package)
    points = metadata.EntryPoints(
        metadata.EntryPoint(name, f"their_package:{name}", registry.ENTRY_POINTS)
        for name in [*made, "absent"]
    )
    asked = []

    def entry_points(group):
        asked.append(group)
        return points

    monkeypatch.setattr(registry.metadata, "entry_points", entry_points)
    return asked


def test_an_installed_package_announces_models(monkeypatch):
    module = types.ModuleType("registers_itself")
    asked = announce(monkeypatch, theirs=Patches, silent=module, wrong=3)
    assert {"theirs", "silent"} <= set(bmjax.list_models())
    assert bmjax.create_model("theirs", 4) == Patches(4)
    assert set(asked) == {"bmjax.models"}
    with pytest.raises(UserError, match="announces the model 'silent', but does not register it"):
        bmjax.create_model("silent", 4)
    with pytest.raises(UserError, match="'wrong' of an installed package cannot be loaded"):
        bmjax.create_model("wrong", 4)
    with pytest.raises(UserError, match=r"'absent' .* their_package:absent \(AttributeError"):
        bmjax.create_model("absent", 4)
    # What is broken stands in nobody's way.
    assert bmjax.create_model("mlp", 4) == MLP(4)


def test_a_module_has_the_record_of_its_kin():
    bmjax.register_model("patches", Patches, **PATCHES)
    record = architecture_of(Patches(3))
    assert (record.name, record.head, record.own) == ("patches", "classifier", True)
    assert record.make(num_classes=3) == Patches(3)
    other = architecture_of(Patches(3, width=5))
    assert (other.name, other.head) == ("Patches", "classifier")
    tiny = bmjax.create_model("resnet8", 3)
    assert architecture_of(tiny).name == "resnet8"
    assert architecture_of(tiny).options == ("dtype", "norm", "remat")
    made = architecture_of(tiny).make(num_classes=3, norm="group")
    assert (made.norm, made.num_blocks) == ("group", 1)
    assert architecture_of("mlp") is find("mlp")
    assert architecture_of(bridged(3)).name == "ToLinen"
    with pytest.raises(UserError, match=r"is a Bridged, but must be .*ToLinen"):
        architecture_of(cast(Any, Bridged(3, rngs=nnx.Rngs(0))))
