"""Official LaVIT checkpoints (rain1011/LaVIT-7B, -7B-v2) to one folder in the Hub's layout.

`python -m modeling_lavit.conversion OFFICIAL_DIR OUT_DIR [--dtype …] [--pixel-decoder highres|lowres|both|none]
[--push-to REPO]`

    keys.py             names of weights: the one home
    sizes.py            configurations, from the shapes of weights
    source.py           reading .bin and .safetensors, whole or in shards
    text_tokenizer.py   sentencepiece's model file to tokenizer.json
    writing.py          shards, and all or nothing
    calibrate.py        a faster merger, where images show that it changes no code
    convert.py          all of it together

What comes out is what `LavitPipeline.save_pretrained` writes (with one pixel decoder or both; a second one lies in
`lowres/`), or the model and its processor alone.
"""
