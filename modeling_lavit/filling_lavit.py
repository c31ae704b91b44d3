"""Prompts of `generate`: their slots filled, behind what a cache holds, and everything given back in the caller's ids.

B prompts, L ids as the caller has them, P positions once the slots are filled, E width of the language model.
Ids, masks and positions are int64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer

from .compat_lavit import CACHE_NAME, cache_kwargs
from .decoding_lavit import LavitDraw, grows_freely
from .layers_lavit import take_rows
from .logits_lavit import image_state
from .slots_lavit import (
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
from .vocabulary_lavit import LavitVocabulary


@dataclass
class LavitPrompt:
    """Prompts as they were given: `input_ids` and `attention_mask` (B, L), `pixel_values` one image per slot."""

    input_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    pixel_values: torch.Tensor | None
    selection: dict[str, Any]
    cache: Cache | None = None

    @property
    def ids(self) -> torch.Tensor:
        """`input_ids`, where there must be some."""
        if self.input_ids is None:
            raise ValueError("generate needs input_ids")
        return self.input_ids

    def split(self, vocabulary: LavitVocabulary) -> list["LavitPrompt"]:
        """Each prompt alone, with its images."""
        ids = self.ids
        slots = find_slots(unpad(ids, self.attention_mask), vocabulary)
        counts = [len(starts) for starts in slots]
        images: list[torch.Tensor | None] = [None] * len(counts)
        if self.pixel_values is not None:
            check_slots(slots, len(self.pixel_values))
            images = [pixels if len(pixels) else None for pixels in self.pixel_values.split(counts)]
        rows = range(len(ids))
        masks = [None if self.attention_mask is None else self.attention_mask[i : i + 1] for i in rows]
        return [LavitPrompt(ids[i : i + 1], masks[i], images[i], self.selection) for i in rows]


def begin_images(prompt: LavitPrompt, vocabulary: LavitVocabulary, pad_token_id: int) -> LavitPrompt:
    """The prompts with an `[IMG]` behind those that do not end within an image."""
    ids = prompt.ids
    mask = torch.ones_like(ids) if prompt.attention_mask is None else prompt.attention_mask
    if empty := (mask[:, -ids.shape[1] :] == 0).all(1).nonzero().flatten().tolist():
        raise ValueError(f"prompts {empty} are empty: a prompt needs at least one id")
    inside, _ = image_state(ids.masked_fill(mask[:, -ids.shape[1] :] == 0, pad_token_id), vocabulary)
    if bool(inside.all()):
        return prompt
    begun = torch.where(inside, pad_token_id, vocabulary.boi_token_id).to(ids).unsqueeze(1)
    mask = torch.cat([mask, (~inside).to(mask).unsqueeze(1)], dim=1)
    return LavitPrompt(torch.cat([ids, begun], dim=1), mask, prompt.pixel_values, prompt.selection, prompt.cache)


def fill_prompt(
    model, prompt: LavitPrompt, pad_token_id: int, discrete: bool, brackets: bool = True
) -> "LavitFilledPrompt":
    """Fills the slots of prompts and pads them on the left, behind what their cache holds.

    Args:
        model: a `LavitForConditionalGeneration`.
        pad_token_id: fills the padding.
        discrete: whether images are read as codes (to draw) or as continuous features (to write text).
        brackets: whether `[IMG]` and `[/IMG]` stay around codes.

    Raises:
        ValueError: no ids, empty prompts, ids that go nowhere beyond the cache, numbers of slots and images that
            differ, a mask of another shape.
    """
    vocabulary, ids, cache = model.config.vocabulary, prompt.ids, prompt.cache
    cached = cache.get_seq_length() if cache is not None else 0
    check_ids_and_mask(ids, prompt.attention_mask, model.config.text_config.vocab_size, bool(cached))
    mask = torch.ones_like(ids) if prompt.attention_mask is None else prompt.attention_mask.to(ids)
    before = _held_by(cache if cached else None, cached, mask)
    known = before.own.shape[1]
    if mask.shape[1] == ids.shape[1]:
        known_ids, new_ids = ids[:, :known], ids[:, known:]
    elif mask.shape[1] == known + ids.shape[1]:
        known_ids, new_ids = ids[:, :0], ids
    else:
        raise ValueError(f"attention_mask has {mask.shape[1]} columns for {known} ids in the cache and {ids.shape[1]}")
    if cached and not new_ids.shape[1]:
        raise ValueError(f"the cache holds all of the {known} ids: give those, too, that go on behind them")
    new_mask = mask[:, mask.shape[1] - new_ids.shape[1] :]
    rows = unpad(new_ids, new_mask)
    if empty := [index for index, row in enumerate(rows) if not len(row)]:
        raise ValueError(f"prompts {empty} are empty: a prompt needs at least one id" + " more" * bool(cached))
    slots = find_slots(rows, vocabulary)
    pixel_values = _images_of(slots, find_slots(unpad(ids, mask[:, -ids.shape[1] :]), vocabulary), prompt)

    embeds = own = speaks = None
    if pixel_values is not None and not discrete:
        expanded = model.model.expand_inputs(new_ids, pixel_values, new_mask, padding_side="left", **prompt.selection)
        filled, filled_mask, embeds = expanded.input_ids, expanded.attention_mask, expanded.inputs_embeds
        own, speaks = expanded.positions.own, expanded.speaks
    else:
        codes = model.get_image_tokens(pixel_values, **prompt.selection).split() if pixel_values is not None else ()
        fills = [vocabulary.ids_of(row.to(ids.device)) for row in codes]
        filled, filled_mask = pad(fill_slots(rows, slots, fills, keep_brackets=brackets), pad_token_id, "left")
        if brackets:
            own, speaks = locate(rows, slots, [len(fill) for fill in fills], new_mask, "left")
    if cached:
        held = _place(known_ids, before, mask, vocabulary.visual_offset)
        filled, filled_mask = torch.cat([held, filled], dim=1), torch.cat([before.mask, filled_mask], dim=1)
        if embeds is not None:
            embeds = torch.cat([model.get_input_embeddings()(held), embeds], dim=1)
    positions = None
    if own is not None:
        positions = LavitPositions(torch.cat([before.own, own + cached], dim=1), filled_mask)
    return LavitFilledPrompt(ids, filled, filled_mask, embeds, positions, speaks, cache, cached)


def _held_by(cache: Cache | None, cached: int, mask: torch.Tensor) -> LavitPositions:
    """Where the ids in a cache stand; each at its own position where the cache knows nothing else."""
    positions = positions_of(cache) if cache is not None else None
    if positions is None:
        own = torch.arange(cached, device=mask.device).expand(len(mask), -1)
        return LavitPositions(own, mask[:, :cached])
    if len(positions.own) != len(mask):
        raise ValueError(f"the cache has {len(positions.own)} rows, but there are {len(mask)} prompts")
    return positions


def _images_of(slots: list[list[int]], all_slots: list[list[int]], prompt: LavitPrompt) -> torch.Tensor | None:
    """The images of the slots that are filled now; those of slots in the cache may have been given, too."""
    pixel_values, new = prompt.pixel_values, [len(starts) for starts in slots]
    given = 0 if pixel_values is None else len(pixel_values)
    whole = [len(starts) for starts in all_slots]
    is_of_all = given != sum(new) and given == sum(whole)
    if prompt.cache is not None and pixel_values is not None and is_of_all:
        pixel_values = torch.cat(
            [rows[len(rows) - count :] for rows, count in zip(pixel_values.split(whole), new, strict=True)]
        )
        given = len(pixel_values)
    check_slots(slots, given)
    return pixel_values if given else None


def _place(ids: torch.Tensor, positions: LavitPositions, mask: torch.Tensor, filler: int) -> torch.Tensor:
    """Ids (B, n) at their positions (B, P), `filler` where images are."""
    held = positions.mask.new_full(positions.mask.shape, filler, dtype=torch.long)
    is_id = mask[:, : ids.shape[1]].bool()
    row = torch.arange(len(held), device=held.device).unsqueeze(1).expand_as(is_id)
    held[row[is_id], positions.own[:, : ids.shape[1]][is_id]] = ids[is_id]
    return held


@dataclass
class LavitFilledPrompt:
    """What `GenerationMixin.generate` is given for prompts, and the way back to the caller's ids.

    Args:
        caller_ids: (B, L), as they were given.
        input_ids, attention_mask: (B, P), or (2B, P) with unconditional streams; left padded.
        inputs_embeds: (B, P, E) where there are continuous features.
        positions: where the caller's ids stand; None for the reference's prompts, whose slots vanish.
        speaks: (B, new ids), see [`LavitInputs`], counted from the end of the cache.
        cache, cached: what the caller gave to go on from or to fill, and how many positions it holds.
    """

    caller_ids: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    inputs_embeds: torch.Tensor | None
    positions: LavitPositions | None
    speaks: torch.Tensor | None
    cache: Cache | None
    cached: int
    has_streams: bool = False

    @property
    def longest(self) -> int:
        """Positions of the longest prompt, padding not counted."""
        return int(self.attention_mask[: len(self.caller_ids)].sum(1).max())

    @property
    def added(self) -> int:
        """How many more columns the filled prompts have."""
        return self.input_ids.shape[1] - self.caller_ids.shape[1]

    @property
    def is_as_given(self) -> bool:
        return torch.equal(self.input_ids[: len(self.caller_ids)], self.caller_ids)

    def add_streams(self, unconditional: list[torch.Tensor], pad_token_id: int) -> None:
        """Puts the rows of a second stream below, which see nothing of what the cache holds."""
        new = unpad(self.input_ids[:, self.cached :], self.attention_mask[:, self.cached :])
        width = self.input_ids.shape[1]
        ids, mask = pad(new + unconditional, pad_token_id, "left")
        held, held_mask = self.input_ids[:, : self.cached], self.attention_mask[:, : self.cached]
        self.input_ids = torch.cat([torch.cat([held, torch.full_like(held, pad_token_id)]), ids], dim=1)
        self.attention_mask = torch.cat([torch.cat([held_mask, torch.zeros_like(held_mask)]), mask], dim=1)
        self.has_streams = True
        wider = self.input_ids.shape[1] - width
        if self.positions is not None and self.speaks is not None:
            is_new = self.positions.own >= self.cached
            own = torch.where(is_new, self.positions.own + wider, self.positions.own)
            self.positions = LavitPositions(own, self.attention_mask[: len(held)])
            self.speaks = self.speaks + wider

    def take_cache(self, cache: Cache, rows_of_prompt: int) -> None:
        """Makes the rows of the prompts' cache those that are decoded."""
        rows = torch.arange(len(self.caller_ids)).repeat_interleave(rows_of_prompt)
        rows = torch.cat([rows, rows]) if self.has_streams else rows
        if self.cached and len(rows) > len(self.caller_ids):
            if not grows_freely(cache):
                raise ValueError(
                    f"a {type(cache).__name__} cannot serve several rows or streams of a prompt: give a "
                    "DynamicCache, one row a prompt, and no guidance"
                )
            cache.batch_select_indices(rows.to(self.input_ids.device))
        tell_positions(cache, None)

    def compute_once(self, model, rows_of_prompt: int) -> Cache:
        """Computes all positions of the prompts but the last, once for all rows that go on from them.

        transformers repeats the prompts for every beam and draw, and computes them as often.
        """
        ids, embeds = self.input_ids[:, :-1], self.inputs_embeds
        mask = self.attention_mask[:, :-1]
        cache = DynamicCache(config=model.config.text_config)
        model(
            input_ids=ids if embeds is None else None,
            inputs_embeds=None if embeds is None else embeds[:, :-1],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            logits_to_keep=1,
            logit_range=(0, 1),
            use_cache=True,
            **cache_kwargs(cache),
        )
        cache.batch_repeat_interleave(rows_of_prompt)
        return cache

    def wrap(self, call: dict[str, Any], drawn: LavitDraw, rows_of_prompt: int) -> None:
        """Shows the caller's processors, stopping criteria and streamer ids as the caller has them."""
        if self.is_as_given:
            return
        call["logits_processor"] = LogitsProcessorList(
            _ProcessorInCallersIds(processor, self) for processor in call["logits_processor"]
        )
        call["stopping_criteria"] = StoppingCriteriaList(
            _CriteriaInCallersIds(criteria, self) for criteria in call["stopping_criteria"]
        )
        if (allowed := call.get("prefix_allowed_tokens_fn")) is not None:
            call["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
                row, torch.cat([self.caller_ids[row // rows_of_prompt], ids[self.input_ids.shape[1] :]])
            )
        if drawn.streamer is not None:
            drawn.streamer = _StreamerInCallersIds(drawn.streamer, self)

    def in_callers_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, P + new) to (rows, L + new)."""
        return self._behind(ids[:, self.input_ids.shape[1] :])

    def _behind(self, new_ids: torch.Tensor) -> torch.Tensor:
        repeats = len(new_ids) // len(self.caller_ids)
        return torch.cat([self.caller_ids.to(new_ids.device).repeat_interleave(repeats, dim=0), new_ids], dim=1)

    def give_back(self, output, with_prompt: bool, num_prompt_ids: int | None = None):
        """What `GenerationMixin.generate` returned, in the caller's ids; new ids alone without the prompt.

        Args:
            num_prompt_ids: how many ids of a prompt are in front of the output's; P by default.
        """
        is_tensor = isinstance(output, torch.Tensor)
        sequences = output if is_tensor else output.sequences
        sequences = sequences[:, self.input_ids.shape[1] if num_prompt_ids is None else num_prompt_ids :]
        sequences = self._behind(sequences) if with_prompt else sequences
        cache = self.cache if is_tensor else output.get(CACHE_NAME)
        if cache is not None:
            self._describe(cache)
        if is_tensor:
            return sequences
        output.sequences = sequences
        if output.hidden_states is not None and self.speaks is not None and not self.is_as_given:
            first = output.hidden_states[0]
            speaks = self.speaks.repeat_interleave(len(first[0]) // len(self.speaks), dim=0)
            output.hidden_states = (tuple(take_rows(layer, speaks) for layer in first), *output.hidden_states[1:])
        return output

    def _describe(self, cache: Cache) -> None:
        """Leaves the conditional rows in a cache, and where their ids stand."""
        if self.has_streams and grows_freely(cache):
            keys: Any = cache.layers[0].keys  # pyright: ignore[reportAttributeAccessIssue]
            rows = len(keys) // 2
            cache.batch_select_indices(torch.arange(rows, device=self.input_ids.device))
        tell_positions(cache, None if self.is_as_given else self.positions)


class _ProcessorInCallersIds(LogitsProcessor):
    def __init__(self, processor: Callable, filled: LavitFilledPrompt):
        self.processor, self.filled = processor, filled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.processor(self.filled.in_callers_ids(input_ids), scores)


class _CriteriaInCallersIds(StoppingCriteria):
    def __init__(self, criteria: Callable, filled: LavitFilledPrompt):
        self.criteria, self.filled = criteria, filled

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return self.criteria(self.filled.in_callers_ids(input_ids), scores, **kwargs)


class _StreamerInCallersIds(BaseStreamer):
    """The first ids that a streamer gets are the prompt."""

    def __init__(self, streamer: BaseStreamer, filled: LavitFilledPrompt):
        self.streamer, self.filled, self.is_prompt = streamer, filled, True

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(self.filled.in_callers_ids(value).cpu() if self.is_prompt else value)
        self.is_prompt = False

    def end(self) -> None:
        self.streamer.end()
