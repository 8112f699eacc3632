// Copies and codecs of the GPU tier: blocks wherever an engine keeps them to encoded payloads, and back.
//
//     row of (block b, plane p, head h, token t), `dim` values side by side:
//     plane[p].base + offset[b * runs + t / run_tokens] + h * head_stride + t % run_tokens * token_stride
//                                          │ kv_encode                      ▲ kv_decode
//                                          ▼                                │
//     coded[b] + plane[p].at:   | scales bf16 | bases | codes |   each part padded to 64 bytes with zeros
//
// A block is encoded exactly as rust/codec/plane.rs does it, so an encoded payload is the same bytes in every tier, by
// the arithmetic of rust/codec/scalar.rs, so it is the same numbers. Least and greatest of a group are found on the
// bits of values, as integers in total order: whoever comes first, the outcome is the same. A plane with a NaN, an
// infinity or values that no scale fits sets a bit in its block's status; what is in the payload then means nothing.
//
// Values are fp16 or bf16, planes are raw or have codes of 8 bits; fp32 and codes of 4 bits stay with the CPU. Rows
// begin at multiples of 16 bytes and are a multiple of 16 bytes long, payloads begin at multiples of 64: the host asks
// for nothing else. A value is read twice at most, by neighbouring threads from neighbouring addresses, 16 bytes each;
// only groups of channels that are no multiple of eight are read value by value. A block of a launch has a multiple of
// 32 threads, up to KV_THREADS; a grid may have any size.
#include "kv_compat.h"

#define KV_THREADS 256
// Blocks that a multiprocessor has room for at once: what they may take of its registers.
#define KV_RESIDENT 3

// A contiguous piece and where it goes.
struct kv_pair {
    u64 from, to;
};

enum { KV_FP16 = 2, KV_BF16 = 3 };
enum { KV_RAW = 0, KV_S8 = 1, KV_U8 = 2 };
enum { KV_TENSOR = 0, KV_HEAD = 1, KV_TOKEN = 2, KV_CHANNEL = 3 };
// In the status of a block: a plane of it cannot be encoded.
enum { KV_UNFIT = 1 };

// Where a plane's rows lie, where it goes in a payload, and how.
struct kv_plane {
    u64 base, head_stride, token_stride;
    u32 at;
    u8 coding, by;
    u16 unused;
    // Channels or tokens that share a scale; 0: all.
    u32 group;
    // Least and greatest values are cut to this magnitude; +inf: they are not.
    float bound;
};

// What a launch works on; the first four are addresses of tables.
struct kv_work {
    // kv_plane of each plane.
    u64 plane;
    // u64 of each run of tokens of each block.
    u64 offset;
    // u64 of each block: where its payload begins.
    u64 coded;
    // u32 of each block, to which a bit is added; kv_decode has none. 0: payloads are plain, and no plane is padded.
    u64 status;
    u32 blocks, planes, heads, tokens, dim, dtype;
    // A block's tokens lie in so many runs, of so many tokens each.
    u32 runs, run_tokens;
};

static_assert(sizeof(kv_pair) == 16 && sizeof(kv_plane) == 40 && sizeof(kv_work) == 64, "as hosts pack them");

#if defined(KV_DEVICE)

// Vectors that a warp moves at a time: four for each thread.
#define KV_PART 128
// Vectors of a row whose channels' parameters stand in shared memory at once, and groups of channels.
#define KV_COLUMNS 128
#define KV_GROUPS 1024

// Copies n pieces of so many 16-byte vectors each. Warps share them by parts, so that one large piece has many.
extern "C" __global__ void __launch_bounds__(KV_THREADS, KV_RESIDENT)
kv_copy(const kv_pair* pairs, u32 n, u32 vectors) {
    const u32 lane = threadIdx.x % 32, parts = (vectors + KV_PART - 1) / KV_PART;
    if (parts == 0) return;
    const u32 warps = gridDim.x * (blockDim.x / 32), first = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    u32 piece = first / parts, part = first % parts;
    while (piece < n) {
        const u64 pair = (u64)pairs + piece * (u64)sizeof(kv_pair);
        const u32 at = part * KV_PART + lane;
        const u64 from = kv_table8(pair) + 16ull * at, to = kv_table8(pair + 8) + 16ull * at;
        if (at + 96 < vectors) {
            const kv_v4 a = kv_ld16(from), b = kv_ld16(from + 512), c = kv_ld16(from + 1024), d = kv_ld16(from + 1536);
            kv_st16(to, a);
            kv_st16(to + 512, b);
            kv_st16(to + 1024, c);
            kv_st16(to + 1536, d);
        } else {
#pragma unroll 1
            for (u32 i = 0; at + i < vectors && i < KV_PART; i += 32)
                kv_st16(to + 16ull * i, kv_ld16(from + 16ull * i));
        }
        piece += warps / parts;
        part += warps % parts;
        if (part >= parts) {
            part -= parts;
            piece += 1;
        }
    }
}

// Division by a number that stays the same, as a multiplication: exact while dividend * divisor < 2^32.
struct kv_divisor {
    u32 number, inverse;

    __device__ u32 of(u32 n) const { return inverse != 0 ? (u32)((u64)n * inverse >> 32) : n; }
};

KV_INLINE kv_divisor kv_by(u32 number) {
    // 2^32 / number, rounded up; that of 1 does not fit, and is 0.
    const kv_divisor by = {number, ~0u / number + 1};
    return by;
}

// One plane of one block, and this thread's place in it: threads are a grid over rows and the vectors of a row.
struct kv_item {
    u64 base, head_stride, token_stride, offsets, scales, bases, codes;
    u32 coding, by, dim, dtype, rows, vectors;
    // Rows that follow one another and share their groups, but for those of tokens; how many such there are; groups of
    // a row; of all.
    u32 tile_rows, tiles, parts, groups;
    // Channels or tokens of a group, and channels of a row that share it.
    u32 group;
    kv_divisor together, tokens, run_tokens;
    float bound;
    // The least and the greatest code.
    float low, high;
    // This thread's vector and row, and the next that are its own; a thread that has none has no row.
    u32 column, row, columns, next_row;

    __device__ u64 at(u32 row) const {
        const u32 head = tokens.of(row), token = row - head * tokens.number;
        const u32 run = run_tokens.of(token), within = token - run * run_tokens.number;
        return base + kv_table8(offsets + 8ull * run) + head * head_stride + within * token_stride;
    }
    __device__ kv_v4 read(u32 row, u32 column) const { return kv_ld16(at(row) + 16ull * column); }
};

KV_INLINE u32 kv_padded(u32 bytes) { return (bytes + 63) / 64 * 64; }

KV_INLINE kv_item kv_open(const kv_work& work, u32 n) {
    kv_item item;
    const u32 block = n / work.planes;
    const u64 plane = work.plane + n % work.planes * (u64)sizeof(kv_plane);
    item.base = kv_table8(plane);
    item.head_stride = kv_table8(plane + 8);
    item.token_stride = kv_table8(plane + 16);
    const u64 how = kv_table8(plane + 24), more = kv_table8(plane + 32);
    item.offsets = work.offset + 8ull * block * work.runs;
    item.coding = (u32)(how >> 32) & 0xff;
    item.by = (u32)(how >> 40) & 0xff;
    item.bound = kv_float((u32)(more >> 32));
    item.low = item.coding == KV_S8 ? -127.0f : 0.0f;
    item.high = item.coding == KV_S8 ? 127.0f : 255.0f;
    item.dim = work.dim;
    item.dtype = work.dtype;
    item.rows = work.heads * work.tokens;
    item.vectors = work.dim / 8;
    item.group = (u32)more;
    if (item.group == 0) item.group = item.by == KV_TOKEN ? work.dim : work.tokens;
    item.together = kv_by(item.by == KV_TOKEN ? item.group : item.by == KV_CHANNEL ? 1 : work.dim);
    item.tokens = kv_by(work.tokens);
    item.run_tokens = kv_by(work.run_tokens);
    item.tile_rows = item.by == KV_CHANNEL ? item.group : item.by == KV_HEAD ? work.tokens : item.rows;
    item.tiles = item.rows / item.tile_rows;
    item.parts = item.together.of(work.dim - 1) + 1;
    item.groups = (item.by == KV_TOKEN ? item.rows : item.tiles) * item.parts;
    const u32 part = kv_padded(2 * item.groups);
    item.scales = kv_table8(work.coded + 8ull * block) + (u32)how;
    item.bases = item.scales + (item.coding == KV_RAW ? 0 : part);
    item.codes = item.bases + (item.coding == KV_U8 ? part : 0);
    item.columns = item.vectors < blockDim.x ? item.vectors : blockDim.x;
    if (item.columns > KV_COLUMNS) item.columns = KV_COLUMNS;
    item.next_row = blockDim.x / item.columns;
    item.row = threadIdx.x / item.columns;
    item.column = threadIdx.x - item.row * item.columns;
    if (item.row >= item.next_row) item.row = ~0u;
    return item;
}

// Gives `each` this thread's rows of n, with what `read` finds there; the next is on its way meanwhile.
template <class Read, class Each> KV_INLINE void kv_rows(const kv_item& item, u32 n, Read read, Each each) {
    decltype(read(0u)) now = {}, next = {};
    u32 row = item.row;
#pragma unroll 1
    for (bool some = false;; some = true) {
        const bool more = row < n;
        if (more) next = read(row);
        if (some) each(row - item.next_row, now);
        if (!more) return;
        now = next;
        row += item.next_row;
    }
}

// Four rows at a time: what is copied needs no room for anything else.
template <class Read, class Each> KV_INLINE void kv_fours(const kv_item& item, Read read, Each each) {
#pragma unroll 1
    for (u32 row = item.row; row < item.rows; row += 4 * item.next_row) {
        kv_v4 v[4];
#pragma unroll
        for (u32 k = 0; k < 4; ++k)
            if (row + k * item.next_row < item.rows) v[k] = read(row + k * item.next_row);
#pragma unroll
        for (u32 k = 0; k < 4; ++k)
            if (row + k * item.next_row < item.rows) each(row + k * item.next_row, v[k]);
    }
}

// Two values of 16 bits as unsigned numbers in total order: the lesser value is the lesser number, -0 less than 0, and
// NaNs are beyond the infinities of their sign.
KV_INLINE u32 kv_ordered(u32 two) { return two ^ (kv_bytes(two, 0, 0xbb99) | 0x80008000u); }

// Least and greatest number, in the upper 16 bits; what is below does not count.
struct kv_span {
    u32 lo, hi;

    __device__ void add(u32 number) {
        lo = number < lo ? number : lo;
        hi = number > hi ? number : hi;
    }
    __device__ void add(kv_v4 v) {
        const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (u32 k = 0; k < 4; ++k) {
            const u32 two = kv_ordered(words[k]);
            add(two);
            add(two << 16);
        }
    }
    __device__ void add(kv_span other) {
        lo = other.lo < lo ? other.lo : lo;
        hi = other.hi > hi ? other.hi : hi;
    }
    // With those of so many neighbouring threads, a power of two: of whole warps all threads come here.
    __device__ void join(u32 threads) {
#pragma unroll 1
        for (u32 distance = threads / 2; distance != 0; distance /= 2) {
            kv_span other;
            other.lo = kv_other(lo, distance);
            other.hi = kv_other(hi, distance);
            add(other);
        }
    }
};

KV_INLINE kv_span kv_nothing() {
    kv_span span;
    span.lo = ~0u;
    span.hi = 0;
    return span;
}

KV_INLINE float kv_value(u32 dtype, u32 bits) { return dtype == KV_FP16 ? kv_of_half(bits) : kv_float(bits << 16); }

KV_INLINE bool kv_finite(float v) { return (kv_bits(v) & 0x7f800000u) != 0x7f800000u; }

// What a group is encoded with, in binary32 and as it is stored.
struct kv_scale {
    float inverse, least;
    u32 scale, base;
    bool fit;
};

// As `parameters` of scalar.rs, and what plane.rs cuts before it.
KV_INLINE kv_scale kv_parameters(const kv_item& item, kv_span span) {
    const float infinity = kv_float(0x7f800000u);
    const u32 low = span.lo >> 16, high = span.hi >> 16;
    // Back to the values' bits.
    const u32 lo_bits = low ^ (low & 0x8000 ? 0x8000 : 0xffff), hi_bits = high ^ (high & 0x8000 ? 0x8000 : 0xffff);
    float lo = kv_value(item.dtype, lo_bits), hi = kv_value(item.dtype, hi_bits);
    if (item.coding == KV_S8) {
        const u32 a = lo_bits & 0x7fff, b = hi_bits & 0x7fff;
        hi = kv_value(item.dtype, a > b ? a : b);
        lo = 0.0f;
    }
    kv_scale out;
    out.fit = item.bound == item.bound;
    if (item.bound < infinity) {
        // What is not finite is no value to cut.
        out.fit = kv_finite(lo) && kv_finite(hi);
        lo = kv_least(kv_most(lo, -item.bound), item.bound);
        hi = kv_least(kv_most(hi, -item.bound), item.bound);
    }
    const float largest = item.dtype == KV_FP16 ? 64000.0f : 1e38f;
    // 2^-110
    const float smallest = kv_float((127 - 110) << 23);
    const float spread = kv_sub(hi, lo);
    const u32 up = (kv_bits(kv_div(spread, item.high)) + 0xffff) & 0xffff0000u;
    const bool some = spread > 0.0f;
    out.inverse = some ? kv_div(1.0f, kv_float(up)) : 0.0f;
    out.least = lo;
    out.scale = some ? up >> 16 : 0;
    out.base = (item.dtype == KV_FP16 ? kv_to_halves(lo, lo) : kv_to_bf16s(lo, lo)) & 0xffff;
    // Written so that a NaN does not fit.
    out.fit = out.fit && lo >= -largest && hi <= largest && (spread == 0.0f || spread >= smallest);
    return out;
}

// A value's code in the lowest byte. Adding 1.5 * 2^23 rounds to the nearest integer, ties to even; of a NaN, which is
// infinity times 0, stays the least code.
KV_INLINE u32 kv_code(const kv_item& item, float value, float inverse, float least) {
    const float code = kv_mul(kv_sub(value, least), inverse);
    return kv_bits(kv_add(kv_least(kv_most(code, item.low), item.high), 12582912.0f));
}

// Codes of eight values to where they belong; `inverse` and `least` are asked for those of each.
template <class Inverse, class Least>
KV_INLINE void kv_put(const kv_item& item, u64 to, kv_v4 v, Inverse inverse, Least least) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    float values[8];
    // The same for all threads.
    if (kv_opaque(item.dtype) == KV_FP16) {
#pragma unroll
        for (u32 k = 0; k < 8; ++k) values[k] = kv_of_half(words[k / 2] >> k % 2 * 16 & 0xffff);
    } else {
#pragma unroll
        for (u32 k = 0; k < 8; ++k) values[k] = kv_float(k % 2 ? words[k / 2] & 0xffff0000u : words[k / 2] << 16);
    }
    u32 codes[8];
#pragma unroll
    for (u32 k = 0; k < 8; ++k) codes[k] = kv_code(item, values[k], inverse(k), least(k));
    const u32 a = kv_bytes(codes[0], codes[1], 0x0040), b = kv_bytes(codes[2], codes[3], 0x0040);
    const u32 c = kv_bytes(codes[4], codes[5], 0x0040), d = kv_bytes(codes[6], codes[7], 0x0040);
    kv_st8(to, kv_bytes(a, b, 0x5410), kv_bytes(c, d, 0x5410));
}

KV_INLINE void kv_put(const kv_item& item, u64 to, kv_v4 v, const kv_scale& scale) {
    kv_put(item, to, v, [&](u32) { return scale.inverse; }, [&](u32) { return scale.least; });
}

KV_INLINE void kv_note(const kv_item& item, u32 group, u32 scale, u32 base) {
    kv_st2(item.scales + 2ull * group, scale);
    if (item.coding == KV_U8) kv_st2(item.bases + 2ull * group, base);
}

// Zeros from the end of a part to where the next begins.
KV_INLINE void kv_pad(u64 part, u32 bytes) {
#pragma unroll 1
    for (u32 at = bytes + 2 * threadIdx.x; at < kv_padded(bytes); at += 2 * blockDim.x) kv_st2(part + at, 0);
}

// Shared memory of kv_encode: what each of the three ways to share a scale needs of it.
union kv_shared {
    struct {
        // Of each thread's rows, two channels a word; then of each channel, the channel within its vector first.
        u32 lo[4 * KV_THREADS], hi[4 * KV_THREADS];
        float inverse[8 * KV_COLUMNS], least[8 * KV_COLUMNS];
    } channels;
    struct {
        u32 scale[KV_GROUPS], base[KV_GROUPS];
    } groups;
    // Of each warp.
    kv_span warps[KV_THREADS / 32];
};

// A scale for a head or for all of a plane: everybody's least and greatest, then everybody's codes.
KV_INLINE bool kv_encode_whole(const kv_item& item, kv_shared& shared) {
    const u32 tiles = item.tiles, n = item.tile_rows;
    bool fit = true;
#pragma unroll 1
    for (u32 tile = 0; tile < tiles; ++tile) {
        kv_span span = kv_nothing();
#pragma unroll 1
        for (u32 column = item.column; column < item.vectors; column += item.columns)
            kv_rows(item, n, [&](u32 row) { return item.read(tile * n + row, column); },
                    [&](u32, kv_v4 v) { span.add(v); });
        span.join(32);
        if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = span;
        __syncthreads();
#pragma unroll 1
        for (u32 warp = 0; warp < blockDim.x / 32; ++warp) span.add(shared.warps[warp]);
        const kv_scale scale = kv_parameters(item, span);
        fit = fit && scale.fit;
        if (threadIdx.x == 0) kv_note(item, tile, scale.scale, scale.base);
#pragma unroll 1
        for (u32 column = item.column; column < item.vectors; column += item.columns)
            kv_rows(item, n, [&](u32 row) { return item.read(tile * n + row, column); }, [&](u32 row, kv_v4 v) {
                kv_put(item, item.codes + 8ull * ((tile * n + row) * item.vectors + column), v, scale);
            });
        // The next tile writes what this one reads.
        __syncthreads();
    }
    return fit;
}

// A scale for each channel: everybody's of some rows, then those of all rows, then codes.
KV_INLINE bool kv_encode_channels(const kv_item& item, kv_shared& shared) {
    const u32 tiles = item.tiles, n = item.tile_rows, wide = 8 * item.columns;
    // Rows of threads that have a row of values.
    const u32 high = item.next_row < n ? item.next_row : n;
    auto& our = shared.channels;
    bool fit = true;
#pragma unroll 1
    for (u32 tile = 0; tile < tiles; ++tile) {
#pragma unroll 1
        for (u32 first = 0; first < item.vectors; first += item.columns) {
            const u32 column = first + item.column;
            const bool here = column < item.vectors;
            kv_span spans[8];
#pragma unroll
            for (u32 k = 0; k < 8; ++k) spans[k] = kv_nothing();
            const auto read = [&](u32 row) { return item.read(tile * n + row, column); };
            if (here) {
                kv_rows(item, n, read, [&](u32, kv_v4 v) {
                    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                    for (u32 k = 0; k < 4; ++k) {
                        const u32 two = kv_ordered(words[k]);
                        spans[2 * k].add(two << 16);
                        spans[2 * k + 1].add(two);
                    }
                });
            }
            if (here && item.row < high) {
#pragma unroll
                for (u32 k = 0; k < 4; ++k) {
                    const u32 word = (item.row * item.columns + item.column) * 4 + k;
                    our.lo[word] = kv_bytes(spans[2 * k].lo, spans[2 * k + 1].lo, 0x7632);
                    our.hi[word] = kv_bytes(spans[2 * k].hi, spans[2 * k + 1].hi, 0x7632);
                }
            }
            __syncthreads();
#pragma unroll 1
            for (u32 i = threadIdx.x; i < wide && 8 * first + i < item.dim; i += blockDim.x) {
                kv_span span = kv_nothing();
#pragma unroll 1
                for (u32 row = 0; row < high; ++row) {
                    const u32 word = (row * wide + i) / 2, shift = i % 2 ? 0 : 16;
                    kv_span other;
                    other.lo = our.lo[word] << shift;
                    other.hi = our.hi[word] << shift;
                    span.add(other);
                }
                const kv_scale scale = kv_parameters(item, span);
                fit = fit && scale.fit;
                kv_note(item, tile * item.dim + 8 * first + i, scale.scale, scale.base);
                our.inverse[i % 8 * item.columns + i / 8] = scale.inverse;
                our.least[i % 8 * item.columns + i / 8] = scale.least;
            }
            __syncthreads();
            if (here) {
                kv_rows(item, n, read, [&](u32 row, kv_v4 v) {
                    kv_put(item, item.codes + 8ull * ((tile * n + row) * item.vectors + column), v,
                           [&](u32 k) { return our.inverse[k * item.columns + item.column]; },
                           [&](u32 k) { return our.least[k * item.columns + item.column]; });
                });
            }
        }
    }
    return fit;
}

// A scale for each token of a head, by groups of channels: neighbouring threads have a group, or one has it where its
// channels are no multiple of eight.
KV_INLINE bool kv_encode_tokens(const kv_item& item, kv_shared& shared) {
    const u32 each = item.group, parts = item.parts, groups = item.groups, size = each / 8;
    const bool narrow = each % 8 != 0;
    auto& our = shared.groups;
    u32 power = 0;
#pragma unroll 1
    while (!narrow && power < 5 && 1u << power < size) ++power;
    const u32 threads = 1u << power, mine = threadIdx.x >> power, lane = threadIdx.x & (threads - 1);
    bool fit = true;
#pragma unroll 1
    for (u32 first = 0; first < groups; first += KV_GROUPS) {
        const u32 end = groups - first < KV_GROUPS ? groups : first + KV_GROUPS;
#pragma unroll 1
        for (u32 next = first; next < end; next += blockDim.x >> power) {
            const u32 group = next + mine;
            const bool here = group < end;
            const u32 row = group / parts;
            const u64 from = here ? item.at(row) + 2ull * (group - row * parts) * each : 0;
            kv_span span = kv_nothing();
            // The first stays for the codes.
            kv_v4 v = {0, 0, 0, 0};
            if (here && narrow) {
#pragma unroll 1
                for (u32 i = 0; i < each; ++i) span.add(kv_ordered(kv_ld2(from + 2ull * i)) << 16);
            } else if (here && lane < size) {
                v = kv_ld16(from + 16ull * lane);
                span.add(v);
#pragma unroll 1
                for (u32 i = lane + threads; i < size; i += threads) span.add(kv_ld16(from + 16ull * i));
            }
            span.join(threads);
            if (!here) continue;
            const kv_scale scale = kv_parameters(item, span);
            fit = fit && scale.fit;
            const u64 to = item.codes + (u64)group * each;
            if (narrow) {
#pragma unroll 1
                for (u32 i = 0; i < each; ++i) {
                    const float value = kv_value(item.dtype, kv_ld2(from + 2ull * i));
                    kv_st1(to + i, kv_code(item, value, scale.inverse, scale.least));
                }
            } else {
#pragma unroll 1
                for (u32 i = lane; i < size; i += threads) {
                    if (i != lane) v = kv_ld16(from + 16ull * i);
                    kv_put(item, to + 8ull * i, v, scale);
                }
            }
            if (lane == 0) {
                our.scale[group - first] = scale.scale;
                our.base[group - first] = scale.base;
            }
        }
        // Scales go out side by side.
        __syncthreads();
#pragma unroll 1
        for (u32 i = first + threadIdx.x; i < end; i += blockDim.x)
            kv_note(item, i, our.scale[i - first], our.base[i - first]);
        __syncthreads();
    }
    return fit;
}

// Gathers and encodes every plane of every block.
extern "C" __global__ void __launch_bounds__(KV_THREADS, KV_RESIDENT) kv_encode(const kv_work work) {
    __shared__ kv_shared shared;
#pragma unroll 1
    for (u32 n = blockIdx.x; n < work.blocks * work.planes; n += gridDim.x) {
        const kv_item item = kv_open(work, n);
        const u32 values = item.rows * item.dim;
        if (item.coding == KV_RAW) {
#pragma unroll 1
            for (u32 column = item.column; column < item.vectors; column += item.columns)
                kv_fours(item, [&](u32 row) { return item.read(row, column); }, [&](u32 row, kv_v4 v) {
                    kv_st16(item.codes + 16ull * (row * item.vectors + column), v);
                });
            // Of a plain payload planes lie side by side.
            if (work.status != 0) kv_pad(item.codes, 2 * values);
            continue;
        }
        const bool fit = item.by == KV_TOKEN     ? kv_encode_tokens(item, shared)
                         : item.by == KV_CHANNEL ? kv_encode_channels(item, shared)
                                                 : kv_encode_whole(item, shared);
        if (!fit) kv_or(work.status + 4ull * (n / work.planes), KV_UNFIT);
        kv_pad(item.scales, 2 * item.groups);
        if (item.coding == KV_U8) kv_pad(item.bases, 2 * item.groups);
        // No barrier: of shared memory only the parameters of channels may be read still, and nobody writes them before
        // the next plane's own barrier.
        kv_pad(item.codes, values);
    }
}

// What eight codes are decoded with.
struct kv_eight {
    float scale[8], base[8];
};

// Those of eight channels, whose groups begin with `first`.
KV_INLINE void kv_get(const kv_item& item, u32 first, u32 column, kv_eight& eight) {
    const bool based = item.coding == KV_U8;
#pragma unroll
    for (u32 k = 0; k < 8; ++k) {
        const u32 group = first + item.together.of(8 * column + k);
        eight.scale[k] = kv_float((u32)kv_ld2(item.scales + 2ull * group) << 16);
        // Of what is signed: adding it changes nothing, not even the sign of a zero.
        eight.base[k] = -0.0f;
        if (based) eight.base[k] = kv_value(item.dtype, kv_ld2(item.bases + 2ull * group));
    }
}

// Of eight codes of a row.
KV_INLINE kv_v4 kv_decoded(const kv_item& item, u64 codes, const kv_eight& eight) {
    const bool is_signed = item.coding == KV_S8;
    // A code in the lowest byte of 2^23 is that number more, exactly; signed ones are made unsigned before.
    const u32 flip = is_signed ? 0x80808080u : 0, words[2] = {(u32)codes ^ flip, (u32)(codes >> 32) ^ flip};
    const float origin = is_signed ? 8388736.0f : 8388608.0f;
    float values[8];
#pragma unroll
    for (u32 k = 0; k < 8; ++k) {
        const float code = kv_sub(kv_float(kv_bytes(words[k / 4], 0x4b000000u, 0x7650 + k % 4)), origin);
        values[k] = kv_add(kv_mul(code, eight.scale[k]), eight.base[k]);
    }
    u32 out[4];
    // The same for all threads.
    if (kv_opaque(item.dtype) == KV_FP16) {
#pragma unroll
        for (u32 k = 0; k < 4; ++k) out[k] = kv_to_halves(values[2 * k], values[2 * k + 1]);
    } else {
#pragma unroll
        for (u32 k = 0; k < 4; ++k) out[k] = kv_to_bf16s(values[2 * k], values[2 * k + 1]);
    }
    const kv_v4 v = {out[0], out[1], out[2], out[3]};
    return v;
}

// Decodes every plane of every block and scatters it.
extern "C" __global__ void __launch_bounds__(KV_THREADS, KV_RESIDENT) kv_decode(const kv_work work) {
#pragma unroll 1
    for (u32 i = blockIdx.x; i < work.blocks * work.planes; i += gridDim.x) {
        const kv_item item = kv_open(work, i);
        const u32 tiles = item.tiles, n = item.tile_rows, parts = item.parts;
        const bool by_token = item.by == KV_TOKEN;
#pragma unroll 1
        for (u32 column = item.column; column < item.vectors; column += item.columns) {
            if (item.coding == KV_RAW) {
                const u64 from = item.codes + 16ull * column;
                kv_fours(item, [&](u32 row) { return kv_ld16(from + 16ull * (row * item.vectors)); },
                         [&](u32 row, kv_v4 v) { kv_st16(item.at(row) + 16ull * column, v); });
                continue;
            }
#pragma unroll 1
            for (u32 tile = 0; tile < tiles; ++tile) {
                const u64 from = item.codes + 8ull * (tile * n * item.vectors + column);
                kv_eight eight = {};
                bool known = false;
                kv_rows(item, n, [&](u32 row) { return kv_ld8(from + 8ull * (row * item.vectors)); },
                        [&](u32 row, u64 codes) {
                            // A token has its own, others have those of the tile.
                            if (!known) kv_get(item, (by_token ? row : tile) * parts, column, eight);
                            known = !by_token;
                            kv_st16(item.at(tile * n + row) + 16ull * column, kv_decoded(item, codes, eight));
                        });
            }
        }
    }
}

#endif

// The host's part of the pool follows here, outside __CUDACC__; it knows the structures above.
