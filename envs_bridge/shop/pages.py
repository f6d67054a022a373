"""The pages of the shop, as WebShop's templates render them: pieces of text and clickable labels.

A piece is (text, kind); kind is "" for plain text, "button", "option" or "link". Mode `text` joins the pieces by
` [SEP] `; mode `text_rich` puts each on its own line and marks clickable ones.
"""

import json
from dataclasses import dataclass

Piece = tuple[str, str]
PAGE_SIZE = 10
SUBPAGES = ("Description", "Features", "Reviews", "Attributes")


@dataclass(frozen=True)
class Page:
    """A page. pieces: those after the instruction. text: the pieces in mode `text`. clickables: lower-cased distinct
    labels in the order buttons, links, options. options: label -> its option. first: whether it is the search page."""

    pieces: tuple[Piece, ...]
    text: str
    clickables: tuple[str, ...]
    options: dict[str, str]
    links: frozenset[str]
    first: bool = False


def page(pieces: list[Piece], options: dict[str, str] | None = None, *, first: bool = False) -> Page:
    """A page of pieces, without those that an HTML parser drops."""
    shown = tuple(piece for text, kind in pieces if (piece := (_blank(text), kind))[0] not in ("", "\n"))
    buttons = [text.lower() for text, kind in shown if kind == "button"]
    links = [text.lower() for text, kind in shown if kind == "link"]
    labels = dict.fromkeys([*buttons, *links, *(options or {})])
    return Page(shown, joined(shown), tuple(labels), options or {}, frozenset(links), first)


def _blank(text: str) -> str:
    """Collapse a text of only white space to one space or line break, as BeautifulSoup does."""
    if text and not text.strip("\n\t\f\r "):
        return "\n" if "\n" in text else " "
    return text


def joined(pieces: tuple[Piece, ...]) -> str:
    """The pieces in mode `text`."""
    return " [SEP] ".join(text.strip() for text, _ in pieces)


SEARCH = page([("Search", "button")], first=True)
BACK: Piece = ("Back to Search", "button")
PREVIOUS: Piece = ("< Prev", "button")


def results_page(products: list[dict], number: int, total: int) -> Page:
    """A page of at most 10 search results; it always has `Next >`."""
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
    """The page after the purchase; most of it is empty in WebShop's templates, too."""
    chosen = json.dumps(options, sort_keys=True)
    for character, escape in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("'", "\\u0027")):
        chosen = chosen.replace(character, escape)
    texts = ["Thank you for shopping with us!", "Your code: ", "None", " (Paste it in your MTurk interface.)"]
    texts += ["Purchased", "asin", asin, "options", chosen]
    texts += [part for name in ("attrs", "category", "query", "product category") for part in (name, "None")]
    texts += "Target|asin|options|attrs|price upper|instuction text|category|product category|query".split("|")
    texts += ["Goal ", "None", "Reward", "Your score (min 0.0, max 1.0)", str(reward), "Reward Details ", "None"]
    return page([(text, "") for text in texts])
