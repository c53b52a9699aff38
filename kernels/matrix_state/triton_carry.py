"""The state from chunk to chunk, S_{c+1} = decay_c S_c + added_c, at every edge: in one level, or in two where one would leave a GPU idle.

One level walks a state's chunks one after another. Two levels cut them into spans:

    1. All spans but the last are walked in parallel, each from a zero state: that gives its end state and the product of its decays.
    2. These form the same recurrence over the spans. Carried in the same manner, it gives the state that enters each span.
    3. All spans are walked in parallel from there, and write the states at their chunks' edges.

No decay is above 1, so no product of decays overflows.
"""

# ruff: noqa: RUF005 (Triton does not compile starred tuples)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medssm.kernels.triton import strided
from medssm.kernels.triton_tiles import where_live

GROUP, TILE = 16, 64  # chunks that a program reads ahead, and numbers of a state that a program has

# For each number of a state, GROUP chunks are being read ahead: 64 bytes in flight. An H100 moves 3.35 TB/s with a latency of some 0.6 us. A kernel
# that writes as much as it reads needs 1 MiB of reads in flight (16,384 numbers) to reach that rate, a kernel that only reads needs 2 MiB. One level
# moves the states' bytes twice, two levels three times, less a span. So two levels are faster where one level has less than two thirds of 1 MiB in
# flight. An example by this count, which no GPU has confirmed yet: 4 heads of 32 x 32 over 4,096 chunks. One level moves 128 MiB, 40 us at the full
# rate, but waits for 256 groups, 150 us. Two levels of 16 spans move 189 MiB, 59 us, and each long walk waits for 16 groups, 10 us.
IN_FLIGHT = 2**20  # bytes
FEWEST = 1024  # chunks, 64 groups, 40 us of waiting: two more launches cost less than that even where the launching processor is the bottleneck
SHORTEST = 2 * GROUP  # chunks of a span: its end is moved four times, each of its chunks three times


def span(numbers: int, chunks: int) -> int:
    """Chunks of a span; all chunks where one level is enough. Shapes alone decide, so the same call gives the same bits. numbers: of all states."""
    in_flight = 4 * GROUP * numbers
    if chunks < FEWEST or 3 * in_flight >= 2 * IN_FLIGHT:
        return chunks
    spans = 4 * IN_FLIGHT // in_flight  # twice what a walk that only reads needs: some GPUs are faster
    return max(SHORTEST, GROUP * triton.cdiv(chunks, GROUP * spans))


def carry_over(states: torch.Tensor, decays: torch.Tensor, backward: bool = False) -> None:
    """In place: states (b*h, chunks + 1, dk, dv) become the states at every edge.

    Before, they are what each chunk adds, and the state that enters the first chunk (backward: the last). decays (b*h, chunks[, dk]): the factor by
    which each chunk multiplies the state. The ends of spans are carried by this function again.
    """
    rows, edges, dk, dv = states.shape
    chunks = edges - 1
    length = span(rows * dk * dv, chunks)
    spans = triton.cdiv(chunks, length)
    tiles = rows * triton.cdiv(dk * dv, TILE)
    shared = {
        "states": states,
        **strided(("row", "chunk", "key"), decays, decays=decays if decays.dim() == 3 else decays.unsqueeze(2).expand(-1, -1, dk)),
        "size": dk * dv,
        "dv": dv,
        "chunks": chunks,
        "length": length,
        "TILE": TILE,
        "GROUP": min(GROUP, triton.next_power_of_2(length)),
        "BACKWARD": backward,
        "num_warps": 1,
    }
    if spans == 1:
        carry[tiles,](ends=states, left=decays, TOTALS=False, **shared)
        return
    ends, left = (t.new_empty((rows, spans - 1, *t.shape[2:])) for t in (states, decays))
    carry[tiles * (spans - 1),](ends=ends, left=left, TOTALS=True, **shared)
    if spans > 2:
        carry_over(ends, left[:, 1:])
    carry[tiles * spans,](ends=ends, left=left, TOTALS=False, **shared)


@triton.jit
def _group(states, decays, first, stop, chunks, here, size, decays_chunk, GROUP: tl.constexpr, BACKWARD: tl.constexpr):
    """What GROUP chunks from the first on add to the state, and their decays; from `stop` on 0 and 1."""
    added, kept = (), ()
    for i in tl.static_range(GROUP):
        at = first + i
        there = where_live(here, at < stop)
        if BACKWARD:
            at = chunks - 1 - at
            added = added + (tl.load(states + at * size, mask=there, other=0.0),)
        else:
            added = added + (tl.load(states + (at + 1) * size, mask=there, other=0.0),)
        kept = kept + (tl.load(decays + at * decays_chunk, mask=there, other=1.0),)
    return added, kept


@triton.jit
def carry(
    states,
    decays,
    ends,
    left,
    size,
    dv,
    chunks,
    length,
    decays_row,
    decays_chunk,
    decays_key,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    BACKWARD: tl.constexpr,
    TOTALS: tl.constexpr,
):
    """states: one slot holds the state that enters (the first slot; BACKWARD: the last), each other slot what its chunk adds. Each becomes the state
    at its edge.

    A span has `length` chunks, counted as they are walked. ends (rows, spans - 1, size): the state that leaves each span but the last. TOTALS writes
    only these, from a zero state except in the first span, and left (rows, spans - 1[, dk]), the product of each span's decays.
    A program has TILE numbers of one state in one span. A chunk is one multiply-add, so the time is that of memory: each group of chunks is read
    while the group before it is used.
    """
    tiles = tl.cdiv(size, TILE)
    before_last = tl.cdiv(chunks, length) - 1
    walked = before_last if TOTALS else before_last + 1
    program = tl.program_id(0).to(tl.int64)
    number = program // tiles % walked
    row = program // tiles // walked
    place = program % tiles * TILE + tl.arange(0, TILE)
    here = place < size
    key = place // dv * decays_key
    states += row * (chunks + 1) * size + place
    decays += row * decays_row + key
    end = row * before_last + number
    begin = number * length
    stop = tl.minimum(begin + length, chunks)
    entry = states
    if BACKWARD:
        entry += tl.cast(chunks, tl.int64) * size
    s = tl.load(entry, mask=where_live(here, number == 0), other=0.0)
    if not TOTALS:
        s += tl.load(ends + (end - 1) * size + place, mask=where_live(here, number > 0), other=0.0)
    product = tl.full((TILE,), 1.0, tl.float32)
    added, kept = _group(states, decays, begin, stop, chunks, here, size, decays_chunk, GROUP, BACKWARD)
    for first in range(begin, stop, GROUP):
        next_added, next_kept = _group(states, decays, first + GROUP, stop, chunks, here, size, decays_chunk, GROUP, BACKWARD)
        for i in tl.static_range(GROUP):
            s = tl.where(kept[i] == 0.0, 0.0, kept[i] * s) + added[i]  # nothing is left, not even of infinity
            if TOTALS:
                product *= kept[i]
            else:
                at = first + i
                there = where_live(here, at < stop)
                if BACKWARD:
                    tl.store(states + (chunks - 1 - at) * size, s, mask=there)
                else:
                    tl.store(states + (at + 1) * size, s, mask=there)
        added, kept = next_added, next_kept
    if TOTALS:
        tl.store(ends + end * size + place, s, mask=here)
        tl.store(left + end * decays_chunk + key, product, mask=here & (place == key * dv))  # a key's first lane, or the state's, writes for all
