"""Which of the things in a checkpoint are its weights."""

import collections
import pickle

import numpy as np
import pytest

from bmjax.errors import UserError
from bmjax.weights import state_dicts
from bmjax.weights.files import read_checkpoint, read_state_dict, write_state_dict
from bmjax.weights.state_dicts import the_plain_one
from tests.weights_files_helpers import (
    assert_equal,
    count,
    dict_piece,
    packed,
    pickled,
    piece,
    several,
    tensors_piece,
)

ONE = {"a.weight": count(2, 3), "a.bias": count(2)}
TWO = {"a.weight": count(2, 3) + 1, "a.bias": count(2) + 1}
BOTH = [*ONE.values(), *TWO.values()]


def two(tmp_path, first, second):
    return several(tmp_path, **{first: ONE, second: TWO})


@pytest.mark.parametrize(
    ("plain", "average"),
    [
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("model", "ema"),
        ("net", "averaged"),
        ("generator", "generator_ema"),
        ("model_ema", "teacher"),
        ("weights", "criterion"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_of_several_the_plain_one_is_read_and_said(tmp_path, plain, average, turned):
    keys = (average, plain) if turned else (plain, average)
    path = two(tmp_path, *keys)
    read = read_checkpoint(path)
    assert_equal(read.named, TWO if turned else ONE)
    assert read.notes == (
        f"note: {path} holds 2 state dicts. {plain} is read, and not {average}; --weights-key "
        "says otherwise.",
    )
    assert_equal(read_state_dict(path, average), ONE if turned else TWO)


def test_what_is_not_clear_is_refused_with_the_keys(tmp_path):
    for keys in (("teacher", "student"), ("model", "net"), ("ema", "swa"), ("ema", "criterion")):
        path = two(tmp_path, *keys)
        with pytest.raises(UserError, match=rf"several state dicts \({keys[0]}, {keys[1]}\)"):
            read_state_dict(path)
        assert_equal(read_state_dict(path, keys[1]), TWO)
        with pytest.raises(UserError, match=rf"no state dict 'emma'.* are: {keys[0]}, {keys[1]}\."):
            read_state_dict(path, "emma")


def test_a_single_one_is_read_wherever_it_stands(tmp_path):
    inner = tensors_piece(ONE)
    places = {
        "": inner,
        "x": dict_piece(x=inner),
        "state.model": dict_piece(state=dict_piece(model=inner), epoch=piece(1)),
        "model": dict_piece(state=dict_piece(model=inner)),
        "0": b"]" + inner + b"a",
    }
    for key, written in places.items():
        path = packed(tmp_path, pickled(written), list(ONE.values()))
        for asked in {key, ""}:
            read = read_checkpoint(path, asked)
            assert_equal(read.named, ONE)
            assert read.notes == ()


def test_tensors_of_optimizers_and_metrics_are_no_state_dicts(tmp_path):
    moments = dict_piece(exp_avg=tensors_piece(TWO, 2))
    path = packed(
        tmp_path,
        pickled(
            dict_piece(
                state_dict=tensors_piece(ONE),
                optimizer=moments,
                opt2=dict_piece(param_groups=piece([1]), state=moments),
                callbacks=dict_piece(best=moments),
                loss=tensors_piece({"best": np.float32(0)}, 4),
            )
        ),
        [*BOTH, np.zeros((), np.float32)],
    )
    read = read_checkpoint(path)
    assert_equal(read.named, ONE)
    assert read.notes == ()


def test_entries_that_are_no_tensors_are_left_out(tmp_path):
    tensors = tensors_piece(ONE)[:-1]  # before the end of its items
    extra = piece("epoch") + piece(5) + piece("fc._extra_state") + piece({"a": 1})
    extra += piece("history") + piece(collections.defaultdict(list, loss=[0.5]))
    path = packed(tmp_path, pickled(tensors + extra + b"u"), list(ONE.values()))
    assert_equal(read_state_dict(path), ONE)


def module(parameters, buffers=b"}", **parts):
    """A whole model, as torch.save(model) writes it."""
    attributes = dict_piece(
        training=piece(False),
        _parameters=parameters,
        _buffers=buffers,
        _modules=dict_piece(**parts),
    )
    return b"cmine.nets\nNet\n)\x81" + attributes + b"b"


def test_a_whole_model_is_read_as_its_state_dict(tmp_path):
    mean = {"running_mean": count(2) + 5}
    norm = module(tensors_piece({"weight": TWO["a.bias"]}, 2), tensors_piece(mean, 3))
    linear = module(tensors_piece({name[2:]: array for name, array in ONE.items()}))
    whole = module(dict_piece(unused=b"N"), a=linear, b=module(b"}", norm=norm))
    arrays = [*ONE.values(), TWO["a.bias"], mean["running_mean"]]
    expected = {**ONE, "b.norm.weight": arrays[2], "b.norm.running_mean": arrays[3]}
    for written in (whole, dict_piece(epoch=piece(1), model=whole)):
        assert_equal(read_state_dict(packed(tmp_path, pickled(written), arrays)), expected)


def test_models_within_themselves_come_to_an_end(tmp_path, monkeypatch):
    # Modules that hold themselves twice, and dictionaries that do.
    again = b"cmine\nNet\n)\x81q\x01}(" + piece("_parameters") + b"}" + piece("_modules")
    again += b"}(" + piece("a") + b"h\x01" + piece("b") + b"h\x01uub"
    nested = b"}q\x01(" + b"".join(piece(f"k{number}") + b"h\x01" for number in range(60)) + b"u"
    for written, message in ((again, "too many parts"), (nested, "too many dictionaries")):
        with pytest.raises(UserError, match=message):
            read_state_dict(packed(tmp_path, pickled(written), ()))


def test_a_prefix_may_be_the_key(tmp_path):
    named = {f"module.encoder_{one}.{name}": array for one in "qk" for name, array in ONE.items()}
    named["module.queue"] = count(4)
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"a{suffix}"
        write_state_dict(path, named)
        for key in ("encoder_q", "module.encoder_q"):
            assert read_state_dict(path, key).keys() == ONE.keys()
        message = r"none of its names stands under 'encoder'.*begin with module"
        with pytest.raises(UserError, match=message):
            read_state_dict(path, "encoder")


def test_never_more_than_ten_keys_are_named(tmp_path):
    many = {f"net{number}": tensors_piece(ONE) for number in range(30)}
    path = packed(tmp_path, pickled(dict_piece(**many)), list(ONE.values()))
    for key in ("", "other"):
        with pytest.raises(UserError, match=r"net9 and 20 more"):
            read_state_dict(path, key)
    numbers = packed(tmp_path, pickle.dumps({str(n): n for n in range(30)}, 2), ())
    with pytest.raises(UserError, match=r"'9' and 20 more"):
        read_state_dict(numbers)


def test_the_outermost_plain_key_counts():
    assert the_plain_one(["teacher.state_dict", "state_dict"]) == "state_dict"
    assert the_plain_one(["ema.model", "model"]) == "model"
    assert the_plain_one(["a.model", "b.model"]) is None
    assert state_dicts.unwrapped("module.layer1._orig_mod.0.weight") == "layer1.0.weight"
    assert state_dicts.unwrapped("module") == "module"
