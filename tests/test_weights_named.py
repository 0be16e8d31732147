"""Published weights: the table against torchvision, and where their files are fetched from."""

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from bmjax.errors import UserError
from bmjax.weights import named
from bmjax.weights.named import fetch, imagenet_classes, list_weights, published
from bmjax.weights.published import PUBLISHED
from tests.weights_named_helpers import PREFIX, Server, serve


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve(monkeypatch) as state:
        yield state


def test_each_model_has_the_weights_that_torchvision_lists_for_it():
    assert list_weights("resnet18") == ["imagenet-v1"]
    assert list_weights("resnet50") == ["imagenet-v1", "imagenet-v2"]
    assert list_weights("mlp") == []
    assert len({weights.model for weights in PUBLISHED}) == 10
    assert len(PUBLISHED) == len({weights.url for weights in PUBLISHED}) == 17


def test_published_says_what_belongs_to_the_weights():
    weights = published("resnet50", "imagenet-v2")
    assert weights.url == "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"
    assert (weights.file_name, weights.sha256_prefix) == ("resnet50-11ad3fa6.pth", "11ad3fa6")
    assert (weights.crop_size, weights.resize_size) == (224, 232)
    assert (weights.top1, weights.num_params) == (80.858, 25_557_032)


def test_a_wrong_name_is_answered_with_those_that_exist():
    with pytest.raises(UserError, match=r"weights of resnet18 'imagenet-v2'.*Known: imagenet-v1\."):
        published("resnet18", "imagenet-v2")
    for model in ("mlp", "cnn", "resnet_tiny"):
        with pytest.raises(UserError, match=rf"for {model}.*resnet18, .*wide_resnet101_2.*own"):
            published(model, "imagenet-v1")


def test_class_names_are_imagenets():
    names = imagenet_classes()
    assert len(names) == len(set(names)) == 1000
    # The ends, and the last dog before the wolves: known positions of the usual order.
    assert (names[0], names[268], names[999]) == ("tench", "Mexican hairless", "toilet tissue")


def test_every_value_is_torchvisions():
    models = pytest.importorskip("torchvision").models
    family = ["resnet*", "resnext*", "wide_resnet*"]
    assert {weights.model for weights in PUBLISHED} == set(
        models.list_models(module=models, include=family)
    )
    for model in dict.fromkeys(weights.model for weights in PUBLISHED):
        theirs = {f"imagenet-v{entry.name[-1]}": entry for entry in models.get_model_weights(model)}
        assert list_weights(model) == list(theirs)
        for name, entry in theirs.items():
            ours, transforms = published(model, name), entry.transforms()
            accuracy = entry.meta["_metrics"]["ImageNet-1K"]
            assert ours.url == entry.url
            assert [ours.crop_size] == transforms.crop_size
            assert [ours.resize_size] == transforms.resize_size
            assert ours.interpolation == transforms.interpolation.value
            assert transforms.antialias
            assert (list(ours.mean), list(ours.std)) == (transforms.mean, transforms.std)
            assert (ours.top1, ours.top5) == (accuracy["acc@1"], accuracy["acc@5"])
            assert ours.num_params == entry.meta["num_params"]
            assert ours.file_mib == entry.meta["_file_size"]
            assert imagenet_classes() == tuple(entry.meta["categories"])


def test_fetch_takes_the_mirror_and_the_cache_that_the_environment_names(
    server, tmp_path, monkeypatch
):
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path))
    monkeypatch.setenv("BMJAX_WEIGHTS_URL", f"{server.url}/mirror/")
    console = Console(file=io.StringIO())
    with pytest.raises(UserError, match=r"begins with .*, not f37072fd"):
        fetch("resnet18", "imagenet-v1", console)
    assert server.paths == ["/mirror/resnet18-f37072fd.pth"]
    entry = published("resnet18", "imagenet-v1")
    fitting = type(entry)(**{**vars(entry), "url": f"https://example.org/net-{PREFIX}.pth"})
    monkeypatch.setattr(named, "PUBLISHED", (fitting,))
    assert fetch("resnet18", "imagenet-v1", console) == tmp_path / "weights" / f"net-{PREFIX}.pth"
    assert server.paths[1:] == [f"/mirror/net-{PREFIX}.pth"]
