"""Prompts for vLLM: images read, and as many positions in each slot as its image has features."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)
from vllm.multimodal.processing.processor import MultiModalProcessingResult
from vllm.renderers import TokenizeParams

from modeling_lavit.configuration_lavit import LavitConfig
from modeling_lavit.processing import LavitProcessor
from modeling_lavit.slots_lavit import check_slots, find_slots
from modeling_lavit.vllm_plugin.reading import LavitImageReader


class LavitProcessingInfo(BaseProcessingInfo):
    """Sizes and tools that vLLM asks for."""

    def get_hf_config(self) -> LavitConfig:
        return self.ctx.get_hf_config(LavitConfig)

    def get_hf_processor(self, **kwargs: object) -> LavitProcessor:
        return self.ctx.get_hf_processor(LavitProcessor, **kwargs)

    def get_default_tok_params(self) -> TokenizeParams:
        """Prompts of LaVIT have no BOS."""
        return super().get_default_tok_params().with_kwargs(add_special_tokens=False)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """An image has a feature for each of its patches at most."""
        return {"image": self.get_hf_config().visual_config.num_patches}

    @cached_property
    def reader(self) -> LavitImageReader:
        """Loaded with the first image; in single precision, because it runs on the CPU."""
        model_config = self.ctx.model_config
        return LavitImageReader.from_pretrained(
            model_config.model, revision=model_config.revision, dtype=torch.float32
        )


class LavitDummyInputsBuilder(BaseDummyInputsBuilder[LavitProcessingInfo]):
    """The largest prompts, which vLLM measures its memory with: images that keep all patches."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        tokenizer = self.info.get_tokenizer()
        return (tokenizer.boi_token + tokenizer.eoi_token) * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        config = self.info.get_hf_config()
        shape = (config.visual_config.num_patches, config.text_config.hidden_size)
        return {"image": [torch.zeros(shape)] * mm_counts.get("image", 0)}


class LavitMultiModalProcessor(BaseMultiModalProcessor[LavitProcessingInfo]):
    """Images to features, and their slots to that many positions."""

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        image_processor = self.info.get_hf_processor().image_processor
        pixel_values = image_processor(hf_data["images"], return_tensors="pt", **hf_kwargs)["pixel_values"]
        with torch.no_grad():
            features = self.info.reader.get_image_features(pixel_values).pooler_output
        dtype = self.info.ctx.model_config.dtype
        return BatchFeature({"image_embeds": [one.to(dtype) for one in features]})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"image_embeds": MultiModalFieldConfig.batched("image")}

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        """Text as `LavitProcessor` tokenizes it, each `<image>` a slot; ids with slots stay as they are."""
        processor = self.info.get_hf_processor()
        if processor.boi_token_id in prompt:
            return prompt
        text = self.info.get_tokenizer().decode(prompt)
        slots = [processor.image_token_ids] * text.count(processor.image_token)
        return processor._encode(text, slots, 0, "text", processor.text_kwargs)[0]

    def _maybe_apply_prompt_updates(self, mm_items: MultiModalDataItems, mm_res: MultiModalProcessingResult):
        """Refuses prompts with more or fewer slots than images."""
        slots = find_slots([torch.tensor(mm_res.prompt_ids)], self.info.get_hf_config().vocabulary)
        check_slots(slots, mm_items.get_count("image"))
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        vocabulary = self.info.get_hf_config().vocabulary
        boi, eoi, stand_in = vocabulary.boi_token_id, vocabulary.eoi_token_id, vocabulary.visual_offset

        def fill(item: int) -> PromptUpdateDetails:
            features = out_mm_kwargs["image"][item]["image_embeds"].data
            return PromptUpdateDetails.select_token_id([boi, *[stand_in] * len(features), eoi], stand_in)

        return [PromptReplacement(modality="image", target=[boi, eoi], replacement=fill)]
