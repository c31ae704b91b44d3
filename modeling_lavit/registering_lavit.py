"""Makes the models known to transformers, under their own names and to the Auto classes."""

import transformers

from .compat_lavit import AutoImageProcessor
from .saving_lavit import GENERATION_AUTO_CLASSES


def register_models(model, generation_model, visual_tokenizer, detokenizer, image_processor, processor):
    """Makes classes known to the Auto classes, and to diffusers, which looks for components in transformers too."""
    for model_class in (model, visual_tokenizer, detokenizer):
        config_class = model_class.config_class
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        transformers.AutoModel.register(config_class, model_class, exist_ok=True)
    config_class = generation_model.config_class
    for auto_class in GENERATION_AUTO_CLASSES:
        getattr(transformers, auto_class).register(config_class, generation_model, exist_ok=True)
    AutoImageProcessor.register(config_class, image_processor_classes={"pil": image_processor}, exist_ok=True)
    transformers.AutoProcessor.register(config_class, processor, exist_ok=True)
    for known in (generation_model, detokenizer, processor):
        setattr(transformers, known.__name__, known)
