"""The part of a checkpoint that reads images: what vLLM's language model is given of them."""

from modeling_lavit.base_lavit import LavitPreTrainedModel, of_vision
from modeling_lavit.configuration_lavit import LavitConfig
from modeling_lavit.modeling_lavit import LavitModel
from modeling_lavit.modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from modeling_lavit.understanding_lavit import LavitUnderstanding


class LavitImageReader(LavitPreTrainedModel):
    """[`LavitModel`] without its language model: `from_pretrained` of the same folder or repository loads it."""

    _keys_to_ignore_on_load_unexpected = [r"language_model\.", r"lm_head\.", "draft_ids"]
    get_image_features = LavitModel.get_image_features
    _reading_parts = LavitModel._reading_parts

    def __init__(self, config: LavitConfig):
        super().__init__(config)
        if config.generation_only:
            raise ValueError("the checkpoint was saved with generation_only=True: it has no encoder, reads no images")
        self.visual_tokenizer = LavitVisualTokenizer._from_config(
            config.visual_config, attn_implementation=of_vision(config.visual_config._attn_implementation)
        )
        self.understanding = LavitUnderstanding(config)
        self.post_init()
