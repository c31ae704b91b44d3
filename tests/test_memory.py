"""What a model takes in memory: loading in half precision, a quantized language model."""

import subprocess
import sys

import pytest
import torch
from tiny import BOI, CODE, END, EOI, PROMPTS, draw_images, seeded, tiny_model, tiny_text_config


LOAD = """
import sys, torch
from modeling_lavit import LavitForConditionalGeneration

def resident(name):
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith(name)).split()[1])

with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = resident("VmRSS")
model = LavitForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(resident("VmHWM") - before, sum(weight.nbytes for weight in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.slow
def test_loading_in_bfloat16_costs_the_weights_and_the_file_once(tmp_path):
    large = tiny_text_config(hidden_size=512, intermediate_size=1536, num_hidden_layers=8)
    tiny_model(text_config=large).to(torch.bfloat16).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True)
    peak, weights = map(int, done.stdout.split())
    assert weights > 40e6
    # the file's pages are resident while they are read; a model in float32 first would be twice the weights on top
    assert peak < 2.4 * weights


def stored_bytes(weight: torch.Tensor) -> int:
    """Bytes that a tensor keeps: of a quantized one, those of the tensors that it is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()
    return sum(stored_bytes(getattr(weight, name)) for name in names)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_language_model_draws_and_talks_in_less_memory(tmp_path, bits):
    # the extra `quantization`: `make test-extras` runs this
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    plain = tiny_model(text_config=tiny_text_config(hidden_size=128, intermediate_size=256))
    plain.save_pretrained(tmp_path)
    kind = (
        quantization.Int8WeightOnlyConfig()
        if bits == 8
        else quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4)
    )
    # of the head a mode computes some rows alone: it stays as it is, and so does what sees
    config = TorchAoConfig(kind, modules_to_not_convert=["visual_tokenizer", "understanding", "lm_head"])
    model = type(plain).from_pretrained(tmp_path, quantization_config=config).eval()

    def layers_bytes(of) -> int:
        return sum(stored_bytes(weight) for weight in of.model.language_model.layers.parameters())

    # a byte each, and scales
    assert layers_bytes(model) < 0.3 * layers_bytes(plain)
    ids = torch.tensor([PROMPTS[0]])
    logits, wanted = model(ids).logits, plain(ids).logits
    assert torch.corrcoef(torch.stack([logits.flatten(), wanted.flatten()]))[0, 1] > (0.8 if bits == 4 else 0.999)

    computed = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: computed.append(None))
    for image in draw_images(model, PROMPTS, generator=seeded(0)).tolist():
        assert all(CODE <= token < END for token in image[: image.index(EOI)])
    # only some of the head's rows were needed
    assert not computed
    text = model.generate(ids[:, :-1], max_new_tokens=5, min_new_tokens=5)
    assert text.shape == (1, ids.shape[1] + 4)
    assert (text < BOI).all()
