import io
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bmjax.data import preprocess
from bmjax.data.preprocess import EvaluationTransform, decode
from bmjax.errors import UserError


def read_image(path, shape):
    """An image file as the input of a model that takes `shape`, as `predict` reads it."""
    height, width, channels = shape
    return preprocess.squash(height, width).apply(decode(path, channels))


FIXTURES = Path(__file__).parent / "data" / "images"


def noise(width, height, channels=3, seed=0):
    """Black and white noise overshoots most where bicubic."""
    pixels = np.random.default_rng(seed).integers(0, 2, (height, width, channels)) * 255
    return Image.fromarray(pixels.astype(np.uint8)[:, :, slice(None) if channels == 3 else 0])


def triangle(x):
    return np.maximum(1 - np.abs(x), 0)


def cubic(x):
    """Keys' kernel with a = -1/2, by its two pieces."""
    x = np.abs(x)
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


def resample_columns(pixels, length, kernel):
    """Resizes the second axis in float64, the kernel stretched where it shrinks; rounds."""
    scale = pixels.shape[1] / length
    centres = (np.arange(length)[:, None] + 0.5) * scale
    weights = kernel((np.arange(pixels.shape[1]) + 0.5 - centres) / max(scale, 1))
    weights /= weights.sum(1, keepdims=True)
    return np.floor(np.einsum("ow,hwc->hoc", weights, pixels) + 0.5).clip(0, 255)


def resample(pixels, height, width, kernel):
    """Along the width first, then along the height, as Pillow."""
    rows = resample_columns(pixels.astype(np.float64), width, kernel)
    return resample_columns(rows.swapaxes(0, 1), height, kernel).swapaxes(0, 1)


@pytest.mark.parametrize(
    ("size", "resized"),  # width, height; height, width
    [
        ((61, 45), (24, 32)),  # 24 * 61 / 45 = 32.5
        ((45, 61), (32, 24)),
        ((7, 90), (308, 24)),
        ((24, 24), (24, 24)),
        ((10, 13), (31, 24)),
    ],
)
@pytest.mark.parametrize(("interpolation", "kernel"), [("bilinear", triangle), ("bicubic", cubic)])
def test_resizing_matches_float64(size, resized, interpolation, kernel):
    picture = noise(*size)
    expected = resample(np.asarray(picture), resized[0], resized[1], kernel)
    got = EvaluationTransform(24, resized, interpolation).apply(picture).astype(int)
    squashed = EvaluationTransform(resized, resized, interpolation).apply(picture)
    assert np.abs(got - expected).max() <= 1
    assert (got != expected).mean() < 0.02  # Pillow's weights of 22 bits send some halves down
    np.testing.assert_array_equal(squashed, got)


@pytest.mark.parametrize(
    ("interpolation", "row", "column", "expected"),
    [
        # Shrunk by two, a triangle weighs the pixels at distances 1/2, 1/2, 3/2 by 3, 3, 1 of 7:
        # (3 * 0 + 3 * 70 + 140) / 7 = 50, and so on.
        ("bilinear", [0, 70, 140, 210], [0, 7, 14, 21], [[55, 165], [66, 176]]),
        # The cubic weighs those at 1/2, 1/2, 3/2, 5/2 by 111, 111, 29, -9 of 242.
        ("bicubic", [0, 242, 0, 0], [0, 0, 0, 0], [[111, 29], [111, 29]]),
        ("bicubic", [242, 242, 242, 0], [0, 0, 0, 0], [[251, 131], [251, 131]]),
        # (111 + 111 + 29) / 242 * 255 = 264.5 is white, -9 / 242 * 255 is black.
        ("bicubic", [255, 255, 255, 0], [0, 0, 0, 0], [[255, 138], [255, 138]]),
        ("bicubic", [0, 0, 0, 242], [0, 0, 0, 0], [[0, 111], [0, 111]]),
    ],
)
def test_four_by_four_to_two_by_two_by_hand(interpolation, row, column, expected):
    pixels = np.array(row)[None, :] + np.array(column)[:, None]
    got = EvaluationTransform(2, 2, interpolation).apply(Image.fromarray(pixels.astype(np.uint8)))
    np.testing.assert_array_equal(got[:, :, 0], expected)


@pytest.mark.parametrize(
    ("crop", "expected"),  # of 1, 2, 3, 4, 5, 6, 7 for the odd and 1, ..., 8 for the even length
    [
        ((7, 5), [2, 3, 4, 5, 6]),
        ((7, 4), [3, 4, 5, 6]),  # a half goes to the even number: 1.5 to 2
        ((7, 2), [3, 4]),  # and 2.5 to 2
        ((7, 6), [1, 2, 3, 4, 5, 6]),  # and 0.5 to 0
        ((7, 9), [0, 1, 2, 3, 4, 5, 6, 7, 0]),
        ((7, 10), [0, 1, 2, 3, 4, 5, 6, 7, 0, 0]),  # the larger padding comes last
        ((8, 5), [3, 4, 5, 6, 7]),
        ((8, 4), [3, 4, 5, 6]),
        ((8, 11), [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]),
    ],
)
def test_crops_and_padding_by_hand(crop, expected):
    length, size = crop
    line = np.arange(1, length + 1, dtype=np.uint8)
    across, down = (
        Image.fromarray(np.broadcast_to(a, (length, length)).copy()) for a in (line, line[:, None])
    )
    got = EvaluationTransform(0, (1, size)).apply(across)
    assert got.shape == (1, size, 1)
    assert got[0, :, 0].tolist() == expected
    assert EvaluationTransform(0, (size, 1)).apply(down)[:, 0, 0].tolist() == expected


def test_a_long_picture_is_padded_on_one_side_and_cut_on_the_other():
    picture = Image.new("RGB", (9, 2), (1, 2, 3))
    got = EvaluationTransform(0, (5, 4)).apply(picture)
    assert got[1:3].tolist() == [[[1, 2, 3]] * 4] * 2
    assert not got[[0, 3, 4]].any()


def test_transforms_are_kept_as_json():
    for transform in (
        EvaluationTransform(256, 224),
        EvaluationTransform((9, 8), (7, 6), "bicubic"),
    ):
        kept = json.loads(json.dumps(transform.to_dict()))
        assert EvaluationTransform.from_dict(kept) == transform
    assert EvaluationTransform(0, 5).to_dict() == {
        "resize_size": 0,
        "crop_size": 5,
        "interpolation": "bilinear",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": 0}, "crop_size is 0"),
        ({"crop_size": 2.5}, "crop_size is 2.5"),
        ({"crop_size": [4, 0]}, r"crop_size is \(4, 0\)"),
        ({"crop_size": [4, 4, 3]}, "crop_size"),
        ({"resize_size": -1}, "resize_size is -1"),
        ({"resize_size": True}, "resize_size is True"),
        ({"resize_size": [0, 4]}, "resize_size"),
        ({"resize_size": None}, "resize_size is None"),
        ({"interpolation": "bilinaer"}, "unknown interpolation 'bilinaer'. Did you mean bilinear"),
        ({"crop": 4}, "unknown setting of the evaluation transform 'crop'. Did you mean crop_size"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    fine = {"resize_size": 5, "crop_size": 4, "interpolation": "bicubic"}
    with pytest.raises(UserError, match=message):
        EvaluationTransform.from_dict({**fine, **settings})


def test_missing_settings_and_wrong_pictures_are_named():
    with pytest.raises(UserError, match="lacks crop_size, interpolation"):
        EvaluationTransform.from_dict({"resize_size": 5})
    with pytest.raises(UserError, match="decode it first"):
        EvaluationTransform(5, 4).apply(Image.new("RGBA", (9, 9)))
    with pytest.raises(UserError, match="9000 by 1 pixels would become 9216000 by 1024"):
        EvaluationTransform(1024, 4).apply(Image.new("L", (9000, 1)))


def test_pixels_are_those_of_torchvision_as_it_was():
    """Its output for tiny files is kept; `experiments/certify_preprocess.py` wrote both."""
    golden = np.load(FIXTURES / "golden.npz")
    assert len(golden) == 6
    for key in golden:
        name, resize, crop, interpolation = key.split()
        transform = EvaluationTransform(int(resize), int(crop), interpolation)
        got = transform.apply(decode(FIXTURES / name)).astype(int)
        # JPEG decoders may differ in the last bit.
        assert np.abs(got - golden[key]).max() <= 1, key


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "resize", "crop"),
    [((61, 45), 32, 28), ((45, 64), 40, 33), ((9, 130), 20, 28), ((28, 28), 28, 28)],
)
def test_pixels_are_those_of_torchvision(size, resize, crop, interpolation):
    presets = pytest.importorskip("torchvision.transforms._presets")
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tv

    theirs = presets.ImageClassification(
        resize_size=resize, crop_size=crop, interpolation=InterpolationMode(interpolation)
    )
    smooth = noise(*size).resize(size, box=(0, 0, size[0] / 4, size[1] / 4))
    got = EvaluationTransform(resize, crop, interpolation).apply(smooth)
    normalization = preprocess.Normalization(theirs.mean, theirs.std)
    ours = preprocess.normalize(jnp.asarray(got[None], jnp.float32) / 255, normalization)[0]
    of_pillow = theirs(smooth).permute(1, 2, 0).numpy()
    of_tensor = theirs(tv.pil_to_tensor(smooth)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours, of_pillow, atol=1e-6, rtol=0)
    if interpolation == "bilinear":
        difference = np.abs(ours - of_tensor) * np.array(theirs.std)[None, None, :]
        assert difference.max() <= 1 / 255 + 1e-6


# What a camera wrote of the picture with rows (1, 2, 3) and (4, 5, 6), by where row 0 and column 0
# of the file are to be seen, as EXIF 2.3 has it on its tag 274.
STORED = {
    1: [[1, 2, 3], [4, 5, 6]],  # top, left
    2: [[3, 2, 1], [6, 5, 4]],  # top, right
    3: [[6, 5, 4], [3, 2, 1]],  # bottom, right
    4: [[4, 5, 6], [1, 2, 3]],  # bottom, left
    5: [[1, 4], [2, 5], [3, 6]],  # left, top
    6: [[3, 6], [2, 5], [1, 4]],  # right, top
    7: [[6, 3], [5, 2], [4, 1]],  # right, bottom
    8: [[4, 1], [5, 2], [6, 3]],  # left, bottom
    9: [[1, 2, 3], [4, 5, 6]],  # no such orientation
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_are_turned_upright(tmp_path, orientation, kind, dtype):
    stored = np.array(STORED[orientation], dtype) * (257 if dtype == np.uint16 else 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / f"a.{kind}", exif=exif)
    for channels in (1, 3):
        pixels = np.asarray(decode(tmp_path / f"a.{kind}", channels)).reshape(2, 3, channels)
        for channel in range(channels):
            np.testing.assert_array_equal(pixels[:, :, channel], [[1, 2, 3], [4, 5, 6]])


def test_a_damaged_exif_block_does_no_harm(tmp_path):
    Image.new("L", (3, 2), 9).save(tmp_path / "a.png", exif=b"Exif\0\0no such thing")
    assert decode(tmp_path / "a.png").size == (3, 2)


RED, CLEAR_BLUE = (200, 10, 30, 255), (20, 40, 220, 0)


def two_pixels(mode):
    """A red pixel and a blue one, transparent where the mode knows that, and what is to come."""
    rgba = Image.new("RGBA", (2, 1))
    rgba.putdata([RED, CLEAR_BLUE])
    picture = rgba if mode == "RGBA" else rgba.convert("RGB")
    # ITU-R 601-2: (299 R + 587 G + 114 B) / 1000 = 69.09 and 54.54.
    expected = [[69] * 3, [55] * 3] if mode in ("L", "LA") else [RED[:3], CLEAR_BLUE[:3]]
    if mode.startswith("P"):
        picture = picture.quantize(2)
        if mode != "P":
            index = picture.getpixel((1, 0))
            whole = bytes(0 if i == index else 255 for i in range(2))
            picture.info["transparency"] = index if mode == "P, one" else whole
    elif mode == "LA":
        picture = rgba.convert("LA")
    elif mode == "RGB, one":
        picture.info["transparency"] = CLEAR_BLUE[:3]
    elif mode != "RGBA":
        picture = picture.convert(mode)
    return picture, expected


@pytest.mark.parametrize(
    "mode", ["L", "LA", "RGB", "RGB, one", "RGBA", "P", "P, one", "P, some", "CMYK"]
)
def test_modes_become_rgb_and_gray_without_transparency(tmp_path, mode):
    picture, expected = two_pixels(mode)
    path = tmp_path / f"a.{'tiff' if mode == 'CMYK' else 'png'}"
    info = {k: v for k, v in picture.info.items() if k == "transparency"}
    picture.save(path, **info)
    with Image.open(path) as saved:
        assert saved.has_transparency_data == (bool(info) or mode in ("LA", "RGBA"))
    rgb = decode(path)
    assert np.asarray(rgb).tolist() == [[list(pixel) for pixel in expected]]
    assert np.asarray(decode(path, 1)).tolist() == [[69, 55]]
    assert not rgb.has_transparency_data


def test_jpeg_files_of_cmyk_are_not_inverted():
    """Adobe's, and so Pillow's, keep CMYK inverted; a yellow disc lies on dark green."""
    with Image.open(FIXTURES / "cmyk.jpg") as opened:
        assert opened.mode == "CMYK"
        assert "adobe" in opened.info
    picture = decode(FIXTURES / "cmyk.jpg")
    assert np.abs(np.array(picture.getpixel((19, 15))) - (250, 245, 10)).max() <= 25
    assert np.abs(np.array(picture.getpixel((42, 35))) - (5, 0, 20)).max() <= 25


def test_jpeg_files_are_decoded_at_full_resolution(tmp_path):
    noise(160, 120).save(tmp_path / "a.jpg", quality=95)
    got = EvaluationTransform(15, 15).apply(decode(tmp_path / "a.jpg"))
    with Image.open(tmp_path / "a.jpg") as opened:
        expected = resample(np.asarray(opened), 15, 20, triangle)[:, 2:17]
    assert np.abs(got - expected).max() <= 1


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_both_decoders_of_jpeg_give_the_same_pixels(mode, progressive, subsampling, monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    files = []
    for width, height, quality in [(64, 48, 75), (31, 50, 95), (17, 9, 30)]:
        files.append(io.BytesIO())
        options = {"quality": quality, "progressive": progressive, "subsampling": subsampling}
        noise(width, height).convert(mode).save(files[-1], "JPEG", **options)
    used, by_simplejpeg = [], simplejpeg.decode_jpeg

    def count(*arguments):
        used.append(arguments)
        return by_simplejpeg(*arguments)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", count)
    faster = [np.asarray(decode(file, channels)) for file in files for channels in (1, 3)]
    assert len(used) == 6
    monkeypatch.setattr(preprocess, "_has_simplejpeg", lambda: False)
    for expected in (decode(file, channels) for file in files for channels in (1, 3)):
        np.testing.assert_array_equal(faster.pop(0), np.asarray(expected))
    assert len(used) == 6


def test_files_may_be_open_or_in_memory():
    content = (FIXTURES / "turned.jpg").read_bytes()
    expected = np.asarray(decode(FIXTURES / "turned.jpg"))
    np.testing.assert_array_equal(decode(io.BytesIO(content)), expected)
    with open(FIXTURES / "turned.jpg", "rb") as file:
        np.testing.assert_array_equal(decode(file), expected)
        assert not file.closed
    with pytest.raises(UserError, match="the file cannot be read"):
        decode(io.BytesIO(content[:-9]))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "LA", "I;16", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_files_of_any_mode_are_read(tmp_path, mode, channels):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (20, 10)).save(path)
    pixels = read_image(path, [8, 6, channels])
    assert pixels.shape == (8, 6, channels)
    assert pixels.dtype == np.uint8


def test_pictures_are_read_squashed_to_the_shape_of_a_model(tmp_path):
    path = tmp_path / "a.png"
    noise(40, 30).save(path)
    got = read_image(str(path), (8, 6, 3)).astype(int)
    assert np.abs(got - resample(np.asarray(noise(40, 30)), 8, 6, triangle)).max() <= 1
    batch = np.asarray(noise(40, 30))[None]
    expected = resample(batch[0], 7, 7, triangle)
    assert np.abs(preprocess.resize_all(batch, 7)[0].astype(int) - expected).max() <= 1


def test_sixteen_bits_are_scaled_and_unknown_ranges_refused(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", (16, 16, 1))[..., 0]
    np.testing.assert_array_equal(pixels.ravel(), np.arange(256))
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "b.tiff")
    with pytest.raises(UserError, match="floats, whose range is not known"):
        read_image(tmp_path / "b.tiff", (16, 16, 1))


@pytest.mark.parametrize("cut", [1, 2, 40, 900])
@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {})]
)
def test_files_that_are_cut_off_are_named(tmp_path, kind, options, cut):
    whole = io.BytesIO()
    noise(64, 48).save(whole, kind, **options)
    # The last 32 bytes of a PNG file hold little but checksums: without, the picture is whole.
    (tmp_path / "cut").write_bytes(whole.getvalue()[: -cut - 32 * (kind == "PNG")])
    with pytest.raises(UserError, match=r"cut cannot be read as an image .* may be cut off"):
        decode(tmp_path / "cut")


def test_files_that_are_no_images_are_named(tmp_path, monkeypatch):
    (tmp_path / "text.jpg").write_text("hello")
    damaged = io.BytesIO()
    noise(64, 48).save(damaged, "PNG")
    content = damaged.getvalue()
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "damaged.png").write_bytes(content[:60] + bytes(20) + content[80:])
    for name in ("text.jpg", "empty.png", "damaged.png"):
        with pytest.raises(UserError, match=f"{name} cannot be read as an image"):
            decode(tmp_path / name)
    for name in ("none.png", ""):
        with pytest.raises(UserError, match=r"there is no file .* Check the path"):
            decode(tmp_path / name)
    (tmp_path / "bomb.png").write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"bomb.png has too many pixels .* Make it smaller"):
        decode(tmp_path / "bomb.png")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("denied")

    path = tmp_path / "locked.png"
    path.write_bytes(b"")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"locked.png cannot be read .denied.*permissions"):
        decode(path)


def test_pixel_statistics_match_float64():
    pixels = np.random.default_rng(1).integers(0, 255, (7, 5, 4, 3)).astype(np.uint8)
    pixels[..., 2] = 9
    got = preprocess.pixel_statistics(pixels)
    scaled = pixels.astype(np.float64) / 255
    np.testing.assert_allclose(got.mean, scaled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(got.std[:2], scaled.std((0, 1, 2))[:2], rtol=1e-12)
    assert got.std[2] == 1.0
