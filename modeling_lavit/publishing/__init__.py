"""What a repository on the Hub holds beside weights: generated code, and the model card.

code.py     this package as one file for each library
card.py     the README
verify.py   whether a folder's code is this package's
"""

from modeling_lavit.saving_lavit import publisher


def use_package() -> None:
    """Has every `save_pretrained` write this package's code and cards."""

    def code() -> dict[str, str]:
        from .code import generate

        return dict(generate())

    def card(folder, tags, extras, repository) -> str:
        from .card import model_card

        return model_card(folder, tags=tags, extras=extras, repository=repository)

    def merge(theirs: str, ours: str) -> str:
        from .card import merge_cards

        return merge_cards(theirs, ours)

    publisher.code, publisher.card, publisher.merge_cards = code, card, merge
