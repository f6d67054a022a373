"""ALFWorld's own engine with its repeated work remembered: the same transcripts, many times faster.

TextWorld parses every text template and every condition of a game's grammar anew at each use, translates the game's
PDDL twice at each reset (the second time for a planner that playing does not need), and copies its tables of names
deeply for each symbol it expands. `install` replaces those places, in this process, by memoised or shallow ones. It is
guarded: it changes nothing unless the code to be replaced is, line for line, that of textworld 1.7.0.
"""

import functools
import hashlib
import inspect
from types import SimpleNamespace
from typing import Any

# Of the functions replaced and those that rely on them, in textworld 1.7.0.
KNOWN_SOURCE = "ce21007ac6572331"
_installed: str | None = None


def install() -> str:
    """Make TextWorld's PDDL engine faster in this process; what was done, as a sentence. Twice is once.

    Raises ImportError without textworld.
    """
    global _installed
    if _installed is None:
        from textworld.envs.pddl import logic, pddl, textgen

        found = source_hash(logic, pddl, textgen)
        if found == KNOWN_SOURCE:
            _replace(logic, pddl, textgen)
            _installed = "TextWorld with its repeated work remembered"
        else:
            _installed = f"TextWorld as it is: its source (hash {found}) is not the one known to be safe to speed up"
    return _installed


def source_hash(logic, pddl, textgen) -> str:
    """Of everything in TextWorld that the replacements rely on."""
    parts = [logic.PddlState, logic.GameLogic, logic._parse_and_convert, logic._ModelConverter, pddl.PddlEnv, textgen]
    source = "".join(inspect.getsource(part) for part in parts)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _replace(logic, pddl, textgen) -> None:
    parse_symbols, parse_rule = textgen._parse_and_convert, textgen.Rule.parse_conjunctive_query
    parsed_symbols = functools.lru_cache(maxsize=4096)(lambda text: parse_symbols(text, rule_name="symbols"))

    def symbols(text, rule_name="symbols", **_):
        """Fresh symbols each time: expanding them writes into them."""
        assert rule_name == "symbols"
        return [_clone(symbol, textgen) for symbol in parsed_symbols(text)]

    textgen._parse_and_convert = symbols
    # Rules are only read once they are parsed.
    textgen.Rule = SimpleNamespace(parse_conjunctive_query=functools.lru_cache(maxsize=4096)(parse_rule))
    textgen.deepcopy = lambda found: _copied(found, textgen)

    parse_grammar = logic._parse_and_convert
    parsed_grammar = functools.lru_cache(maxsize=64)(lambda text: parse_grammar(text, rule_name="pddlStart"))
    logic._parse_and_convert = lambda text, rule_name: parsed_grammar(text)

    translate = logic.fast_downward.pddl2sas
    translated = functools.lru_cache(maxsize=64)(lambda domain, problem: translate(domain, problem, verbose=False))

    def pddl2sas(domain, problem, verbose=False, optimize=False):
        """What playing needs; the optimised translation is for the planner alone, which never runs here."""
        return (None, "") if optimize else translated(domain, problem)

    names = {name: getattr(logic.fast_downward, name) for name in dir(logic.fast_downward) if name[:2] != "__"}
    logic.fast_downward = SimpleNamespace(**{**names, "pddl2sas": pddl2sas})
    load_library = pddl.fast_downward.load_lib
    pddl.fast_downward = SimpleNamespace(load_lib=lambda: _WithoutPlanner(load_library()))


class _WithoutPlanner:
    """The planner's library, except that no problem is ever given to the planner."""

    def __init__(self, library: Any):
        self._library = library

    def load_sas_replan(self, _) -> None: ...

    def __getattr__(self, name: str):
        function = getattr(self._library, name)
        setattr(self, name, function)
        return function


def _clone(symbol, textgen):
    """A symbol that can be given a context of its own; the symbols inside it, too."""
    copy = symbol.__class__.__new__(symbol.__class__)
    copy.__dict__.update(symbol.__dict__)
    for name in ("symbol", "expression"):
        inner = copy.__dict__.get(name)
        if isinstance(inner, textgen.Symbol):
            copy.__dict__[name] = _clone(inner, textgen)
    return copy


def _copied(found, textgen):
    """In place of a deep copy: of symbols what is written to, of tables of names the table alone."""
    if isinstance(found, textgen.Symbol):
        return _clone(found, textgen)
    if isinstance(found, list):
        return [_copied(item, textgen) for item in found]
    return dict(found)
