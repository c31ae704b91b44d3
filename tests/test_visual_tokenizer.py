"""The merger's ways to the same result: every row, the needed rows, kept rows only; and half precision."""

import pytest
import torch
import torch.nn as nn
from tiny import NUM_PATCHES, tiny_images, tiny_model, tiny_visual_config

from benchmarks import reference_like
from modeling_lavit import LavitForConditionalGeneration


# images that keep 5 patches, one, all, and 9
KEPT = [(0, 3, 4, 9, 15), (7,), tuple(range(NUM_PATCHES)), (1, 2, 5, 6, 8, 10, 11, 12, 14)]


def keep_mask() -> torch.Tensor:
    mask = torch.zeros(len(KEPT), NUM_PATCHES, dtype=torch.bool)
    for row, kept in zip(mask, KEPT, strict=True):
        row[list(kept)] = True
    return mask


def visual_tokenizer(**values):
    return tiny_model(visual_config=tiny_visual_config(**values)).model.visual_tokenizer


@pytest.mark.parametrize("epsilon", [0, 1e-6, 0.1])
@torch.no_grad()
def test_the_merger_gives_what_computing_every_row_gives(epsilon):
    tokenizer = visual_tokenizer(attention_epsilon=epsilon)
    features = tokenizer.encode_patches(tiny_images(len(KEPT)))
    merged = tokenizer.merger(features, keep_mask())
    torch.testing.assert_close(merged, reference_like.merge(tokenizer.merger, features, keep_mask()))


@torch.no_grad()
def test_kept_rows_only_differ_by_no_more_than_the_leak():
    tokenizer = visual_tokenizer(attention_epsilon=1e-6)
    features = tokenizer.encode_patches(tiny_images(len(KEPT))) / 10
    exact = tokenizer.merger(features, keep_mask())
    tokenizer.config.kept_only = True
    fast = tokenizer.merger(features, keep_mask())
    assert not torch.equal(fast, exact)
    torch.testing.assert_close(fast, exact, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_kept_rows_only_with_a_leak_give_an_image_the_same_in_every_batch():
    tokenizer = visual_tokenizer(attention_epsilon=0.1, kept_only=True)
    features = tokenizer.encode_patches(tiny_images(len(KEPT)))
    together = tokenizer.merger(features, keep_mask()).split([len(kept) for kept in KEPT])
    for index, merged in enumerate(together):
        alone = tokenizer.merger(features[index, None], keep_mask()[index, None])
        torch.testing.assert_close(merged, alone)


@torch.no_grad()
def test_kept_rows_only_are_exact_for_an_image_that_keeps_all():
    tokenizer = visual_tokenizer(attention_epsilon=0.1)
    features, all_kept = tokenizer.encode_patches(tiny_images(1)), torch.ones(1, NUM_PATCHES, dtype=torch.bool)
    exact = tokenizer.merger(features, all_kept)
    tokenizer.config.kept_only = True
    torch.testing.assert_close(tokenizer.merger(features, all_kept), exact)


@torch.no_grad()
def test_codes_stand_for_rows_of_the_codebook():
    tokenizer = visual_tokenizer().eval()
    codes = tokenizer.tokenize(tiny_images(2)).codes
    features = tokenizer.decode_features(codes)
    torch.testing.assert_close(features, tokenizer.quantizer.codebook.weight[codes], rtol=0, atol=0)
    assert features.dtype == torch.float32
    for wrong in (codes + tokenizer.config.codebook_size, codes - 1 - codes.max(), codes.float(), codes > 0):
        with pytest.raises(ValueError, match="codes must be"):
            tokenizer.decode_features(wrong)


def test_half_precision_keeps_norms_residual_stream_and_distances_in_float32(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = LavitForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert model.dtype == torch.bfloat16
    for part in (model.model.visual_tokenizer, model.model.understanding):
        for name, module in part.named_modules():
            used = "post_layernorm" not in name
            if isinstance(module, nn.LayerNorm) and used:
                assert module.weight.dtype == torch.float32, name
            if isinstance(module, nn.Linear):
                assert module.weight.dtype == torch.bfloat16, name
    tokenizer = model.model.visual_tokenizer
    assert tokenizer.quantizer.codebook.weight.dtype == torch.float32
    features = tokenizer.encode_patches(tiny_images(2))
    assert features.dtype == torch.float32
    assert tokenizer.merger(features, keep_mask()[:2]).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_float32_residuals_bring_deep_half_precision_encoders_nearer(dtype, tmp_path):
    deep = visual_tokenizer(num_hidden_layers=24)
    exact = deep.encode_patches(tiny_images(4))
    deep.save_pretrained(tmp_path)
    mixed = type(deep).from_pretrained(tmp_path, dtype=dtype).encode_patches(tiny_images(4))
    plain = deep.to(dtype).encode_patches(tiny_images(4)).float()
    assert (mixed - exact).norm() < 0.8 * (plain - exact).norm()


@pytest.mark.slow
def test_compiled_layers_are_one_graph_for_every_count_of_kept_patches():
    tokenizer = visual_tokenizer().eval()
    images = tiny_images(3)
    ratios = (0.25, 0.5, 0.75, 0.9)
    expected = [tokenizer.tokenize(images, keep_ratio=ratio).codes for ratio in ratios]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tokenizer.compile(backend="eager")
    for step, ratio in enumerate(ratios):
        assert torch.equal(tokenizer.tokenize(images, keep_ratio=ratio).codes, expected[step])
        if step == 1:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def changed_rows(patch: int, **values) -> list[int]:
    """Which of the kept patches 0, 3, 4, 9, 15 the merger gives another row when the patch's features change."""
    tokenizer = visual_tokenizer(attention_epsilon=0, **values)
    features = tokenizer.encode_patches(tiny_images(1))
    other = features.clone()
    other[:, patch] *= -1
    before, after = (tokenizer.merger(x, keep_mask()[:1]) for x in (features, other))
    return [kept for kept, same in zip(KEPT[0], torch.isclose(before, after).all(1).tolist(), strict=True) if not same]


@torch.no_grad()
def test_who_sees_whom_in_the_merger():
    assert changed_rows(4) == [4, 9, 15]
    assert changed_rows(4, merger_is_causal=False) == list(KEPT[0])
    dropped = 6
    assert changed_rows(dropped) == list(KEPT[0])
    assert changed_rows(dropped, merge_dropped=False) == []
    assert changed_rows(4, merge_dropped=False) == [4, 9, 15]


def test_what_needs_no_leak_says_so():
    for switch in ("merger_is_causal", "merge_dropped"):
        with pytest.raises(ValueError, match="attention_epsilon=0"):
            tiny_visual_config(attention_epsilon=1e-6, **{switch: False})


@torch.no_grad()
def test_all_patches_may_be_kept():
    tokenizer = visual_tokenizer(attention_epsilon=0, selection="all")
    tokens = tokenizer.tokenize(tiny_images(2))
    assert tokens.lengths.tolist() == [NUM_PATCHES, NUM_PATCHES] and tokens.keep_mask.all()
