"""`score`: log-likelihoods of texts behind images, and of images behind texts."""

import pytest
import torch
from tiny import BOI, CODE, EOI, left_padded, tiny_images

from modeling_lavit.modeling_lavit import IGNORED_LABEL


TEXTS = [[20, 30, 40], [50], [60, 70, 80, 90, 2]]
READ = [5, BOI, EOI, 7, 9]


def of_forward(model, prompt: list[int], continuation: list[int], pixel_values=None) -> float:
    """The same by `forward` with labels."""
    ids = torch.tensor([prompt + continuation])
    labels = torch.tensor([[IGNORED_LABEL] * len(prompt) + continuation])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels, pixel_values=pixel_values).loss
    return -float(loss) * len(continuation)


def test_a_text_behind_an_image_is_as_probable_as_by_the_loss(model):
    pixel_values = tiny_images(2)
    prompts = left_padded([READ, [BOI, EOI]])
    scores = model.score(**prompts, pixel_values=pixel_values, continuations=TEXTS)
    assert scores.shape == (2, 3) and scores.dtype == torch.float32
    for i, prompt in enumerate((READ, [BOI, EOI])):
        wanted = [of_forward(model, prompt, text, pixel_values[i : i + 1]) for text in TEXTS]
        assert torch.allclose(scores[i], torch.tensor(wanted), atol=1e-4)


def test_an_image_behind_a_text_is_as_probable_as_its_codes(model):
    pixel_values = tiny_images(3)
    prompts = [[5, 6, 7], [8, BOI]]
    scores = model.score(**left_padded(prompts), continuation_images=pixel_values)
    codes = [[*(CODE + codes).tolist(), EOI] for codes in model.get_image_tokens(pixel_values).split()]
    for i, prompt in enumerate(([5, 6, 7, BOI], [8, BOI])):
        wanted = [of_forward(model, prompt, continuation) for continuation in codes]
        assert torch.allclose(scores[i], torch.tensor(wanted), atol=1e-4)


def test_an_image_is_read_once_for_many_texts_and_batches_do_not_show(model, monkeypatch):
    pixel_values, prompts = tiny_images(3), left_padded([READ, [BOI, EOI], READ])
    whole = model.score(**prompts, pixel_values=pixel_values, continuations=TEXTS)
    read = []
    features = model.model.get_image_features
    monkeypatch.setattr(
        model.model,
        "get_image_features",
        lambda pixels, **kwargs: read.append(len(pixels)) or features(pixels, **kwargs),
    )
    parts = model.score(**prompts, pixel_values=pixel_values, continuations=TEXTS, batch_size=2)
    assert read == [2, 1] and torch.allclose(whole, parts, atol=1e-5)


def test_prompts_may_have_texts_of_their_own(model):
    prompts = left_padded([[5, 6], [7]])
    scores = model.score(**prompts, continuations=[TEXTS[:1], TEXTS[1:]])
    assert [len(row) for row in scores] == [1, 2]
    shared = model.score(**prompts, continuations=TEXTS)
    assert torch.allclose(torch.cat(scores), torch.stack([shared[0, 0], shared[1, 1], shared[1, 2]]), atol=1e-5)


def test_a_selection_of_the_image_changes_the_score(model):
    prompts, pixel_values = left_padded([READ]), tiny_images(1)
    scores = [
        model.score(**prompts, pixel_values=pixel_values, continuations=TEXTS, keep_ratio=share)
        for share in (0.2, 1.0)
    ]
    assert not torch.allclose(*scores)


def test_wrong_continuations_are_refused(model):
    prompts = left_padded([[5, 6], [7]])
    with pytest.raises(ValueError, match="give either continuations"):
        model.score(**prompts)
    with pytest.raises(ValueError, match="continuation 1 must be a row of at least one id"):
        model.score(**prompts, continuations=[[1], []])
    with pytest.raises(ValueError, match="continuation 0 has ids from 5 to 99999"):
        model.score(**prompts, continuations=[[5, 99999]])
    with pytest.raises(ValueError, match="1 lists of continuations were given for 2 prompts"):
        model.score(**prompts, continuations=[[[5]]])


@torch.no_grad()
def test_greedy_says_whether_every_id_is_the_most_probable(model):
    prompt = left_padded([[5, 6]])
    ids = [int(model(**prompt).logits[0, -1].argmax())]
    ids.append(int(model(**left_padded([[5, 6, *ids]])).logits[0, -1].argmax()))
    other = [ids[0], (ids[1] + 1) % CODE]
    scores, greedy = model.score(**prompt, continuations=[ids, other, ids[:1]], return_greedy=True)
    assert greedy.tolist() == [[True, False, True]] and scores.shape == (1, 3)
