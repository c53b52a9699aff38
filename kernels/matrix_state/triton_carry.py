"""The state from chunk to chunk, S_{c+1} = decay_c S_c + added_c, for every edge: in one level or, where that leaves a GPU idle, in two.

One level walks a state's chunks one after another. Two cut them into spans: every span but the last is walked at once for what it makes of a zero
state and the product of its decays; these make the same recurrence over the spans, which is carried the same way and gives the state that enters
each; from there every span is walked at once, and writes its edges. No product of decays, none above 1, overflows.
"""

# ruff: noqa: RUF005 (Triton does not compile starred tuples)

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.triton_tiles import where_live

GROUP, TILE = 16, 64  # chunks that a program reads ahead, and the numbers of a state that it has

# Each number of the states has the GROUP chunks read ahead of it under way, 64 bytes. An H100 moves 3.35 TB/s, some 0.6 us after it is asked: what
# writes as much as it reads fills it with 1 MiB of reads under way (16,384 numbers), what only reads with 2 MiB. One level moves the states' bytes
# twice, two levels three times, less a span: they are faster where one level has less than two thirds of that MiB under way. So by this count, which
# no GPU has confirmed yet, 4 heads of 32 x 32 over 4,096 chunks take in one level 128 MiB, 40 us at that rate, but 256 groups to wait for, 150 us; in
# two levels of 16 spans 189 MiB, 59 us, and in each of the long walks 16 groups to wait for, 10 us.
IN_FLIGHT = 2**20  # bytes
FEWEST = 1024  # chunks, 64 groups to wait for, 40 us: two more launches cost less even where what one waits for is the launching processor
SHORTEST = 2 * GROUP  # chunks of a span: its end is moved four times, each of its chunks three times


def span(numbers: int, chunks: int) -> int:
    """Chunks of a span, all where one level does; by shapes alone, so that the same call gives the same bits. numbers: of all rows' states."""
    in_flight = 4 * GROUP * numbers
    if chunks < FEWEST or 3 * in_flight >= 2 * IN_FLIGHT:
        return chunks
    spans = 4 * IN_FLIGHT // in_flight  # twice what a walk that only reads needs: some GPUs are faster
    return max(SHORTEST, GROUP * triton.cdiv(chunks, GROUP * spans))


def carry_over(states, decays, backward=False):
    """In place: states (b*h, chunks + 1, dk, dv), what each chunk adds and the state that enters the first (backward: the last), become the states
    at every edge. decays (b*h, chunks[, dk]): what each chunk leaves of the state. The spans' ends are carried by this function again.
    """
    rows, edges, dk, dv = states.shape
    chunks = edges - 1
    length = span(rows * dk * dv, chunks)
    spans = triton.cdiv(chunks, length)
    tiles = rows * triton.cdiv(dk * dv, TILE)
    d_row, d_chunk, d_key = decays.stride() if decays.dim() == 3 else (*decays.stride(), 0)
    sizes = dk * dv, dv, chunks, length, d_row, d_chunk, d_key
    options = {"TILE": TILE, "GROUP": min(GROUP, triton.next_power_of_2(length)), "BACKWARD": backward, "num_warps": 1}
    if spans == 1:
        carry[tiles,](states, decays, states, decays, *sizes, TOTALS=False, **options)
        return
    ends, left = (t.new_empty((rows, spans - 1, *t.shape[2:])) for t in (states, decays))
    carry[tiles * (spans - 1),](states, decays, ends, left, *sizes, TOTALS=True, **options)
    if spans > 2:
        carry_over(ends, left[:, 1:])
    carry[tiles * spans,](states, decays, ends, left, *sizes, TOTALS=False, **options)


@triton.jit
def _group(states, decays, first, stop, chunks, here, size, d_chunk, GROUP: tl.constexpr, BACKWARD: tl.constexpr):
    """What GROUP chunks add, and what they leave of the state, from the first on; from stop on nothing is added and all left."""
    added, kept = (), ()
    for i in tl.static_range(GROUP):
        at = first + i
        there = where_live(here, at < stop)
        if BACKWARD:
            at = chunks - 1 - at
            added = added + (tl.load(states + at * size, mask=there, other=0.0),)
        else:
            added = added + (tl.load(states + (at + 1) * size, mask=there, other=0.0),)
        kept = kept + (tl.load(decays + at * d_chunk, mask=there, other=1.0),)
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
    d_row,
    d_chunk,
    d_key,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    BACKWARD: tl.constexpr,
    TOTALS: tl.constexpr,
):
    """states: the first slot (the last, BACKWARD) holds a state and each other what its chunk adds; becomes the state at every edge.

    A span has `length` chunks, counted as they are walked. ends (rows, spans - 1, size): the state that leaves each span but the last; TOTALS: only
    they are written, each from zero but the first, and left (rows, spans - 1[, dk]), the product of each span's decays; states stay as they are.
    A program has TILE numbers of one state in one span. A chunk is one multiply-add; what it waits for is memory: a group is read while the one
    before is used.
    """
    tiles = tl.cdiv(size, TILE)
    before_last = tl.cdiv(chunks, length) - 1
    walked = before_last if TOTALS else before_last + 1
    program = tl.program_id(0).to(tl.int64)
    number = program // tiles % walked
    row = program // tiles // walked
    place = program % tiles * TILE + tl.arange(0, TILE)
    here = place < size
    key = place // dv * d_key
    states += row * (chunks + 1) * size + place
    decays += row * d_row + key
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
    added, kept = _group(states, decays, begin, stop, chunks, here, size, d_chunk, GROUP, BACKWARD)
    for first in range(begin, stop, GROUP):
        next_added, next_kept = _group(states, decays, first + GROUP, stop, chunks, here, size, d_chunk, GROUP, BACKWARD)
        for i in tl.static_range(GROUP):
            s = kept[i] * s + added[i]
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
        tl.store(left + end * d_chunk + key, product, mask=here & (place == key * dv))  # a key's first lane, or the state's, writes for all
