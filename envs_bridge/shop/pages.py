"""The shop's pages as WebShop's templates show them: pieces of text, and what can be clicked.

A piece is (text, kind); kind is "" for plain text, "button", "option" or "link". In mode `text` the pieces are joined
by ` [SEP] `, in `text_rich` each stands on a line of its own and what can be clicked is marked.
"""

import json
from dataclasses import dataclass

Piece = tuple[str, str]
PAGE_SIZE = 10
SUBPAGES = ("Description", "Features", "Reviews", "Attributes")


@dataclass(frozen=True)
class Page:
    """pieces: after the instruction. text: they, as mode `text` shows them. clickables: labels, lower-cased, each
    once, in the order of buttons, links, options. options: which option a label belongs to. first: the search page."""

    pieces: tuple[Piece, ...]
    text: str
    clickables: tuple[str, ...]
    options: dict[str, str]
    links: frozenset[str]
    first: bool = False


def page(pieces: list[Piece], options: dict[str, str] | None = None, *, first: bool = False) -> Page:
    """A page of these pieces, without those that an HTML parser would not show."""
    shown = tuple(piece for text, kind in pieces if (piece := (_blank(text), kind))[0] not in ("", "\n"))
    buttons = [text.lower() for text, kind in shown if kind == "button"]
    links = [text.lower() for text, kind in shown if kind == "link"]
    labels = dict.fromkeys([*buttons, *links, *(options or {})])
    return Page(shown, joined(shown), tuple(labels), options or {}, frozenset(links), first)


def _blank(text: str) -> str:
    """Nothing but white space becomes one space or line break (as BeautifulSoup reads it)."""
    if text and not text.strip("\n\t\f\r "):
        return "\n" if "\n" in text else " "
    return text


def joined(pieces: tuple[Piece, ...]) -> str:
    return " [SEP] ".join(text.strip() for text, _ in pieces)


SEARCH = page([("Search", "button")], first=True)
BACK: Piece = ("Back to Search", "button")
PREVIOUS: Piece = ("< Prev", "button")


def results_page(products: list[dict], number: int, total: int) -> Page:
    """A page of search results: 10 a page; `Next >` is always there."""
    pieces = [BACK, (f"Page {number} (Total results: {total})", "")]
    pieces += [PREVIOUS] if number > 1 else []
    pieces.append(("Next >", "button"))
    for product in products:
        pieces += [(product["asin"], "link"), (product["title"], ""), (product["price_tag"], "")]
    return page(pieces)


def item_page(product: dict, show_attributes: bool) -> Page:
    """A product with its options."""
    pieces, options = [BACK, PREVIOUS], {}
    for name, values in product["options"].items():
        pieces.append((name, ""))
        for value in values:
            pieces.append((value, "option"))
            options[value] = name
    pieces += [(product["title"], ""), (f"Price: {product['price_tag']}", ""), (f"Rating: {product['rating']}", "")]
    pieces += [(name, "button") for name in SUBPAGES[: 4 if show_attributes else 3]]
    pieces.append(("Buy Now", "button"))
    return page(pieces, options)


def sub_page(product: dict, name: str) -> Page:
    """A product's description, features, reviews or attributes."""
    pieces = [BACK, PREVIOUS]
    if name == "Description":
        pieces.append((product["description"], ""))
    elif name == "Features":
        pieces += [(f" {line}", "") for line in product["bullets"]]
    elif name == "Reviews":
        for title, stars, body in product["reviews"]:
            pieces += [(f'"{title}"', ""), (str(stars), ""), (str(body), "")]
    else:
        pieces += [(f" {attribute}", "") for attribute in product["attributes"]]
        pieces += [(product[key], "") for key in ("category", "query", "product_category")]
    return page(pieces)


def done_page(asin: str, options: dict[str, str], reward: float) -> Page:
    """After the purchase; most of it is what WebShop's templates leave empty."""
    chosen = json.dumps(options, sort_keys=True)
    for character, escape in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("'", "\\u0027")):
        chosen = chosen.replace(character, escape)
    texts = ["Thank you for shopping with us!", "Your code: ", "None", " (Paste it in your MTurk interface.)"]
    texts += ["Purchased", "asin", asin, "options", chosen]
    texts += [part for name in ("attrs", "category", "query", "product category") for part in (name, "None")]
    texts += "Target|asin|options|attrs|price upper|instuction text|category|product category|query".split("|")
    texts += ["Goal ", "None", "Reward", "Your score (min 0.0, max 1.0)", str(reward), "Reward Details ", "None"]
    return page([(text, "") for text in texts])
