"""Words of captions, as Stanford's PTBTokenizer divides them."""

import pytest

from modeling_lavit.evaluation.ptb import tokenize


# what the Java program gives for these, without the tokens that caption metrics drop
RECORDED = {
    "A man can't ride; won't, isn't O'Brien's dog cannot gonna": (
        "a man ca n't ride wo n't is n't o'brien 's dog can not gon na"
    ),
    "half-eaten T-shirt (indoors) [x] & family": "half-eaten t-shirt -lrb- indoors -rrb- -lsb- x -rsb- & family",
    "U.S. plane, 5 p.m. and 10 a.m.. Mr. Smith's St.Bernard.": "u.s. plane 5 p.m. and 10 a.m. mr. smith 's st.bernard",
    "$5.50 £5 €10 20% #1 1,000 3/4 10x10 24/7 2-3 -5": "$ 5.50 # 5 $ 10 20 % # 1 1,000 3/4 10x10 24/7 2-3 -5",
    'a "quoted" word “curly” — b – c -- ... .. …': "a quoted word curly b c",
    "colour theatre e-mail foo@bar.com www.foo.com http://a.b/c?d=e.": (
        "colour theatre e-mail foo@bar.com www.foo.com http://a.b/c?d=e"
    ),
    "dogs' tails '90s rock'n'roll o'clock ma'am y'all 'em": "dogs tails '90s rock 'n' roll o'clock ma'am y' all 'em",
    "hello!! why?! hello:) wait": "hello !! why ?! hello :-rrb- wait",
    "No. 5 is no. dog's no": "no. 5 is no dog 's no",
    "café Déjà-vu it’s don’t": "café déjà-vu it 's do n't",
    "AT&T R&B a&b B & W *star* _": "at&t r&b a & b b & w * star * _",
    "the end., really Inc. sign.A": "the end. really inc. sign.a",
    "5'10\" tall 6ft 5'": "5 10 tall 6ft 5",
    "😀 ♥ 中文 字": "♥ 中文 字",
    "a\nb\r\nc\td": "a b c d",
    "": "",
}


@pytest.mark.parametrize("caption", RECORDED)
def test_a_caption_has_the_words_of_the_java_program(caption):
    assert tokenize([caption])[0] == RECORDED[caption].split()


def test_a_single_letter_keeps_its_stop_unless_a_sentence_begins_behind_it_in_the_next_caption_too():
    assert tokenize(["plan B.", "the end"])[0] == ["plan", "b."]
    assert tokenize(["plan B.", "The end"])[0] == ["plan", "b"]


def test_each_caption_gets_its_own_words():
    assert tokenize(["a dog", "", " . ", "two cats"]) == [["a", "dog"], [], [], ["two", "cats"]]
