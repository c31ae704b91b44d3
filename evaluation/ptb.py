"""Words of captions by the rules of the Penn Treebank, lower case, without punctuation: what caption metrics count.

The official caption programs tokenize with Stanford's PTBTokenizer (CoreNLP 3.4.1, Java; options `-preserveLines
-lowerCase`) and drop the tokens of [`PUNCTUATION`]. This is the same in Python, found by asking that program about
180,000 words and many made-up lines; how it treats addresses, file names and smileys is kept too, because it changes
scores. At each place the rule that reaches farthest wins, then the earlier one; what must follow a token counts in how
far its rule reaches.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate


# as the official programs list them: brackets have been lower-cased by then, and stay
PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())

# keep their full stop, in any case
ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros calif capt cf
    cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga
    gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mich minn
    mlle mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn pfc ph plc pres prof profs pvt rd rep reps
    rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs treas tue tues univ va vs
    vt wed wis wisc wm wyo
""".split()
CAPITAL_ABBREVIATIONS = "ark az del ill la mass miss ore pa tex wash".split()  # not in lower case
LOWER_ABBREVIATIONS = "mfg mtg pte pty ptys".split()  # not in upper case
NUMBER_ABBREVIATIONS = "art ca fig figs no nos op pp prop".split()  # in front of a number

# ... of which one of a single letter loses it
SENTENCE_STARTS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It
    Last Lemme Many More Now Once One Other Our She Since So Some Such That The Their Then There These They This
    We What When While Yet You
""".split()

# words that are two: the letters of the first
SPLIT_WORDS = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "gimme": 3, "lemme": 3}

LETTER = r"(?:[^\W\d_²³¹¼-¾⁰-₟⅐-↋①-⓿]|[\xad\u0300-\u036f])"
LETTERS = rf"(?:{LETTER}|\d)+"
APOSTROPHE = "['\x92’]"
ANY_APOSTROPHE = "['\x92’`\x91‘‛]"
WORD = rf"{LETTER}(?:{LETTER}|\d)*(?:[.!?]{LETTER}(?:{LETTER}|\d)*)*"
NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"
ENDING = rf"{APOSTROPHE}(?:[msdMSD]|re|ve|ll|RE|VE|LL)"
NEGATION = rf"[nN]{ANY_APOSTROPHE}[tT]"
ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
HYPHENATED = rf"(?:{ACRONYM}\.|[A-Za-z]*\d+(?:\.[A-Za-z\d]+)+(?=[-_])|{LETTERS})(?:[-_]{LETTERS})*"
SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"
JOINED = r"[A-Z]+(?:(?:\+|&(?:amp;)?)[A-Z]+)+"
ADDRESS_END = r"[^\s\"<>|.!?(){},\-]"


def _any_case(words: list[str]) -> str:
    return "|".join(f"(?i:{word})" for word in words)


ABBREVIATION = "|".join(
    [r"[Pp]h\.[Dd]", _any_case(ABBREVIATIONS)]
    + [f"{word[0].upper()}(?i:{word[1:]})" for word in CAPITAL_ABBREVIATIONS]
    + [f"(?i:{word[0]}){word[1:]}" for word in LOWER_ABBREVIATIONS]
)
SENTENCE_START = "|".join(f"{word[0]}(?i:{word[1:]})" for word in SENTENCE_STARTS)
APOSTROPHE_WORD = "|".join(
    [
        rf"{APOSTROPHE}[nN](?:{APOSTROPHE}|(?![^\W_]))",
        rf"(?:[dD]unkin|somethin|ol){APOSTROPHE}",
        rf"{APOSTROPHE}(?i:em|till?|cause)",
        rf"{APOSTROPHE}(?:[2-9]0s|\d\d(?=[\s.,;!?)]|$))",
        rf"[A-HJ-XZn]{ANY_APOSTROPHE}{LETTER}{{2}}(?:{LETTER}|\d)*",
        rf"[dDoOlL]{ANY_APOSTROPHE}{LETTER}{LETTERS}",
        rf"{LETTER}+[aeiouyAEIOUY]{APOSTROPHE}[aeiouA-Z]{LETTER}*",
        rf"(?i:c{APOSTROPHE}mon|e{APOSTROPHE}er|s{APOSTROPHE}mores|ev{APOSTROPHE}ry|li{APOSTROPHE}l)",
        rf"(?i:nat{APOSTROPHE}l|nor{APOSTROPHE}easter|cont{APOSTROPHE}d\.?)",
        rf"[lLdDjJ]{APOSTROPHE}",
    ]
)
FILE_NAME = (
    rf"{LETTERS}(?:\.{LETTERS})*\.(?i:bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp[34g]|"
    r"pdf|php|pl|png|ppt|ps|py|sql|tar|txt|wav|x|xml|zip|3gp|wm[va]|avi|flv)"
)
SITE = r"(?:www\.(?:[^\s\"<>|.!?(){},]+\.)+[A-Za-z]{2,4}|(?:[^\s\"`'<>|.!?(){},\-_$/@]+\.)+(?:com|net|org|edu))"
PHONE = r"(?:\(\d{2,3}\)[  ]?|(?:\+\+?)?(?:\d{2,4}[-  ])?\d{2,4}[-  ])\d{3,4}[-  ]?\d{3,5}"
SYMBOLS = (
    "!-@\\[-`{-~\x80\x91-\x94\x96\x97¡-¬®-¿×÷\u2013-\u201e\u2020-\u2023\u2026\u2030-\u203b\u20ac"
    "\u2100-\u214f\u2190-\u2bff"
)
SMILEY = r"[<>]?[:;=]['^]?[-o*']?(?:[()DPdpO\[\]{@|\\](?![^\W_]))"
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": ""}
# what is taken, and what must follow it
RULES = [
    (rf"(?i:{'|'.join(SPLIT_WORDS)})", r"(?![^\W_]|['’][A-Za-z])"),
    (r"</?[A-Za-z]\w*(?:[ \xa0][^<>\n]*)?/?>|<[!?][A-Za-z-][^>\n]*>", ""),
    (rf"{APOSTROPHE}[tT]", r"(?i:is|was)(?![A-Za-z])"),
    (WORD, ENDING),
    (rf"{LETTER}*(?![nN])[A-Za-z]", NEGATION),
    (ENDING, r"(?![A-Za-z])"),
    (NEGATION, r"(?![A-Za-z])"),
    (rf"https?://[^\s\"<>|()]+{ADDRESS_END}", ""),
    (rf"{SITE}(?:/[^\s\"<>|()]+{ADDRESS_END})?", ""),
    (r"<?(?:mailto:)?[A-Za-z0-9][^\s\"<>|()]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+>?", ""),
    (r"@[A-Za-z_][A-Za-z_0-9]*", ""),
    (rf"#{LETTER}(?:{LETTER}|\d)*", ""),
    (APOSTROPHE_WORD, ""),
    (rf"[yY]{APOSTROPHE}", LETTER),
    (WORD, ""),
    (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", ""),
    (rf"[-+]?{NUMBER}", ""),
    (r"(?:\d{1,4}[-  ])?\d{1,4}(?:\\?/|⁄)\d{1,4}", ""),
    (PHONE, ""),
    (HYPHENATED, ""),
    (SLASHED, ""),
    (JOINED, ""),
    (FILE_NAME, r"(?![^\W_])"),
    (r"[A-Z]*\$|#", ""),
    (rf"(?:{ABBREVIATION}|{ACRONYM})\.", ""),
    (r"[A-Za-z]\.", rf"(?!\s+(?:(?:{SENTENCE_START})(?:\s|$)|Mr\.\s|</?[A-Za-z]))"),
    (rf"(?:{_any_case(NUMBER_ABBREVIATIONS)})\.", r"\s?\d"),
    (rf"(?:{WORD}|{LETTERS}(?:[-_]{LETTERS})*|{JOINED})\.", "[,;:]"),
    (r"\.{3,5}", ""),
    (r"[?!]+", ""),
    (r"\*+|_+|##+|''|[`“‘’]{2,}", ""),
    (SMILEY, ""),
    (r"[-^x=~<>']_[-^x=~<>']|<<|>>", ""),
    (rf"{'|'.join(ENTITIES)}", ""),
    (r"[cC]\+\+", ""),
    (rf"[{SYMBOLS}]", ""),
]
COMPILED = [re.compile(f"({token})(?:{ahead})") for token, ahead in RULES]
PLAIN = re.compile(rf"({LETTER}{{2,}})(?=\s|$)")

NORMALIZED = {
    **ENTITIES,
    '"': "''",
    **dict.fromkeys("–—―\x96\x97", "--"),
    **dict.fromkeys("\x92’›", "'"),
    **dict.fromkeys("‘\x91‛‹", "`"),
    **dict.fromkeys("«“\x93", "``"),
    **dict.fromkeys("»”\x94", "''"),
    **dict.fromkeys("€¤₠\x80", "$"),
    "£": "#",
    "¢": "cents",
    "…": "...",
    "¼": "1/4",
    "½": "1/2",
    "¾": "3/4",
    "⅓": "1/3",
    "⅔": "2/3",
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "\xad": "-",
}


def _tokens(text: str) -> Iterator[tuple[int, str]]:
    """Places and tokens, punctuation too."""
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        plain = PLAIN.match(text, position)
        if plain and plain[1].lower() not in SPLIT_WORDS:
            yield position, plain[1]
            position = plain.end()
            continue
        matches = [found for pattern in COMPILED if (found := pattern.match(text, position))]
        if not matches:  # characters that the program does not know are left out
            position += 1
            continue
        best = max(matches, key=lambda found: found.end())
        if best.re is COMPILED[0]:
            cut = position + SPLIT_WORDS[best[1].lower()]
            yield position, text[position:cut]
            yield cut, text[cut : best.end(1)]
        else:
            yield position, best[1]
        position = best.end(1)


def _normalized(token: str) -> str:
    if token in NORMALIZED:
        return NORMALIZED[token]
    if re.fullmatch("[`“‘’]+", token):
        return "".join(NORMALIZED.get(mark, mark) for mark in token)
    if re.fullmatch(f"{ENDING}|{NEGATION}", token):
        token = re.sub(ANY_APOSTROPHE, "'", token)
    token = token.replace("(", "-lrb-").replace(")", "-rrb-")
    return token.replace("&amp;", "&").replace(" ", "\xa0").lower()


def tokenize(captions: list[str]) -> list[list[str]]:
    """The words of each caption.

    They are read as lines of one text, as the official programs do: in a few cases ("plan B." in front of "A man")
    what a line begins with decides the end of the line before. Line breaks in a caption are spaces. A token that spans
    words ("1 1/2") has no-break spaces inside.
    """
    lines = [" ".join(caption.splitlines()) for caption in captions]
    starts = list(accumulate((len(line) + 1 for line in lines), initial=0))
    words: list[list[str]] = [[] for _ in lines]
    for position, token in _tokens("\n".join(lines)):
        token = _normalized(token)
        if token not in PUNCTUATION and token.strip("."):
            words[bisect_right(starts, position) - 1].append(token)
    return words
