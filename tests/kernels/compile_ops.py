"""Compiles the Triton kernels that an op launches, for a GPU that need not be there.

    python tests/kernels/compile_ops.py ada [--arch 80] [--more | --rows]

The ops run forward and backward on CPU tensors; every launch is specialised by Triton as a real one
would be (an integer that is 1 becomes a constant), is compiled down to machine code, and is not
run. No op looks at what its kernels write. Prints a `Report` as JSON; with --rows its launches are
those that were compiled anew for other numbers of rows than the first. A process of its own,
without TRITON_INTERPRET: the tests beside this file have Triton's interpreter in the place of its
compiler.
Letters: B batch, T tokens, H heads, D width, C channels, R rank, K kept, G groves.
"""

import argparse
import dis
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from triton.runtime.jit import KernelInterface

import kalmagrove_kernels
from kalmagrove_kernels import ada, edge, permute, polynomial, projection
from kalmagrove_kernels.ada import triton as ada_triton
from kalmagrove_kernels.ada.decode import decode_step
from kalmagrove_kernels.edge.triton_linear import edge_topk_linear
from kalmagrove_kernels.projection import stages
from kalmagrove_kernels.projection.tiles import Tile

BF16, FP32 = torch.bfloat16, torch.float32
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory a program may use, by target


class Report(NamedTuple):
    kernels: list[str]  # those of the op's package, launched or not
    # kernel, arguments, integers that may become constants, what was compiled, error
    launches: list[dict[str, Any]]


class Sizes(NamedTuple):
    batch: int
    tokens: int
    heads: int
    width: int
    channels: int
    rank: int
    kept: int
    groves: int


ONE = Sizes(1, 1, 1, 1, 1, 1, 1, 1)
LONE = Sizes(1, 640, 1, 64, 1, 64, 1, 1)  # one of each, of the sizes that models have
EVEN = Sizes(2, 640, 16, 64, 16, 64, 4, 16)  # multiples of 16 where they may be
ODD = Sizes(3, 601, 3, 23, 5, 33, 3, 3)
BRIEF = EVEN._replace(tokens=1)
ROWS = (601, 640, 1024, 4096, 5003)  # as differ between the steps of a training with groves
LARGE = EVEN._replace(heads=2, width=256, rank=256)
BEYOND = EVEN._replace(rank=300)  # more ranks than a tile takes


class Call(NamedTuple):
    """How an op is called. whole: with all that is optional, else with nothing."""

    sizes: Sizes
    dtype: torch.dtype = BF16
    whole: bool = True

    def leaf(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, requires_grad=True)

    def optional(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor | None:
        return self.leaf(*shape, dtype=dtype) if self.whole else None


def differentiate(*outputs: Tensor | None) -> None:
    given = [y for y in outputs if y is not None]
    torch.autograd.backward(given, [torch.ones_like(y) for y in given])


def call_ada(call: Call) -> None:
    b, t, h, d = call.sizes[:4]
    q, k, v = (call.leaf(b, t, h, d) for _ in "qkv")
    documents = torch.zeros(b, t, dtype=torch.int32) if call.whole else None
    decay = call.optional(h, dtype=FP32)
    given: dict[str, Any] = {"log_decay_H": decay, "segments_BT": documents, "backend": "triton"}
    state = call.optional(b, h, d, d, dtype=FP32)
    options = {"state_BHRV": state, "return_state": call.whole}
    differentiate(*ada.attention(q, k, v, scale=0.3, **options, **given))
    differentiate(ada.final_state(k, v, **given))

    taps = call.leaf(h * d, 4) if call.whole or d == 1 else None  # 1 leaves nothing else to do
    rotated = d % 2 == 0
    slots = {"slot_S": torch.arange(h * d), "rank_H": torch.full((h,), d)} if call.whole else {}
    differentiate(
        ada.prepare(
            call.leaf(b, t, h * d), heads=h, width=d, taps_CP=taps, segments_BT=documents,
            silu=call.whole, norm_eps=1e-5 if call.whole else None, backend="triton",
            angles_THr=torch.zeros(t, h if call.whole else 1, d // 2) if rotated else None, **slots,
        )
    )  # fmt: skip
    weight = call.leaf(d, dtype=FP32)
    differentiate(
        ada.norm_gate(call.leaf(b, t, h, d), call.optional(b, t, h, d), weight, backend="triton")
    )
    differentiate(
        ada.norm_gate(call.leaf(b, t, h, d), call.leaf(b, t, h, d), None, backend="triton")
    )
    every = torch.zeros(h * d, 4), torch.zeros(4, h * d).T, torch.zeros(h * d, 1)
    for taps in every if call.whole else (None,):
        before = 0 if taps is None else taps.shape[1] - 1
        decode_step(
            *torch.zeros(2, b, h * d, dtype=call.dtype), torch.zeros(b, h, d, dtype=call.dtype),
            torch.zeros(b, h, d, d), torch.zeros(b, before, h * d, dtype=call.dtype),
            heads=h, width=d, scale=0.3, position=torch.zeros(b if call.whole else 1).long(),
            log_decay_H=None if decay is None else decay.detach(),
            taps_CP=taps, silu=call.whole, norm_eps=1e-5 if call.whole else None,
            rope_theta=1e4 if rotated else None, **slots, backend="triton",
        )  # fmt: skip


def call_edge(call: Call, basis: str = "bspline") -> None:
    s, base = call.sizes, "silu" if call.whole else "none"
    form: dict[str, Any] = {"basis": basis, "degree": 3, "grid": 8, "base": base}
    size = edge.basis.BASES[basis](3, 8).size
    for groves in ((), (s.groves,)):
        coef = call.leaf(*groves, s.channels, size, dtype=FP32)
        scale = call.optional(*groves, s.channels, dtype=FP32)
        group = torch.zeros(s.tokens, dtype=torch.int32) if groves else None
        given = None if call.whole else torch.zeros(s.tokens, s.kept).long()
        kept = edge.edge_topk(
            call.leaf(s.tokens, s.channels), coef, scale, torch.zeros(*groves, 2), s.kept, **form,
            group_N=group, index_NK=given, backend="triton",
        )  # fmt: skip
        differentiate(kept.value_NK)
    x, w = call.leaf(s.tokens, s.width), call.leaf(s.channels, s.width)
    coef, scale = call.leaf(s.channels, size), call.optional(s.channels)
    kept = edge_topk_linear(x, w, coef, scale, torch.zeros(2), s.kept, **form, index_NK=given)
    differentiate(kept.value_NK)


def call_permute(call: Call) -> None:
    index = torch.zeros(call.sizes.tokens, call.sizes.kept)
    for dtype in (torch.int64, torch.int32):
        permute.sort_pairs(index.to(dtype), call.sizes.channels, backend="triton")


def call_projection(call: Call) -> None:
    s = call.sizes
    x, gate = call.leaf(s.tokens, s.width), call.leaf(s.tokens, s.kept, dtype=FP32)
    v, u = (call.leaf(s.channels, s.rank, s.width) for _ in "vu")
    index, start = torch.zeros(s.tokens, s.kept).long(), torch.zeros(s.channels + 1).int()
    silu = {"inner_silu": call.whole}
    differentiate(projection.basis_projection(x, gate, index, v, u, **silu, backend="triton"))
    differentiate(projection.grouped_linear(x, v, start, backend="triton"))
    order = torch.zeros(s.tokens * s.kept).int()
    with torch.no_grad():  # what sums in shared memory begin with, and channels that take turns
        stages.gated(x, gate, v, order, start, **silu)
        stages.rank(x, v, order, start, s.kept, tile=Tile(64, 64, 64, group=8))


def call_polynomial(call: Call, basis: str = "legendre") -> None:
    s, squash = call.sizes, "affine" if call.whole else "tanh"
    size = 5 if basis == "fourier" else 3
    x, coef = call.leaf(s.tokens, s.width), call.leaf(size, s.channels, s.width)
    affine = {"scale_I": call.optional(s.width), "shift_I": call.optional(s.width)}
    bias = call.optional(s.channels)
    form = {"basis": basis, "squash": squash, "backend": "triton"}
    differentiate(polynomial.polynomial(x, coef, bias, **form, **affine))


@triton.jit
def one_as_tensor(out, one):
    tl.store(out, one.to(tl.int64))


def call_fault(call: Call) -> None:
    """What the interpreter runs and the compiler does not: 1 is a constant, without methods."""
    one_as_tensor[(1,)](torch.zeros(1), call.sizes.tokens)


OPS: dict[str, Callable[..., None]] = {
    "ada": call_ada,
    "edge": call_edge,
    "permute": call_permute,
    "polynomial": call_polynomial,
    "projection": call_projection,
    "fault": call_fault,
}


def calls(op: str) -> Iterator[dict[str, Any]]:
    """The fewest that reach every kernel, with integers that are 1 and with others."""
    for sizes in (ONE, LONE, EVEN) if op == "ada" else (ONE, EVEN):
        yield {"call": Call(sizes)}


def more_calls(op: str) -> Iterator[dict[str, Any]]:
    """The rest: awkward and large sizes, fp32 (exact by default), without options, other bases."""
    for sizes in (LONE, ODD, BRIEF, LARGE, BEYOND):
        yield {"call": Call(sizes)}
    for sizes in (ONE, LONE, EVEN, ODD):
        yield {"call": Call(sizes, whole=False)}
        yield {"call": Call(sizes, FP32)}
    for basis in {"edge": edge.basis.BASES, "polynomial": polynomial.BASES}.get(op, ()):
        yield {"call": Call(ODD), "basis": basis}


def kernels_of(op: str) -> list[str]:
    """The Triton functions of the op's package that no other Triton function calls."""
    package = importlib.import_module(f"{kalmagrove_kernels.__name__}.{op}")
    found: dict[int, JITFunction] = {}
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        found |= {id(f): f for f in vars(module).values() if isinstance(f, KernelInterface)}
    called = {
        id(f.fn.__globals__.get(step.argval))
        for f in found.values()
        for step in dis.get_instructions(f.fn)
        if step.opname == "LOAD_GLOBAL"
    }
    own = f"{package.__name__}."
    named = [name_of(f) for key, f in found.items() if key not in called]
    return sorted(name for name in named if name.startswith(own))


def name_of(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"


def shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch.")
    if hasattr(value, "block_shape"):
        return f"tiles of {value.base.dtype} {value.block_shape}".replace("torch.", "")
    return repr(value)


class AbsentGPU:
    """What Triton asks its driver for when it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class Compiled:
    """In the place of a compiled kernel: takes launches."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *values: None


def compile_launches(arch: int, launches: list[dict[str, Any]]) -> None:
    """From now on kernels are compiled for `arch`, noted in `launches` and not run."""
    driver.set_active(AbsentGPU(arch))
    torch.cuda.current_device = lambda: 0
    if arch < 90:
        ada_triton.copied_in_bulk = lambda *_: False  # there is no engine for it
    compile_only = JITFunction.run

    def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Compiled:
        del warmup  # always
        names = (parameter.name for parameter in self.params)
        given = dict(zip(names, arguments, strict=False)) | named
        error = variant = None
        try:
            compiled = compile_only(self, *arguments, grid=grid, warmup=True, **named)
            variant = compiled.hash
            used = compiled.metadata.shared
            if used > SHARED[arch]:
                error = f"{used} bytes of shared memory are more than {SHARED[arch]}"
        except Exception as failure:  # all are told of, not the first alone
            error = f"{type(failure).__name__}: {failure}"
        launches.append(
            {
                "kernel": name_of(self),
                "arguments": ", ".join(f"{name}={shown(given[name])}" for name in given),
                "integers": {
                    parameter.name: given[parameter.name]
                    for parameter in self.params
                    if isinstance(given.get(parameter.name), int)
                    and not (parameter.is_constexpr or parameter.do_not_specialize)
                },
                "variant": variant,
                "error": error,
            }
        )
        return Compiled()

    JITFunction.run = run


def later(op: str, launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Launches that were compiled for another number of rows, not for the first."""
    first, *others = (Call(EVEN._replace(tokens=rows)) for rows in ROWS)
    OPS[op](first)
    known = {launch["variant"] for launch in launches}
    assert launches
    assert None not in known
    for call in others:
        OPS[op](call)
    new = {launch["variant"]: launch for launch in launches if launch["variant"] not in known}
    return list(new.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--arch", type=int, choices=SHARED, default=90)
    parser.add_argument("--more", action="store_true")
    parser.add_argument("--rows", action="store_true")
    words = parser.parse_args()
    report = Report([] if words.op == "fault" else kernels_of(words.op), [])
    compile_launches(words.arch, report.launches)
    if words.rows:
        print(json.dumps(Report(report.kernels, later(words.op, report.launches))._asdict()))
        return
    for options in calls(words.op):
        OPS[words.op](**options)
    if words.more:
        for options in more_calls(words.op):
            OPS[words.op](**options)
        torch.set_float32_matmul_precision("high")
        OPS[words.op](call=Call(EVEN, FP32))
    print(json.dumps(report._asdict()))


if __name__ == "__main__":
    main()
