"""The prompt of a small policy in the shop: the task, and the parts of the page that matter for the next click."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from envs_bridge.prompts import Cut, piece_ends
from envs_bridge.turn import SEARCH_COMMAND, Observation, clicks

SEPARATOR = " [SEP] "
_PRICE = re.compile(r"\$(\d+)(?:\.\d+)?")


@dataclass
class ShopNotes:
    """Notes on one session: the current page, the chosen options, the last command."""

    task: str
    page: Observation
    chosen: dict[str, str] = field(default_factory=dict)
    last: str = ""

    @classmethod
    def start(cls, task: str, seen: Observation) -> "ShopNotes":
        return cls(task, seen)

    def remember(self, command: str, seen: Observation) -> None:
        """Add a command and the observation after it; a clicked option value is noted as chosen."""
        label = command.removeprefix("click[").removesuffix("]")
        self.last = command if seen.text != self.page.text or self._group(label) else f"{command} nothing"
        if group := self._group(label):
            self.chosen[group] = label
        elif seen.text.startswith("Back to Search [SEP] Page "):
            self.chosen = {}
        self.page = seen

    def copy(self) -> "ShopNotes":
        return replace(self, chosen=dict(self.chosen))

    def _group(self, label: str) -> str:
        return next((name for name, values in self.options().items() if label in values), "")

    def options(self) -> dict[str, list[str]]:
        """The option groups of a product page."""
        if "click[buy now]" not in self.page.admissible:
            return {}
        values = {c[6:-1] for c in self.page.admissible[self.page.admissible.index("click[buy now]") + 1 :]}
        groups: dict[str, list[str]] = {}
        name = ""
        for part in self.page.text.split(SEPARATOR)[2:]:
            if part.startswith("Price: "):
                break
            if part in values and name:
                groups.setdefault(name, []).append(part)
            elif not name or clicks([part.lower()]):  # else it is a value that cannot be clicked
                name = part
        return groups

    def rows(self) -> list[str]:
        """The products of a results page: ASIN, title, price in dollars."""
        parts = self.page.text.split(SEPARATOR)
        starts = [i for i, part in enumerate(parts) if f"click[{part.lower()}]" in self.page.admissible]
        starts = [i for i in starts if i + 2 < len(parts) and parts[i + 2].startswith("$")]
        return [f"{parts[i]} {parts[i + 1]} {' '.join(_PRICE.findall(parts[i + 2])[:1])}" for i in starts]

    def prompt(self) -> str:
        """Task, kind of page, its content, the last command."""
        return self._written(self.task, "\n".join(self._lines(self.rows())))

    def _written(self, task: str, page: str) -> str:
        return f"task : {task}\n{page}\nlast {self.last}\n"

    def _lines(self, rows: Sequence[str]) -> list[str]:
        """The lines of the page in the prompt, with the given results."""
        if SEARCH_COMMAND in self.page.admissible:
            return ["page search"]
        if "click[buy now]" in self.page.admissible:
            open_groups = {n: v for n, v in self.options().items() if n not in self.chosen}
            lines = [f"open {name} : {' , '.join(values)}" for name, values in open_groups.items()]
            return ["page item", *lines, "chosen " + " , ".join(self.chosen.values())]
        if rows:
            return ["page results", *rows]
        return ["page other " + " ".join(self.page.text.replace(SEPARATOR, " , ").split())]

    def shortened(self) -> Iterator[Cut]:
        """Drop results, the end of the page, the end of the task."""
        rows = self.rows()
        if rows:
            yield Cut(
                "results", len(rows) - 1, lambda n: self._written(self.task, "\n".join(self._lines(rows[: n + 1])))
            )
        page = "\n".join(self._lines(rows[:1]))
        ends = piece_ends(page)
        yield Cut("observation", len(ends) - 1, lambda n: self._written(self.task, page[: ends[n]]))
        task_ends = piece_ends(self.task)
        yield Cut("task", len(task_ends) - 1, lambda n: self._written(self.task[: task_ends[n]], ""))
