"""LaVIT: one language model that reads and writes both text and visual tokens (arXiv 2309.04669, section 3.2).

Dimension letters: B prompts, L their length, N patches, C width of the visual tokenizer, E width of the language
model, V ids in all, n kept patches of one picture.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_lavit import LavitConfig
from .generation_lavit import LavitGenerationMixin
from .loading_lavit import StrictLoadingMixin
from .modeling_lavit_visual_tokenizer import LavitTokenMerger, LavitVisualTokenizer, LavitVisualTokens
from .slots_lavit import check_slots, fill_slots, find_slots, pad, unpad


IGNORED_LABEL = -100


@dataclass
class LavitInputs:
    """Prompts whose slots are filled, see [`LavitModel.expand_inputs`].

    Args:
        input_ids: (B, L). Picture features have no id: code 0 stands in for them.
        inputs_embeds: (B, L, E).
        attention_mask: (B, L), 0 on padding.
        labels: (B, L) or None; -100 on picture features and padding.
        is_feature: (B, L) bool, where the picture features are.
    """

    input_ids: torch.LongTensor
    inputs_embeds: torch.Tensor
    attention_mask: torch.LongTensor
    labels: torch.LongTensor | None
    is_feature: torch.BoolTensor


class LavitUnderstanding(nn.Module):
    """Pictures as the language model reads them: merged continuous features, projected to its width (no quantization).

    Has its own merger, because stage 2 trains one for reading, unless `config.share_understanding_merger`.
    """

    def __init__(self, config: LavitConfig):
        super().__init__()
        self.merger = None if config.share_understanding_merger else LavitTokenMerger(config.visual_config)
        self.projection = nn.Linear(config.visual_config.hidden_size, config.text_config.hidden_size)

    def forward(
        self, visual_tokenizer: LavitVisualTokenizer, pixel_values: torch.Tensor, **selection
    ) -> list[torch.Tensor]:
        """(B, 3, H, W) normalised pixels -> B tensors (n, E). `selection`: see `LavitVisualTokenizer.encode`."""
        encoded = visual_tokenizer.encode(pixel_values, merger=self.merger, **selection)
        projected = self.projection(encoded.features.to(self.projection.weight.dtype))
        return list(projected.split(encoded.lengths.tolist()))


class LavitPreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    config_class = LavitConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

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


class LavitModel(LavitPreTrainedModel):
    """Visual tokenizer, understanding and language model, without the LM head."""

    def __init__(self, config: LavitConfig):
        super().__init__(config)
        if config.generation_only:
            self.visual_tokenizer = self.understanding = None
            self._keys_to_ignore_on_load_unexpected = [r"visual_tokenizer\.", r"understanding\."]
        else:
            self.visual_tokenizer = LavitVisualTokenizer._from_config(config.visual_config)
            self.understanding = LavitUnderstanding(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor, **selection) -> list[torch.Tensor]:
        """What the language model reads of each picture: a list of (n, E). See [`LavitUnderstanding`]."""
        self._check_reads()
        return self.understanding(self.visual_tokenizer, pixel_values, **selection)

    def get_image_tokens(self, pixel_values: torch.Tensor, **selection) -> LavitVisualTokens:
        """The pictures' visual tokens, as generation prompts hold them. See `LavitVisualTokenizer.tokenize`."""
        self._check_reads()
        return self.visual_tokenizer.tokenize(pixel_values, **selection)

    def _check_reads(self) -> None:
        if self.config.generation_only:
            raise ValueError("the model was loaded with generation_only=True: it has no encoder and reads no pictures")

    def expand_inputs(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        padding_side: str | None = None,
        **selection,
    ) -> LavitInputs:
        """Puts every picture's continuous features between the `[IMG]` and `[/IMG]` of its slot.

        Args:
            input_ids: (B, L) with one slot per picture.
            pixel_values: (pictures, 3, H, W), in reading order over the batch.
            attention_mask, labels: (B, L).
            padding_side: "left" or "right"; by default as the inputs are padded, right when they are not.
            selection: passed to the visual tokenizer.

        Raises:
            ValueError: the numbers of slots and pictures differ.
        """
        rows = unpad(input_ids, attention_mask)
        slots = find_slots(rows, self.config.vocabulary)
        check_slots(slots, pixel_values.shape[0])
        if padding_side is None:
            padded_left = attention_mask is not None and bool((attention_mask[:, 0] == 0).any())
            padding_side = "left" if padded_left else "right"

        features = self.get_image_features(pixel_values, **selection)
        placeholders = [
            input_ids.new_full((feature.shape[0],), self.config.vocabulary.visual_offset) for feature in features
        ]
        is_text = [torch.ones_like(row, dtype=torch.bool) for row in rows]
        is_text = fill_slots(is_text, slots, [torch.zeros_like(ids, dtype=torch.bool) for ids in placeholders])
        ids, mask = pad(fill_slots(rows, slots, placeholders), self.config.vocabulary.visual_offset, padding_side)
        is_feature = ~pad(is_text, True, padding_side)[0]

        embeds = self.get_input_embeddings()(ids)
        stacked = torch.cat(features).to(embeds.device, embeds.dtype)
        embeds = embeds.masked_scatter(is_feature.unsqueeze(-1).to(embeds.device), stacked)
        if labels is not None:
            ignored = [torch.full_like(placeholder, IGNORED_LABEL) for placeholder in placeholders]
            label_rows = fill_slots(unpad(labels, attention_mask), slots, ignored)
            labels = pad(label_rows, IGNORED_LABEL, padding_side)[0]
        return LavitInputs(ids, embeds, mask, labels, is_feature)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        selection: str | None = None,
        keep_ratio: float | None = None,
        gumbel_noise: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Hidden states of the language model, (B, L, E); L counts the filled slots. Arguments: see
        [`LavitForConditionalGeneration.forward`]."""
        if pixel_values is not None:
            if position_ids is not None or past_key_values is not None:
                raise ValueError(
                    "pixel_values lengthen the prompts: position_ids and past_key_values of the prompts as they are "
                    "given do not fit. Leave them out, or call expand_inputs() and pass its inputs_embeds"
                )
            expanded = self.expand_inputs(
                input_ids,
                pixel_values,
                attention_mask,
                selection=selection,
                keep_ratio=keep_ratio,
                gumbel_noise=gumbel_noise,
            )
            input_ids, inputs_embeds, attention_mask = None, expanded.inputs_embeds, expanded.attention_mask
        elif _starts_a_sequence(input_ids, past_key_values, kwargs):
            check_slots(find_slots(list(input_ids), self.config.vocabulary), 0)
        return self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class LavitForConditionalGeneration(LavitPreTrainedModel, LavitGenerationMixin):
    """LaVIT with its LM head over text ids, `[IMG]`, `[/IMG]` and codes: reads and draws.

    ```python
    model = LavitForConditionalGeneration.from_pretrained(path)
    loss = model(input_ids, attention_mask=mask, pixel_values=pixels, labels=labels).loss
    codes = model.generate(**processor(text="a red apple", generation_mode="image"), generation_mode="image")
    ```

    The language model is a stock one: `LlamaForCausalLM.from_pretrained(path,
    key_mapping={r"^model\\.language_model\\.": "model."})` loads it alone.
    """

    output_modalities = ("text", "image")
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LavitConfig):
        super().__init__(config)
        self.model = LavitModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        known = torch.zeros(config.num_draft_ids, dtype=torch.int16) if config.num_draft_ids else None
        self.register_buffer("draft_ids", known)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **selection) -> list[torch.Tensor]:
        """See [`LavitModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **selection)

    def get_image_tokens(self, pixel_values: torch.Tensor, **selection) -> LavitVisualTokens:
        """See [`LavitModel.get_image_tokens`]."""
        return self.model.get_image_tokens(pixel_values, **selection)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        selection: str | None = None,
        keep_ratio: float | None = None,
        gumbel_noise: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        logit_range: tuple[int, int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """One next-token objective over both modalities (paper Eq. 4).

        Args:
            input_ids: (B, L). A picture that is read is a slot `[IMG][/IMG]` here and pixels in `pixel_values`; one
                that is a target, or part of a drawing prompt, is `[IMG] code ids [/IMG]`.
            attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: as in Llama.
            pixel_values: (pictures, 3, H, W), one per slot in reading order over the batch. The slots are filled with
                continuous features and the batch is padded again, on the side it was padded on: outputs are longer
                than `input_ids`.
            labels: (B, L) ids, -100 where there is no loss; picture features get -100, and so does the first id of a
                prompt, which nothing precedes.
            selection, keep_ratio, gumbel_noise: which patches are kept, see `LavitVisualTokenizer.encode`.
            logits_to_keep: compute the logits of the last positions alone, 0 = all.
            logit_range: (start, stop): compute the logits of these ids alone, the others are -inf.

        Returns:
            `loss` (mean cross-entropy over labelled positions) and `logits` (B, L, V).

        Raises:
            ValueError: the numbers of slots and pictures differ, or pixels come with positions or a cache.
        """
        if pixel_values is not None and labels is not None:
            expanded = self.model.expand_inputs(
                input_ids,
                pixel_values,
                attention_mask,
                labels,
                selection=selection,
                keep_ratio=keep_ratio,
                gumbel_noise=gumbel_noise,
            )
            input_ids, pixel_values, inputs_embeds = None, None, expanded.inputs_embeds
            attention_mask, labels = expanded.attention_mask, expanded.labels
        if labels is not None and attention_mask is not None:
            # the first id behind padding would be predicted from the padding
            follows_padding = F.pad(attention_mask[:, :-1] == 0, (1, 0))
            labels = labels.masked_fill(follows_padding, IGNORED_LABEL)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            selection=selection,
            keep_ratio=keep_ratio,
            gumbel_noise=gumbel_noise,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._compute_logits(outputs.last_hidden_state[:, kept], logit_range)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _compute_logits(self, hidden_states: torch.Tensor, logit_range: tuple[int, int] | None) -> torch.Tensor:
        """(B, L, E) -> (B, L, V); of a plain linear head only the rows `logit_range` are multiplied."""
        if logit_range is None:
            return self.lm_head(hidden_states)
        start, stop = logit_range
        if type(self.lm_head) is nn.Linear and not hasattr(self.lm_head, "_hf_hook"):
            num_ids = self.lm_head.weight.shape[0]
            # the product in this order: for a few rows MKL's other one takes three times as long (float32, 4097 ids)
            rows = hidden_states.flatten(0, -2)
            logits = (self.lm_head.weight[start:stop] @ rows.T).T.unflatten(0, hidden_states.shape[:-1])
            return F.pad(logits, (start, num_ids - stop), value=float("-inf"))
        logits = self.lm_head(hidden_states)
        ids = torch.arange(logits.shape[-1], device=logits.device)
        return logits.masked_fill((ids < start) | (ids >= stop), float("-inf"))


def _starts_a_sequence(input_ids: torch.Tensor | None, past_key_values: Cache | None, kwargs: dict) -> bool:
    # "cache" is the paged cache of continuous batching
    return (
        input_ids is not None
        and past_key_values is None
        and "cache" not in kwargs
        and not torch.compiler.is_compiling()
    )
