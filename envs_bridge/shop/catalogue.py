"""WebShop's data files, converted once to files that many processes share.

A folder has `items_shuffle*.json` (products), `items_ins_v2*.json` (attributes and synthetic instructions),
`items_human_ins.json` (human instructions) and optionally `reviews.json`. `prepare` streams them into a folder of JSON
lines and arrays; `Catalogue` memory-maps those, so that the processes of a host share one copy. The rules for fields,
prices and goals are those of WebShop's `engine.py` and `goal.py`.
"""

import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from envs_bridge.errors import UserError
from envs_bridge.shop.search import Lucene, build_index, mapped
from envs_bridge.text import escapes_halves, load_json, whole_characters

VERSION = 2
SEED = 233  # of the order of the goals, as in WebShop; also of prices and limits, which WebShop draws at random
SPLITS = ("train", "valid", "test")
# Sizes of WebShop's ranges in the order of the goals, test first; a tenth each if there are too few goals.
TEST, VALID = 500, 1000
GOALS = ("human", "synthetic")
NO_PRICE, NO_LIMIT = 100.0, 1_000_000
ASKED = ("asin", "title", "category", "query", "product_category", "options")  # fields that goals need


class CatalogueError(UserError):
    """An invalid data file; the message names the file, the product if there is one, and the fault."""


def read_array(path: Path, size: int = 1 << 22) -> Iterator[dict]:
    """Stream the objects of a JSON array. Raises CatalogueError for other or truncated content."""
    decoder, buffer, at, number = json.JSONDecoder(), "", 0, 0
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise CatalogueError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        buffer = _text(file, size, path).lstrip()
        if not buffer.startswith("["):
            raise CatalogueError(f"{path}: need a JSON array of products, found {buffer[:20]!r}")
        at = 1
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n,":
                at += 1
            if buffer[at : at + 1] == "]":
                return
            try:
                found, end = decoder.raw_decode(buffer, at)
            except ValueError as error:
                more = _text(file, max(size, len(buffer)), path)
                if not more:
                    raise CatalogueError(f"{path}: cut off or not JSON after {number} products ({error})") from error
                buffer, at = buffer[at:] + more, 0
                continue
            if not isinstance(found, dict):
                raise CatalogueError(f"{path}: product {number} is {type(found).__name__}, need an object")
            yield whole_characters(found) if escapes_halves(buffer[at:end]) else found
            at, number = end, number + 1


def _text(file: TextIO, size: int, path: Path) -> str:
    """The next characters of a file. Raises CatalogueError if they are not UTF-8."""
    try:
        return file.read(size)
    except UnicodeDecodeError as error:
        raise CatalogueError(f"{path}: is not UTF-8 ({error.reason})") from error


def read_object(path: Path) -> dict:
    """Read a JSON object by ASIN. Raises CatalogueError."""
    try:
        found = load_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CatalogueError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CatalogueError(f"{path}: cut off or not JSON ({error})") from error
    if not isinstance(found, dict):
        raise CatalogueError(f"{path}: need a JSON object by ASIN, found {type(found).__name__}")
    return found


def product_file(data: Path) -> Path:
    """The products file of a folder (the full one if there are several), or the file itself."""
    if data.is_file():
        return data
    found = sorted(data.glob("items_shuffle*.json"), key=lambda path: len(path.name))
    if not found:
        raise CatalogueError(f"{data}: holds no items_shuffle*.json (WebShop's setup.sh downloads it)")
    return found[0]


def clean(raw: dict, known: dict, reviews: dict, where: str) -> dict[str, Any]:
    """Convert a raw product to the fields that the shop shows.

    Args:
        raw: its entry in the products file.
        known: its entry in the attributes file.
        reviews: of `read_reviews`.
        where: named in errors.

    Raises:
        CatalogueError: a field is invalid.
    """
    asin = raw["asin"]

    def text(name: str) -> str:
        value = raw.get(name)
        if not isinstance(value, str):
            raise CatalogueError(f"{where}: product {asin}: {name} must be a string, got {value!r:.40}")
        return value

    bullets = raw.get("small_description")
    tag, prices = _prices(raw.get("pricing"), f"{where}: product {asin}")
    rating, written = reviews.get(asin, ("N.A.", []))
    return {
        "asin": asin,
        "title": text("name"),
        "description": str(raw.get("full_description")),
        "bullets": [str(line) for line in (bullets if isinstance(bullets, list) else [bullets])],
        "price_tag": tag,
        "prices": prices,
        "options": _options(raw.get("customization_options"), f"{where}: product {asin}"),
        "attributes": known.get("attributes", ["DUMMY_ATTR"]),
        "category": text("category"),
        "query": text("query").lower().strip(),
        "product_category": text("product_category"),
        "rating": rating,
        "reviews": written,
    }


def _prices(pricing: Any, where: str) -> tuple[str, list[float]]:
    """(text on the page, one price or the ends of a range); 100 dollars without a price."""
    if not pricing:
        return f"${NO_PRICE}", [NO_PRICE]
    try:
        found = [float(re.sub(r"[^\d.]", "", part)) for part in pricing.split("$")[1:]]
        return (f"${found[0]}", found) if len(found) == 1 else (f"${found[0]} to ${found[1]}", found[:2])
    except (ValueError, IndexError, AttributeError) as error:
        raise CatalogueError(f"{where}: pricing must be like '$5.00' or '$5.00$8.00', got {pricing!r:.40}") from error


def _options(found: Any, where: str) -> dict[str, list[str]]:
    """Option names, lower-cased, and their values."""
    if not found:
        return {}
    try:
        return {
            name.lower(): [value["value"].strip().replace("/", " | ").lower() for value in values]
            for name, values in found.items()
            if values is not None
        }
    except (TypeError, KeyError, AttributeError) as error:
        raise CatalogueError(
            f"{where}: customization_options must map names to lists of {{'value': text}}, got {found!r:.80}"
        ) from error


def read_reviews(path: Path) -> dict[str, tuple[str, list]]:
    """(rating, [title, score, body]) by ASIN; empty without a file."""
    if not path.is_file():
        return {}
    try:
        return {
            entry["asin"]: (
                str(entry["average_rating"]),
                [[r.get("title"), r.get("score", r.get("stars")), r.get("review", "")] for r in entry["reviews"]],
            )
            for entry in read_array(path)
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CatalogueError(f"{path}: need asin, average_rating and a list of reviews of each ({error!r})") from error


def read_products(data: Path) -> Iterator[tuple[dict[str, Any], dict]]:
    """Yield (product, its entry in the attributes file) in file order, each ASIN once. Raises CatalogueError."""
    path = product_file(data)
    known = read_object(path.with_name(path.name.replace("items_shuffle", "items_ins_v2")))
    reviews, seen = read_reviews(path.with_name("reviews.json")), set()
    for number, raw in enumerate(read_array(path)):
        asin = raw.get("asin")
        if not isinstance(asin, str):
            raise CatalogueError(f"{path}: product {number} has no asin")
        if not asin.isascii():
            raise CatalogueError(f"{path}: product {number}: asin must be of ASCII characters, got {asin!r:.40}")
        if asin == "nan" or len(asin) > 10 or asin in seen:
            continue
        seen.add(asin)
        entry = known.get(asin, {})
        yield clean(raw, entry, reviews, str(path)), entry


def indexed_text(product: dict[str, Any]) -> str:
    """The indexed text of a product (WebShop's `convert_product_file_format.py`)."""
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product["options"].items())
    first = product["bullets"][0] if product["bullets"] else ""
    return " ".join([product["title"], product["description"], first, options]).lower()


def limit(price: float, rng: random.Random) -> tuple[float, str]:
    """(price limit, its words in the instruction): the larger of two of the next four tens above the price."""
    above = [10.0 * i for i in range(1, 100) if 10.0 * i > price][:4]
    if len(above) < 2:
        return NO_LIMIT, ""
    upper = max(rng.sample(above, 2))
    return upper, f", and price lower than {upper:.2f} dollars"


def human_goals(product: dict, price: float, instructions: list[dict], rng: random.Random, where: str) -> list[dict]:
    """The goals that people wrote for a product. Raises CatalogueError, with `where`, for invalid instructions."""
    goals = []
    for entry in instructions:
        try:
            text, attributes, options = (
                entry[name] for name in ("instruction", "instruction_attributes", "instruction_options")
            )
            text = text.strip(".")
        except (KeyError, TypeError, AttributeError) as error:
            raise CatalogueError(
                f"{where}: product {product['asin']}: need instruction, instruction_attributes and"
                f" instruction_options, got {entry!r:.80}"
            ) from error
        if attributes:
            upper, price_text = limit(price, rng)
            goals.append(goal_of(product, text + price_text, attributes, upper, options) | {"weight": 1})
    return goals


def synthetic_goals(product: dict, price: float, entry: dict, rng: random.Random, where: str) -> list[dict]:
    """A goal for every combination of a product's options, if it has an instruction. Options are (name, value)."""
    text, attributes = entry.get("instruction"), entry.get("instruction_attributes")
    if text is None:
        return []
    if not attributes:
        raise CatalogueError(f"{where}: product {product['asin']}: its instruction has no instruction_attributes")
    upper, price_text = limit(price, rng)
    names = sorted(product["options"])
    goals = []
    for values in itertools.product(*(product["options"][name] for name in names)):
        pairs = list(zip(names, values, strict=True))
        wanted = " with " + ", and ".join(f"{name}: {value}" for name, value in pairs) if pairs else ""
        goals.append(goal_of(product, f"{text}{wanted}{price_text}", attributes, upper, pairs))
    return goals


def goal_of(product: dict, instruction: str, attributes: list[str], upper: float, options: list) -> dict[str, Any]:
    """A goal with WebShop's field names."""
    same = {name: product[name] for name in ("asin", "category", "query", "product_category")}
    return same | {
        "name": product["title"], "instruction_text": instruction, "attributes": attributes, "price_upper": upper,
        "goal_options": options,
    }  # fmt: skip


def weigh(goals: list[dict]) -> None:
    """Set the weights of synthetic goals by the rarity of their attributes."""
    count = Counter(attribute for goal in goals for attribute in goal["attributes"])
    for goal in goals:
        goal["weight"] = sum(1.0 / count[a] for a in goal["attributes"]) / len(goal["attributes"])


def splits(count: int) -> dict[str, range]:
    """Disjoint ranges of the order of the goals, the same in every process.

    (The official code shuffles in every worker with another seed, so that its validation goals are training goals.)
    """
    small = count < 2 * (TEST + VALID)
    test, valid = (max(count // 10, 1), max(count // 10, 1)) if small else (TEST, VALID)
    test = min(test, count)
    valid = min(valid, count - test)
    return {"train": range(test + valid, count), "valid": range(test, test + valid), "test": range(test)}


def cache_folder() -> Path:
    """The folder of prepared catalogues: $PROXMO_CACHE or ~/.cache/proxmo. Raises CatalogueError without a home."""
    if named := os.environ.get("PROXMO_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "proxmo"
    except RuntimeError as error:
        raise CatalogueError("no home folder to keep prepared catalogues in; name one with PROXMO_CACHE") from error


def prepare(
    data: Path, goals: str = "human", on_product: Callable[[int], None] | None = None, cache: Path | None = None
) -> Path:
    """Prepare a catalogue, unless it is cached; the folder is written atomically.

    Args:
        data: folder or products file of WebShop.
        goals: human or synthetic.
        on_product: called with the number of products read so far.
        cache: where prepared catalogues are stored; default: `cache_folder`.

    Returns:
        The prepared folder.

    Raises:
        UserError: unknown goals.
        CatalogueError: a data file is missing or invalid, or the cache cannot be written.
    """
    if goals not in GOALS:
        raise UserError(f"goals must be one of {', '.join(GOALS)}; got {goals!r}")
    path = product_file(data)
    sources = [path, path.with_name(path.name.replace("items_shuffle", "items_ins_v2"))]
    sources += [file for name in ("items_human_ins.json", "reviews.json") if (file := path.with_name(name)).is_file()]
    for source in sources:
        if not source.is_file():
            raise CatalogueError(f"{source}: is missing; need it beside {path.name}")
    stamp = [VERSION, goals, *((str(s.resolve()), s.stat().st_size, s.stat().st_mtime_ns) for s in sources)]
    target = (cache or cache_folder()) / f"shop-{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".shop-"))
        try:
            _write(folder, path, goals, on_product)
            try:
                folder.rename(target)
            except OSError:  # another process was faster
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        remedy = "" if cache else "; name a folder that can be written with PROXMO_CACHE"
        reason = error.strerror or error
        raise CatalogueError(f"{target.parent}: cannot keep the prepared catalogue ({reason}){remedy}") from error
    return target


def _write(folder: Path, path: Path, kind: str, on_product: Callable[[int], None] | None) -> None:
    """Write the index, products, goals and arrays of a catalogue."""
    rng, human = random.Random(SEED), path.with_name("items_human_ins.json")
    if kind == "human" and not human.is_file():
        raise CatalogueError(f"{human}: is missing; need it for human goals (--env.goals synthetic does without)")
    instructions = read_object(human) if kind == "human" else {}
    asins: list[str] = []
    prices: list[float] = []
    labels: dict[str, list[str]] = {"query": [], "category": []}
    wanted: list[tuple[dict, Any]] = []

    def texts() -> Iterator[str]:
        with Lines(folder / "products") as lines:
            for product, entry in read_products(path):
                span = product.pop("prices")
                prices.append(span[0] if len(span) == 1 else rng.uniform(*span))
                lines.add(product)
                asins.append(product["asin"])
                for name, values in labels.items():
                    values.append(product[name])
                found = instructions.get(product["asin"]) if kind == "human" else entry
                if found:  # keep only the fields of goals: a full catalogue has a million products
                    wanted.append(({name: product[name] for name in ASKED}, found))
                if on_product:
                    on_product(len(asins))
                yield indexed_text(product)

    build_index(folder, texts())
    price = dict(zip(asins, prices, strict=True))
    make = human_goals if kind == "human" else synthetic_goals
    where = str(human if kind == "human" else path)
    goals = [goal for product, found in wanted for goal in make(product, price[product["asin"]], found, rng, where)]  # type: ignore[operator]
    if kind == "synthetic":
        weigh(goals)
    random.Random(SEED).shuffle(goals)
    with Lines(folder / "goals") as lines:
        for goal in goals:
            lines.add(goal)
    order = np.argsort(np.array(asins, "S10"), kind="stable")
    np.save(folder / "asins.npy", np.array(asins, "S10")[order])
    np.save(folder / "rows.npy", order.astype(np.int32))
    np.save(folder / "ranks.npy", np.argsort(order).astype(np.int32))
    np.save(folder / "prices.npy", np.array(prices))
    for name, values in labels.items():
        words, codes = np.unique(np.array(values, object).astype(str), return_inverse=True)
        np.save(folder / f"{name}.npy", codes.astype(np.int32))
        (folder / f"{name}.json").write_text(json.dumps(words.tolist()), encoding="utf-8")


class Lines:
    """Writes JSON lines and their offsets, for random access by many processes."""

    def __init__(self, path: Path):
        self._path, self._starts = path, [0]
        self._file = path.with_suffix(".jsonl").open("wb")

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        np.save(self._path.with_suffix(".npy"), np.array(self._starts, np.int64))

    def add(self, value: dict) -> None:
        written = self._file.write(json.dumps(value).encode("ascii") + b"\n")
        self._starts.append(self._starts[-1] + written)


class Catalogue:
    """A memory-mapped prepared folder: products by ASIN or row, prices, goals in order, search."""

    def __init__(self, folder: Path, search: Callable[[str], Iterable[int]] | None = None):
        """search: query -> rows of products, best first; default: as Lucene."""
        self.folder = folder

        def array(name: str) -> np.ndarray:
            return mapped(folder / f"{name}.npy")

        self._asins, self._rows, self.prices = array("asins"), array("rows"), array("prices")
        self._lines = {name: (mapped(folder / f"{name}.jsonl"), array(name)) for name in ("products", "goals")}
        self._codes = {name: array(name) for name in ("query", "category")}
        self._search = search or Lucene(folder)
        self.count, self.goal_count = len(self._rows), len(self._lines["goals"][1]) - 1
        self.splits = splits(self.goal_count)
        self.product = functools.lru_cache(4096)(self._product)
        self.search = functools.lru_cache(4096)(self._results)

    def row(self, asin: str) -> int:
        """The row of a product. Raises KeyError for an unknown ASIN."""
        key = asin.encode("ascii", "replace")
        at = int(np.searchsorted(self._asins, key))
        if at == self.count or self._asins[at] != key:
            raise KeyError(asin)
        return int(self._rows[at])

    def goal(self, number: int) -> dict:
        """The goal of a number."""
        return self._line("goals", number)

    def at(self, row: int) -> dict:
        """The product in a row."""
        return self._line("products", row)

    def _product(self, asin: str) -> dict:
        return self.at(self.row(asin))

    def _line(self, name: str, number: int) -> dict:
        data, starts = self._lines[name]
        return json.loads(data[int(starts[number]) : int(starts[number + 1])].tobytes())

    def _results(self, query: str) -> tuple[int, ...]:
        return tuple(self._search(query))

    def labelled(self, name: str, value: str) -> list[int]:
        """Rows of all products with a given query or category."""
        words = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return np.flatnonzero(self._codes[name] == words.index(value)).tolist() if value in words else []
