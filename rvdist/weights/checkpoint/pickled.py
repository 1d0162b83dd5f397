"""Reads a pickle as data: what torch's own pickles say of tensors is built, and nothing is ever imported or called.

A class or a function is a name here, and what would be made by it a record of that name and its arguments; a name that
is not on the reader's list ends it. Bounded in opcodes and in memory, and without recursion. Knows no file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from struct import unpack_from
from typing import Any

_MOST_OPCODES, _DEAREST = 10_000_000, 256 << 20  # steps; bytes that what is built may take
_MOST_DIGITS = 16  # bytes of an integer


@dataclass(slots=True, eq=False)
class Named:
    """A class, a function or a constant, by its dotted name."""

    name: str


@dataclass(slots=True, eq=False)
class Made:
    """What the class or function `of` would have made of `args`, and the state that it would have been given."""

    of: str
    args: Any
    state: Any = None


_MARK = Named("a mark")
_Opcode = Callable[["_Machine"], None]
_OPCODES: dict[int, _Opcode] = {}


def read_pickle(data: bytes, allowed: Collection[str], persistent: bool = False) -> Any:
    """What a pickle says: dicts, lists, tuples, text and numbers, `Named` and `Made`. `allowed` are the names it may
    use; `persistent`: whether it may point to storages, each of which is a `Made` of "storage". Raises ValueError."""
    return _Machine(data, allowed, persistent).run()


def _opcode(code: str) -> Callable[[_Opcode], _Opcode]:
    def register(step: _Opcode) -> _Opcode:
        _OPCODES[ord(code)] = step
        return step

    return register


class _Machine:
    """The stack machine that a pickle is a program of."""

    def __init__(self, data: bytes, allowed: Collection[str], persistent: bool) -> None:
        self.data, self.at = data, 0
        self.allowed, self.persistent = allowed, persistent
        self.stack: list[Any] = []
        self.memo: list[Any] = []  # as picklers number them: one after the other
        self.left = _DEAREST

    def run(self) -> Any:
        data = self.data
        try:
            for _ in range(_MOST_OPCODES):
                code = data[self.at]
                self.at += 1
                if code == 0x2E:  # STOP
                    (value,) = self.stack
                    return value
                _OPCODES[code](self)
        except KeyError as error:
            raise ValueError(f"its pickle has the opcode {error}, which torch's have not") from None
        except (IndexError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"its pickle is damaged at byte {self.at} ({error})") from None
        raise ValueError(f"its pickle has more than {_MOST_OPCODES:,} steps")

    def push(self, value: Any, cost: int = 8) -> None:
        self.left -= cost
        if self.left < 0:
            raise ValueError("what its pickle makes would take too much memory")
        self.stack.append(value)

    def take(self, count: int) -> bytes:
        at = self.at
        self.at += count
        if count < 0 or self.at > len(self.data):
            raise ValueError("its pickle ends too early")
        return self.data[at : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self, size: int) -> None:
        self.push(str(self.take(size), "utf-8", "surrogatepass"), 60 + 4 * size)

    def marked(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        stack = self.stack
        for k in range(len(stack) - 1, -1, -1):
            if stack[k] is _MARK:
                items = stack[k + 1 :]
                del stack[k:]
                return items
        raise ValueError("its pickle lacks a mark")

    def named(self, name: str) -> None:
        if name not in self.allowed:
            raise ValueError(f"its pickle asks for {name[:200]}, which is no part of a tensor; nothing of it was run")
        self.push(Named(name), 100 + 4 * len(name))

    def make(self, of: Any, args: Any) -> None:
        if not isinstance(of, Named) or not isinstance(args, tuple):
            raise ValueError("its pickle calls what is no name")
        if of.name == "collections.OrderedDict" and not args:
            self.push({}, 240)
        elif of.name == "torch.Size" and len(args) == 1 and isinstance(args[0], tuple):
            self.push(args[0])
        else:
            self.push(Made(of.name, args), 80)

    def put_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("its pickle puts items into what is no dictionary")
        self.left -= 50 * len(items)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | Made | None) or (type(key) is int and key.bit_length() > 64):
                raise ValueError("its pickle has a key that is neither text nor a number of 64 bits")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("its pickle appends to what is no list")
        self.left -= 8 * len(items)
        self.stack[-1].extend(items)


@_opcode("\x80")
def _proto(m: _Machine) -> None:
    if m.number(1) > 5:
        raise ValueError("its pickle is of a protocol that is not known")


@_opcode("\x95")
def _frame(m: _Machine) -> None:
    m.take(8)


@_opcode("(")
def _mark(m: _Machine) -> None:
    m.push(_MARK)


def _constant(value: bool | None) -> _Opcode:
    return lambda m: m.push(value)


for _code, _value in (("N", None), ("\x88", True), ("\x89", False)):
    _opcode(_code)(_constant(_value))


@_opcode("K")
def _int1(m: _Machine) -> None:
    m.push(m.number(1))


@_opcode("M")
def _int2(m: _Machine) -> None:
    m.push(m.number(2), 40)


@_opcode("J")
def _int4(m: _Machine) -> None:
    m.push(int.from_bytes(m.take(4), "little", signed=True), 40)


@_opcode("\x8a")
def _long(m: _Machine) -> None:
    size = m.number(1)
    if size > _MOST_DIGITS:
        raise ValueError(f"its pickle has an integer of {size} bytes")
    m.push(int.from_bytes(m.take(size), "little", signed=True), 48)


@_opcode("G")
def _float(m: _Machine) -> None:
    m.push(unpack_from(">d", m.take(8))[0], 32)


@_opcode("X")
def _text4(m: _Machine) -> None:
    m.text(m.number(4))


@_opcode("\x8c")
def _text1(m: _Machine) -> None:
    m.text(m.number(1))


@_opcode("}")
def _dict(m: _Machine) -> None:
    m.push({}, 240)


@_opcode("]")
def _list(m: _Machine) -> None:
    m.push([], 100)


@_opcode(")")
def _tuple0(m: _Machine) -> None:
    m.push(())


@_opcode("t")
def _tuple(m: _Machine) -> None:
    items = tuple(m.marked())
    m.push(items, 56 + 8 * len(items))


def _tuple_of(count: int) -> _Opcode:
    def step(m: _Machine) -> None:
        items = tuple(m.stack[-count:])
        if len(items) < count or _MARK in items:
            raise ValueError("its pickle makes a tuple of too little")
        del m.stack[-count:]
        m.push(items, 80)

    return step


for _code, _count in (("\x85", 1), ("\x86", 2), ("\x87", 3)):
    _opcode(_code)(_tuple_of(_count))


@_opcode("a")
def _append(m: _Machine) -> None:
    m.append([m.stack.pop()])


@_opcode("e")
def _appends(m: _Machine) -> None:
    m.append(m.marked())


@_opcode("s")
def _item(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.put_items([key, value])


@_opcode("u")
def _items(m: _Machine) -> None:
    m.put_items(m.marked())


@_opcode("c")
def _global(m: _Machine) -> None:
    lines = []
    for _ in range(2):
        end = m.data.index(b"\n", m.at, m.at + 500)
        lines.append(str(m.take(end - m.at), "utf-8"))
        m.at += 1
    m.named(".".join(lines))


@_opcode("\x93")
def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.named(f"{module}.{name}" if isinstance(name, str) and isinstance(module, str) else "what is no name")


@_opcode("R")
def _reduce(m: _Machine) -> None:
    args, of = m.stack.pop(), m.stack.pop()
    m.make(of, args)


@_opcode("\x81")
def _new(m: _Machine) -> None:
    args, of = m.stack.pop(), m.stack.pop()
    m.make(of, args)


@_opcode("b")
def _build(m: _Machine) -> None:
    state, target = m.stack.pop(), m.stack[-1]
    if isinstance(target, Made):
        target.state = state
    elif type(target) is not dict:  # of one it is what an ordered dictionary has for attributes
        raise ValueError("its pickle gives a state to what has none")


@_opcode("Q")
def _persistent(m: _Machine) -> None:
    if not m.persistent:
        raise ValueError("its pickle points to storages")
    m.push(Made("storage", m.stack.pop()), 80)


def _put(m: _Machine, index: int) -> None:
    if index != len(m.memo):
        raise ValueError("its pickle numbers what it remembers otherwise than torch's do")
    m.left -= 10
    m.memo.append(m.stack[-1])


@_opcode("q")
def _put1(m: _Machine) -> None:
    _put(m, m.number(1))


@_opcode("r")
def _put4(m: _Machine) -> None:
    _put(m, m.number(4))


@_opcode("\x94")
def _memoize(m: _Machine) -> None:
    _put(m, len(m.memo))


@_opcode("h")
def _get1(m: _Machine) -> None:
    m.push(m.memo[m.number(1)])


@_opcode("j")
def _get4(m: _Machine) -> None:
    m.push(m.memo[m.number(4)])
