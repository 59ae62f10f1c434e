"""Executes PTX on a CPU: all threads of a grid in lockstep, each instruction a call or two of NumPy.

It supports the instructions of the kernels' loops, and refuses any other, a branch that threads take differently, and
an access outside an array or against its purpose: inputs are only read, outputs only written. What ptxas does
afterwards is not modelled: it may still contract a product and a sum without an explicit rounding, and its
approximations (`div.full`, `ex2.approx`) are correctly rounded here.
"""

import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

WARP, SECTOR = 32, 32  # threads; the fewest bytes that a GPU's memory moves
WIDEST = 32  # bytes of the widest access
BUFFER_BITS = 40  # an address has an array's number above these bits, and a place in the array in them
FLOAT = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}
TYPES: dict[str, np.dtype] = {"pred": np.dtype(bool)}
TYPES |= {name: np.dtype(of) for name, of in FLOAT.items()}
TYPES |= {f"{kind}{8 * n}": np.dtype(f"{'i' if kind == 's' else 'u'}{n}") for kind in "bus" for n in (1, 2, 4, 8)}

Array = np.ndarray
Execute = Callable[["Machine"], "str | None"]  # returns the label to jump to, if any


class Statement(NamedTuple):
    text: str
    execute: Execute


class Program(NamedTuple):
    statements: list[Statement]
    labels: dict[str, int]  # the statement after each


class Counts(NamedTuple):
    """Totals so far, or of one iteration of the loop; all but `instructions` are sums over warps."""

    instructions: int = 0
    bytes: int = 0  # distinct ones of each request, over all requests
    requests: int = 0
    sectors: int = 0
    touched: int = 0  # bytes that a warp loads or stores for the first time

    def plus(self, *more: int) -> "Counts":
        return Counts(*map(operator.add, self, more))


def parse(text: str) -> Program:
    """The statements of the one kernel in a PTX text."""
    body = re.sub(r"//.*", "", text[text.index("\n{") + 2 : text.rindex("}")])
    body = re.sub(r"^\s*\.(loc|file|pragma)\b.*$", "", body, flags=re.MULTILINE)
    widths: dict[str, np.dtype] = {}
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, body.split(";")):
        while label := re.match(r"([$\w]+):\s*", line):
            labels[label[1]] = len(statements)
            line = line[label.end() :]
        if line.startswith(".reg"):
            _, kind, name = line.split()
            widths[name.partition("<")[0]] = _unsigned(TYPES[kind[1:]])
        elif line:
            statements.append(Statement(line, _decode(line, widths)))
    return Program(statements, labels)


def _unsigned(dtype: np.dtype) -> np.dtype:
    return dtype if dtype.kind == "b" else np.dtype(f"u{dtype.itemsize}")


class Machine:
    """The threads of a grid, and the arrays that they see.

    Registers are kept as bits, unsigned and as wide as they are declared; [n_threads], or [1] if all hold the same.
    """

    def __init__(self, inputs: list[Array], outputs: list[Any], order: list[int], n_blocks: int, block: int):
        self.n_threads = n_blocks * block
        thread = np.arange(self.n_threads)
        self.registers: dict[str, Array] = {"%tid.x": (thread % block).astype("u4")}
        self.registers |= {"%ctaid.x": (thread // block).astype("u4"), "%ntid.x": np.array([block], "u4")}
        self.warp = thread // WARP
        self.order, self.n_inputs = order, len(inputs)  # the order: which array each kernel parameter is
        self.sizes = [x.size * np.dtype(x.dtype).itemsize for x in (*inputs, *outputs)]
        self.memory = [np.zeros(-(-size // WIDEST) * WIDEST, "u1") for size in self.sizes]
        for x, memory in zip(inputs, self.memory, strict=False):
            memory[: x.nbytes] = x.reshape(-1).view("u1")
        self.touched = [np.zeros((self.n_threads // WARP, len(memory)), bool) for memory in self.memory]
        self.counts = Counts()
        self.turns: list[Counts] = []  # at every jump backwards

    def run(self, program: Program) -> None:
        at = 0
        with np.errstate(all="ignore"):
            while at < len(program.statements):
                text, execute = program.statements[at]
                self.counts = self.counts.plus(1, 0, 0, 0, 0)
                try:
                    label = execute(self)
                except (IndexError, ValueError) as error:
                    raise type(error)(f"{text}: {error}") from None
                if label == "ret":
                    return
                at, before = at + 1 if label is None else program.labels[label], at
                if at < before:
                    self.turns.append(self.counts)
        raise ValueError("the kernel does not return")

    def output(self, k: int, like: Any) -> Array:
        """Output k, which must have been written entirely."""
        k += self.n_inputs
        unwritten = np.count_nonzero(~self.touched[k].any(0)[: self.sizes[k]])
        if unwritten:
            raise ValueError(f"{unwritten} of {self.sizes[k]} bytes of output {k - self.n_inputs} are not written")
        return self.memory[k][: self.sizes[k]].view(like.dtype).reshape(like.shape)

    def turn(self) -> Counts:
        """The counts of the last whole iteration of the loop."""
        return Counts(*(b - a for a, b in zip(*self.turns[-2:], strict=True)))

    def place(self, address: Array, size: int, *, written: bool) -> tuple[int, Array]:
        """The array that the threads' addresses are in, and their places in it."""
        address = np.broadcast_to(address.astype("i8"), (self.n_threads,))
        (k, *others), offset = np.unique(address >> BUFFER_BITS), address & ((1 << BUFFER_BITS) - 1)
        if others or not 0 <= k < len(self.sizes) or (offset + size > self.sizes[k]).any():
            raise IndexError("outside of an array")
        if written != (k >= self.n_inputs):
            raise IndexError("a store into an input" if written else "a load from an output")
        if (offset % size).any():
            raise IndexError(f"not aligned to {size} bytes")
        apart = [np.diff(np.sort(offset.reshape(-1, WARP) // n)) != 0 for n in (size, SECTOR)]
        places, sectors = (int(np.count_nonzero(new)) + len(new) for new in apart)
        before = np.count_nonzero(self.touched[k])
        self.touched[k].view(f"V{size}")[self.warp, offset // size] = b"\1" * size
        touched = np.count_nonzero(self.touched[k]) - before
        self.counts = self.counts.plus(0, size * places, len(apart[0]), sectors, touched)
        return int(k), offset


def _operand(text: str, kind: str) -> Callable[[Machine], Array]:
    """Reads a register, a vector of registers or a literal as a type; of a wider register, its low bits."""
    dtype = TYPES[kind]
    bits = _unsigned(dtype)
    if text.startswith("{"):
        parts = text.strip("{}").split(",")
        read = [_operand(part.strip(), f"b{8 * dtype.itemsize // len(parts)}") for part in parts]
        return lambda m: np.stack(np.broadcast_arrays(*(part(m) for part in read)), -1).view(dtype)[:, 0]
    if text.startswith("%"):
        return lambda m: m.registers[text].astype(bits, copy=False).view(dtype)
    if kind == "pred":
        value = np.array([int(text) != 0])
    else:
        number = int(text[2:], 16) if text.startswith("0f") else int(text.rstrip("U"), 0)
        value = np.array([number % (1 << 8 * bits.itemsize)], bits).view(dtype)
    return lambda _: value


def _assign(register: str, widths: dict[str, np.dtype]) -> Callable[[Machine, Array], None]:
    """Writes a register or a vector of registers; narrower values are extended by their sign, if they have one."""
    if register == "_":
        return lambda m, value: None
    if register.startswith("{"):
        parts = [_assign(part.strip(), widths) for part in register.strip("{}").split(",")]

        def assign_parts(m: Machine, value: Array) -> None:
            for n, part in enumerate(value[:, None].view(f"u{value.itemsize // len(parts)}").T):
                parts[n](m, part)

        return assign_parts
    width = widths[register.rstrip("0123456789")]

    def assign(m: Machine, value: Array) -> None:
        if value.dtype.kind != "i":
            value = value.view(_unsigned(value.dtype))
        m.registers[register] = value.astype(width, copy=False)

    return assign


def _flush(x: Array) -> Array:
    """Replaces subnormal numbers by zeros of the same sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def _fma(x: Array, y: Array, z: Array) -> Array:
    """x y + z rounded to odd in float64, so that only the rounding to float32 counts."""
    product, z = x.astype("f8") * y, z.astype("f8")
    total = product + z
    part = total - product
    rest = (product - (total - part)) + (z - part)
    inexact = np.isfinite(total) & (rest != 0)
    bits = total.view("i8") - (inexact & ((rest < 0) != (total < 0)))
    return (bits | inexact).view("f8")


def _down(x: Array) -> Array:
    """Rounded down to float32."""
    y = x.astype("f4")
    return np.where(y > x, np.nextafter(y, np.float32(-np.inf)), y)


def _compare(name: str) -> Callable[[Array, Array], Array]:
    """A comparison that is false if a number is NaN, or true if its name ends in `u`."""
    function = COMPARED[name[:2]]
    unordered = len(name) == 3
    return lambda x, y: np.where(np.isnan(x) | np.isnan(y), unordered, function(x, y)).astype(bool)


def _shift(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """NumPy's shift, which is undefined where PTX clamps."""

    def shift(x: Array, n: Array) -> Array:
        if (n >= 8 * x.dtype.itemsize).any():
            raise ValueError("a shift by more bits than there are")
        return function(x, n.astype(x.dtype))

    return shift


def _permute(x: Array, y: Array, selector: Array) -> Array:
    """Four of the eight bytes of y and x: each digit of the selector picks one or, with 8 added, repeats its sign."""
    both = (y.astype("u8") << np.uint64(32)) | x
    result = np.zeros_like(both)
    for n in range(0, 16, 4):
        digit = selector.astype("u8") >> np.uint64(n)
        byte = both >> np.uint64(8) * (digit & np.uint64(7)) & np.uint64(255)
        byte = np.where(digit & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
        result |= byte << np.uint64(2 * n)
    return result.astype("u4")


def _pair(high: Array, low: Array, dtype: np.dtype) -> Array:
    return np.stack(np.broadcast_arrays(low, high), -1).astype(dtype).view("u4")[:, 0]


def _to_integer(x: Array, dtype: np.dtype) -> Array:
    """Rounded towards zero and clamped to the range of the dtype; NaN becomes 0."""
    info = np.iinfo(dtype)
    return np.clip(np.nan_to_num(np.trunc(x.astype("f8"))), info.min, info.max).astype(dtype)


COMPARED = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
COMPARED |= {"ge": np.greater_equal}
JOINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
F32, INTEGER = "(f32)", "([su](?:16|32|64))"
BITS, WORD = "(b(?:16|32|64))", "([bsuf](?:16|32|64))"
# Instructions whose operands and result are of one type: the opcode, and what it does.
ELEMENTWISE: dict[str, Callable[..., Array]] = {
    rf"(?:add|add\.rn)\.{F32}|add\.{INTEGER}": np.add,
    rf"(?:sub|sub\.rn)\.{F32}|sub\.{INTEGER}": np.subtract,
    rf"(?:mul|mul\.rn)\.{F32}|mul\.lo\.{INTEGER}": np.multiply,
    rf"mad\.lo\.{INTEGER}": lambda x, y, z: x * y + z,
    rf"fma\.rn\.{F32}": lambda x, y, z: _fma(x, y, z).astype("f4"),
    rf"fma\.rm\.{F32}": lambda x, y, z: _down(_fma(x, y, z)),
    rf"div\.(?:full|rn)\.{F32}": np.divide,
    rf"rcp\.(?:approx|rn)\.{F32}": lambda x: np.float32(1) / x,
    rf"sqrt\.rn\.{F32}": np.sqrt,
    rf"ex2\.approx\.ftz\.{F32}": lambda x: _flush(np.exp2(_flush(x).astype("f8")).astype("f4")),
    rf"neg\.(?:{F32}|{INTEGER})": np.negative,
    rf"abs\.{F32}": np.abs,
    rf"copysign\.{F32}": lambda sign, x: np.copysign(x, sign),
    rf"min\.{F32}": np.fmin,
    rf"max\.{F32}": np.fmax,
    rf"min\.(?:NaN\.{F32}|{INTEGER})": np.minimum,
    rf"max\.(?:NaN\.{F32}|{INTEGER})": np.maximum,
    rf"and\.(?:{BITS}|(pred))": np.bitwise_and,
    rf"or\.(?:{BITS}|(pred))": np.bitwise_or,
    rf"xor\.(?:{BITS}|(pred))": np.bitwise_xor,
    rf"not\.(?:{BITS}|(pred))": np.invert,
    rf"mov\.(?:{WORD}|(pred))|cvta\.to\.global\.(u64)": lambda x: x,
}


def _elementwise(opcode: str) -> tuple[Callable[..., Array], str] | None:
    """The function of the instruction, and the type of its operands."""
    for pattern, function in ELEMENTWISE.items():
        if found := re.fullmatch(pattern, opcode):
            return function, next(filter(None, found.groups()))
    return None


def _two_at_once(function: Callable[..., Array]) -> Callable[..., Array]:
    """The function on two float32 in 64 bits, as on Blackwell."""
    return lambda *pairs: np.ascontiguousarray(function(*(x[:, None].view("f4") for x in pairs))).view("u8")[:, 0]


def _decode(text: str, widths: dict[str, np.dtype]) -> Execute:
    predicate, opcode, rest = re.fullmatch(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL).groups()
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)

    def of(pattern: str) -> tuple[str, ...] | None:
        """The groups that matched, if the opcode matches the pattern."""
        found = re.fullmatch(pattern, opcode)
        return None if found is None else tuple(group for group in found.groups() if group is not None)

    def value(function: Callable[..., Array], *kinds: str) -> Execute:
        """Sets the first operand to this function of the others."""
        assign = _assign(operands[0], widths)
        sources = [_operand(source, kind) for source, kind in zip(operands[1:], kinds, strict=True)]
        return lambda m: assign(m, function(*(source(m) for source in sources)))

    if opcode in ("bra", "bra.uni"):
        return _branch(predicate, operands[0])
    if predicate is None:
        if opcode == "ret":
            return lambda m: "ret"
        if opcode in ("bar.sync", "fence.mbarrier_init.release.cluster"):  # in lockstep there is nothing to wait for
            return lambda m: None
        if opcode == "elect.sync":
            return _elect(*operands, widths)
        if opcode == "shfl.sync.idx.b32" and operands[2:] == ["0", "31", "-1"]:
            return value(lambda x, *_: np.repeat(x[::WARP], WARP) if len(x) > 1 else x, *["b32"] * 4)
        if found := _elementwise(opcode):
            return value(found[0], *found[1:] * (len(operands) - 1))
        if opcode.endswith(".f32x2") and (found := _elementwise(opcode.removesuffix("x2"))):
            return value(_two_at_once(found[0]), *["b64"] * (len(operands) - 1))
        if kind := of(rf"shl\.{BITS}"):
            return value(_shift(np.left_shift), *kind, "u32")
        if kind := of(rf"shr\.(?:{BITS}|{INTEGER})"):
            return value(_shift(np.right_shift), *kind, "u32")
        if kind := of(r"mul\.wide\.([su](?:16|32))"):
            return value(lambda x, y: x.astype(f"{x.dtype.kind}{2 * x.itemsize}") * y, *kind * 2)
        if kind := of(rf"selp\.{WORD}"):
            return value(lambda x, y, p: np.where(p, x, y), *kind * 2, "pred")
        if found := of(r"setp\.([lg][te]u?|equ?|neu?)\.(f32)") or of(r"setp\.(eq|ne|[lg][te])\.([bsu]\d+)"):
            return value(_compare(found[0]), *found[1:] * 2)
        if found := of(r"setp\.([lg][te]u?|equ?|neu?)\.(and|or|xor)\.(f32|[bsu]\d+)"):
            compare, join = _compare(found[0]), JOINED[found[1]]
            return value(lambda x, y, p: join(compare(x, y), p), *found[2:] * 2, "pred")
        if opcode == "prmt.b32":
            return value(_permute, *["b32"] * 3)
        if found := of(r"cvt\.rn\.(f16|bf16)x2\.f32"):
            return value(lambda x, y: _pair(x, y, TYPES[found[0]]), "f32", "f32")
        if found := of(r"cvt\.rzi\.([su]\d+)\.(f32)"):
            return value(lambda x: _to_integer(x, TYPES[found[0]]), found[1])
        if found := of(r"cvt\.sat\.(f32)\.f32"):
            return value(lambda x: np.clip(np.nan_to_num(x), 0, 1), *found)
        if found := (
            of(r"cvt\.rn\.(f16|bf16)\.(f32)") or of(r"cvt\.(f32)\.(f16|bf16)")
            or of(r"cvt\.rn\.(f32)\.([su]\d+)") or of(r"cvt\.([su]\d+)\.([su]\d+)")
        ):  # fmt: skip
            return value(lambda x: x.astype(TYPES[found[0]]), found[1])
        if opcode in ("ld.param.u64", "ld.param.b64", "ld.param::entry.b64"):
            return _parameter(operands[0], int(re.findall(r"\d+", operands[1])[-1]), widths)
        if kind := of(r"ld\.global(?:\.v[248])?\.([bsuf]\d+)"):
            return _load(*operands, *kind, widths)
        if kind := of(r"st\.global(?:\.v[248])?\.([bsuf]\d+)"):
            return _store(*operands, *kind)
    raise NotImplementedError(f"PTX: {text}")


def _branch(predicate: str | None, label: str) -> Execute:
    if predicate is None:
        return lambda m: label
    wanted = not predicate.startswith("!")

    def branch(m: Machine) -> str | None:
        taken = m.registers[predicate.lstrip("!")] == wanted
        if taken.any() != taken.all():
            raise ValueError("threads part ways")
        return label if taken.all() else None

    return branch


def _elect(chosen: str, mask: str, widths: dict[str, np.dtype]) -> Execute:
    """Elects one thread of each warp, and says which it is."""
    leader, elected = (_assign(name, widths) for name in chosen.split("|"))

    def elect(m: Machine) -> None:
        leader(m, np.zeros(1, "u4"))
        elected(m, np.arange(m.n_threads) % WARP == 0)

    return elect


def _parameter(register: str, n: int, widths: dict[str, np.dtype]) -> Execute:
    assign = _assign(register, widths)
    return lambda m: assign(m, np.array([m.order[n] << BUFFER_BITS], "u8"))


def _address(text: str) -> Callable[[Machine], Array]:
    register, _, offset = text.strip("[]").partition("+")
    return lambda m: m.registers[register].view("i8") + int(offset or 0)


def _load(registers: str, place: str, kind: str, widths: dict[str, np.dtype]) -> Execute:
    address, dtype = _address(place), TYPES[kind]
    assigned = [_assign(name.strip(), widths) for name in registers.strip("{}").split(",")]

    def load(m: Machine) -> None:
        k, offset = m.place(address(m), dtype.itemsize * len(assigned), written=False)
        memory = m.memory[k].view(dtype)
        for n, assign in enumerate(assigned):
            assign(m, memory[offset // dtype.itemsize + n])

    return load


def _store(place: str, values: str, kind: str) -> Execute:
    address, dtype = _address(place), _unsigned(TYPES[kind])
    stored = [_operand(x.strip(), f"b{8 * dtype.itemsize}") for x in values.strip("{}").split(",")]

    def store(m: Machine) -> None:
        k, offset = m.place(address(m), dtype.itemsize * len(stored), written=True)
        memory = m.memory[k].view(dtype)
        for n, value in enumerate(stored):
            at = offset // dtype.itemsize + n
            memory[at] = value(m)
            if (memory[at] != value(m)).any():
                raise ValueError("two threads store different values in one place")

    return store
