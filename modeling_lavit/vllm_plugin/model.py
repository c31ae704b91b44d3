"""vLLM's own language model, with the features of images put in."""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from modeling_lavit.vllm_plugin.processing import (
    LavitDummyInputsBuilder,
    LavitMultiModalProcessor,
    LavitProcessingInfo,
)


# of the checkpoint's weights, those that are loaded here: prefix there -> prefix here
LANGUAGE_MODEL = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}


@MULTIMODAL_REGISTRY.register_processor(
    LavitMultiModalProcessor, info=LavitProcessingInfo, dummy_inputs=LavitDummyInputsBuilder
)
class LavitForConditionalGeneration(nn.Module, SupportsMultiModal):
    """Takes features of images as `processing` computes them; the visual tokenizer is not loaded here."""

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix=LANGUAGE_MODEL)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<image>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, image_embeds: torch.Tensor | list[torch.Tensor]) -> MultiModalEmbeddings:
        """The features of each image, (n, E) each."""
        return list(image_embeds)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        """Hidden states (tokens, E) of a batch's tokens, one prompt after the other."""
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(tokens, E) to (tokens, V)."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Those of the language model and its head."""
        own = ((name, weight) for name, weight in weights if name.startswith(tuple(LANGUAGE_MODEL)))
        return AutoWeightsLoader(self).load_weights(own, mapper=self.hf_to_vllm_mapper)
