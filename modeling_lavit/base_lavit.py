"""What all models with LaVIT's configuration have: attention implementations, how they are split, embeddings."""

from torch import nn
from transformers import PreTrainedModel

from .configuration_lavit import LavitConfig
from .loading_lavit import StrictLoadingMixin
from .modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from .saving_lavit import SavedWithCodeMixin


def of_vision(attn_implementation: str | None) -> str | None:
    """An attention implementation for the visual tokenizer, where another is asked of the language model."""
    return attn_implementation if attn_implementation in (None, "eager", "sdpa") else "sdpa"


class LavitPreTrainedModel(SavedWithCodeMixin, StrictLoadingMixin, PreTrainedModel):
    config_class = LavitConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # pyright: ignore[reportAssignmentType]
    supports_gradient_checkpointing = True
    _no_split_modules = ["Blip2EncoderLayer", "LavitLayer", "LlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As in transformers; an implementation that the visual tokenizer has not (flash, flex) is the language
        model's alone, and the visual tokenizer computes by PyTorch's own attention."""
        if isinstance(attn_implementation, str):
            attn_implementation = {
                "": attn_implementation,
                "text_config": attn_implementation,
                "visual_config": of_vision(attn_implementation),
            }
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        for module in self.modules():
            if isinstance(module, LavitVisualTokenizer):
                module.encoder.set_attn_implementation(module.config._attn_implementation)  # pyright: ignore[reportArgumentType]

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """As in transformers, but refuses to drop rows of visual ids.

        A tokenizer has no strings for the codes, so `resize_token_embeddings(len(tokenizer))` would drop them all.
        """
        needed = self.config.vocabulary.size
        if new_num_tokens is not None and new_num_tokens < needed:
            raise ValueError(
                f"resizing to {new_num_tokens} ids would drop visual tokens: {self.config.text_vocab_size} text ids, "
                f"[IMG], [/IMG] and {self.config.visual_config.codebook_size} codes need {needed}"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
