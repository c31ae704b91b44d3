"""How one id after the other is chosen: seeds, and the loop with batched guidance. Ids and masks are int64."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .compat_lavit import CACHE_NAME
from .drafts_lavit import END, LOOKED_AT, LavitDraftIndex
from .logits_lavit import image_state
from .vocabulary_lavit import LavitVocabulary


# whether torch's global generators are lent to a stock decoding method in this context
_GLOBAL_ARE_LENT = ContextVar("global generators are lent", default=False)
Generators = torch.Generator | Sequence[torch.Generator] | None


def row_generators(generator: Generators, rows: int) -> list[torch.Generator]:
    """One generator per drawn row.

    A list is taken as it is. A single generator is used directly for one row; for more rows it draws one seed per row,
    in order, and each row gets a generator of its own with that seed. None means fresh entropy. The global generators
    of torch are never read or written.

    Raises:
        ValueError: a list of another length, or something else than generators.
    """
    given: list[Any] = (
        list(generator) if isinstance(generator, list | tuple) else [generator] * (generator is not None)
    )
    if wrong := [one for one in given if not isinstance(one, torch.Generator)]:
        raise ValueError(
            f"generator must be a torch.Generator, or a list of one for each row, got {wrong[0]!r:.40}: a seed goes "
            "into one by torch.Generator().manual_seed(seed)"
        )
    if isinstance(generator, list | tuple):
        if len(generator) != rows:
            raise ValueError(
                f"{len(generator)} generators were given for {rows} rows: give one generator, or one for each prompt "
                "and each of its num_return_sequences draws"
            )
        return list(generator)
    if given:
        first: torch.Generator = given[0]
    else:
        # an assistant draws while its model does: from what that was given
        seed = int(torch.randint(2**63 - 1, (1,), device="cpu")) if _GLOBAL_ARE_LENT.get() else None
        first = torch.Generator()
        first.seed() if seed is None else first.manual_seed(seed)
    if rows == 1:
        return [first]
    seeds = torch.randint(2**63 - 1, (rows,), generator=first, device=first.device).tolist()
    return [torch.Generator(first.device).manual_seed(seed) for seed in seeds]


def next_uniforms(generators: Sequence[torch.Generator | None], device: torch.device | str = "cpu") -> torch.Tensor:
    """(B, 1) uniform numbers on `device`, row by row from its own generator; a row without one gets zero."""
    rows = [
        torch.zeros(1, device=device) if one is None else torch.rand(1, generator=one, device=one.device).to(device)
        for one in generators
    ]
    return torch.stack(rows)


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(B, V) probabilities and (B, 1) uniform numbers -> (B,) ids, each row by inverting its distribution.

    One number per row and step makes a row independent of its batch, of V and of the device of the generator.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, uniform.to(cumulative) * total, right=True)
    # rounding can carry the number up to the total: the last id that has a probability
    return ids.minimum((cumulative < total).sum(-1, keepdim=True)).squeeze(1)


class LavitDecodingState:
    """What the decoding loop knows of its rows: ids, which of them go on, and what was asked to be returned.

    Rows that are finished may leave the forwards (`active` are those that have not); processors, stopping criteria and
    streamer always see all of them, each at its own index.
    """

    def __init__(self, sequences: torch.Tensor, generators: list[torch.Generator] | None, config: GenerationConfig):
        self.sequences = sequences
        self.active = torch.arange(len(sequences), device=sequences.device)
        self.unfinished = torch.ones(len(sequences), dtype=torch.bool, device=sequences.device)
        self.generators = list(generators or [])
        wanted = config.return_dict_in_generate
        # transformers' annotations of these are of tuples with one entry
        self.scores: Any = () if wanted and config.output_scores else None
        self.logits: Any = () if wanted and config.output_logits else None
        self.hidden_states: Any = () if wanted and config.output_hidden_states else None
        self.attentions: Any = () if wanted and config.output_attentions else None

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Of the active rows to all rows; zero elsewhere."""
        if len(self.active) == len(self.sequences):
            return values
        return values.new_zeros(len(self.sequences), *values.shape[1:]).index_copy_(0, self.active, values)

    def record(self, logits: torch.Tensor, scores: torch.Tensor) -> None:
        """`logits` (streams, V), with guidance [conditional; unconditional]; `scores` (rows, V)."""
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)

    def record_layers(self, outputs) -> None:
        rows = len(self.sequences)
        if self.hidden_states is not None:
            self.hidden_states += (tuple(layer[:rows] for layer in outputs.hidden_states),)
        if self.attentions is not None:
            self.attentions += (tuple(layer[:rows] for layer in outputs.attentions),)

    def append(self, ids: torch.Tensor, stopping_criteria: StoppingCriteriaList) -> None:
        """The newest ids (rows,), and who goes on."""
        self.sequences = torch.cat([self.sequences, ids.unsqueeze(1)], dim=1)
        self.unfinished = self.unfinished & ~stopping_criteria(self.sequences, self.scores)

    def drop_finished(self) -> torch.Tensor | None:
        """Takes finished rows out of the active ones; the indices among these that stay, None if all do."""
        going_on = self.unfinished[self.active]
        if bool(going_on.all()):
            return None
        kept = going_on.nonzero().squeeze(1)
        self.active = self.active[kept]
        return kept


class LavitDecodingLoop:
    """Greedy search or sampling with batched guidance, as a `custom_generate` of `GenerationMixin.generate`.

    With guidance the rows are `[conditional; unconditional]`, left padded together, and one forward serves both. The
    unconditional stream of an image begins with its `[IMG]` at position 0 and sees nothing before it. Scores (paper
    section 4.1, classifier-free guidance), wherever a row is inside an image: `log_softmax(u) + scale ·
    (log_softmax(c) - log_softmax(u))`.

    Args:
        vocabulary: meaning of the ids.
        pad_token_id: fed to and returned for finished rows.
        guidance_scale: (rows,), one for each row; None for a single stream.
        generators: one per row; None for greedy search. A single generator in `joint_generator` instead draws all rows
            with one `torch.multinomial`, as the reference does.
        streamer: gets the prompt and then every step's ids.
        restart_unconditional: whether the unconditional stream starts again at every `[IMG]` that is written.
        drafter: proposes up to `draft_length` codes ahead of each forward, which verifies them all (arXiv 2311.08252).
            As the uniform number of every id to come is fixed, a code is kept if it is the one that would be drawn:
            what is written stays the same. A lone row does so: of several, all would wait for the slowest.
        keeps_rows: whether finished rows stay in the cache, because the caller goes on with it. Otherwise they leave
            the forwards, where the cache allows it, with both their streams.
    """

    def __init__(
        self,
        vocabulary: LavitVocabulary,
        pad_token_id: int,
        guidance_scale: torch.Tensor | None = None,
        generators: list[torch.Generator] | None = None,
        joint_generator: torch.Generator | None = None,
        streamer: BaseStreamer | None = None,
        restart_unconditional: bool = False,
        drafter: LavitDraftIndex | None = None,
        draft_length: int = 0,
        keeps_rows: bool = False,
    ):
        self.vocabulary = vocabulary
        self.pad_token_id = pad_token_id
        self.guidance_scale = guidance_scale
        self.generators = generators
        self.joint_generator = joint_generator
        self.streamer = streamer
        self.restart_unconditional = restart_unconditional
        self.drafter = drafter
        self.draft_length = draft_length
        self.keeps_rows = keeps_rows

    def __call__(
        self,
        model,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        rows = len(input_ids) // (1 if self.guidance_scale is None else 2)
        state = LavitDecodingState(input_ids[:rows], self.generators, generation_config)
        forward = model.__call__
        if model._valid_auto_compile_criteria(model_kwargs, generation_config):
            forward = model.get_compiled_call(generation_config.compile_config)
        if self.guidance_scale is not None and model_kwargs.get("attention_mask") is None:
            model_kwargs["attention_mask"] = torch.ones_like(input_ids)
        if self.streamer is not None:
            self.streamer.put(state.sequences.cpu())

        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        grows = grows_freely(outputs.get(CACHE_NAME))
        keeps_rows = self.keeps_rows or self.joint_generator is not None or generation_config.return_dict_in_generate
        returns_layers = state.hidden_states is not None or state.attentions is not None
        drafts_allowed = self.draft_length and not returns_layers and (grows or not model_kwargs["use_cache"])
        drafter = self.drafter if drafts_allowed else None
        drafts = input_ids[:1, :0]
        while True:
            accepted = self._accept(state, outputs, drafts, logits_processor, stopping_criteria, generation_config)
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, num_new_tokens=accepted)
            del outputs
            newest = state.sequences[state.active, -accepted:]
            input_ids = torch.cat([input_ids, self._streams(newest)], dim=1)
            if not bool(state.unfinished.any()):
                break
            if self.guidance_scale is not None and self.restart_unconditional:
                self._restart_unconditional(newest[:, -1], model_kwargs)
            if accepted <= drafts.shape[1] and grows:
                model_kwargs[CACHE_NAME].crop(accepted - 1 - drafts.shape[1])
            if grows and not keeps_rows and (kept := state.drop_finished()) is not None:
                input_ids = self._keep_rows(kept, input_ids, model_kwargs)
            drafts = input_ids[:1, :0]
            if drafter is not None and len(state.active) == 1:
                room = generation_config.max_length - input_ids.shape[1] - 1
                drafts = self._draft(drafter, state.sequences[state.active], min(self.draft_length, room))
            outputs = self._forward(forward, model, input_ids, drafts, model_kwargs)

        if self.streamer is not None:
            self.streamer.end()
        if not generation_config.return_dict_in_generate:
            return state.sequences
        return GenerateDecoderOnlyOutput(
            sequences=state.sequences,  # pyright: ignore[reportArgumentType]
            scores=state.scores,
            logits=state.logits,
            hidden_states=state.hidden_states,
            attentions=state.attentions,
            **{CACHE_NAME: model_kwargs.get(CACHE_NAME)},
        )

    def _accept(
        self,
        state: LavitDecodingState,
        outputs,
        drafts: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ) -> int:
        """Writes the ids that the outputs give, one after the other while the drafts are what is written; how many."""
        state.record_layers(outputs)
        all_logits = outputs.logits[:, -1 - drafts.shape[1] :].to(
            copy=True, dtype=torch.float32, device=state.sequences.device
        )
        for position in range(all_logits.shape[1]):
            scores = state.spread(self._guide(all_logits[:, position], state))
            scores = logits_processor(state.sequences, scores)  # pyright: ignore[reportArgumentType]
            state.record(all_logits[:, position], scores)
            ids = self._choose(scores, state, generation_config.do_sample)
            if self.streamer is not None:
                self.streamer.put(ids.cpu())
            state.append(ids, stopping_criteria)
            is_last = position == drafts.shape[1] or not bool(state.unfinished.any())
            if is_last or int(ids[state.active]) != int(drafts[0, position]):
                return position + 1
        raise AssertionError("the last position is always written")

    def _guide(self, logits: torch.Tensor, state: LavitDecodingState) -> torch.Tensor:
        """(streams, V) to the scores (active rows, V)."""
        if self.guidance_scale is None:
            return logits
        scale = self.guidance_scale.to(logits)[state.active].unsqueeze(1)
        conditional, unconditional = logits.log_softmax(-1).chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        # ids outside the computed range are -inf in both streams, their difference is no number
        guided = guided.masked_fill(conditional.isneginf(), float("-inf"))
        is_guided = scale != 1
        if self.restart_unconditional:
            inside, _ = image_state(state.sequences[state.active], self.vocabulary)
            is_guided = is_guided & inside.unsqueeze(1)
        return torch.where(is_guided, guided, conditional)

    def _choose(self, scores: torch.Tensor, state: LavitDecodingState, do_sample: bool) -> torch.Tensor:
        """(rows, V) to ids (rows,); finished rows get the pad id and use up no random number."""
        if not do_sample:
            ids = scores.argmax(-1)
        elif self.joint_generator is not None:
            ids = torch.multinomial(scores.softmax(-1), 1, generator=self.joint_generator).squeeze(1)
        else:
            going_on = state.unfinished.tolist()
            drawing = [one if goes_on else None for one, goes_on in zip(state.generators, going_on, strict=True)]
            ids = draw(scores.softmax(-1), next_uniforms(drawing, device=scores.device))
        return torch.where(state.unfinished, ids, self.pad_token_id)

    def _streams(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.guidance_scale is None else torch.cat([rows, rows])

    def _draft(self, drafter: LavitDraftIndex, sequences: torch.Tensor, count: int) -> torch.Tensor:
        """(1, n) ids to verify next, n up to `count`: how a known image goes on, of the only row (1, L)."""
        recent = [id_ - self.vocabulary.visual_offset for id_ in sequences[0, -LOOKED_AT:].tolist()]
        codes = drafter.continuation(recent, count)
        ids = [self.vocabulary.eoi_token_id if code == END else self.vocabulary.ids_of(code) for code in codes]
        return sequences.new_tensor([ids], dtype=torch.long)

    def _forward(self, forward, model, input_ids: torch.Tensor, drafts: torch.Tensor, model_kwargs: dict):
        """The newest ids and the drafts behind them through the model."""
        count = drafts.shape[1]
        if count:
            input_ids = torch.cat([input_ids, self._streams(drafts)], dim=1)
            model_kwargs = model._update_model_kwargs_for_generation({}, dict(model_kwargs), num_new_tokens=count)
            model_kwargs["logits_to_keep"] = 1 + count
        next_length = 1 + count if model_kwargs["use_cache"] else None
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=next_length, **model_kwargs)
        return forward(**inputs, return_dict=True)

    def _keep_rows(self, kept: torch.Tensor, input_ids: torch.Tensor, model_kwargs: dict) -> torch.Tensor:
        """Takes all rows but `kept`, with their streams, out of the cache and of what goes with the ids."""
        count = len(input_ids)
        streams = kept if self.guidance_scale is None else torch.cat([kept, kept + count // 2])
        model_kwargs[CACHE_NAME].batch_select_indices(streams)
        for name, value in model_kwargs.items():
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
                model_kwargs[name] = value[streams]
        return input_ids[streams]

    def _restart_unconditional(self, ids: torch.Tensor, model_kwargs: dict) -> None:
        """Where `[IMG]` was just written, its unconditional stream starts again, with that id alone at position 0."""
        begins = (ids == self.vocabulary.boi_token_id).unsqueeze(1)
        mask, positions = model_kwargs["attention_mask"].clone(), model_kwargs["position_ids"].clone()
        mask[len(ids) :, :-1].masked_fill_(begins, 0)
        positions[len(ids) :, -1:].masked_fill_(begins, 0)
        model_kwargs["attention_mask"], model_kwargs["position_ids"] = mask, positions


def grows_freely(cache: Cache | None) -> bool:
    """Whether a cache is made of plain tensors that grow with every step: its rows can be dropped, its end cut off."""
    return cache is not None and all(type(layer) is DynamicLayer for layer in cache.layers)


@dataclass
class LavitDraw:
    """How ids are drawn: seeds, streamer, and whether as the reference does."""

    generator: Generators
    streamer: BaseStreamer | None
    reference_compat: bool

    @property
    def is_list(self) -> bool:
        return isinstance(self.generator, list | tuple)

    def loop(self, vocabulary: LavitVocabulary, pad_token_id: int, rows: int, **options) -> LavitDecodingLoop:
        joint = self.generator if isinstance(self.generator, torch.Generator) and self.reference_compat else None
        return LavitDecodingLoop(
            vocabulary,
            pad_token_id,
            generators=None if joint is not None else row_generators(self.generator, rows),
            joint_generator=joint,
            streamer=self.streamer,
            **options,
        )

    @contextmanager
    def global_generators(self, device: torch.device) -> Iterator[None]:
        """Lends torch's global generators to a stock decoding method: seeded from ours, restored afterwards."""
        generator = row_generators(self.generator, 1)[0]
        seed = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
        on_accelerator = device.type not in ("cpu", "meta")
        forked: dict[str, Any] = (
            {"devices": [device], "device_type": device.type} if on_accelerator else {"devices": []}
        )
        with torch.random.fork_rng(**forked):
            torch.default_generator.manual_seed(seed)
            if on_accelerator:
                torch.get_device_module(device).manual_seed(seed)
            lent = _GLOBAL_ARE_LENT.set(True)
            try:
                yield
            finally:
                _GLOBAL_ARE_LENT.reset(lent)
