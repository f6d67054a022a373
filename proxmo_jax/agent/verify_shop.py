"""Replay recorded episodes of WebShop in our engine, and compare every turn.

proxmo verify-env shop --traces FILE
"""

from dataclasses import dataclass
from pathlib import Path

from envs_bridge.shop.verify import verify


@dataclass(frozen=True)
class Config:
    """Replay recorded episodes of the genuine WebShop in our engine: pages, what can be clicked, rewards and parts."""

    traces: Path
    """JSON file of episodes: a list, or an object that holds the catalogue they were recorded on."""
    catalogue: Path | None = None
    """Folder with WebShop's data files; needed for a list of episodes."""


def main(options: Config) -> bool:
    """Replay and report; whether all agree."""

    found = verify(options.catalogue, options.traces)
    for difference in found.differences[:20]:
        print(difference)
    if len(found.differences) > 20:
        print(f"... and {len(found.differences) - 20} more")
    print(found)
    return not found.differences
