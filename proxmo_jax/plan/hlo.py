"""The text of a compiled program (optimised HLO) as computations of instructions."""

import re
from dataclasses import dataclass, field
from functools import cached_property

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
SIZES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "token": 0}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
ON_CHIP = re.compile(r"S\(\d+\)")  # a memory space other than HBM
NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """An array of a type: its dimensions, its bytes, and whether it lies in HBM."""

    shape: tuple[int, ...]
    bytes: float
    in_hbm: bool


def arrays(text: str) -> list[Array]:
    """The arrays of a type, a tuple's in order."""
    found = []
    for kind, dimensions, layout in ARRAY.findall(text):
        shape, size = tuple(int(d) for d in dimensions.split(",") if d), SIZES.get(kind, 0)
        for d in shape:
            size *= d
        found.append(Array(shape, size, not ON_CHIP.search(layout)))
    return found


@dataclass
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in the program.
        kind: its opcode.
        type: text of its type.
        operands: names of other instructions of the computation.
        rest: what follows the operands.
        root: whether it is the computation's result.
    """

    name: str
    kind: str
    type: str
    operands: list[str]
    rest: str
    root: bool

    @cached_property
    def arrays(self) -> list[Array]:
        """The arrays of the result."""
        return arrays(self.type)

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{name}=%([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclass
class Computation:
    """Instructions in order, by name."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each one."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                if operand in found:
                    found[operand].append(instruction)
        return found

    @cached_property
    def root(self) -> Instruction:
        """The result."""
        return next(i for i in self.instructions.values() if i.root)

    @cached_property
    def parameters(self) -> list[Instruction]:
        """The parameters, by number."""
        found = [i for i in self.instructions.values() if i.kind == "parameter"]
        return sorted(found, key=lambda i: int(i.rest.split(")")[0]))


@dataclass
class Module:
    """A program: its computations by name, and the one that is entered."""

    computations: dict[str, Computation]
    entry: str


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"no closing bracket in {text[start : start + 80]!r}")


LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
OPCODE = re.compile(r"\s*([\w\-]+)\(")


def parse(text: str) -> Module:
    """Read a program.

    Args:
        text: as `jax.stages.Compiled.as_text` gives it.

    Returns:
        Its computations.
    """
    computations: dict[str, Computation] = {}
    current, entry = Computation(""), ""
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
        elif start := LINE.match(line):
            at = start.end()
            end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
            opcode = OPCODE.match(line, end)
            assert opcode is not None, line[:200]
            close = _closing(line, opcode.end() - 1)
            inside = line[opcode.end() : close]
            rest = inside + ")" if opcode[1] == "parameter" else line[close + 1 :]
            if opcode[1] == "constant":
                rest = inside
            instruction = Instruction(start[2], opcode[1], line[at:end], NAME.findall(inside), rest, bool(start[1]))
            current.instructions[instruction.name] = instruction
    return Module(computations, entry)
