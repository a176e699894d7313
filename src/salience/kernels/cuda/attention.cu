// Attention of one query a row to its cache, in one launch (flash-decoding within a cluster).
//
// A cluster of SPLITS blocks has the keys of one head of the cache, for up to 8 * HIGH of the GROUP
// query heads that share them; each block has a piece of the context, and its warps take tiles of
// 16 keys of that in turn. Keys and values come once from memory, straight into the registers that
// mma.sync wants, and those of a warp's next tile are under way as soon as the registers are free:
//
//     scores [heads, keys]  = q K^T     the sum is over columns, in any order: so lane t of four has
//                                       8 columns that lie together (16 bytes), and q likewise
//     out^T [values, heads] = V^T P^T   P is where the first product left it. A lane has 8 columns
//                                       of four keys; two keys of a column make a register (prmt)
//
// Each warp keeps a maximum m of its scores (base 2) and, relative to it, the sum of weights and of
// weighted values. The warps' are put together in shared memory. Then each block sends what it found
// to the others, each of which has a share of the columns to put together. A write tells a barrier of
// the receiver how many bytes have come (st.async), and the receiver knows how many will: so nobody
// waits for a far read, or for a barrier of all, nor leaves while others read.
//
// Before the first read of q and of the cache the kernel waits for the one before it. Till then it
// asks the L2 for its keys by the position that it finds, which may be an old one. After the wait it
// starts with that too, and begins again in the rare case that the position was another.
//
// Keys that are not seen are never read: in their place comes the last one that is, with weight 0.
//
// Options, as macros: DIM and VALUES, columns of a key and a value, multiples of 16; GROUP; HIGH 1,
// 2; WARPS; SPLITS 1, 2, 4, 8; BF16; SOFTCAP 0, 1; SINKS 0 none, 1 fp16, 2 bf16, 3 fp32;
// POSITION_BYTES 4, 8.

#include "common.cuh"

constexpr int TILE = 16;  // keys
constexpr int THREADS = 32 * WARPS;
constexpr int HEADS = GROUP < 8 * HIGH ? GROUP : 8 * HIGH;  // of a block
constexpr int QUADS = VALUES / 4;
constexpr int PITCH = VALUES + 4;  // floats of a head in shared memory: 4 more, or banks collide
// Whether a lane has room for q, keys and values at once. If not, it asks for values when it is done
// with the keys, and q is in shared memory.
constexpr bool BOTH = DIM + VALUES <= 384;
constexpr int Q_PITCH = BOTH ? 8 : DIM + 8;
constexpr float LOG2E = 1.4426950408889634f;

struct alignas(16) Shared {
#if SPLITS > 1
    float4 received[SPLITS][(HEADS * QUADS + SPLITS - 1) / SPLITS];
    float2 received_sums[SPLITS][HEADS];
    u64 barrier;
#endif
    float2 sums[WARPS][HEADS];  // maximum, sum of weights
    float sinks[HEADS];
    alignas(16) u16 q[BOTH ? 1 : HEADS][Q_PITCH];
    alignas(16) float parts[WARPS][HEADS][PITCH];
};

// ---- instructions --------------------------------------------------------------------------

#if BF16
#define HALF "bf16"
#else
#define HALF "f16"
#endif

// From AT bytes after `from`
template <int AT>
__device__ __forceinline__ void load16(u32* to, const u16* from) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from), "n"(AT));
}

template <int AT>
__device__ __forceinline__ void load8(u32* to, const u16* from) {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2 + %3];"
                 : "=r"(to[0]), "=r"(to[1]) : "l"(from), "n"(AT));
}

template <int AT>
__device__ __forceinline__ void load4(u32* to, const u16* from) {
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1 + %2];"
                 : "=r"(to[0]) : "l"(from), "n"(AT));
}

// From the L2, never from what this processor has kept
__device__ __forceinline__ long long load_position(const void* from) {
#if POSITION_BYTES == 8
    long long found;
    asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(found) : "l"(from));
#else
    int found;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(from));
#endif
    return found;
}

__device__ __forceinline__ void prefetch(const u16* from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(from), "r"(bytes));
}

__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                         u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." HALF "." HALF ".f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float power2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float quotient(float x, float y) { return __fdividef(x, y); }

__device__ __forceinline__ float wide(u16 half, int kind) {  // of fp16 (1) or bf16 (2)
    if (kind == 2) return __uint_as_float(static_cast<u32>(half) << 16);
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(half));
    return result;
}

__device__ __forceinline__ void launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ void wait_for_inputs() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Of threads, not of memory. A warp arrives as one: where a lane is late, it would count twice.
__device__ __forceinline__ void cluster_arrive() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same place in the shared memory of another block of the cluster
__device__ __forceinline__ u32 there(const void* place, int rank) {
    u32 found;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(shared_address(place)), "r"(rank));
    return found;
}

__device__ __forceinline__ void barrier_init(u64* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u64* barrier) {
    asm volatile("{.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
                 "@!done bra again;}" :: "r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void send(float4* place, int rank, float4 x, u64* barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
                 "[%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(there(place, rank)), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w),
                    "r"(there(barrier, rank)) : "memory");
}

__device__ __forceinline__ void send(float2* place, int rank, float2 x, u64* barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
                 :: "r"(there(place, rank)), "f"(x.x), "f"(x.y), "r"(there(barrier, rank)) : "memory");
}

// ---- the kernel ----------------------------------------------------------------------------

// A row of K or q, of which lane t of four has every fourth 16 bytes; what is left is cut likewise.
template <int I = 0>
__device__ __forceinline__ void load_row(u32* to, const u16* row, int t) {
    if constexpr (I < DIM / 32) {
        load16<64 * I>(to + 4 * I, row + 8 * t);
        load_row<I + 1>(to, row, t);
    } else if constexpr (DIM % 32) {
        load8<64 * I>(to + 4 * I, row + 4 * t);
    }
}

// The four columns that lane t has for step s of 16
__device__ __forceinline__ int step_columns(int s, int t) {
    return s < DIM / 32 * 2 ? s / 2 * 32 + 8 * t + s % 2 * 4 : 16 * s + 4 * t;
}

// The columns of V that lane g of eight has: pair r of VALUES / 16
__device__ __forceinline__ int column(int r, int g) {
    if (r < VALUES / 64 * 4) return r / 4 * 64 + 8 * g + r % 4 * 2;
    if (VALUES & 32 && r < VALUES / 32 * 2) return VALUES / 64 * 64 + 4 * g + r % 2 * 2;
    return VALUES / 32 * 32 + 2 * g;
}

template <int I = 0>
__device__ __forceinline__ void load_values(u32* to, const u16* row, int g) {
    if constexpr (I < VALUES / 64) {
        load16<128 * I>(to + 4 * I, row + 8 * g);
        load_values<I + 1>(to, row, g);
    } else {
        if constexpr (VALUES & 32) load8<128 * I>(to + 4 * I, row + 4 * g);
        if constexpr (VALUES & 16) load4<VALUES / 32 * 64>(to + VALUES / 32 * 2, row + 2 * g);
    }
}

struct Span {  // of keys: of the row, and of this block
    int keys, each, begin, end;

    __device__ __forceinline__ Span(long long position, int length, int window, int rank) {
        const int all = static_cast<int>(max(0ll, min(position + 1, static_cast<long long>(length))));
        const int first = window > 0 ? max(all - window, 0) : 0;
        keys = all - first;
        each = (max(keys, 1) + SPLITS * TILE - 1) / (SPLITS * TILE) * TILE;
        begin = first + rank * each;
        end = min(all, begin + each);
    }
};

struct Cache {  // K and V of one head: where key 0 lies, and how far keys are apart
    const u16 *k, *v;
    int k_key, v_key;

    __device__ __forceinline__ void keys(u32 (&to)[2][DIM / 8], int tile, int end, int lane) const {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int key = min(tile + 8 * n + lane / 4, end - 1);
            load_row(to[n], k + static_cast<long long>(key) * k_key, lane % 4);
        }
    }

    __device__ __forceinline__ void values(u32 (&to)[4][VALUES / 16], int tile, int end, int lane) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = min(tile + 8 * (i / 2) + 2 * (lane % 4) + i % 2, end - 1);
            load_values(to[i], v + static_cast<long long>(key) * v_key, lane / 4);
        }
    }
};

__device__ __forceinline__ void add(float4& sum, float4 x, float factor) {
    sum.x += factor * x.x;
    sum.y += factor * x.y;
    sum.z += factor * x.z;
    sum.w += factor * x.w;
}

// Grid (pairs of row and kv head, strips of 8 * HIGH heads), of clusters. Strides count elements.
extern "C" __global__ void __launch_bounds__(THREADS)
attend(const u16* q, const u16* k, const u16* v, const char* positions, const char* sinks, u16* out,
       int q_row, int q_head, int k_row, int k_head, int k_key, int v_row, int v_head, int v_key,
       int position_step, int kv_heads, int length, int window, int ahead, float scale, float softcap) {
    extern __shared__ __align__(16) char dynamic[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.x % SPLITS, pair = blockIdx.x / SPLITS;
    const int kv_head = pair % kv_heads, first_head = kv_head * GROUP + blockIdx.y * HEADS;
    const int here = min(HEADS, GROUP - static_cast<int>(blockIdx.y) * HEADS);  // heads
    const long long row = pair / kv_heads;
    positions += row * position_step * POSITION_BYTES;
    const Cache cache = {k + row * k_row + static_cast<long long>(kv_head) * k_head,
                         v + row * v_row + static_cast<long long>(kv_head) * v_head, k_key, v_key};

    launch_dependents();
#if SPLITS > 1
    if (threadIdx.x == 0) barrier_init(&shared.barrier);
    cluster_arrive();  // only when all have begun may one write to another
#endif
    const long long found = load_position(positions);
    Span span(found, length, window, rank);
    const int early = min(ahead, span.end - span.begin);  // of keys that lie together
    if (threadIdx.x == 0 && early > 0) {
        if (k_key == DIM) prefetch(cache.k + static_cast<long long>(span.begin) * DIM, 2 * DIM * early);
        if (v_key == VALUES)
            prefetch(cache.v + static_cast<long long>(span.begin) * VALUES, 2 * VALUES * early);
    }
    wait_for_inputs();

    q += row * q_row + static_cast<long long>(first_head) * q_head;
    u32 queries[HIGH][DIM / 8];  // heads that are not there read one that is
    if constexpr (BOTH) {
#pragma unroll
        for (int h = 0; h < HIGH; h++)
            load_row(queries[h], q + static_cast<long long>(min(8 * h + g, here - 1)) * q_head, t);
    } else {
        for (int i = threadIdx.x; i < here * (DIM / 8); i += THREADS) {
            const int head = i / (DIM / 8), at = i % (DIM / 8) * 8;
            u32 x[4];
            load16<0>(x, q + static_cast<long long>(head) * q_head + at);
            *reinterpret_cast<uint4*>(&shared.q[head][at]) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
    u32 keys[2][DIM / 8], values[4][VALUES / 16];
    int tile = span.begin + TILE * warp;
    // In either branch, or the assembler compares it, and waits for it, before it asks for the keys.
    long long position;
    if (tile < span.end) {
        cache.keys(keys, tile, span.end, lane);
        position = load_position(positions);
        if (BOTH) cache.values(values, tile, span.end, lane);
    } else {
        position = load_position(positions);
    }
#if SINKS
    if (threadIdx.x < here) {
        const int head = first_head + threadIdx.x;
        shared.sinks[threadIdx.x] = SINKS == 3 ? reinterpret_cast<const float*>(sinks)[head]
                                               : wide(reinterpret_cast<const u16*>(sinks)[head], SINKS);
    }
#endif
    if (position != found) {
        span = Span(position, length, window, rank);
        tile = span.begin + TILE * warp;
        if (tile < span.end) {
            cache.keys(keys, tile, span.end, lane);
            if (BOTH) cache.values(values, tile, span.end, lane);
        }
    }
    if (!BOTH) __syncthreads();

    float most[HIGH], total[HIGH], sums[HIGH][VALUES / 16][4];
#pragma unroll
    for (int h = 0; h < HIGH; h++) {
        most[h] = __uint_as_float(0xFF800000);
        total[h] = 0;
#pragma unroll
        for (int r = 0; r < VALUES / 16; r++)
#pragma unroll
            for (int c = 0; c < 4; c++) sums[h][r][c] = 0;
    }
    for (; tile < span.end; tile += TILE * WARPS) {
        const int next = tile + TILE * WARPS;
        float scores[2][2][4];  // of keys 8 n ..., in two sums, or each step waits for the one before
#pragma unroll
        for (int i = 0; i < 16; i++) scores[i / 8][i / 4 % 2][i % 4] = 0;
#pragma unroll
        for (int s = 0; s < DIM / 16; s++) {
            u32 a[2][2] = {};
#pragma unroll
            for (int h = 0; h < HIGH; h++)
                if constexpr (BOTH) {
                    a[0][h] = queries[h][2 * s];
                    a[1][h] = queries[h][2 * s + 1];
                } else {
                    const u16* from = shared.q[min(8 * h + g, here - 1)] + step_columns(s, t);
                    const uint2 both = *reinterpret_cast<const uint2*>(from);
                    a[0][h] = both.x;
                    a[1][h] = both.y;
                }
#pragma unroll
            for (int n = 0; n < 2; n++)
                multiply(scores[n][s % 2], a[0][0], a[0][1], a[1][0], a[1][1], keys[n][2 * s],
                         keys[n][2 * s + 1]);
        }
        if (!BOTH) {
            __syncwarp();  // or the assembler moves the loads up
            cache.values(values, tile, span.end, lane);
        } else if (next < span.end) {
            cache.keys(keys, next, span.end, lane);
        }

        u32 weights[HIGH][2];
        float shrink[HIGH];
#pragma unroll
        for (int h = 0; h < HIGH; h++) {
            float x[4], higher = most[h];
#pragma unroll
            for (int i = 0; i < 4; i++) {  // keys 2 t, 2 t + 1 and 8 further on
                x[i] = (scores[i / 2][0][2 * h + i % 2] + scores[i / 2][1][2 * h + i % 2]) * scale;
                if (SOFTCAP)  // tanh(z) = 1 - 2 / (1 + exp(2 z))
                    x[i] = softcap * (1 - quotient(2, 1 + power2(2 * LOG2E * quotient(x[i], softcap))));
                const bool seen = tile + 8 * (i / 2) + 2 * t + i % 2 < span.end;
                x[i] = seen ? x[i] * LOG2E : __uint_as_float(0xFF800000);
                higher = fmaxf(higher, x[i]);
            }
            higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
            higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 2));
            shrink[h] = power2(most[h] - higher);
            most[h] = higher;
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = power2(x[i] - higher);
            total[h] = total[h] * shrink[h] + ((x[0] + x[1]) + (x[2] + x[3]));
            weights[h][0] = pack2(x[0], x[1]);
            weights[h][1] = pack2(x[2], x[3]);
        }
#pragma unroll
        for (int h = 0; h < HIGH; h++) {  // the sums of a lane are of heads 2 t and 2 t + 1
            const float factor[2] = {__shfl_sync(~0u, shrink[h], 8 * t),
                                     __shfl_sync(~0u, shrink[h], 8 * t + 4)};
#pragma unroll
            for (int r = 0; r < VALUES / 16; r++)
#pragma unroll
                for (int c = 0; c < 4; c++) sums[h][r][c] *= factor[c % 2];
        }
#pragma unroll
        for (int r = 0; r < VALUES / 16; r++) {
            u32 a[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[i] = __byte_perm(values[i / 2 * 2][r], values[i / 2 * 2 + 1][r], i % 2 ? 0x7632 : 0x5410);
#pragma unroll
            for (int h = 0; h < HIGH; h++)
                multiply(sums[h][r], a[0], a[1], a[2], a[3], weights[h][0], weights[h][1]);
        }
        if (next < span.end) {
            if (BOTH)
                cache.values(values, next, span.end, lane);
            else
                cache.keys(keys, next, span.end, lane);
        }
    }

#pragma unroll
    for (int h = 0; h < HIGH; h++) {
        total[h] += __shfl_xor_sync(~0u, total[h], 1);
        total[h] += __shfl_xor_sync(~0u, total[h], 2);
        if (t == 0 && 8 * h + g < HEADS) shared.sums[warp][8 * h + g] = make_float2(most[h], total[h]);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int head = 8 * h + 2 * t + e;
            if (head < HEADS)
#pragma unroll
                for (int r = 0; r < VALUES / 16; r++)
                    *reinterpret_cast<float2*>(&shared.parts[warp][head][column(r, g)]) =
                        make_float2(sums[h][r][e], sums[h][r][2 + e]);
        }
    }
    __syncthreads();

    // The warps that had keys, always in one order
    const int warps = min(WARPS, (max(span.end - span.begin, 0) + TILE - 1) / TILE);
    const auto sums_of = [&](int head, float (&factors)[WARPS]) {
        float2 sum = make_float2(__uint_as_float(0xFF800000), 0);
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            if (w < warps) sum.x = fmaxf(sum.x, shared.sums[w][head].x);
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            if (w < warps) {
                factors[w] = power2(shared.sums[w][head].x - sum.x);
                sum.y += factors[w] * shared.sums[w][head].y;
            }
        return sum;
    };
    const auto store = [&](int head, int quad, float2 sum, float4 x) {
#if SINKS
        const float sink = shared.sinks[head] * LOG2E, higher = fmaxf(sum.x, sink);
        const float factor = power2(sum.x - higher);
        sum.y = factor * sum.y + power2(sink - higher);
#else
        const float factor = 1;
#endif
        const float inverse = sum.y == 0 ? 0 : factor / sum.y;  // of no key at all: 0
        const long long head_row = row * kv_heads * GROUP + first_head + head;
        *reinterpret_cast<uint2*>(out + head_row * VALUES + 4 * quad) =
            make_uint2(pack2(x.x * inverse, x.y * inverse), pack2(x.z * inverse, x.w * inverse));
    };

#if SPLITS > 1
    const int ranks = (span.keys + span.each - 1) / span.each;  // that have keys
    if (threadIdx.x == 0) {
        const int share = (here * QUADS - rank + SPLITS - 1) / SPLITS;
        barrier_expect(&shared.barrier, ranks * (16 * share + 8 * here));
    }
    cluster_wait();
    if (warps > 0)
        for (int i = THREADS - 1 - threadIdx.x; i < here * SPLITS; i += THREADS) {
            float factors[WARPS];
            send(&shared.received_sums[rank][i / SPLITS], i % SPLITS, sums_of(i / SPLITS, factors),
                 &shared.barrier);
        }
    const int quads = warps > 0 ? here * QUADS : 0;
#else
    const int quads = here * QUADS;
#endif
    for (int i = threadIdx.x; i < quads; i += THREADS) {
        const int head = i / QUADS, quad = i % QUADS;
        float factors[WARPS];
        const float2 sum = sums_of(head, factors);
        float4 x = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            if (w < warps)
                add(x, *reinterpret_cast<const float4*>(&shared.parts[w][head][4 * quad]), factors[w]);
#if SPLITS > 1
        send(&shared.received[rank][i / SPLITS], i % SPLITS, x, &shared.barrier);
    }
    barrier_wait(&shared.barrier);
    for (int i = threadIdx.x * SPLITS + rank; i < here * QUADS; i += THREADS * SPLITS) {
        const int head = i / QUADS, quad = i % QUADS;
        float2 sums_there[SPLITS], sum = make_float2(__uint_as_float(0xFF800000), 0);
        float4 parts_there[SPLITS], x = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int other = 0; other < SPLITS; other++) {  // reads without branches, all at once
            sums_there[other] = shared.received_sums[other][head];
            parts_there[other] = shared.received[other][i / SPLITS];
        }
#pragma unroll
        for (int other = 0; other < SPLITS; other++)
            if (other < ranks) sum.x = fmaxf(sum.x, sums_there[other].x);
#pragma unroll
        for (int other = 0; other < SPLITS; other++)
            if (other < ranks) {
                const float factor = power2(sums_there[other].x - sum.x);
                sum.y += factor * sums_there[other].y;
                add(x, parts_there[other], factor);
            }
#endif
        store(head, quad, sum, x);
    }
}
