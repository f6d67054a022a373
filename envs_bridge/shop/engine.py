"""WebShop in plain Python: pages, clicks, searches and the reward, as its text environment plays them.

`Shop` is WebShop's own interface, its quirks included; `Shopping` is the bridge's (`envs_bridge.turn`) on top of it.
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
HOST = "http://127.0.0.1:3000"  # of the addresses, which WebShop looks into to know where it is
_PAGE_NAMES = ("search_results", "item_page", "item_sub_page", "done")


class Shop:
    """One session: one goal. `reset` and `step` answer what WebShop's text environment answers."""

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
        """Back to the search page, nothing searched, seen or chosen."""
        self._keywords: list[str] = []
        self._seen: set[str] = set()
        self.options: dict[str, str] = {}
        self._number, self.asin = 1, ""
        self.page, self.url, self.done = pages.SEARCH, f"{HOST}/{self._session}", False
        return self.observation()

    def available(self) -> dict[str, Any]:
        """Whether there is a search bar, and what can be clicked."""
        return {"has_search_bar": self.page.first, "clickables": list(self.page.clickables)}

    def step(self, action: str) -> tuple[str, float, bool]:
        """(observation, reward, done). What is neither a search nor something to click changes nothing."""
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
        said = self.goal["instruction_text"]
        if self.mode == "text":
            before = ["WebShop"] if self.page.first else []
            parts = [] if self.done else [*before, "Instruction:", *([said.strip()] if said else [])]
            return " [SEP] ".join([*parts, self.page.text])
        text = ""
        if not self.done:
            text = ("WebShop\nInstruction: \n" if self.page.first else "Instruction:\n") + (f"{said}\n" if said else "")
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
        """Which page the address names; the words searched are part of it."""
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
        shown = rows[(number - 1) * PAGE_SIZE : number * PAGE_SIZE]  # negative numbers count from the end, as there
        self.page = pages.results_page([self.catalogue.at(row) for row in shown], number, len(rows))
        self.url = f"{HOST}/search_results/{self._session}/{'+'.join(keywords)}/{number}"

    def _found(self, keywords: list[str]) -> list[int]:
        """Rows of products. `<r>`, `<c>` and `<q>` ask for random ones, a category's and a query's; `<a>`, which breaks
        WebShop, for none."""
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
            except KeyError:  # an ASIN in small letters: WebShop breaks here
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
        """What it costs; one of a range was drawn when the catalogue was prepared."""
        return float(self.catalogue.prices[self.catalogue.row(product["asin"])])


class Shopping:
    """A shop session as the bridge's environment: `task` is the instruction, texts are pages without it.

    reward: the purchase's score in [0, 1]; won: it is 1. admissible: `search[<words>]` where there is a search bar,
    then every click that does something, in the page's order.
    """

    def __init__(self, catalogue: Catalogue, goal: dict[str, Any], session: str = "0"):
        self._shop = Shop(catalogue, goal, session=session)
        self.goal, self.task = goal, goal["instruction_text"].strip()

    @classmethod
    def load(cls, game: Goal) -> "Shopping":
        """game: its folder is a prepared catalogue, which a process opens once."""
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
    return Catalogue(Path(folder))


def admissible(page: Page) -> tuple[str, ...]:
    """What does something on a page; an ASIN in small letters, as an option that WebShop cannot read, does nothing."""
    if page.first:
        return (SEARCH_COMMAND,)
    unknown = {text.lower() for text, kind in page.pieces if kind == "link" and text != text.upper()}
    return clicks(label for label in page.clickables if label not in unknown)
