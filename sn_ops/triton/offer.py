"""What a tile of products leaves behind: the pairs that can matter, in their anchors' buffers; in PTX and in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

# Pairs that one branch guards.
PACK = tl.constexpr(4)


@triton.constexpr_function
def offer_code(pack, capacity):
    """`offer` in PTX, for `pack` pairs at a time: results $0 to $(pack - 1), then as many registers for each argument.

    One branch passes over the pairs if none is kept. The atomics come first, all of them, so that one latency covers
    them; counters and rows of buffers are addresses, which only a kept pair needs to compute with.
    """
    value, limit, dot, candidate, counter, row = (
        [f"${(1 + argument) * pack + pair}" for pair in range(pack)] for argument in range(6)
    )
    pairs = range(pack)
    lines = [
        f".reg .pred any, keep<{pack}>;", f".reg .b32 place<{pack}>;", f".reg .b64 address<{pack}>;",
        *(f"setp.leu.f32 keep{i}, {value[i]}, {limit[i]};" for i in pairs),
        "mov.pred any, keep0;",
        *(f"or.pred any, any, keep{i};" for i in pairs[1:]),
        "@!any bra done;",
        *(f"@keep{i} atom.global.relaxed.gpu.add.u32 place{i}, [{counter[i]}], 1;" for i in pairs),
    ]  # fmt: skip
    for i in pairs:
        lines += [
            f"setp.lt.and.u32 keep{i}, place{i}, {capacity}, keep{i};",
            f"mad.wide.u32 address{i}, place{i}, 8, {row[i]};",
            f"@keep{i} st.global.v2.b32 [address{i}], {{{candidate[i]}, {dot[i]}}};",
        ]
    lines += ["done:", *(f"mov.b32 ${i}, 0;" for i in pairs)]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def offer_registers(pack):
    """The registers of `offer_code`, as LLVM's constraints."""
    return ",".join(["=r"] * pack + ["f"] * (3 * pack) + ["r"] * pack + ["l"] * (2 * pack))


@triton.jit
def offer(value, limit, dot, candidate, row, gCount, gBuffer, CAPACITY: tl.constexpr, PLAIN: tl.constexpr):
    """Pairs [BM, W] that are not above the limit [BM, 1], NaN too, go to their rows of gBuffer, in any order.

    An entry is 64 bits, the candidate's index below the product's bits. Each kept pair counts, and one that finds its
    buffer full is dropped. The compiled code does what the plain one does, on the products as they lie in registers:
    Triton would move them first, and store after a barrier.
    """
    if PLAIN:
        keep = ~(value > limit)
        counter = gCount + tl.broadcast_to(row[:, None], value.shape)
        place = tl.atomic_add(counter, tl.full(value.shape, 1, tl.int32), mask=keep, sem="relaxed")
        entry = (dot.to(tl.int32, bitcast=True).to(tl.int64) << 32) | candidate[None, :].to(tl.int64)
        tl.store(gBuffer + row[:, None] * CAPACITY + place, entry, keep & (place < CAPACITY))
    else:
        tl.inline_asm_elementwise(
            offer_code(PACK, CAPACITY),
            offer_registers(PACK),
            [
                value, limit, dot, candidate[None, :],
                (gCount + row).to(tl.uint64)[:, None], (gBuffer + row * CAPACITY).to(tl.uint64)[:, None],
            ],
            tl.int32,
            is_pure=False,
            pack=PACK,
        )  # fmt: skip
