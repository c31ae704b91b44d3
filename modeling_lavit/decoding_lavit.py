"""How one id after the other is chosen: seeds, and the loop with batched guidance."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .drafts_lavit import END, LOOKED_AT, LavitDraftIndex
from .logits_lavit import image_state
from .steps_lavit import can_step_plainly, grows_freely, plain_step
from .vocabulary_lavit import LavitVocabulary


Generators = torch.Generator | Sequence[torch.Generator] | None


def row_generators(generator: Generators, rows: int) -> list[torch.Generator]:
    """One generator per drawn row.

    A list is taken as it is. A single generator is used directly for one row; for more rows it draws one seed per row,
    in order, and each row gets a generator of its own with that seed. None means fresh entropy. The global generators
    of torch are never read or written.

    Raises:
        ValueError: a list of another length.
    """
    if isinstance(generator, Sequence):
        if len(generator) != rows:
            raise ValueError(
                f"{len(generator)} generators were given for {rows} rows: give one generator, or one for each prompt "
                "and each of its num_return_sequences draws"
            )
        return list(generator)
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if rows == 1:
        return [generator]
    seeds = torch.randint(2**63 - 1, (rows,), generator=generator, device=generator.device).tolist()
    return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]


def next_uniforms(generators: Sequence[torch.Generator | None], device: torch.device | str = "cpu") -> torch.Tensor:
    """(B, 1) uniform numbers on `device`, row by row from its own generator; a row without one gets zero."""
    rows = [
        torch.zeros(1, device=device) if one is None else torch.rand(1, generator=one, device=one.device).to(device)
        for one in generators
    ]
    return torch.stack(rows)


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.LongTensor:
    """(B, V) probabilities and (B, 1) uniform numbers -> (B,) ids, each row by inverting its distribution.

    One number per row and step makes a row independent of its batch, of V and of the device of the generator.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, uniform.to(cumulative) * total, right=True)
    # rounding can carry the number up to the total: the last id that has a probability
    return ids.minimum((cumulative < total).sum(-1, keepdim=True)).squeeze(1)


class LavitDecodingLoop:
    """Greedy search or sampling with batched guidance, as a `custom_generate` of `GenerationMixin.generate`.

    With guidance the rows are `[conditional; unconditional]`, left padded together, and one forward serves both. The
    unconditional stream of an image begins with its `[IMG]` at position 0 and sees nothing before it. Scores (paper
    section 4.1, classifier-free guidance), wherever a row is inside an image: `log_softmax(u) + scale ·
    (log_softmax(c) - log_softmax(u))`.

    Args:
        vocabulary: meaning of the ids.
        pad_token_id: fed to and returned for finished rows.
        guidance_scale: None for a single stream.
        generators: one per row; None for greedy search. A single generator in `joint_generator` instead draws all rows
            with one `torch.multinomial`, as the reference does.
        streamer: gets the prompt and then every step's ids.
        restart_unconditional: whether the unconditional stream begins anew at every `[IMG]` that is written.
        known_pictures, draft_length: so many codes, at most, are looked up ahead of each forward, which verifies them
            all (retrieval-based speculative decoding, arXiv 2311.08252). As the uniform number of every id to come is
            fixed, a code is kept if it is the one that would be drawn: what is written stays the same. A lone row
            does so: of several, all would have to go on by as many as the slowest.

    Rows that are finished leave the batch, with both their streams, where cache and outputs allow it: logits
    processors then see the others alone, stopping criteria and streamer always all. They use up no more random
    numbers.
    """

    def __init__(
        self,
        vocabulary: LavitVocabulary,
        pad_token_id: int,
        guidance_scale: float | None = None,
        generators: list[torch.Generator] | None = None,
        joint_generator: torch.Generator | None = None,
        streamer: BaseStreamer | None = None,
        restart_unconditional: bool = False,
        known_pictures: LavitDraftIndex | None = None,
        draft_length: int = 0,
    ):
        self.vocabulary = vocabulary
        self.pad_token_id = pad_token_id
        self.guidance_scale = guidance_scale
        self.generators = generators
        self.joint_generator = joint_generator
        self.streamer = streamer
        self.restart_unconditional = restart_unconditional
        self.known_pictures = known_pictures
        self.draft_length = draft_length

    def __call__(
        self,
        model,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> torch.LongTensor | GenerateDecoderOnlyOutput:
        guided = self.guidance_scale is not None
        rows = input_ids.shape[0] // 2 if guided else input_ids.shape[0]
        sequences, active = input_ids[:rows], torch.arange(rows, device=input_ids.device)
        unfinished = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
        drawing = list(self.generators or [])
        forward = model.__call__
        compiled = model._valid_auto_compile_criteria(model_kwargs, generation_config)
        if compiled:
            forward = model.get_compiled_call(generation_config.compile_config)
        if guided and model_kwargs.get("attention_mask") is None:
            model_kwargs["attention_mask"] = torch.ones_like(input_ids)
        all_scores, all_logits = [], []
        if self.streamer is not None:
            self.streamer.put(sequences.cpu())

        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        grows = model_kwargs["use_cache"] and grows_freely(outputs.past_key_values)
        drops_rows = grows and self.joint_generator is None and not generation_config.return_dict_in_generate
        # codes that are not drawn are taken back out of the cache
        looks_ahead = self.draft_length and (grows or not model_kwargs["use_cache"])
        if grows and not compiled and can_step_plainly(model, model_kwargs):
            forward = plain_step
        drafts = sequences[:, :0]
        while True:
            step_logits = outputs.logits[:, -1 - drafts.shape[1] :].to(
                copy=True, dtype=torch.float32, device=input_ids.device
            )
            for accepted in range(1, step_logits.shape[1] + 1):
                logits, written = step_logits[:, accepted - 1], sequences if len(active) == rows else sequences[active]
                scores = logits_processor(written, self._guide(logits, written) if guided else logits)
                if generation_config.output_scores:
                    all_scores.append(scores)
                if generation_config.output_logits:
                    all_logits.append(logits)
                ids = self._choose(scores, drawing, generation_config.do_sample)
                ids = torch.where(unfinished[active], ids, self.pad_token_id)
                newest = sequences.new_full((rows,), self.pad_token_id).index_copy_(0, active, ids)
                if self.streamer is not None:
                    self.streamer.put(newest.cpu())
                sequences = torch.cat([sequences, newest.unsqueeze(1)], dim=1)
                input_ids = torch.cat([input_ids, (ids.repeat(2) if guided else ids).unsqueeze(1)], dim=1)
                unfinished = unfinished & ~stopping_criteria(sequences, scores)
                going_on = unfinished[active].tolist()
                drawing = [one if goes_on else None for one, goes_on in zip(drawing, going_on, strict=False)]
                if not any(going_on):
                    break
                if accepted <= drafts.shape[1] and (unfinished[active] & (ids != drafts[:, accepted - 1])).any():
                    break
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, num_new_tokens=accepted)
            del outputs
            if not any(going_on):
                break
            if guided and self.restart_unconditional:
                self._restart_unconditional(ids, model_kwargs)
            if accepted <= drafts.shape[1] and model_kwargs["use_cache"]:
                model_kwargs["past_key_values"].crop(accepted - 1 - drafts.shape[1])
            if drops_rows and not all(going_on):
                kept = unfinished[active].nonzero().squeeze(1)
                streams = torch.cat([kept, kept + len(active)]) if guided else kept
                active, input_ids = active[kept], input_ids[streams]
                drawing = [one for one, goes_on in zip(drawing, going_on, strict=False) if goes_on]
                self._keep_rows(streams, model_kwargs)
            drafts = sequences[:, :0]
            if looks_ahead and len(active) == 1:
                room = generation_config.max_length - input_ids.shape[1] - 1
                drafts = self._look_up(sequences[active], min(self.draft_length, room))
            outputs = self._forward(forward, model, input_ids, drafts, model_kwargs)

        if self.streamer is not None:
            self.streamer.end()
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=tuple(all_scores) if generation_config.output_scores else None,
            logits=tuple(all_logits) if generation_config.output_logits else None,
            past_key_values=model_kwargs.get("past_key_values"),
        )

    def _look_up(self, sequences: torch.LongTensor, count: int) -> torch.LongTensor:
        """(1, n) ids to verify next, n up to `count`: how a known picture goes on, of the only row (1, L)."""
        recent = sequences[0, -LOOKED_AT:] - self.vocabulary.visual_offset
        codes = self.known_pictures.continuation(recent.tolist(), count)
        offset, end = self.vocabulary.visual_offset, self.vocabulary.eoi_token_id
        return sequences.new_tensor([[end if code == END else offset + code for code in codes]], dtype=torch.long)

    def _forward(self, forward, model, input_ids: torch.LongTensor, drafts: torch.LongTensor, model_kwargs: dict):
        """The newest ids and those that were looked up behind them through the model."""
        count = drafts.shape[1]
        if count:
            drafts = drafts.repeat(2, 1) if self.guidance_scale is not None else drafts
            input_ids = torch.cat([input_ids, drafts], dim=1)
            model_kwargs = model._update_model_kwargs_for_generation({}, dict(model_kwargs), num_new_tokens=count)
            model_kwargs["logits_to_keep"] = 1 + count
        if forward is plain_step:
            return plain_step(model, input_ids[:, -1 - count :], model_kwargs)
        next_length = 1 + count if model_kwargs["use_cache"] else None
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=next_length, **model_kwargs)
        return forward(**inputs, return_dict=True)

    def _guide(self, logits: torch.Tensor, sequences: torch.LongTensor) -> torch.Tensor:
        conditional, unconditional = logits.log_softmax(-1).chunk(2)
        guided = unconditional + self.guidance_scale * (conditional - unconditional)
        # ids outside the computed range are -inf in both streams, their difference is no number
        guided = guided.masked_fill(conditional.isneginf(), float("-inf"))
        if self.restart_unconditional:
            inside, _ = image_state(sequences, self.vocabulary)
            guided = torch.where(inside.unsqueeze(1), guided, conditional)
        return guided

    def _choose(
        self, scores: torch.Tensor, drawing: list[torch.Generator | None], do_sample: bool
    ) -> torch.LongTensor:
        if not do_sample:
            return scores.argmax(-1)
        probabilities = scores.softmax(-1)
        if self.joint_generator is not None:
            return torch.multinomial(probabilities, 1, generator=self.joint_generator).squeeze(1)
        return draw(probabilities, next_uniforms(drawing, device=scores.device))

    def _keep_rows(self, streams: torch.LongTensor, model_kwargs: dict) -> None:
        """Takes all rows but `streams` out of the cache and of what goes with the ids."""
        count = len(model_kwargs["past_key_values"].layers[0].keys)
        model_kwargs["past_key_values"].batch_select_indices(streams)
        for name, value in model_kwargs.items():
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
                model_kwargs[name] = value[streams]

    def _restart_unconditional(self, ids: torch.LongTensor, model_kwargs: dict) -> None:
        """Where `[IMG]` was just written, its unconditional stream begins anew, with that id alone at position 0."""
        begins = (ids == self.vocabulary.boi_token_id).unsqueeze(1)
        mask, positions = model_kwargs["attention_mask"].clone(), model_kwargs["position_ids"].clone()
        mask[len(ids) :, :-1].masked_fill_(begins, 0)
        positions[len(ids) :, -1:].masked_fill_(begins, 0)
        model_kwargs["attention_mask"], model_kwargs["position_ids"] = mask, positions


@dataclass
class LavitDraw:
    """How ids are drawn: seeds, streamer, and whether as the reference does."""

    generator: Generators
    streamer: BaseStreamer | None
    reference_compat: bool

    def loop(self, vocabulary: LavitVocabulary, pad_token_id: int, rows: int, **options) -> LavitDecodingLoop:
        joint = isinstance(self.generator, torch.Generator) and self.reference_compat
        return LavitDecodingLoop(
            vocabulary,
            pad_token_id,
            generators=None if joint else row_generators(self.generator, rows),
            joint_generator=self.generator if joint else None,
            streamer=self.streamer,
            **options,
        )

    @contextmanager
    def global_generators(self, device: torch.device) -> Iterator[None]:
        """Lends torch's global generators to a stock decoding method: seeded from ours, restored afterwards."""
        generator = row_generators(self.generator, 1)[0]
        seed = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
        on_accelerator = device.type not in ("cpu", "meta")
        forked = {"devices": [device], "device_type": device.type} if on_accelerator else {"devices": []}
        with torch.random.fork_rng(**forked):
            torch.default_generator.manual_seed(seed)
            if on_accelerator:
                torch.get_device_module(device).manual_seed(seed)
            yield
