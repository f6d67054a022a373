"""WebShop in plain Python: pages, clicks, searches and the reward of its text environment.

`Shop` has WebShop's interface, including its quirks; `Shopping` adapts it to the bridge (`envs_bridge.turn`).
"""

import functools
import json
import random
from pathlib import Path
from typing import Any

from envs_bridge.errors import UserError
from envs_bridge.shop import pages
from envs_bridge.shop.catalogue import Catalogue
from envs_bridge.shop.pages import PAGE_SIZE, SUBPAGES, Page
from envs_bridge.shop.reward import Nouns, default_nouns, score
from envs_bridge.turn import SEARCH_COMMAND, Goal, Observation, bracketed, clicks

HITS = 50
MODES = ("text", "text_rich")
HOST = "http://127.0.0.1:3000"  # of the addresses, from which WebShop determines the current page
_PAGE_NAMES = ("search_results", "item_page", "item_sub_page", "done")


class Shop:
    """One session with one goal. `reset` and `step` return what WebShop's text environment returns."""

    def __init__(
        self,
        catalogue: Catalogue,
        goal: dict[str, Any],
        *,
        mode: str = "text",
        session: str = "0",
        nouns: Nouns | None = None,
        show_attributes: bool = False,
    ):
        if mode not in MODES:
            raise UserError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        self.catalogue, self.goal, self.mode = catalogue, goal, mode
        self._session, self._nouns, self._show_attributes = session, nouns or default_nouns(), show_attributes
        self.parts: dict[str, Any] = {}
        self.reset()

    def reset(self) -> str:
        """Return to the search page with an empty state."""
        self._keywords: list[str] = []
        self._seen: set[str] = set()
        self.options: dict[str, str] = {}
        self._number, self.asin = 1, ""
        self.page, self.url, self.done = pages.SEARCH, f"{HOST}/{self._session}", False
        return self.observation()

    def available(self) -> dict[str, Any]:
        """Whether the page has a search bar, and its clickable labels."""
        return {"has_search_bar": self.page.first, "clickables": list(self.page.clickables)}

    def step(self, action: str) -> tuple[str, float, bool]:
        """(observation, reward, done). An action that is neither a search nor a clickable label has no effect."""
        (name, argument), reward = bracketed(action), 0.0
        if self.done:
            pass
        elif name == "search" and argument:
            self._search(argument.split(" "), 1)
        elif name == "click" and argument in self.page.clickables and argument != "search":
            reward = self._click(argument)
        return self.observation(), reward, self.done

    def observation(self) -> str:
        """The page as text, in the session's mode."""
        instruction = self.goal["instruction_text"]
        if self.mode == "text":
            before = ["WebShop"] if self.page.first else []
            parts = [] if self.done else [*before, "Instruction:", *([instruction.strip()] if instruction else [])]
            return " [SEP] ".join([*parts, self.page.text])
        text = ""
        if not self.done:
            text = "WebShop\nInstruction: \n" if self.page.first else "Instruction:\n"
            text += f"{instruction}\n" if instruction else ""
        for piece, kind in self.page.pieces:
            mark = "button"
            if (kind == "option" and f'"{piece}"' in self.url) or (kind == "link" and piece in self._seen):
                mark = "clicked button"
                if kind == "option":
                    text = f"You have clicked {piece}.\n{text}"
            indent = {"link": "\n", "option": "  "}.get(kind, "")
            text += f"{indent}[{mark}] {piece} [{mark}_]\n" if kind else f"{piece}\n"
        return text

    def _where(self) -> str:
        """The page that the address names; the address contains the search words, too."""
        return next((name for name in _PAGE_NAMES if name in self.url), "")

    def _click(self, label: str) -> float:
        where = self._where()
        if label == "buy now":
            return self._buy()
        if label == "back to search":
            self.reset()
        elif label in ("next >", "< prev") and where == "search_results":
            self._search(self._keywords, self._number + (1 if label == "next >" else -1))
        elif label == "< prev" and where == "item_page":
            self._search(self._keywords, self._number)
        elif label in map(str.lower, SUBPAGES):
            self._show_sub_page(label.capitalize())
        else:
            self._show_item(label)
        return 0.0

    def _search(self, keywords: list[str], number: int) -> None:
        self._keywords, self._number, self.asin, self.options = keywords, number, "", {}
        rows = self._found(keywords)
        shown = rows[
            (number - 1) * PAGE_SIZE : number * PAGE_SIZE
        ]  # negative numbers count from the end, as in WebShop
        self.page = pages.results_page([self.catalogue.at(row) for row in shown], number, len(rows))
        self.url = f"{HOST}/search_results/{self._session}/{'+'.join(keywords)}/{number}"

    def _found(self, keywords: list[str]) -> list[int]:
        """Rows of products for keywords.

        `<r>` gives random products, `<c>` those of a category, `<q>` those of a query, and `<a>`, which crashes
        WebShop, none.
        """
        first, rest = keywords[0], keywords[1:]
        if first == "<r>":
            rng = random.Random(f"{self._session}/{self._number}")
            return rng.sample(range(self.catalogue.count), min(HITS, self.catalogue.count))
        if first == "<a>":
            return []
        if first == "<c>":
            return self.catalogue.labelled("category", rest[0].strip() if rest else "")
        if first == "<q>":
            return self.catalogue.labelled("query", " ".join(rest).strip())
        return list(self.catalogue.search(" ".join(keywords)))

    def _show_item(self, label: str) -> None:
        if label in self.page.links and label not in self.page.options:
            try:
                self.catalogue.row(label.upper())
            except KeyError:  # an ASIN in lower case: WebShop crashes here
                return
            self.asin = label.upper()
            self._seen.add(self.asin)
        elif label in self.page.options:
            self.options[self.page.options[label].lower()] = label
        self.page = pages.item_page(self.catalogue.product(self.asin), self._show_attributes)
        self.url = (
            f"{HOST}/item_page/{self._session}/{self.asin}/{'+'.join(self._keywords)}/{self._number}/"
            f"{json.dumps(self.options)}"
        )

    def _show_sub_page(self, name: str) -> None:
        self.page = pages.sub_page(self.catalogue.product(self.asin), name)
        self.url = (
            f"{HOST}/item_sub_page/{self._session}/{self.asin}/{'+'.join(self._keywords)}/{self._number}/{name}/"
            f"{self.options}"
        )

    def _buy(self) -> float:
        product = self.catalogue.product(self.asin)
        price = self.price(product)
        reward, self.parts = score(product, self.goal, price, self.options, self._nouns)
        self.page, self.done = pages.done_page(self.asin, self.options, reward), True
        self.url = f"{HOST}/done/{self._session}/{self.asin}/{self.options}"
        return reward

    def price(self, product: dict[str, Any]) -> float:
        """The price of a product; prices of a range were drawn when the catalogue was prepared."""
        return float(self.catalogue.prices[self.catalogue.row(product["asin"])])


class Shopping:
    """A shop session as an Environment of the bridge: `task` is the instruction, texts are pages without it.

    reward: the score of the purchase in [0, 1]; won: whether it is 1. admissible: `search[<words>]` on a page with a
    search bar; else every click that has an effect, in the order of the page.
    """

    def __init__(self, catalogue: Catalogue, goal: dict[str, Any], session: str = "0"):
        self._shop = Shop(catalogue, goal, session=session)
        self.goal, self.task = goal, goal["instruction_text"].strip()

    @classmethod
    def load(cls, game: Goal) -> "Shopping":
        """Open a goal; its folder is a prepared catalogue, which a process opens once."""
        catalogue = opened(game.folder)
        if not 0 <= game.number < catalogue.goal_count:
            raise UserError(f"{game.folder}: has {catalogue.goal_count} goals, got number {game.number}")
        return cls(catalogue, catalogue.goal(game.number), str(game.number))

    def reset(self) -> Observation:
        self._shop.reset()
        return self._seen(0.0)

    def step(self, command: str) -> Observation:
        return self._seen(self._shop.step(command)[1])

    def _seen(self, reward: float) -> Observation:
        page = self._shop.page
        return Observation(page.text, admissible(page), reward, self._shop.done, self._shop.done and reward == 1.0)


@functools.lru_cache(maxsize=8)
def opened(folder: str) -> Catalogue:
    """The catalogue of a prepared folder, memoised."""
    return Catalogue(Path(folder))


def admissible(page: Page) -> tuple[str, ...]:
    """Commands that have an effect on a page; an ASIN in lower case, which WebShop cannot read, has none."""
    if page.first:
        return (SEARCH_COMMAND,)
    unknown = {text.lower() for text, kind in page.pieces if kind == "link" and text != text.upper()}
    return clicks(label for label in page.clickables if label not in unknown)
