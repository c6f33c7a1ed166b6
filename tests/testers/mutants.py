"""Mutants: small faults planted into the package one at a time, to see whether the tests notice.

    python -m tests.testers.mutants draw --seed 0 --count 40 --out mutants.json
    python -m tests.testers.mutants run mutants.json --out caught.json      # in a clone of its own: files are changed

A mutant is told by the function it lies in, its line's text and what becomes of it, so that those drawn on one state
of the package can be planted into another, where code has moved.
"""

import argparse
import ast
import importlib
import json
import os
import random
import re
import select
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("diffusers_repr", "pipelines", "schedulers_ext")
KINDS = ("sign", "off-by-one", "dropped dtype", "forgotten restore", "negated condition")
_SWAPPED = {ast.Add: "-", ast.Sub: "+", ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
_WORDS = {ast.Add: "+", ast.Sub: "-", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_WIDENING = ("float", "double")


class _Candidates(ast.NodeVisitor):
    """Places in one file where a fault of one of `KINDS` can be planted: (kind, function, line, column, old, new)."""

    def __init__(self, text: str) -> None:
        self.lines, self.names, self.found = text.splitlines(), [], []
        self.in_final = 0

    def visit_ClassDef(self, node):
        self._named(node, node.body)

    def visit_FunctionDef(self, node):
        self._named(node, node.body)  # neither its annotations nor its defaults

    def _named(self, node, body):
        self.names.append(node.name)
        for statement in body:
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                self.visit(statement)
        self.names.pop()

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node):
        """What an error says is no mathematics."""

    def visit_JoinedStr(self, node):
        """Nor is any other text."""

    def visit_Try(self, node):
        for part in (*node.body, *node.handlers, *node.orelse):
            self.visit(part)
        self.in_final += 1
        for part in node.finalbody:
            self.visit(part)
        self.in_final -= 1

    def visit_Expr(self, node):
        text = ast.unparse(node.value)
        undoes = self.in_final or re.match(r"(\w+\.)*(callback|remove|enter_context|push)\(", text)
        if undoes and isinstance(node.value, ast.Call):
            self._add("forgotten restore", node, self._source(node), "None")
        self.generic_visit(node)

    def visit_If(self, node):
        if node.lineno == node.test.end_lineno:
            self._add("negated condition", node.test, self._source(node.test), f"not ({self._source(node.test)})")
        self.generic_visit(node)

    def visit_BinOp(self, node):
        if type(node.op) in (ast.Add, ast.Sub):
            self._operator("sign", node.left, node.op, node.right)
        self.generic_visit(node)

    def visit_Compare(self, node):
        if len(node.ops) == 1 and type(node.ops[0]) in _SWAPPED:
            self._operator("off-by-one", node.left, node.ops[0], node.comparators[0])
        self.generic_visit(node)

    def visit_Subscript(self, node):
        for part in ast.walk(node.slice):
            if isinstance(part, ast.Constant) and type(part.value) is int:
                self._add("off-by-one", part, self._source(part), str(part.value + 1))
        self.generic_visit(node)

    def visit_Call(self, node):
        function = node.func
        widens = isinstance(function, ast.Attribute) and function.attr in _WIDENING and not node.args
        if widens and node.lineno == node.end_lineno:
            self._add("dropped dtype", node, self._source(node), self._source(function.value))
        self.generic_visit(node)

    def _source(self, node) -> str:
        if node.lineno != node.end_lineno:
            return ""
        raw = self.lines[node.lineno - 1].encode()[node.col_offset : node.end_col_offset]
        return raw.decode()

    def _operator(self, kind, left, operator, right):
        if left.end_lineno != right.lineno:
            return
        line = self.lines[left.end_lineno - 1].encode()
        between = line[left.end_col_offset : right.col_offset].decode()
        if between.strip() == _WORDS[type(operator)]:
            new = between.replace(_WORDS[type(operator)], _SWAPPED[type(operator)])
            self.found.append((kind, ".".join(self.names), left.end_lineno, left.end_col_offset, between, new))

    def _add(self, kind, node, old, new):
        if old and self.names:
            self.found.append((kind, ".".join(self.names), node.lineno, node.col_offset, old, new))


def candidates(root: Path) -> Iterator[dict]:
    for room in ROOMS:
        for file in sorted((root / room).rglob("*.py")):
            text = file.read_text("utf-8")
            visitor = _Candidates(text)
            visitor.visit(ast.parse(text))
            for kind, function, line, column, old, new in visitor.found:
                yield {
                    "kind": kind, "file": file.relative_to(root).as_posix(), "function": function, "line": line,
                    "column": column, "old": old, "new": new, "text": text.splitlines()[line - 1].strip(),
                }  # fmt: skip


def room_of(file: str) -> str:
    parts = Path(file).parts
    return parts[1].removesuffix(".py") if parts[0] == "diffusers_repr" else parts[0]


def draw(root: Path, seed: int, count: int) -> list[dict]:
    """`count` mutants: one of each room, the rest over kinds in turn."""
    drawn, chance = [], random.Random(seed)
    by_room, by_kind = defaultdict(list), defaultdict(list)
    for candidate in candidates(root):
        by_room[room_of(candidate["file"])].append(candidate)
        by_kind[candidate["kind"]].append(candidate)
    drawn += [chance.choice(by_room[room]) for room in sorted(by_room)]
    while len(drawn) < count:
        candidate = chance.choice(by_kind[KINDS[len(drawn) % len(KINDS)]])
        if candidate not in drawn:
            drawn.append(candidate)
    return drawn[:count]


def place(root: Path, mutant: dict) -> tuple[Path, int, int] | None:
    """Where a mutant belongs in this state of the package: its file, or another that has the function and the line."""
    named = mutant["function"].split(".")[-1]
    files = [root / mutant["file"], *(f for room in ROOMS for f in sorted((root / room).rglob("*.py")))]
    for file in files:
        if not file.is_file():
            continue
        text = file.read_text("utf-8")
        if mutant["text"] not in text:
            continue
        visitor = _Candidates(text)
        visitor.visit(ast.parse(text))
        for kind, function, line, column, old, new in visitor.found:
            same = (kind, old, new) == (mutant["kind"], mutant["old"], mutant["new"])
            if same and function.split(".")[-1] == named and text.splitlines()[line - 1].strip() == mutant["text"]:
                return file, line, column
    return None


def mutated(text: str, line: int, column: int, old: str, new: str) -> str:
    lines = text.splitlines(keepends=True)
    raw = lines[line - 1].encode()
    assert raw[column : column + len(old.encode())].decode() == old
    lines[line - 1] = (raw[:column] + new.encode() + raw[column + len(old.encode()) :]).decode()
    return "".join(lines)


def tests_of(root: Path, file: Path, function: str) -> tuple[list[str], list[str]]:
    """Test files that are near (of the room, or naming what the file defines), the nearest first, and all others."""
    room, parts = room_of(file.relative_to(root).as_posix()), set(function.split("."))
    defined = set(re.findall(r"^(?:class|def) ([A-Za-z]\w+)", file.read_text("utf-8"), re.M)) | {file.stem}

    def rank(test: Path) -> tuple[int, int, int]:
        words = set(re.findall(r"\w+", test.read_text("utf-8")))
        return (-len(words & parts), -int(test.parent.name == room), -len(words & defined))

    ranks = {test: rank(test) for test in sorted((root / "tests").rglob("test_*.py"))}
    ordered = [test.relative_to(root).as_posix() for test in sorted(ranks, key=lambda test: (ranks[test], test))]
    near = sum(any(rank) for rank in ranks.values())
    return ordered[:near], ordered[near:]


def run_tests(root: Path, tests: list[str], limit: float) -> tuple[int | None, str]:
    """Exit code (None: no end within `limit` seconds) and output of pytest in a fork of this process.

    What takes long to import is imported by now; the package and its tests are not.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.chdir(root)
        sys.path.insert(0, str(root))
        known = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # of what was imported before
        options = ("-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", *known)
        code = pytest.main([*options, *tests])
        os._exit(int(code))
    os.close(write)
    output, end, ready = b"", time.monotonic() + limit, True
    with os.fdopen(read, "rb", buffering=0) as stream:
        while ready:
            ready = bool(select.select([stream], [], [], max(0.0, end - time.monotonic()))[0])
            chunk = stream.read(1 << 16) if ready else b""
            if ready and not chunk:
                break
            output += chunk
    if not ready:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return (os.waitstatus_to_exitcode(status) if ready else None), output.decode(errors="replace")


def run_one(root: Path, mutant: dict, nearest: int, whole: bool, limit: float) -> dict:
    """Plant a mutant, run tests until one fails, the `nearest` files first, and take it out again."""
    found = place(root, mutant)
    if found is None:
        return {**mutant, "result": "gone"}
    file, line, column = found
    text = file.read_text("utf-8")
    near, far = tests_of(root, file, mutant["function"])
    start = time.monotonic()
    told = {**mutant, "planted": f"{file.relative_to(root).as_posix()}:{line}"}
    try:
        file.write_text(mutated(text, line, column, mutant["old"], mutant["new"]), "utf-8")
        for tests in (near[:6], near[6:nearest], [*near[nearest:], *far] if whole else []):
            code, output = run_tests(root, tests, limit) if tests else (0, "")
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M)
            if code is None:
                return {**told, "result": "undecided", "by": f"no end in {limit:g} s"}
            if code not in (0, 5):
                by = failed[0] if failed else f"exit code {code}"
                return {**told, "result": "caught", "by": by, "seconds": round(time.monotonic() - start)}
    finally:
        file.write_text(text, "utf-8")
    asked = len(near) + len(far) if whole else min(nearest, len(near))
    return {**told, "result": "survived", "by": f"{asked} test files", "seconds": round(time.monotonic() - start)}


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("draw", "run"))
    parser.add_argument("mutants", nargs="?")
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--nearest", type=int, default=24, help="test files to run, the nearest first")
    parser.add_argument("--whole", action="store_true", help="of survivors, run all other tests too")
    parser.add_argument("--limit", type=float, default=300, help="seconds that the tests of one mutant may take")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.what == "draw":
        args.out.write_text(json.dumps(draw(args.root, args.seed, args.count), indent=1) + "\n", "utf-8")
        return
    for name in ("torch", "diffusers", "transformers", "accelerate", "datasets", "peft", "sklearn.linear_model"):
        importlib.import_module(name)
    results = json.loads(args.out.read_text("utf-8")) if args.out.is_file() else []
    for mutant in json.loads(Path(args.mutants).read_text("utf-8"))[len(results) :]:
        results.append(run_one(args.root.resolve(), mutant, args.nearest, args.whole, args.limit))
        args.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        told = results[-1]
        print(
            f"{len(results):3} {told['result']:9} {told['kind']:18} {told['file']}:{told['line']} {told.get('by', '')}"
        )


if __name__ == "__main__":
    main()
