"""Configurations of the three models.

Defaults are the sizes of the official LaVIT-7B checkpoints (arXiv 2309.04669).
"""

from .compat_lavit import ALLOWED_VERSIONS as _  # noqa: F401  # isort: skip  (first: it checks the versions)

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.pipelines import PIPELINE_REGISTRY

from .saving_lavit import SavedWithCodeMixin
from .vocabulary_lavit import LavitVocabulary


IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
SELECTIONS = ("sample", "argmax", "all")
STEMS = ("linear", "convolutional")


@strict
class LavitVisualTokenizerConfig(SavedWithCodeMixin, PreTrainedConfig):
    """Configuration of [`LavitVisualTokenizer`]: encoder, selector, merger, quantizer (paper section 3.1).

    Args:
        hidden_size, intermediate_size: width of the encoder, the selector and the merger, and of the feed-forward
            layers.
        num_hidden_layers, num_attention_heads: depth and heads of the encoder (EVA ViT-g).
        image_size, patch_size: in pixels; `num_patches` follows.
        stem: what turns pixels into patch embeddings: `"linear"` (one matrix a patch, as in EVA ViT-g) or
            `"convolutional"` (residual 3x3 convolutions, arXiv 2106.14881: small encoders of small data sets need
            them; `patch_size` must be a power of two).
        layer_norm_eps: of the encoder only. Everything behind it uses `merger_layer_norm_eps`.
        merger_num_hidden_layers, merger_num_attention_heads: depth and heads of the merger.
        attention_epsilon: what the merger's attention leaks to masked positions, `1e-6` in official checkpoints. With
            `0` it is exact to compute kept tokens only.
        kept_only: whether the merger computes kept tokens alone where `attention_epsilon` is not 0: faster, and close,
            not equal (`lavit tokenize --compare-kept-only` counts the codes that change). May be switched at any time.
        merger_is_causal: whether a kept patch attends to the kept ones before it (the paper's choice), or to all.
        merge_dropped: whether the merger's cross attention sees the dropped patches (the paper's choice); without it
            they are lost.
        codebook_size, codebook_dim: number of codes and their dimension.
        selection: `"sample"` (Gumbel draw, reproducible through `selection_seed`), `"argmax"`, or `"all"` (every
            patch: as many tokens for any image).
        selection_seed: seed of the Gumbel draw when a call gives neither a generator nor noise.

    Raises:
        ValueError: an unknown selection or stem, or sizes that contradict each other.
    """

    model_type = "lavit_visual_tokenizer"
    base_config_key = "visual_config"

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 40
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    stem: str = "linear"
    layer_norm_eps: float | int = 1e-6
    merger_num_hidden_layers: int = 12
    merger_num_attention_heads: int = 16
    merger_layer_norm_eps: float | int = 1e-5
    attention_epsilon: float | int = 1e-6
    kept_only: bool = False
    merger_is_causal: bool = True
    merge_dropped: bool = True
    codebook_size: int = 16384
    codebook_dim: int = 32
    selection: str = "sample"
    selection_seed: int = 0
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {SELECTIONS}, got {self.selection!r}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.attention_epsilon and not (self.merger_is_causal and self.merge_dropped):
            raise ValueError("merger_is_causal=False and merge_dropped=False need attention_epsilon=0")
        if self.stem not in STEMS:
            raise ValueError(f"stem must be one of {STEMS}, got {self.stem!r}")
        if self.stem == "convolutional" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"a convolutional stem needs a patch_size that is a power of two, got {self.patch_size}")
        super().__post_init__(**kwargs)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@strict
class LavitDetokenizerConfig(SavedWithCodeMixin, PreTrainedConfig):
    """Configuration of [`LavitDetokenizer`]: visual codes to the conditions of a denoising UNet (paper section 3.1,
    Eq. 5).

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the decoder blocks.
        num_queries: number of query tokens, and so of conditions; also the most codes that one image may have.
        codebook_size, codebook_dim: as in the visual tokenizer whose codes are read.
        feature_size: width of the reconstructed encoder features.
        variant: `"highres"` (SDXL-shaped UNet: `prompt_embed_dims` concatenated, and a pooled embedding of
            `pooled_embed_dim`) or `"lowres"` (SD-1.5-shaped UNet: `prompt_embed_dims` has one entry).
        num_unconditional_tokens: lowres only: rows of the learnt unconditional embedding.
        aspect_ratios: name -> (height, width) in pixels that the UNet was trained for. None: those of the official
            decoder where the UNet is of that size, else "1:1" alone.
        vae_scale_factor: pixels a latent, along a side; what a pipeline without an autoencoder goes by.
        default_num_inference_steps, default_decoder_guidance_scale: what [`LavitPipeline`] decodes with unless a call
            says otherwise.

    Raises:
        ValueError: an unknown variant, or a lowres one with several `prompt_embed_dims`.
    """

    model_type = "lavit_detokenizer"

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_queries: int = 256
    layer_norm_eps: float | int = 1e-5
    codebook_size: int = 16384
    codebook_dim: int = 32
    feature_size: int = 1408
    variant: str = "highres"
    prompt_embed_dims: list[int] | tuple[int, ...] = (768, 1280)
    pooled_embed_dim: int = 1280
    num_unconditional_tokens: int = 77
    aspect_ratios: dict | None = None
    vae_scale_factor: int = 8
    default_num_inference_steps: int = 25
    default_decoder_guidance_scale: float | int = 7.0
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        if self.variant not in ("highres", "lowres"):
            raise ValueError(f"variant must be 'highres' or 'lowres', got {self.variant!r}")
        if self.variant == "lowres" and len(self.prompt_embed_dims) != 1:
            raise ValueError(f"the lowres variant has one entry in prompt_embed_dims, got {self.prompt_embed_dims}")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As every configuration's. `variant="bf16"`, which Auto classes pass on, names weight files, not a decoder,
        and is left to the model."""
        of_files = {} if kwargs.get("variant") in ("highres", "lowres") else {"variant": kwargs.pop("variant", None)}
        loaded = super().from_dict(config_dict, **kwargs)
        if not isinstance(loaded, tuple):
            return loaded
        config, unused = loaded
        return config, unused | {name: value for name, value in of_files.items() if value is not None}


@strict
class LavitConfig(SavedWithCodeMixin, PreTrainedConfig):
    """Configuration of [`LavitModel`] and [`LavitForConditionalGeneration`] (paper section 3.2).

    Args:
        text_config: of the language model, any decoder with the shape of Llama. Its `vocab_size` counts text, `[IMG]`,
            `[/IMG]` and codes, and may be padded above that.
        visual_config: of the visual tokenizer.
        text_vocab_size: number of text ids; all other ids follow from it, see [`LavitVocabulary`].
        share_understanding_merger: whether reading images uses the visual tokenizer's merger (checkpoints trained
            here) or one of its own (official checkpoints).
        generation_only: whether visual tokenizer and understanding are left out: the model draws from text, and reads
            no images. Also an argument of `from_pretrained`.
        tie_word_embeddings: whether the LM head is the embedding matrix.

    Raises:
        ValueError: the language model's `vocab_size` is too small for text ids, `[IMG]`, `[/IMG]` and codes.
    """

    model_type = "lavit"
    # what tools ask composite models for
    attribute_map = {"vision_config": "visual_config"}
    sub_configs = {  # pyright: ignore[reportAssignmentType]
        "text_config": AutoConfig,
        "visual_config": LavitVisualTokenizerConfig,
    }

    if TYPE_CHECKING:  # what is there once the config is made
        text_config: PreTrainedConfig | Any = None
        visual_config: LavitVisualTokenizerConfig | Any = None
    else:  # what may be given
        text_config: dict | PreTrainedConfig | None = None
        visual_config: dict | PreTrainedConfig | None = None
    text_vocab_size: int = 32000
    share_understanding_merger: bool = False
    generation_only: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        default_language_model = self.text_config is None
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama", **(self.text_config or {})})
        if not isinstance(self.visual_config, PreTrainedConfig):
            self.visual_config = LavitVisualTokenizerConfig(**(self.visual_config or {}))
        if "text-to-image" in PIPELINE_REGISTRY.get_supported_tasks():
            # the task of the imported package wins over a folder's code, as its models do
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        # the language model lifted out as a stock one reads its own config
        self.text_config.tie_word_embeddings = self.tie_word_embeddings
        needed = self.vocabulary.size
        if default_language_model:
            self.text_config.vocab_size = needed
        if self.text_config.vocab_size < needed:
            raise ValueError(
                f"text_config.vocab_size is {self.text_config.vocab_size}, but {self.text_vocab_size} text ids, "
                f"[IMG], [/IMG] and {self.visual_config.codebook_size} codes need {needed}"
            )

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding of the matrices included: the language model's."""
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.text_config.vocab_size = value

    @property
    def image_token_id(self) -> int:
        """Id of `[IMG]`, which opens every image."""
        return self.vocabulary.boi_token_id

    @property
    def pad_token_id(self) -> int | None:
        """The language model's, as are `bos_token_id` and `eos_token_id`; trainers set them."""
        return self.text_config.pad_token_id

    @pad_token_id.setter
    def pad_token_id(self, value: int | None) -> None:
        self.text_config.pad_token_id = value

    @property
    def bos_token_id(self) -> int | None:
        return self.text_config.bos_token_id

    @bos_token_id.setter
    def bos_token_id(self, value: int | None) -> None:
        self.text_config.bos_token_id = value

    @property
    def eos_token_id(self) -> int | list[int] | None:
        return self.text_config.eos_token_id

    @eos_token_id.setter
    def eos_token_id(self, value: int | list[int] | None) -> None:
        self.text_config.eos_token_id = value

    @property
    def vocabulary(self) -> LavitVocabulary:
        return LavitVocabulary(self.text_vocab_size, self.visual_config.codebook_size)
