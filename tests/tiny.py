"""Tiny real components shared by all tests: the classes of the package at the smallest useful size.

config = tiny_config()            # 16 patches, 24 codes, 300 text ids
model = tiny_model()              # LavitForConditionalGeneration, seeded
processor = tiny_processor()      # LavitProcessor around tiny_tokenizer()
tiny_detokenizer(), tiny_unet(), tiny_vae(), tiny_scheduler()
"""

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaTokenizer

from modeling_lavit.configuration_lavit import LavitConfig, LavitDetokenizerConfig, LavitVisualTokenizerConfig
from modeling_lavit.modeling_lavit import LavitForConditionalGeneration


TEXT_VOCAB_SIZE = 300
CODEBOOK_SIZE = 24
# [IMG], [/IMG], the id of code 0, and the number of ids
BOI, EOI, CODE, END = TEXT_VOCAB_SIZE, TEXT_VOCAB_SIZE + 1, TEXT_VOCAB_SIZE + 2, TEXT_VOCAB_SIZE + 2 + CODEBOOK_SIZE
CODEBOOK_DIM = 8
IMAGE_SIZE = 16
NUM_PATCHES = 16
PROMPT_EMBED_DIMS = (8, 16)
POOLED_EMBED_DIM = 16
WORDS = "a red apple on the table is it big what colour question answer two blue cats and dogs in snow photo of"


def tiny_visual_config(**overrides) -> LavitVisualTokenizerConfig:
    """16x16 pixels in 4x4 patches (16 of them), width 32, 24 codes."""
    values = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=4,
        merger_num_hidden_layers=2,
        merger_num_attention_heads=2,
        attention_epsilon=0,
        codebook_size=CODEBOOK_SIZE,
        codebook_dim=CODEBOOK_DIM,
    )
    return LavitVisualTokenizerConfig(**(values | overrides))


def tiny_text_config(**overrides) -> LlamaConfig:
    """Two Llama layers, width 32, a context of 256."""
    values = dict(
        vocab_size=TEXT_VOCAB_SIZE + 2 + CODEBOOK_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaConfig(**(values | overrides))


def tiny_config(**overrides) -> LavitConfig:
    """A `LavitConfig` with its own understanding merger; keyword arguments replace top-level fields."""
    values = dict(
        text_config=tiny_text_config(),
        visual_config=tiny_visual_config(),
        text_vocab_size=TEXT_VOCAB_SIZE,
    )
    return LavitConfig(**(values | overrides))


def tiny_model(seed: int = 0, **overrides) -> LavitForConditionalGeneration:
    """A seeded random model in eval mode, float32; image defaults fit its 16 patches."""
    config = tiny_config(**overrides)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LavitForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.random.set_rng_state(state)
    _make_decisive(model.model.visual_tokenizer)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model


@torch.no_grad()
def _make_decisive(visual_tokenizer) -> None:
    """Scales the selector so that images keep about half of their patches, each image others."""
    selector = visual_tokenizer.selector
    margins = selector(visual_tokenizer.encode_patches(tiny_images(8))).diff(dim=-1).neg()
    scale = 2 / margins.std()
    selector.out_proj.weight *= scale
    selector.out_proj.bias *= scale
    selector.out_proj.bias[0] -= scale * margins.mean()


def tiny_tokenizer():
    """A Llama BPE tokenizer with byte fallback and exactly `TEXT_VOCAB_SIZE` text ids, `[IMG]` and `[/IMG]` above."""
    from tokenizers import AddedToken

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for letter in ["▁", *sorted(set(WORDS.replace(" ", "")))]:
        vocab[letter] = len(vocab)
    merges = []
    for word in WORDS.split():
        left = "▁"
        for letter in word:
            if left + letter not in vocab and len(vocab) < TEXT_VOCAB_SIZE:
                merges.append((left, letter))
                vocab[left + letter] = len(vocab)
            elif left + letter not in vocab:
                break
            left += letter
    if len(vocab) != TEXT_VOCAB_SIZE:
        raise AssertionError(f"the tiny vocabulary has {len(vocab)} entries, not {TEXT_VOCAB_SIZE}")
    return LlamaTokenizer(
        vocab=vocab,
        merges=merges,
        add_bos_token=True,
        pad_token="</s>",
        padding_side="left",
        extra_special_tokens={
            "boi_token": AddedToken("[IMG]", special=True),
            "eoi_token": AddedToken("[/IMG]", special=True),
        },
    )


def tiny_processor():
    """A `LavitProcessor` for `tiny_model()`: 16x16 pixels."""
    from modeling_lavit.processing import LavitImageProcessor, LavitProcessor

    image_processor = LavitImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return LavitProcessor(image_processor=image_processor, tokenizer=tiny_tokenizer())


def tiny_images(count: int, seed: int = 0) -> torch.Tensor:
    """Normalised pixels, (count, 3, 16, 16)."""
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def left_padded(rows: list[list[int]], pad: int = 2) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of uneven rows."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def right_padded(rows: list[list[int]], pad: int = 2) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of uneven rows."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def tiny_detokenizer(seed: int = 0, **overrides):
    """A seeded `LavitDetokenizer`; `variant="lowres", prompt_embed_dims=(24,)` for the other shape."""
    from modeling_lavit.modeling_lavit_detokenizer import LavitDetokenizer

    values = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_queries=NUM_PATCHES,
        codebook_size=CODEBOOK_SIZE,
        codebook_dim=CODEBOOK_DIM,
        feature_size=32,
        prompt_embed_dims=PROMPT_EMBED_DIMS,
        pooled_embed_dim=POOLED_EMBED_DIM,
        num_unconditional_tokens=5,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    detokenizer = LavitDetokenizer(LavitDetokenizerConfig(**(values | overrides))).eval()
    torch.random.set_rng_state(state)
    return detokenizer


def tiny_unet(variant: str = "highres", seed: int = 0, channels: int = 4):
    """A seeded diffusers UNet: SDXL-shaped (`text_time` conditions) or, `"lowres"`, SD-1.5-shaped."""
    from diffusers import UNet2DConditionModel

    values = dict(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=sum(PROMPT_EMBED_DIMS),
    )
    if variant == "highres":
        values |= dict(
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + POOLED_EMBED_DIM,
            transformer_layers_per_block=1,
            use_linear_projection=True,
        )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**values).eval()
    torch.random.set_rng_state(state)
    return unet


def tiny_vae(seed: int = 0):
    """A seeded `AutoencoderKL`, 2 pixels per latent, 4 latent channels."""
    from diffusers import AutoencoderKL

    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=IMAGE_SIZE,
    ).eval()
    torch.random.set_rng_state(state)
    return vae


def tiny_scheduler(prediction_type: str = "epsilon"):
    """The DDIM schedule of Stable Diffusion."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


# denoising steps of `tiny_pipeline()`
STEPS = 3


def tiny_pipeline(variant: str = "highres", **components):
    """A `LavitPipeline` of the parts above, 16x16 pixels; keyword arguments replace them, or are its own."""
    from modeling_lavit import LavitPipeline

    lowres = {"variant": "lowres", "prompt_embed_dims": (24,)} if variant == "lowres" else {}
    pipe = LavitPipeline(
        **{
            "processor": tiny_processor(),
            "model": tiny_model(),
            "detokenizer": tiny_detokenizer(**lowres),
            "unet": tiny_unet(variant),
            "vae": tiny_vae(),
            "scheduler": tiny_scheduler(),
            "default_num_inference_steps": STEPS,
            **components,
        }
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, *args, **kwargs) -> torch.Tensor:
    return pipe(*args, output_type="latent", **kwargs).images


def codes(*lengths: int):
    """Visual tokens of images of so many codes, the same ones every time."""
    from modeling_lavit import LavitVisualTokens

    lengths = torch.tensor(lengths)
    values = torch.randint(CODEBOOK_SIZE, (int(lengths.sum()),), generator=seeded(5))
    return LavitVisualTokens(codes=values, lengths=lengths)


def an_image(colour: str = "red", size: int = 20):
    """A PIL image of a colour, with a blue rectangle."""
    from PIL import Image

    image = Image.new("RGB", (size, size), colour)
    image.paste("blue", (2, 3, 9, 12))
    return image


THREE = {"min_image_tokens": 3, "max_image_tokens": 3}
PROMPTS = [[1, 20, 30, 40, 50, 60, BOI], [1, 33, BOI], [1, 70, 80, 90, BOI]]


def without_padding(row):
    """A generated row up to its first `[/IMG]`."""
    ids = row.tolist()
    return ids[: ids.index(EOI) + 1] if EOI in ids else ids


def draw_images(model, rows, **kwargs):
    """Image mode with a guidance of 3, for ragged prompts."""
    settings = {"generation_mode": "image", "min_image_tokens": 4, "guidance_scale": 3.0} | kwargs
    return model.generate(**left_padded(rows), **settings)
