"""Replay recorded episodes of WebShop itself in our engine and count the differences.

There are two formats: a list of episodes (recorded with rank_bm25 over plain words, and words of more than three
letters as nouns), and an object with `trajectories` and a catalogue (recorded with Lucene).
"""

import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from envs_bridge.errors import UserError
from envs_bridge.shop.catalogue import Catalogue, prepare, product_file
from envs_bridge.shop.engine import Shop
from envs_bridge.shop.reward import Nouns, word_nouns

CLOSE = 1e-9
SHOWN = 160  # characters of a difference in a message


class Okapi:
    """rank_bm25's BM25Okapi over `[a-z0-9]+` of name, description and bullets, which some traces were recorded with."""

    K1, B, EPSILON = 1.5, 0.75, 0.25

    def __init__(self, products: list[dict]):
        texts = [" ".join([p["title"], p["description"], *p["bullets"]]) for p in products]
        self._counts = [Counter(self.words(text)) for text in texts]
        length = np.array([counts.total() for counts in self._counts])
        self._norm = self.K1 * (1 - self.B + self.B * length / length.mean())
        frequency = Counter(word for counts in self._counts for word in counts)
        self._idf = {w: np.log(len(texts) - n + 0.5) - np.log(n + 0.5) for w, n in frequency.items()}
        least = self.EPSILON * sum(self._idf.values()) / len(self._idf)
        self._idf = {word: least if value < 0 else value for word, value in self._idf.items()}

    @staticmethod
    def words(text: str) -> list[str]:
        return re.findall(r"[a-z0-9]+", text.lower())

    def __call__(self, query: str) -> list[int]:
        scores = np.zeros(len(self._counts))
        for word in self.words(query):
            times = np.array([counts[word] for counts in self._counts])
            scores += self._idf.get(word, 0) * (times * (self.K1 + 1) / (times + self._norm))
        order = np.argsort(-scores, kind="stable")
        return [int(row) for row in order if scores[row] != 0][:50]


def long_words(title: str) -> list[str]:
    """Alphabetic tokens of more than three letters."""
    return [t.lower() for t in re.findall(r"[A-Za-z]+|\S", title) if t.isalpha() and len(t) > 3]


@dataclass
class Comparison:
    """Episodes and steps replayed, and one sentence for each difference."""

    episodes: int = 0
    steps: int = 0
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.episodes} episodes, {self.steps} steps, {len(self.differences)} differences"

    def check(self, where: str, what: str, ours: Any, theirs: Any) -> None:
        near = isinstance(theirs, float) and isinstance(ours, int | float) and abs(ours - theirs) <= CLOSE
        if ours != theirs and not near:
            self.differences.append(f"{where}: {what}: {_apart(ours, theirs)}")


def _apart(ours: Any, theirs: Any) -> str:
    """Both values, from shortly before the first different character."""
    first, second = str(ours), str(theirs)
    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    start = max(at - 20, 0)
    return f"ours {first[start : start + SHOWN]!r}, theirs {second[start : start + SHOWN]!r} (from character {start})"


def verify(data: Path | None, traces: Path) -> Comparison:
    """Replay every episode of a file of traces.

    Args:
        data: the folder that a list of episodes was recorded on.
        traces: a file in one of the two formats.

    Raises:
        UserError: the file has neither format.
    """
    try:
        found = json.loads(traces.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{traces}: cut off or not JSON ({error})") from error
    comparison = Comparison()
    with tempfile.TemporaryDirectory() as cache:
        try:
            if isinstance(found, list):
                if data is None:
                    raise UserError("--catalogue: these traces need the folder they were recorded on")
                _replay_plain(found, data, Path(cache), comparison)
            else:
                _replay_lucene(found, Path(cache), comparison)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{traces}: is no file of WebShop traces ({error!r})") from error
    return comparison


def _replay_plain(episodes: list[dict], data: Path, cache: Path, comparison: Comparison) -> None:
    has_human = product_file(data).with_name("items_human_ins.json").is_file()
    folder = prepare(data, "human" if has_human else "synthetic", cache=cache)  # the recording has its own goals
    plain = Catalogue(folder)
    catalogue = Catalogue(folder, search=Okapi([plain.at(row) for row in range(plain.count)]))
    for number, episode in enumerate(episodes):
        steps = [
            (s["action"], s["observation"], s["available"], s["reward"], s["done"], None) for s in episode["steps"]
        ]
        first = episode["initial"]
        bought = episode.get("purchased")
        prices = {**episode["product_prices"], **({bought: episode["purchased_price"]} if bought else {})}
        shop = _Priced(catalogue, episode["goal"], prices, episode["mode"], str(episode["session"]), long_words)
        where = f"episode {number} ({episode['mode']})"
        _replay(shop, (first["observation"], first["available"]), steps, where, comparison)
        if bought:  # else the recording stops before a purchase
            comparison.check(where, "reward parts", _rounded(shop.parts), _rounded(episode["verbose"]))
            comparison.check(where, "purchase", (shop.asin, shop.options), (bought, episode["chosen_options"]))


def _replay_lucene(found: dict, cache: Path, comparison: Comparison) -> None:
    for name, content in found["catalogue"].items():
        (cache / Path(name).name).write_text(json.dumps(content), encoding="utf-8")
    catalogue = Catalogue(prepare(cache, cache=cache / "prepared"))
    prices = {"human": found["product_prices_human"], "synthetic": found["product_prices_synthetic"]}
    humans = [goal["instruction_text"] for goal in found["goals_human"]]
    for number, episode in enumerate(found["trajectories"]):
        steps = [
            (s["action"], s["observation"], s["available_actions"], s["reward"], s["done"], s["url"])
            for s in episode["steps"]
        ]
        goal, final = episode["goal"], episode["final"]
        kind = "human" if goal["instruction_text"] in humans else "synthetic"
        shop = _Priced(catalogue, goal, prices[kind], episode["observation_mode"], str(episode["session"]), word_nouns)
        where = f"episode {number} ({episode['name']})"
        first = episode["reset_observation"], episode["reset_available_actions"]
        _replay(shop, first, steps, where, comparison)
        if final["done"]:
            comparison.check(where, "reward parts", _rounded(shop.parts), _rounded(final["verbose_info"]))
            comparison.check(where, "options", shop.options, final["session_options"])


class _Priced(Shop):
    """A session with the recorded prices: those of products with a price range were drawn at random."""

    def __init__(self, catalogue: Catalogue, goal: dict, prices: dict, mode: str, session: str, nouns: Nouns):
        self._prices = prices
        super().__init__(catalogue, goal, mode=mode, session=session, nouns=nouns)

    def price(self, product: dict) -> float:
        return self._prices.get(product["asin"], super().price(product))


def _replay(shop: Shop, first: tuple, steps: list[tuple], where: str, comparison: Comparison) -> None:
    comparison.episodes += 1
    comparison.check(where, "first observation", shop.observation(), first[0])
    comparison.check(where, "first available actions", shop.available(), first[1])
    for number, (action, observation, available, reward, done, url) in enumerate(steps):
        page, earned, over = shop.step(action)
        at = f"{where}, step {number} {action!r:.60}"
        comparison.steps += 1
        comparison.check(at, "observation", page, observation)
        comparison.check(at, "available actions", shop.available(), available)
        comparison.check(at, "reward", earned, float(reward))
        comparison.check(at, "done", over, done)
        if url is not None:
            comparison.check(at, "address", shop.url, url)


def _rounded(parts: dict) -> dict:
    return {name: round(float(value), 9) for name, value in sorted(parts.items())}
