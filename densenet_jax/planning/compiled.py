"""What a compiler says of its program: memory, work, and where cycles go."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import jax

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

# These move or compute nothing; a '-done' is counted where it started.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(")
_CALLED = re.compile(r"(?:body|to_apply)=%?([\w.-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"([a-z]+(\d*)\w*)\[([\d,]*)\]")

# What JAX puts into the name of an operation besides the modules around it.
_NOT_A_MODULE = re.compile(
    r"|.*[(.].*|[A-Z].*|cond|while|body|branch_\d+_fun|closed_call"
    r"|custom_[jv][vj]p_call.*"
)


@dataclasses.dataclass(frozen=True)
class Program:
    """The figures of a compiled program, for one device.

    The body of a loop is counted once, however often it runs: in FLOPs and
    bytes by XLA, and so in cycles and collectives here.

    Attributes:
      argument_bytes, output_bytes: with the padding of the device's layouts.
      alias_bytes: outputs that take the place of donated arguments.
      temp_bytes: everything else at work, at its peak.
      code_bytes: of the program itself.
      flops: as XLA counts them.
      bytes_accessed: by all operations, as XLA counts them: an update in
        place is charged for the whole of its buffer.
      cycles: the compiler's estimates, summed over the operations that carry
        one; None where none does, as on CPU.
      layer_cycles: the same by layer and pass, the most first (see
        `layer_name`); '(copy)' is one that the compiler put in by itself.
      without_estimate: the number of operations of each kind without one.
      collective_bytes: results of collectives by kind.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    code_bytes: int
    flops: float
    bytes_accessed: float
    cycles: int | None
    layer_cycles: dict[str, int]
    without_estimate: dict[str, int]
    collective_bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Memory that running the program takes."""
        outputs = self.output_bytes - self.alias_bytes
        data = self.argument_bytes + outputs + self.temp_bytes
        return data + self.code_bytes

    @property
    def intensity(self) -> float:
        """FLOPs for each byte accessed."""
        return self.flops / self.bytes_accessed


def read_program(compiled: jax.stages.Compiled) -> Program:
    """Reads the figures of what `jit(...).lower(...).compile()` returns."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    hlo = compiled.as_text()
    cycles = collections.Counter()
    without_estimate = collections.Counter()
    for kind, line in _operations(hlo):
        estimate = _CYCLES.search(line)
        if estimate:
            name = _OP_NAME.search(line)
            name = layer_name(name[1]) if name else f"({kind})"
            cycles[name] += int(estimate[1])
        else:
            without_estimate[kind] += 1
    return Program(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=cost.get("flops", 0.0),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        cycles=cycles.total() if cycles else None,
        layer_cycles=dict(cycles.most_common()),
        without_estimate=dict(without_estimate.most_common()),
        collective_bytes=collective_bytes(hlo),
    )


def layer_name(op_name: str) -> str:
    """Names the layer and the pass of an operation's op_name.

    >>> layer_name("jit(f)/jvp(Net)/block1/denselayer2/conv1/dot_general")
    'block1 conv1, forward'

    The layers of a dense block are taken together; what one makes again for
    its backward pass is 'recomputed'. What a model does between
    its layers has the name of its method, as 'features' or 'head'; what is not
    the model's is the 'loss' where it is differentiated, else 'optimizer and
    metrics'.
    """
    # Of merged operations the first; last comes the primitive.
    op_name = op_name.split(";")[0]
    *scopes, _ = op_name.split("/")
    differentiated = [i for i, s in enumerate(scopes) if "jvp(" in s]
    if differentiated:
        scopes = scopes[differentiated[0] :]
    # A block that recomputes differentiates its layers by itself.
    passes = [scope for scope in scopes if "jvp(" in scope]
    scopes = [
        re.sub(r"(?:transpose\()?jvp\((\w*)\)+", r"\1", scope)
        for scope in scopes
    ]
    layers = [
        scope
        for scope in scopes
        if not _NOT_A_MODULE.fullmatch(scope)
        and not re.fullmatch(r"denselayer\d+", scope)
    ]
    methods = re.findall(r"\w+\.(\w+)", "/".join(scopes))
    if not layers and not methods and not differentiated:
        return "optimizer and metrics"
    which = "forward"
    if "transpose(" in op_name:
        which = "backward" if "transpose(" in passes[-1] else "recomputed"
    return f"{' '.join(layers or methods[-1:] or ['loss'])}, {which}"


def collective_bytes(hlo: str) -> dict[str, int]:
    """Bytes of the results of a program's collectives, by kind.

    Args:
      hlo: the text of a compiled program, for one device.
    """
    total = collections.Counter()
    for line in hlo.splitlines():
        found = _INSTRUCTION.match(line)
        # An asynchronous one has its result where it is done.
        kind = found and found[2].removesuffix("-done")
        if kind in COLLECTIVES:
            total[kind] += _num_bytes(found[1])
    return dict(total)


def _num_bytes(shape: str) -> int:
    """The size of an HLO shape, as 'f32[2,3]{1,0}', or of a tuple of them."""
    total = 0
    for name, bits, dimensions in _ARRAY.findall(shape):
        size = math.prod(int(n) for n in dimensions.split(",") if n)
        total += math.ceil(size * (8 if name == "pred" else int(bits or 0)) / 8)
    return total


def _operations(hlo: str) -> Iterator[tuple[str, str]]:
    """The kind and the line of everything that runs, loops' bodies once."""
    bodies, entry = {}, None
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            lines = bodies[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith(" "):
            lines.append(line)

    def walk(name):
        for line in bodies[name]:
            found = _INSTRUCTION.match(line)
            kind = found and found[2]
            if not kind or kind in _FREE or kind.endswith("-done"):
                continue
            if kind != "call":
                yield kind, line
            if kind in ("call", "while"):
                yield from walk(_CALLED.search(line)[1])

    return walk(entry)
