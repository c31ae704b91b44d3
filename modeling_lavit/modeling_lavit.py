"""LaVIT: one language model that reads and writes both text and visual tokens (arXiv 2309.04669, section 3.2).

Dimension letters: B prompts, L their length, N patches, C width of the visual tokenizer, E width of the language
model, V ids in all, n kept patches of one image. Ids, masks and labels are int64.
"""

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .base_lavit import LavitPreTrainedModel, of_vision
from .compat_lavit import CACHE_NAME, cache_kwargs
from .configuration_lavit import LavitConfig
from .generation_lavit import LavitGenerationMixin
from .layers_lavit import FewRowsLinear, take_rows
from .loading_lavit import HUB_OPTIONS
from .modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from .scoring_lavit import LavitScoringMixin
from .slots_lavit import (
    LavitInputs,
    LavitPositions,
    check_ids_and_mask,
    check_slots,
    fill_slots,
    find_slots,
    locate,
    pad,
    positions_of,
    tell_positions,
    unpad,
)
from .understanding_lavit import LavitImageFeatures, LavitUnderstanding
from .visual_tokens_lavit import LavitVisualTokens


IGNORED_LABEL = -100


class LavitModel(LavitPreTrainedModel):
    """Visual tokenizer, understanding and language model, without the LM head (paper section 3.2).

    Its outputs have a row for each of the caller's `input_ids`: a slot `[IMG][/IMG]` is two, whatever its image takes.
    """

    def __init__(self, config: LavitConfig):
        super().__init__(config)
        if config.generation_only:
            self.visual_tokenizer = self.understanding = None
            self._keys_to_ignore_on_load_unexpected = [r"visual_tokenizer\.", r"understanding\."]
        else:
            visual_attention = of_vision(config.visual_config._attn_implementation)
            self.visual_tokenizer = LavitVisualTokenizer._from_config(
                config.visual_config, attn_implementation=visual_attention
            )
            self.visual_tokenizer.requires_grad_(False)
            self.understanding = LavitUnderstanding(config)
        self.language_model = AutoModel.from_config(config.text_config)
        for module in self.language_model.modules():
            if type(module) is nn.Linear:
                module.__class__ = FewRowsLinear
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "LavitModel":
        """As every module's, but the visual tokenizer is frozen here, and in eval mode with the running statistics of
        its batch norms: its own stage trains it as a model of its own."""
        super().train(mode)
        if self.visual_tokenizer is not None:
            # loading makes new parameters, and ends with eval()
            self.visual_tokenizer.eval().requires_grad_(False)
        return self

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> LavitImageFeatures:
        """What the language model reads of each image.

        Args:
            pixel_values: (images, 3, H, W), normalised.
            kwargs: which patches are kept, see `LavitVisualTokenizer.select`; `output_hidden_states` and
                `output_attentions` of the encoder; `return_dict`.

        Returns:
            `pooler_output`, for each image its kept patches as the language model reads them (n, E);
            `last_hidden_state` (images, N, C), the encoder's features; `lengths` (images,).

        Raises:
            ValueError: the model was loaded with `generation_only=True`.
        """
        understanding, visual_tokenizer = self._reading_parts()
        own_merger = understanding if understanding.merger is not None else None
        encoded = visual_tokenizer.encode(pixel_values, merger=own_merger, **kwargs)
        projected = encoded.features if own_merger is not None else understanding(encoded.features)
        return LavitImageFeatures(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=projected.split(encoded.lengths.tolist()),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            lengths=encoded.lengths,
        )

    def get_image_tokens(self, pixel_values: torch.Tensor, **selection) -> LavitVisualTokens:
        """The codes of images (images, 3, H, W), for prompts that draw; see `LavitVisualTokenizer.tokenize`.

        Raises:
            ValueError: the model was loaded with `generation_only=True`.
        """
        _, visual_tokenizer = self._reading_parts()
        return visual_tokenizer.tokenize(pixel_values, **selection)

    def _reading_parts(self) -> tuple[LavitUnderstanding, LavitVisualTokenizer]:
        if self.understanding is None or self.visual_tokenizer is None:
            raise ValueError("the model was loaded with generation_only=True: it has no encoder and reads no images")
        return self.understanding, self.visual_tokenizer

    def expand_inputs(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        padding_side: str | None = None,
        **selection,
    ) -> LavitInputs:
        """Puts every image's continuous features between the `[IMG]` and `[/IMG]` of its slot.

        Args:
            input_ids: (B, L) with one slot per image.
            pixel_values: (images, 3, H, W), in reading order over the batch.
            attention_mask, labels: (B, L).
            padding_side: "left" or "right"; by default as the inputs are padded, right when they are not.
            selection: passed to the visual tokenizer.

        Raises:
            ValueError: the numbers of slots and images differ.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows = unpad(input_ids, attention_mask)
        slots = find_slots(rows, self.config.vocabulary)
        check_slots(slots, pixel_values.shape[0])
        if padding_side is None:
            padding_side = "left" if bool((attention_mask[:, 0] == 0).any()) else "right"

        features = self.get_image_features(pixel_values, return_dict=True, **selection).pooler_output
        placeholders = [
            input_ids.new_full((feature.shape[0],), self.config.vocabulary.visual_offset) for feature in features
        ]
        is_text = [torch.ones_like(row, dtype=torch.bool) for row in rows]
        is_text = fill_slots(is_text, slots, [torch.zeros_like(ids, dtype=torch.bool) for ids in placeholders])
        ids, mask = pad(fill_slots(rows, slots, placeholders), self.config.vocabulary.visual_offset, padding_side)
        is_feature = ~pad(is_text, True, padding_side)[0]
        own, speaks = locate(rows, slots, [len(ids) for ids in placeholders], attention_mask, padding_side)

        embeds = self.get_input_embeddings()(ids)
        stacked = torch.cat(features).to(embeds.device, embeds.dtype)
        embeds = embeds.masked_scatter(is_feature.unsqueeze(-1).to(embeds.device), stacked)
        if labels is not None:
            ignored = [torch.full_like(placeholder, IGNORED_LABEL) for placeholder in placeholders]
            label_rows = fill_slots(unpad(labels, attention_mask), slots, ignored)
            labels = pad(label_rows, IGNORED_LABEL, padding_side)[0]
        return LavitInputs(ids, embeds, mask, labels, is_feature, LavitPositions(own, mask), speaks)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        selection: str | None = None,
        keep_ratio: float | None = None,
        gumbel_noise: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues]
    ) -> BaseModelOutputWithPast:
        """Hidden states of the language model, (B, L, E): a row for each id. Arguments: see
        [`LavitForConditionalGeneration.forward`]."""
        past = cache_kwargs(past_key_values, cache)
        known = next(iter(past.values()))
        if position_ids is None:  # generate has checked, and gives them
            check_ids_and_mask(input_ids, attention_mask, self.config.text_config.vocab_size, known is not None)
        goes_on = position_ids is None and getattr(known, "lavit_positions", None) is not None
        speaks = positions = None
        if pixel_values is not None or goes_on:
            if position_ids is not None:
                raise ValueError(
                    "pixel_values lengthen the prompts: position_ids of the prompts as they are given do not fit. "
                    "Leave them out, or call expand_inputs() and pass its inputs_embeds"
                )
            if input_ids is None:
                raise ValueError("pixel_values and caches of prompts with images need input_ids, not inputs_embeds")
            selected = {"selection": selection, "keep_ratio": keep_ratio, "gumbel_noise": gumbel_noise}
            filled = self._go_on(input_ids, pixel_values, attention_mask, known, selected)
            input_ids, inputs_embeds, attention_mask, position_ids, positions, speaks = filled
        elif input_ids is not None and _starts_a_sequence(past):
            check_slots(find_slots(list(input_ids), self.config.vocabulary), 0)
        outputs = self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **past,
            **kwargs,  # pyright: ignore[reportCallIssue]
        )
        if speaks is not None:
            outputs.last_hidden_state = take_rows(outputs.last_hidden_state, speaks)
            if outputs.hidden_states is not None:
                # layers that were not asked for are None
                outputs.hidden_states = tuple(
                    None if hidden is None else take_rows(hidden, speaks) for hidden in outputs.hidden_states
                )
        if positions is not None and (cache := outputs.get(CACHE_NAME)) is not None:
            tell_positions(cache, positions)
        return outputs

    def _go_on(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        selection: dict,
    ) -> tuple:
        """New ids behind what a cache holds, their slots filled: what the language model is given of them."""
        length = cache.get_seq_length() if cache is not None else 0
        before = positions_of(cache) if length else None
        if before is None:
            own = torch.arange(length, device=input_ids.device).expand(len(input_ids), -1)
            before = LavitPositions(own, torch.ones_like(own))
        mask = torch.ones_like(input_ids)
        if attention_mask is not None:
            known_ids = before.own.shape[1]
            mask = attention_mask[:, -input_ids.shape[1] :]
            if (
                getattr(cache, "lavit_positions", None) is None
                and attention_mask.shape[1] == length + input_ids.shape[1]
            ):
                before.mask = attention_mask[:, :length].long()
            elif attention_mask.shape[1] not in (input_ids.shape[1], known_ids + input_ids.shape[1]):
                raise ValueError(
                    f"attention_mask has {attention_mask.shape[1]} columns for {known_ids} ids in the cache and "
                    f"{input_ids.shape[1]} new ones"
                )
        if pixel_values is None:
            check_slots(find_slots(unpad(input_ids, mask), self.config.vocabulary), 0)
            own = speaks = torch.arange(input_ids.shape[1], device=input_ids.device).expand(len(input_ids), -1)
            ids, embeds, new_mask = input_ids, None, mask.long()
        else:
            side = "left" if length else None
            expanded = self.expand_inputs(input_ids, pixel_values, mask, padding_side=side, **selection)
            ids, embeds, new_mask = None, expanded.inputs_embeds, expanded.attention_mask
            own, speaks = expanded.positions.own, expanded.speaks
        whole = torch.cat([before.mask, new_mask], dim=1)
        positions = LavitPositions(torch.cat([before.own, own + length], dim=1), whole)
        position_ids = (whole.cumsum(1) - 1).clamp_min(0)[:, length:]
        return ids, embeds, whole, position_ids, positions, speaks


class LavitForConditionalGeneration(LavitPreTrainedModel, LavitScoringMixin, LavitGenerationMixin):
    """LaVIT with its LM head over text ids, `[IMG]`, `[/IMG]` and codes: reads and draws (paper section 3.2).

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
    # where earlier checkpoints have the codes of known images
    _keys_to_ignore_on_load_unexpected = ["draft_ids"]

    def __init__(self, config: LavitConfig):
        super().__init__(config)
        self.model = LavitModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs) -> Self:
        """As every model's; with the images that it knows, see [`set_draft_codes`]."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        model.load_draft_codes(pretrained_model_name_or_path, **hub_options)
        return loaded

    def save_extra_files(self, folder: Path) -> None:
        """The images that the model knows, see [`set_draft_codes`]."""
        self.save_draft_codes(folder)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> LavitImageFeatures:
        """See [`LavitModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_image_tokens(self, pixel_values: torch.Tensor, **selection) -> LavitVisualTokens:
        """See [`LavitModel.get_image_tokens`]."""
        return self.model.get_image_tokens(pixel_values, **selection)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        selection: str | None = None,
        keep_ratio: float | None = None,
        gumbel_noise: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        logit_range: tuple[int, int] | None = None,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues]
    ) -> CausalLMOutputWithPast:
        """One next-token objective over both modalities (paper Eq. 6).

        Args:
            input_ids: (B, L). An image that is read is a slot `[IMG][/IMG]` here and pixels in `pixel_values`; one
                that is a target, or part of a drawing prompt, is `[IMG] code ids [/IMG]`.
            attention_mask, position_ids, inputs_embeds, use_cache: as in Llama.
            past_key_values, cache: one and the same, by the name of transformers up to 5.23 and from 5.24 on. After a
                prompt with images it knows how many positions each id took: further ids, with an `attention_mask`
                that counts ids, go on from it.
            pixel_values: (images, 3, H, W), one per slot in reading order over the batch. The language model computes
                on the slots filled with continuous features; what is returned has a row for each of `input_ids`
                nevertheless, where the row of a slot's `[IMG]` is that of the image's last feature. For the filled
                rows pass `expand_inputs(…).inputs_embeds`.
            labels: (B, L) ids, -100 where there is no loss, as for the first id of a prompt, which nothing precedes.
            selection, keep_ratio, gumbel_noise: which patches are kept, see `LavitVisualTokenizer.select`.
            logits_to_keep: compute the logits of so many last ids only; 0 means all.
            logit_range: (start, stop): compute the logits of these ids only; the others are -inf.

        Returns:
            `loss` (mean cross-entropy over labelled ids), `logits` (B, L, V), and what Llama returns; attentions are
            over filled positions.

        Raises:
            ValueError: the numbers of slots and images differ, ids outside the vocabulary, a mask of another shape,
                or pixels together with `position_ids`.
        """
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
            cache=cache,
            **kwargs,  # pyright: ignore[reportCallIssue]
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._compute_logits(outputs.last_hidden_state[:, kept], logit_range)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _compute_logits(self, hidden_states: torch.Tensor, logit_range: tuple[int, int] | None) -> torch.Tensor:
        """(B, L, E) -> (B, L, V); of a plain linear head only the rows `logit_range` are multiplied."""
        if logit_range is None:
            return self.lm_head(hidden_states)
        start, stop = logit_range
        # a sharded, quantized or offloaded head computes by its own forward
        plain = type(self.lm_head) is nn.Linear and type(self.lm_head.weight) is nn.Parameter
        if plain and "forward" not in vars(self.lm_head) and not self.lm_head.weight.is_meta:
            num_ids = self.lm_head.weight.shape[0]
            # the product in this order: for a few rows MKL's other one takes three times as long (float32, 4097 ids)
            rows = hidden_states.flatten(0, -2)
            logits = (self.lm_head.weight[start:stop] @ rows.T).T.unflatten(0, hidden_states.shape[:-1])
            return F.pad(logits, (start, num_ids - stop), value=float("-inf"))
        logits = self.lm_head(hidden_states)
        ids = torch.arange(logits.shape[-1], device=logits.device)
        return logits.masked_fill((ids < start) | (ids >= stop), float("-inf"))


# By these names Trainer knows that it has to shift the labels that it smooths, and `transformers serve` what goes in.
for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    names[LavitConfig.model_type] = LavitForConditionalGeneration.__name__  # pyright: ignore[reportArgumentType]


def _starts_a_sequence(past: dict) -> bool:
    return all(cache is None for cache in past.values()) and not torch.compiler.is_compiling()
