"""The text of a PTX kernel, as instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

_COMMENT = re.compile(r"//[^\n]*")
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)\s*\.reqntid\s+(\d+)([^{]*)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+[^,]*?(\w+)(\[\d+\])?\s*(?:,|$)")
_LABEL = re.compile(r"([\w$]+):(?!:)")
_DECLARED = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_MANY = re.compile(r"(%\w+)<(\d+)>")
_PREDICATE = re.compile(r"@(!?)([%\w@]+)\s+(.*)", re.DOTALL)
_WORD = re.compile(r"(?<![%\w.$])[A-Za-z_]\w*(?![\w.:])")
_DTYPES = {"pred": np.bool_, "16": np.uint16, "32": np.uint32, "64": np.uint64}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One of a program; `operands` are text, with what is in braces or brackets left together."""

    operation: str
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A kernel: its parameters by type, its registers' dtypes, and where its labels are."""

    name: str
    parameters: tuple[tuple[str, str], ...]  # type, name
    threads: int
    max_registers: int | None  # that a thread has when the kernel starts
    registers: dict[str, np.dtype]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    tables: dict[str, tuple[str, ...]]  # of labels

    def without(self, operations: re.Pattern[str]) -> Program:
        """The same, but for some instructions that do nothing."""
        kept = tuple(
            replace(each, operation="nop", operands=())
            if operations.fullmatch(each.operation)
            else each
            for each in self.instructions
        )
        return replace(self, instructions=kept)


def parse(text: str) -> Program:
    """The only kernel of a module."""
    text = _COMMENT.sub("", text)
    entry = _ENTRY.search(text)
    assert entry is not None
    parameters = [(kind, name) for kind, name, _ in _PARAMETER.findall(entry[2].strip())]
    assert text.count(".entry") == 1
    assert len(parameters) == entry[2].count(".param")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    registers: dict[str, np.dtype] = {}
    tables: dict[str, tuple[str, ...]] = {}
    for statement in _statements(text[entry.end() :]):
        if declared := _DECLARED.fullmatch(statement):
            dtype = np.dtype(_DTYPES[declared[1] if declared[1] == "pred" else declared[1][1:]])
            for name in declared[2].split(","):
                many = _MANY.fullmatch(name.strip())
                names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
                registers |= dict.fromkeys(names, dtype)
        elif statement.endswith(":"):
            label = statement[:-1]
            labels[label] = len(instructions)
        elif statement.startswith(".branchtargets"):
            tables[label] = tuple(split(statement.removeprefix(".branchtargets")))
        elif not statement.startswith("."):
            instructions.append(_instruction(statement))
    limit = re.search(r"\.maxnreg\s+(\d+)", entry[4])
    return Program(
        name=entry[1],
        parameters=tuple(parameters),
        threads=int(entry[3]),
        max_registers=int(limit[1]) if limit else None,
        registers=registers,
        instructions=tuple(instructions),
        labels=labels,
        tables=tables,
    )


def _statements(text: str) -> list[str]:
    """Those of the body that `text` begins with; names of inner scopes are made unique."""
    found: list[str] = []
    scopes: list[tuple[int, dict[str, str]]] = []
    place, count = 0, 0
    while True:
        while text[place].isspace() or text[place] == ";":
            place += 1
        if text[place] == "{":
            count += 1
            scopes.append((len(found), {}))
            place += 1
        elif text[place] == "}":
            first, _ = scopes.pop()
            place += 1
            if not scopes:
                return found
            found[first:] = _renamed(found[first:], f"@{count}")
        elif label := _LABEL.match(text, place):
            found.append(f"{label[1]}:")
            place = label.end()
        elif text.startswith((".loc", ".file"), place):
            place = text.index("\n", place)
        else:
            end = text.index(";", place)
            found.append(" ".join(text[place:end].split()))
            place = end + 1


def _renamed(statements: list[str], suffix: str) -> list[str]:
    """Labels and registers without a % are of their scope alone."""
    own = {each[:-1] for each in statements if each.endswith(":")}
    for each in statements:
        if declared := _DECLARED.fullmatch(each):
            own |= {name.strip() for name in declared[2].split(",")}
    return [
        _WORD.sub(lambda word: word[0] + suffix if word[0] in own else word[0], each[:-1]) + ":"
        if each.endswith(":")
        else _WORD.sub(lambda word: word[0] + suffix if word[0] in own else word[0], each)
        for each in statements
    ]


def _instruction(statement: str) -> Instruction:
    predicate, negated, rest = None, False, statement
    if found := _PREDICATE.fullmatch(statement):
        negated, predicate, rest = found[1] == "!", found[2], found[3]
    operation, _, operands = rest.partition(" ")
    return Instruction(operation, tuple(split(operands)), predicate, negated, statement)


def split(operands: str) -> list[str]:
    """Text at commas that stand in no braces or brackets."""
    found, depth, start = [], 0, 0
    for place, character in enumerate(operands):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            found.append(operands[start:place].strip())
            start = place + 1
    last = operands[start:].strip()
    return [*found, last] if last else found
