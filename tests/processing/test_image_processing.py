"""LavitImageProcessor and load_image: every kind of image in, the model's pixel values or a clear error out."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from modeling_lavit import LavitConfig, LavitImageProcessor


FIXTURES = Path(__file__).parents[1] / "fixtures" / "preprocess"
REFERENCE_IMAGES = ["img0_96x60_RGB.png", "img1_50x80_RGB.png", "img2_64x64_RGBA.png", "img3_40x30_L.png"]
RED = (255, 0, 0)


@pytest.fixture
def processor() -> LavitImageProcessor:
    return LavitImageProcessor(size={"height": 48, "width": 48})


@pytest.fixture
def photo() -> Image.Image:
    return Image.open(FIXTURES / "img0_96x60_RGB.png")


def pixels(image: Image.Image, position: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel(position)


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def close(got: tuple[int, ...], want: tuple[int, ...], tolerance: int) -> bool:
    return max(abs(a - b) for a, b in zip(got, want, strict=True)) <= tolerance


def test_reference_images_give_the_reference_pixel_values_bit_by_bit():
    expected = load_file(FIXTURES / "expected.safetensors")
    processor = LavitImageProcessor(reference_compat=True)
    got = processor([FIXTURES / name for name in REFERENCE_IMAGES], return_tensors="pt")["pixel_values"]
    assert got.shape == (4, 3, 224, 224) and got.dtype == torch.float32
    assert torch.equal(got[:, :, ::14, ::14], expected["pixel_values_stride14"])
    torch.testing.assert_close(got.mean((2, 3)), expected["channel_mean"], rtol=0, atol=1e-6)
    torch.testing.assert_close(got.std((2, 3)), expected["channel_std"], rtol=0, atol=1e-4)


def test_default_differs_from_the_reference_in_the_transparent_image_alone():
    paths = [FIXTURES / name for name in REFERENCE_IMAGES]
    default = LavitImageProcessor()(paths, return_tensors="pt")["pixel_values"]
    compat = LavitImageProcessor()(paths, reference_compat=True, return_tensors="pt")["pixel_values"]
    assert [torch.equal(a, b) for a, b in zip(default, compat, strict=True)] == [True, True, False, True]


def test_size_is_taken_from_the_configuration_and_the_aspect_ratio_is_not_kept(processor, photo):
    assert processor(photo, return_tensors="np")["pixel_values"].shape == (1, 3, 48, 48)
    assert processor(photo, size={"height": 20, "width": 30}, return_tensors="np")["pixel_values"].shape[2:] == (
        20,
        30,
    )


def test_a_lazily_opened_truncated_image_is_refused_by_the_processor(processor):
    data = encoded(Image.effect_noise((64, 64), 50), "PNG")
    with pytest.raises(ValueError, match="truncated"):
        processor(Image.open(io.BytesIO(data[: len(data) // 2])))


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size, processor):
    for image in (Image.new("RGB", size), np.zeros((*size[::-1], 3), dtype=np.uint8), torch.zeros(3, *size[::-1])):
        with pytest.raises(ValueError, match=f"no pixels: its size is {size[0]}x{size[1]}"):
            processor(image)


def test_the_pixel_limit_is_an_option_of_calls_and_configuration(processor, photo):
    with pytest.raises(ValueError, match="max_image_pixels=1000"):
        processor(photo, max_image_pixels=1000)
    with pytest.raises(ValueError, match="max_image_pixels=1000"):
        LavitImageProcessor(max_image_pixels=1000)(np.asarray(photo))
    with pytest.raises(ValueError, match="max_image_pixels=1000"):
        LavitImageProcessor(max_image_pixels=1000)(FIXTURES / "img0_96x60_RGB.png")


def test_arrays_and_tensors_of_both_layouts_equal_the_image(processor, photo):
    want = processor(photo, return_tensors="pt")["pixel_values"]
    last = np.asarray(photo)
    first = np.moveaxis(last, -1, 0)
    for image in (last, first, torch.tensor(first), last.astype(np.int64), last.astype(np.uint16) * 257, first[None]):
        assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], want)
    assert torch.equal(processor(last, input_data_format="channels_last", return_tensors="pt")["pixel_values"], want)


def test_grey_and_transparent_arrays_equal_their_images(processor):
    grey, clear = Image.open(FIXTURES / REFERENCE_IMAGES[3]), Image.open(FIXTURES / REFERENCE_IMAGES[2])
    for image in (grey, clear):
        want = processor(image, return_tensors="pt")["pixel_values"]
        got = processor(np.asarray(image), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(got, want, rtol=0, atol=0.02)
    black_and_white = np.array([[True, False]])
    assert processor(black_and_white, do_normalize=False, return_tensors="np")["pixel_values"].max() == 1


def test_floats_from_0_to_1_need_do_rescale_false_and_then_equal_the_image(processor, photo):
    unit = torch.tensor(np.moveaxis(np.asarray(photo), -1, 0)).float() / 255
    want = processor(photo, return_tensors="pt")["pixel_values"]
    for floats, rescale in ((unit, False), (unit.double(), False), (unit * 255, True)):
        got = processor(floats, do_rescale=rescale, return_tensors="pt")["pixel_values"]
        assert (got - want).abs().mean() < 0.005 and (got - want).abs().max() < 0.1
    with pytest.raises(ValueError, match="pass do_rescale=False"):
        processor(unit)


def test_floats_keep_their_precision_through_the_resize(processor):
    image = torch.full((3, 10, 10), 0.5003)
    got = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(got, torch.full((1, 3, 48, 48), 0.5003))


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.full((4, 4, 3), np.nan, dtype=np.float32), {}, "NaN or infinite"),
        (np.full((4, 4, 3), np.inf, dtype=np.float32), {"do_rescale": False}, "NaN or infinite"),
        (np.full((4, 4, 3), -1.0), {"do_rescale": False}, "between 0 and 1"),
        (np.full((4, 4, 3), 300.0), {}, "between 0 and 255"),
        (np.full((4, 4, 3), 300), {}, "between 0 and 255"),
        (np.zeros((4, 4, 3), dtype=np.uint8), {"do_rescale": False}, "integer values"),
        (np.zeros((5, 5, 7), dtype=np.uint8), {}, "channel"),
        (np.zeros((4,), dtype=np.uint8), {}, "2 or 3 dimensions"),
        (np.zeros((4, 4, 3), dtype=complex), {}, "complex"),
    ],
)
def test_arrays_that_are_no_images_are_refused(image, options, message, processor):
    with pytest.raises(ValueError, match=message):
        processor(image, **options)


def test_a_batch_equals_one_by_one(processor):
    paths = [FIXTURES / name for name in REFERENCE_IMAGES]
    batch = processor(paths, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch, torch.cat([processor(path, return_tensors="pt")["pixel_values"] for path in paths]))


def test_saving_and_loading_gives_an_equal_image_processor(tmp_path, photo):
    processor = LavitImageProcessor(size={"height": 48, "width": 48}, max_image_pixels=10**6, reference_compat=True)
    processor.save_pretrained(tmp_path)
    loaded = LavitImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert torch.equal(
        loaded(photo, return_tensors="pt")["pixel_values"], processor(photo, return_tensors="pt")["pixel_values"]
    )


@pytest.mark.skipif(
    getattr(AutoImageProcessor, "is_dummy", False), reason="this version of transformers has it with torchvision only"
)
def test_autoimageprocessor_finds_it_beside_a_lavit_config(tmp_path):
    LavitConfig().save_pretrained(tmp_path)
    LavitImageProcessor(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LavitImageProcessor and loaded.size["height"] == 48


def values(processor: LavitImageProcessor, image, **options) -> np.ndarray:
    """Pixel values from 0 to 1, (height, width) of the first channel, not resized."""
    options = {"do_resize": False, "do_normalize": False, "return_tensors": "np"} | options
    return processor(image, **options)["pixel_values"][0, 0]


@pytest.mark.parametrize(
    ("dtype", "levels", "expected"),
    [
        ("uint8", [0, 100, 255], [0, 100, 255]),
        ("uint16", [0, 257 * 100, 65535], [0, 100, 255]),
        ("uint16", [0, 257, 514], [0, 1, 2]),
        ("uint32", [0, 2**31, 2**32 - 1], [0, 128, 255]),
        ("int16", [0, 16384, 32767], [0, 128, 255]),
        ("int32", [0, 2**30, 2**31 - 1], [0, 128, 255]),
        ("int64", [0, 2**62, 2**63 - 1], [0, 128, 255]),
        *((dtype, [0, 100, 255], [0, 100, 255]) for dtype in ("int16", "int32", "int64", "uint32", "uint64")),
        ("int8", [0, 100, 127], [0, 100, 127]),
        ("bool", [0, 1, 1], [0, 255, 255]),
    ],
)
def test_integers_are_read_by_the_range_of_their_dtype_or_as_8_bits(processor, dtype, levels, expected):
    got = values(processor, np.array([levels], dtype=dtype))
    assert np.rint(got * 255).tolist() == [expected]


@pytest.mark.parametrize(
    ("dtype", "levels"), [("int32", [0, 65535]), ("int64", [0, 256]), ("uint32", [0, 4095]), ("int16", [-1, 255])]
)
def test_integers_that_are_neither_8_bits_nor_of_their_dtypes_range_are_refused(processor, dtype, levels):
    with pytest.raises(ValueError, match=f"from {levels[0]} to {levels[1]}.*for 16 bits give uint16"):
        processor(np.array([levels], dtype=dtype))


@pytest.mark.parametrize("high", [1.004, 1.02, 1.5, 2.0])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_with_a_maximum_between_1_and_2_are_refused_with_both_readings(processor, dtype, high):
    image = np.linspace(0, high, 108, dtype=dtype).reshape(6, 6, 3)
    with pytest.raises(ValueError, match="meant from 0 to 1 pass do_rescale=False.*from 0 to 255 the image is black"):
        processor(image)


def test_the_overshoot_of_a_resize_is_clipped(processor, photo):
    unit = np.asarray(photo).astype(np.float32) / 255
    over = np.clip((unit - 0.5) * 1.1 + 0.5, -0.05, 1.05)
    assert over.min() < 0 and over.max() > 1
    want = processor(np.clip(over, 0, 1), do_rescale=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(over, do_rescale=False, return_tensors="pt")["pixel_values"], want)
    want = processor(np.clip(over, 0, 1) * 255, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor(over * 255, return_tensors="pt")["pixel_values"], want, rtol=0, atol=1e-5)
    for level in (1.02, -0.01):
        assert values(processor, np.full((8, 8), level), do_rescale=False).max() == (1 if level > 1 else 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (4, 8, 8), (2, 8, 8, 3)])
def test_one_value_that_is_no_number_is_enough_to_refuse_an_image(processor, value, shape):
    image = np.full(shape, 0.5)
    image.flat[7] = value
    for given in (image, torch.tensor(image), list(image) if image.ndim == 4 else [image]):
        with pytest.raises(ValueError, match="NaN or infinite"):
            processor(given, do_rescale=False)


@pytest.mark.parametrize("shape", [(3, 40, 4), (4, 40, 3), (3, 40, 3), (1, 40, 3), (4, 3, 1), (3, 3, 3)])
def test_an_ambiguous_shape_asks_for_the_layout(processor, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for given in (image, torch.tensor(image), image[None]):
        with pytest.raises(ValueError, match="channels first or last.*input_data_format"):
            processor(given)
    last = processor(image, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    first = processor(image, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
    assert not torch.equal(first, last)
    moved = processor(np.moveaxis(image, 0, -1), input_data_format="channels_last", return_tensors="pt")
    assert torch.equal(first, moved["pixel_values"])


def test_an_unknown_layout_is_refused(processor, photo):
    with pytest.raises(ValueError, match='"channels_first" or "channels_last", got \'last\''):
        processor(np.asarray(photo), input_data_format="last")


class Column:
    """What `dataset["image"]` gives: a sequence that is no list."""

    def __init__(self, images: list):
        self.images = images

    def __iter__(self):
        return iter(self.images)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def array_of_objects(images: list) -> np.ndarray:
    array = np.empty(len(images), dtype=object)
    array[:] = images
    return array


@pytest.mark.parametrize("kind", [list, tuple, Column, array_of_objects, iter])
def test_several_images_come_in_every_usual_sequence(processor, photo, kind):
    path = FIXTURES / REFERENCE_IMAGES[0]
    images = [photo, str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, np.asarray(photo)]
    got = processor(kind(images), return_tensors="pt")["pixel_values"]
    assert got.shape[0] == len(images) and all(torch.equal(one, got[0]) for one in got)
