"""Where diffusers begins: it copies what this file imports, and finds what is registered here."""

from .calls_lavit import __doc__ as _
from .candidates_lavit import __doc__ as _
from .chat_template_lavit import __doc__ as _
from .checks_lavit import __doc__ as _
from .compat_lavit import __doc__ as _
from .configuration_lavit import __doc__ as _
from .decoding_lavit import __doc__ as _
from .defaults_lavit import __doc__ as _
from .denoising_lavit import __doc__ as _
from .drafts_lavit import __doc__ as _
from .encoder_lavit import __doc__ as _
from .filling_lavit import __doc__ as _
from .generation_lavit import __doc__ as _
from .generation_settings_lavit import __doc__ as _
from .hub_lavit import __doc__ as _
from .image_loading_lavit import __doc__ as _
from .image_processing_lavit import __doc__ as _
from .keeping_lavit import __doc__ as _
from .layers_lavit import __doc__ as _
from .loading_lavit import __doc__ as _
from .logits_lavit import __doc__ as _
from .model_card_lavit import __doc__ as _
from .modeling_lavit import __doc__ as _
from .modeling_lavit_detokenizer import __doc__ as _
from .modeling_lavit_visual_tokenizer import __doc__ as _
from .outputs_lavit import __doc__ as _
from .pipeline_lavit import __doc__ as _
from .pipeline_text_to_image import __doc__ as _
from .pixels_lavit import __doc__ as _
from .post_processing_lavit import __doc__ as _
from .processing_lavit import __doc__ as _
from .prompts_lavit import __doc__ as _
from .scoring_lavit import __doc__ as _
from .slots_lavit import __doc__ as _
from .small_decoder_lavit import __doc__ as _
from .tokens_lavit import __doc__ as _
from .understanding_lavit import __doc__ as _
from .visual_tokens_lavit import __doc__ as _
from .vocabulary_lavit import __doc__ as _
from .modeling_lavit import LavitForConditionalGeneration
from .modeling_lavit import LavitModel
from .modeling_lavit_visual_tokenizer import LavitVisualTokenizer
from .modeling_lavit_detokenizer import LavitDetokenizer
from .image_processing_lavit import LavitImageProcessor
from .processing_lavit import LavitProcessor
from .pipeline_lavit import LavitPipeline
from .small_decoder_lavit import LavitUNet2DConditionModel
from .small_decoder_lavit import LavitPatchAutoencoder
from .hub_lavit import register_classes


register_classes(
    generation_model=LavitForConditionalGeneration,
    model=LavitModel,
    visual_tokenizer=LavitVisualTokenizer,
    detokenizer=LavitDetokenizer,
    image_processor=LavitImageProcessor,
    processor=LavitProcessor,
    pipeline=LavitPipeline,
    unet=LavitUNet2DConditionModel,
    vae=LavitPatchAutoencoder,
)
