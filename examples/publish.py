"""Publish a checkpoint, code and model card included: `python examples/publish.py FOLDER organisation/name`.

Log in first (`hf auth login`), or set HF_TOKEN.
"""

import sys

from modeling_lavit import LavitPipeline


folder, repository = sys.argv[1:]
pipe = LavitPipeline.from_pretrained(folder)
print(pipe.push_to_hub(repository, private=True))

# Anyone who may read the repository can now draw and read, with this package or without it:
#
#     DiffusionPipeline.from_pretrained(repository, trust_remote_code=True)
#     AutoModelForImageTextToText.from_pretrained(repository, trust_remote_code=True)
#     pipeline("text-to-image", model=repository, trust_remote_code=True)
