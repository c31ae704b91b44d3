"""The tasks of transformers on a checkpoint with a pipeline, and drawings chosen from candidates."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    an_image,
    seeded,
    tiny_pipeline,
)
from transformers import pipeline


@pytest.fixture(scope="module", params=["highres", "lowres"])
def pipe(request):
    return tiny_pipeline(request.param)


@pytest.fixture(scope="module")
def highres():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(highres, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    highres.save_pretrained(folder)
    return folder


def test_the_text_to_image_task_returns_images_as_they_were_asked_for(folder, highres):
    draw = pipeline("text-to-image", model=str(folder))
    draw.decoder.set_progress_bar_config(disable=True)
    one = draw("a cat", generator=seeded(0))
    assert np.array_equal(np.asarray(one), np.asarray(highres("a cat", generator=seeded(0)).images[0]))
    assert [image.size for image in draw(["a cat", "dogs"])] == [(16, 16)] * 2
    assert draw([an_image(), "in snow"], num_inference_steps=1).size == (16, 16)
    nested = draw(["a", "b", "c"], num_images_per_prompt=2, num_inference_steps=1)
    assert [len(images) for images in nested] == [2, 2, 2]


def test_the_image_text_to_text_task_reads_images(folder):
    read = pipeline("image-text-to-text", model=str(folder))
    answer = read(images=an_image(), text="<image>question answer", max_new_tokens=4, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)


def test_the_any_to_any_task_reads_and_draws(folder, highres, monkeypatch):
    # It asks for torchvision wherever a model takes images, which this package reads without.
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *args: None)
    task = pipeline("any-to-any", model=str(folder))
    answer = task(images=an_image(), text="<image>question answer", max_new_tokens=4)
    assert isinstance(answer[0]["generated_text"], str)
    task.model.set_pixel_decoder(highres)
    drawn = task(text="a red apple", generation_mode="image")
    assert isinstance(drawn[0]["generated_image"], Image.Image)


def test_of_several_candidates_the_reranker_keeps_one_with_its_visual_tokens(pipe):
    seen = []

    def darkest(images, texts):
        seen.extend(texts)
        return [-float(np.asarray(image).mean()) for image in images]

    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    drawn = pipe(["a cat", "a dog"], num_images_per_prompt=3, generator=generators)
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    best = pipe(["a cat", "a dog"], num_candidates=3, reranker=darkest, generator=generators)
    means = np.array([np.asarray(image).mean() for image in drawn.images]).reshape(2, 3)
    kept = [int(row.argmin()) + 3 * i for i, row in enumerate(means)]
    assert seen == ["a cat"] * 3 + ["a dog"] * 3 and len(best.images) == 2
    for i, (image, own_codes) in enumerate(zip(best.images, best.visual_tokens.split(), strict=True)):
        assert np.array_equal(np.asarray(image), np.asarray(drawn.images[kept[i]]))
        assert torch.equal(own_codes, drawn.visual_tokens.split()[kept[i]])


def test_candidates_need_a_reranker_and_the_other_way_round(pipe):
    def nothing(images, texts):
        return [0.0]

    for arguments in ({"num_candidates": 2}, {"reranker": nothing}):
        with pytest.raises(ValueError, match="a reranker chooses among candidates"):
            pipe("a cat", **arguments)
    with pytest.raises(ValueError, match="give a prompt"):
        pipe("a cat", num_candidates=2, reranker=nothing, output_type="latent")
    with pytest.raises(ValueError, match=r"scores of shape \(1,\) for 2 images"):
        pipe("a cat", num_candidates=2, reranker=nothing)
