"""TextWorld with memoisation: ALFWorld's engine with the same transcripts, many times faster.

TextWorld parses every text template and every condition of a game's grammar at each use, translates the game's PDDL
twice at each reset (the second time for a planner that is not used here), and deep-copies its tables of names for each
symbol it expands. `install` replaces these functions in this process by memoised ones or shallow copies. It changes
nothing unless the source of the replaced code is exactly that of textworld 1.7.0.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from types import SimpleNamespace
from typing import Any

# The hash of the replaced functions and of those that rely on them, in textworld 1.7.0.
KNOWN_SOURCE = "ce21007ac6572331"
_installed: str | None = None


def install() -> str:
    """Memoise TextWorld's PDDL engine in this process; further calls do nothing.

    Returns:
        What was done, as a sentence.

    Raises:
        ImportError: textworld is not installed.
    """
    global _installed
    if _installed is None:
        from textworld.envs.pddl import logic, pddl, textgen

        found = source_hash(logic, pddl, textgen)
        if found == KNOWN_SOURCE:
            _replace(logic, pddl, textgen)
            _installed = "TextWorld with memoisation"
        else:
            _installed = f"TextWorld, unmodified: its source (hash {found}) is not the known one"
    return _installed


def source_hash(logic, pddl, textgen) -> str:
    """The hash of everything in TextWorld that the replacements rely on."""
    parts = [logic.PddlState, logic.GameLogic, logic._parse_and_convert, logic._ModelConverter, pddl.PddlEnv, textgen]
    source = "".join(inspect.getsource(part) for part in parts)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _replace(logic, pddl, textgen) -> None:
    """Replace functions of TextWorld's modules by memoised ones."""
    parse_symbols, parse_rule = textgen._parse_and_convert, textgen.Rule.parse_conjunctive_query
    parsed_symbols = functools.lru_cache(maxsize=4096)(lambda text: parse_symbols(text, rule_name="symbols"))

    def symbols(text, rule_name="symbols", **_):
        """Copies of the parsed symbols, since expanding a symbol writes into it."""
        assert rule_name == "symbols"
        return [_clone(symbol, textgen) for symbol in parsed_symbols(text)]

    textgen._parse_and_convert = symbols
    # Parsed rules are only read, so they can be shared.
    textgen.Rule = SimpleNamespace(parse_conjunctive_query=functools.lru_cache(maxsize=4096)(parse_rule))
    textgen.deepcopy = lambda found: _copied(found, textgen)

    parse_grammar = logic._parse_and_convert
    parsed_grammar = functools.lru_cache(maxsize=64)(lambda text: parse_grammar(text, rule_name="pddlStart"))
    logic._parse_and_convert = lambda text, rule_name: parsed_grammar(text)

    translate = logic.fast_downward.pddl2sas
    translated = functools.lru_cache(maxsize=64)(lambda domain, problem: translate(domain, problem, verbose=False))

    def pddl2sas(domain, problem, verbose=False, optimize=False):
        """The translation for playing. The optimised one is for the planner only, which never runs here."""
        return (None, "") if optimize else translated(domain, problem)

    names = {name: getattr(logic.fast_downward, name) for name in dir(logic.fast_downward) if name[:2] != "__"}
    logic.fast_downward = SimpleNamespace(**{**names, "pddl2sas": pddl2sas})
    load_library = pddl.fast_downward.load_lib
    pddl.fast_downward = SimpleNamespace(load_lib=lambda: _WithoutPlanner(load_library()))


class _WithoutPlanner:
    """The planner's library without loading problems into the planner."""

    def __init__(self, library: Any):
        self._library = library

    def load_sas_replan(self, _) -> None: ...

    def __getattr__(self, name: str):
        function = getattr(self._library, name)
        setattr(self, name, function)
        return function


def _clone(symbol, textgen):
    """A copy of a symbol and of the symbols in it, each of which can get a context of its own."""
    copy = symbol.__class__.__new__(symbol.__class__)
    copy.__dict__.update(symbol.__dict__)
    for name in ("symbol", "expression"):
        inner = copy.__dict__.get(name)
        if isinstance(inner, textgen.Symbol):
            copy.__dict__[name] = _clone(inner, textgen)
    return copy


def _copied(found, textgen):
    """Replaces a deep copy: copies of symbols, and shallow copies of tables of names."""
    if isinstance(found, textgen.Symbol):
        return _clone(found, textgen)
    if isinstance(found, list):
        return [_copied(item, textgen) for item in found]
    return dict(found)
