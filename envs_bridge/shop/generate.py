"""Generate catalogues in WebShop's file formats, so that the shop needs no download.

Every kind of product has many variants that share brand, attributes, options or price, so that a search finds several
products that do not meet the goal.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envs_bridge.errors import UserError

BRANDS = """Lumeo Norvik Halden Orbita Quillon Ombrio Castor Brightwell Tallowby Fenwick Solara Mirelle Kestrel Avenor
 Pinecroft Zephra Marlowe Dunmore Isolde Verity""".split()


@dataclass(frozen=True)
class Kind:
    """A kind of product: its words in a title, its Amazon query, category, path and option groups, its lowest price."""

    noun: str
    query: str
    category: str
    path: str
    options: tuple[str, ...]
    cheapest: int


ATTRIBUTES = {
    "beauty": ("cruelty free", "fragrance free", "sulfate free", "paraben free", "long lasting", "travel size"),
    "electronics": (
        "fast charging",
        "noise cancelling",
        "water resistant",
        "easy install",
        "light weight",
        "dual band",
    ),
    "fashion": ("machine washable", "slim fit", "wide leg", "quick drying", "hand sewn", "arch support"),
    "garden": ("heavy duty", "space saving", "easy assemble", "fade resistant", "solid wood", "eco friendly"),
    "grocery": ("gluten free", "low sugar", "dairy free", "keto friendly", "plant based", "high protein"),
}
OPTIONS = {
    "color": ("black", "white", "navy", "green", "burgundy", "grey"),
    "size": ("small", "medium", "large", "x large"),
    "volume": ("4 ounce", "8 ounce", "16 ounce"),
    "scent": ("lavender", "citrus", "unscented", "rose"),
    "length": ("3 feet", "6 feet", "10 feet"),
    "flavor": ("vanilla", "cocoa", "peanut butter", "berry"),
    "pack": ("pack of 1", "pack of 3", "pack of 6"),
    "finish": ("walnut", "oak", "matte black"),
}
KINDS = tuple(
    Kind(noun, query, category, path, tuple(options.split()), cheapest)
    for category, path, rows in (
        ("beauty", "Beauty & Personal Care", (
            ("argan oil shampoo", "shampoo", "Hair Care › Shampoos", "scent volume", 8),
            ("vitamin serum", "face serum", "Skin Care › Serums", "volume", 12),
            ("body lotion", "lotion", "Skin Care › Lotions", "scent volume", 6),
            ("lip balm", "lip balm", "Skin Care › Lips", "scent pack", 3),
            ("bath soap", "bar soap", "Bath › Soaps", "scent pack", 4),
        )),
        ("electronics", "Electronics", (
            ("usb cable", "usb cables", "Cables › USB Cables", "color length", 5),
            ("wireless headphones", "headphones", "Audio › Headphones", "color", 25),
            ("bluetooth speaker", "speakers", "Audio › Speakers", "color", 20),
            ("wifi router", "routers", "Networking › Routers", "color", 40),
            ("phone charger", "chargers", "Power › Chargers", "color length", 9),
        )),
        ("fashion", "Clothing, Shoes & Jewelry", (
            ("cotton shirt", "men's shirts", "Men › Shirts", "color size", 12),
            ("linen pants", "women's pants", "Women › Pants", "color size", 18),
            ("rain jacket", "rain jackets", "Men › Jackets", "color size", 30),
            ("running shoes", "running shoes", "Women › Shoes", "color size", 35),
            ("wool sweater", "sweaters", "Women › Sweaters", "color size", 28),
        )),
        ("garden", "Home & Kitchen", (
            ("desk lamp", "desk lamps", "Lighting › Lamps", "finish", 16),
            ("book shelf", "bookcases", "Furniture › Shelves", "finish", 45),
            ("patio umbrella", "umbrellas", "Patio › Umbrellas", "color", 40),
            ("storage basket", "baskets", "Storage › Baskets", "color size", 9),
            ("dining table", "tables", "Furniture › Tables", "finish", 80),
        )),
        ("grocery", "Grocery & Gourmet Food", (
            ("oat granola", "granola", "Breakfast › Granola", "flavor pack", 5),
            ("protein bar", "protein bars", "Snacks › Bars", "flavor pack", 7),
            ("trail mix", "trail mix", "Snacks › Nuts", "pack", 6),
            ("herbal tea", "tea", "Beverages › Tea", "pack", 4),
            ("almond cookies", "cookies", "Snacks › Cookies", "flavor pack", 5),
        )),
    )
    for noun, query, end, options, cheapest in rows
    for path in (f"{path} › {end}",)
)  # fmt: skip
ASKING = ("i need a", "i am looking for a", "i want to buy a", "find me a", "looking for a")
FILES = ("items_shuffle.json", "items_ins_v2.json", "items_human_ins.json")


def generate_catalogue(folder: Path, *, count: int = 4000, seed: int = 0) -> Path:
    """Write a catalogue with a human-style and a synthetic instruction per product; equal arguments give equal files.

    Args:
        folder: created if missing.
        count: number of products, at most 10,000: the ASINs here have four digits.
        seed: of the random draws.

    Returns:
        The folder.

    Raises:
        UserError: count is out of range.
    """
    if not 1 <= count <= 10_000:
        raise UserError(f"count must lie between 1 and 10000, got {count}")
    rng = random.Random(f"shop/{seed}")
    numbers = rng.sample(range(10_000), count)
    products, attributes, human = [], {}, {}
    for i, number in enumerate(numbers):
        asin, kind = f"B{number:04d}", KINDS[i % len(KINDS)]
        product, known = _product(rng, asin, kind)
        products.append(product)
        attributes[asin] = known
        human[asin] = [_instruction(rng, asin, kind, product, known["instruction_attributes"])]
    order = list(range(count))
    rng.shuffle(order)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(FILES, ([products[i] for i in order], attributes, human), strict=True):
        temporary = folder / f"{name}.tmp"
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(folder / name)
    return folder


def _product(rng: random.Random, asin: str, kind: Kind) -> tuple[dict, dict]:
    """(entry in the products file, entry in the attributes file) of a product."""
    has = rng.sample(ATTRIBUTES[kind.category], 3)
    brand = rng.choice(BRANDS)
    title = f"{brand} {kind.noun.title()}, {has[0].title()}, {has[1].title()}"
    price = round(kind.cheapest * rng.uniform(1.0, 4.0), 2)
    priced = rng.random()
    pricing = "" if priced < 0.03 else f"${price}" if priced < 0.9 else f"${price}${round(price * 1.4, 2)}"
    options = {
        name: [
            {"value": value, "image": None} for value in sorted(rng.sample(OPTIONS[name], 3), key=OPTIONS[name].index)
        ]
        for name in kind.options
    }
    product = {
        "asin": asin, "name": title, "category": kind.category, "query": kind.query,
        "product_category": kind.path, "pricing": pricing, "customization_options": options,
        "full_description": f"The {brand} {kind.noun} is {has[0]} and {has[1]}.",
        "small_description": [f"{has[2]} as well", f"by {brand}"], "images": [f"{asin}.jpg"],
    }  # fmt: skip
    synthetic = f"Find me {', '.join(has[:2])} {kind.query}"
    return product, {"attributes": has, "instruction": synthetic, "instruction_attributes": has[:2]}


def _instruction(rng: random.Random, asin: str, kind: Kind, product: dict, has: Sequence[str]) -> dict:
    """A human-style instruction that this product meets."""
    wanted = list(has[: rng.choice((1, 2, 2))])
    chosen = [rng.choice(values)["value"] for values in product["customization_options"].values()]
    text = f"{rng.choice(ASKING)} {' '.join(wanted)} {kind.noun} in {' and '.join(chosen)}."
    return {"asin": asin, "instruction": text, "instruction_attributes": wanted, "instruction_options": chosen}
