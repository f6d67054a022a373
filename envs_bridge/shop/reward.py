"""The reward of a purchase, as in WebShop's `goal.py`: a number in [0, 1] and its parts.

reward = r_type * (attributes met + options met + price within the limit) / (goal attributes + goal options + 1)
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from thefuzz import fuzz

from envs_bridge.shop.search import STOP_WORDS

ALIKE = 85  # threshold of token_set_ratio in percent; a higher ratio is a match

# An option is compared by the first of these that it contains (WebShop's `normalize.py`).
COLOURS = """alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel
 camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream crystal
 dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather indigo ivory
 ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom
 mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell
 silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut wheat white wine
 yellow""".split()

Nouns = Callable[[str], list[str]]

_WORD = re.compile(r"[A-Za-z0-9]+(?:'[a-z]+)?|[^\sA-Za-z0-9]")
_NO_NOUNS = STOP_WORDS | set(
    "from you your our my we can its all new more per set non size color pack free high easy long".split()
)


def word_nouns(title: str) -> list[str]:
    """Nouns without a tagger: words that begin with a letter, except frequent other words."""
    words = (word.lower() for word in _WORD.findall(title))
    return [word for word in words if word[0].isalpha() and word not in _NO_NOUNS]


@functools.cache
def default_nouns() -> Nouns:
    """Nouns by spaCy's tagger with the large or small English model, as in WebShop and the official code, if installed;
    else `word_nouns`."""
    try:
        import spacy
    except ImportError:
        return word_nouns
    for name in ("en_core_web_lg", "en_core_web_sm"):
        if spacy.util.is_package(name):
            return functools.lru_cache(1 << 16)(functools.partial(_tagged_nouns, spacy.load(name)))
    return word_nouns


def _tagged_nouns(tagger: Callable, title: str) -> list[str]:
    """Nouns by spaCy's tags."""
    return [token.text.lower() for token in tagger(title) if token.pos_ in ("NOUN", "PROPN")]


def colour_of(option: Any) -> Any:
    """The first colour in an option, or the option. A (name, value) pair matches a colour only as a whole element."""
    parts = tuple(option) if isinstance(option, list | tuple) else option
    return next((colour for colour in COLOURS if colour in parts), parts)


def type_reward(product: dict, goal: dict, nouns: Nouns) -> dict[str, Any]:
    """Whether a product has the goal's type, by query, category and nouns of the titles."""
    query_match = product["query"] == goal["query"]
    ours, wanted = ({x.strip() for x in p["product_category"].split("›")} for p in (product, goal))
    category_match = len(ours & wanted) >= 2
    wanted_nouns = nouns(goal["name"])
    shared = len(set(nouns(product["title"])) & set(wanted_nouns))
    title_score = shared / len(wanted_nouns) if wanted_nouns else 0.2
    r_type = 1.0 if query_match or category_match or title_score > 0.2 else 0.5
    if title_score < 0.1:
        r_type = 0.1 if title_score else 0.0
    return {
        "r_type": r_type, "query_match": query_match, "category_match": category_match, "title_score": title_score,
    }  # fmt: skip


def attributes_met(product: dict, attributes: list[str]) -> int:
    """The number of attributes that match one of the product's, or occur in its texts."""
    texts = [product["title"].lower(), " ".join(product["bullets"]).lower(), product["description"].lower()]
    return sum(
        any(fuzz.token_set_ratio(ours, wanted) > ALIKE for ours in product["attributes"])
        or any(wanted in text for text in texts)
        for wanted in attributes
    )


def options_met(chosen: list[str], wanted: list) -> int:
    """The number of the goal's options that match a chosen one."""
    ours, goals = [colour_of(x) for x in chosen], [colour_of(x) for x in wanted]
    return sum(any(fuzz.token_set_ratio(x, goal) > ALIKE for x in ours) for goal in goals)


def score(product: dict, goal: dict, price: float, chosen: dict[str, str], nouns: Nouns) -> tuple[float, dict]:
    """(reward, its parts under WebShop's names) of a purchase."""
    parts = type_reward(product, goal, nouns)
    options = goal["goal_options"]
    if isinstance(options, dict):
        options = list(options.items())
    attributes, count = goal["attributes"], len(goal["attributes"]) + len(options) + 1
    attributes_found, options_found = attributes_met(product, attributes), options_met(list(chosen.values()), options)
    within = price <= goal["price_upper"]
    reward = (attributes_found + options_found + within) / count * parts["r_type"]
    parts |= {
        "r_att": attributes_found / len(attributes), "w_att": len(attributes) / count,
        "r_price": within, "w_price": 1 / count,
    }  # fmt: skip
    if options:
        parts |= {"r_option": options_found / len(options), "w_option": len(options) / count}
    return reward, parts
