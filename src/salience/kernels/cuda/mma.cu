// y^T = W x^T for few tokens: weights of BITS bits come once from memory, straight into registers.
//
// A thread block has HIGH * DEEP warps. Each warp has 16 * TILES rows of W; HIGH warps, one above
// the other, share the x of a block of 128 columns, and DEEP such teams take every DEEP-th block of
// columns (a cluster of SPLIT thread blocks shares the columns once more). Their sums meet at the
// end. A warp has the weights of its next two blocks under way while it multiplies: that keeps
// enough bytes in flight to fill the memory bus, and more were slower, be it in registers, in
// shared memory or in the L2. Higher teams read x, which comes from the L2 cache, for more rows;
// deeper ones leave more teams for weights of few rows.
//
// Unpacking must cost little, or it takes longer than the memory, whose bus has a quarter of a
// processor wait some 330 cycles for a block of 16 rows of 4 bits. codes.cuh says how a code becomes
// a number under the exponent of 2^(10 - place). What it is too much by, that power and the zero, is
// one number for each place in a group. So for each group, in fp32,
//
//     y += scale * sum (code - zero) x
//
// and no weight is ever rounded.
//
// A team must meet before it reads a block of x that all of it brought, and again before that place
// takes another; where W is narrow in bits and rows are many, warps that stand there are a tenth of
// the time. So x may come two blocks at once, or whole, which is for few tokens: the first products
// wait for it.
//
// Before the first touch of x the kernel waits for the one before it (griddepcontrol.wait); its
// first weights are by then under way, as they depend on nobody.
//
// Options, as macros: BITS 2, 3, 4, 8; SUBS groups to a block of 128 columns (1, 2, 4) or else
// GROUP_BLOCKS blocks to a group; TOKENS a multiple of 8; TILES 1, 2, 4; HIGH; DEEP; STAGES blocks
// of x in shared memory, 2 or 4, of which TOGETHER, 1 or 2, come at once, or 0 for all of x at the
// start; SPLIT; RESIDENT thread blocks that a processor should have registers for, or 0; BF16;
// SCALE 0 fp16, 1 bf16, 2 fp32; SM 90 for sm90.

#include "codes.cuh"

constexpr int AHEAD = 2;                     // blocks of W in registers
constexpr int TILE_WORDS = 32 * LANE_WORDS;  // of all lanes
constexpr int FOURS = LANE_WORDS / 4;
constexpr int STRIPS = TOKENS / 8;
constexpr int ROWS = 16 * TILES * HIGH;
constexpr bool WHOLE = STAGES == 0;
constexpr int PENDING = WHOLE ? 0 : STAGES / TOGETHER - 2;
constexpr int ROUND = WHOLE ? AHEAD : STAGES;  // blocks of a team in a turn of the loop
constexpr int THREADS = 32 * HIGH * DEEP;
static_assert(ROUND % AHEAD == 0, "blocks of W keep their registers");
constexpr int PITCH = ROWS + 4;  // floats of a token's sums in shared memory, for the same reason

struct Weights {
    u32 words[TILES][LANE_WORDS];
    u32 scales[TILES][SUBS][SCALE == 2 ? 2 : 1];  // of rows g and g + 8
    u32 zeros[TILES][SUBS];
};

// A value that the assembler keeps in a register, where it would make it anew at each use.
__device__ __forceinline__ u32 kept(u32 value) {
    return __shfl_sync(0xFFFFFFFF, value, threadIdx.x & 31);
}

__device__ __forceinline__ void load4(u32* to, const char* from, u64 policy) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from), "l"(policy));
}

__device__ __forceinline__ void load2(u32* to, const char* from, u64 policy) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0,%1}, [%2], %3;"
                 : "=r"(to[0]), "=r"(to[1]) : "l"(from), "l"(policy));
}

constexpr int PAIR_BYTES = SCALE == 2 ? 8 : 4;  // of two scales
constexpr int BLOCK_BYTES = 4 * TILE_WORDS;

// Where a lane finds its words of a tile (`narrow`: the last two of six), the scales and zeros of
// its rows g and g + 8, and how far the tiles are apart. Words are those of a block; so are scales
// where each block has its own group, else they are the first group's.
struct Places {
    const char *words, *narrow, *scales, *zeros;
    u32 next_words, next_pairs;
};

constexpr bool STEADY = SUBS == 1 && GROUP_BLOCKS == 1;  // a group to a block

// Fetch a block of W, `ahead` blocks past the places.
__device__ __forceinline__ void fetch(Weights& w, const Places& at, int ahead, int block,
                                      int groups, u64 policy) {
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const char* from = at.words + i * at.next_words + ahead * BLOCK_BYTES;
#pragma unroll
        for (int c = 0; c < FOURS; c++) load4(w.words[i] + 4 * c, from + 512 * c, policy);
        if (LANE_WORDS % 4)
            load2(w.words[i] + 4 * FOURS,
                  at.narrow + i * at.next_words + ahead * BLOCK_BYTES + 512 * FOURS, policy);
#pragma unroll
        for (int sub = 0; sub < SUBS; sub++) {
            const int group = min(block / GROUP_BLOCKS * SUBS + sub, groups - 1);
            const u32 pair = i * at.next_pairs + 8 * (STEADY ? ahead : group);
            const char* scale = at.scales + pair * PAIR_BYTES;
            if (SCALE == 2) {
                const uint2 both = __ldg(reinterpret_cast<const uint2*>(scale));
                w.scales[i][sub][0] = both.x;
                w.scales[i][sub][SCALE == 2 ? 1 : 0] = both.y;
            } else {
                w.scales[i][sub][0] = __ldg(reinterpret_cast<const u32*>(scale));
            }
            asm volatile("ld.global.nc.u16 %0, [%1];"
                         : "=r"(w.zeros[i][sub]) : "l"(at.zeros + pair * 2));
        }
    }
}

__device__ __forceinline__ u32 less(u32 a, u32 b) {  // a - b, of both halves
    u32 result;
    if constexpr (BF16)  // sm80 has no other of bf16
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(b), "r"(0xBF80BF80), "r"(a));
    else
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

// What the codes at a place are too much by: the power of 2, and the zero of rows g + 8 * HALF.
template <int HALF, int PLACE>
__device__ __forceinline__ u32 excess(u32 zeros) {
    if constexpr (PLACE == 0)  // the power is in the upper byte of a half, the zero in the lower
        return __byte_perm(zeros, power2(TOP), HALF ? 0x7171 : 0x7070);
    else
        return less(excess<HALF, 0>(zeros), power2_less(PLACE));
}

// Two codes of a lane, pair 4 * step + register, less their zeros, in half precision.
template <int PAIR>
__device__ __forceinline__ u32 codes(const u32* words, u32 zeros, const u32 (&masks)[PLACES]) {
    constexpr int half = PAIR & 1;
    if constexpr (BYTES) {
        const float zero = widened(zeros, half);
        return pack2(widened(words[PAIR / 2], PAIR % 2) - zero,
                     widened(words[PAIR / 2], PAIR % 2 + 2) - zero);
    } else if constexpr (BITS == 8) {
        return less(__byte_perm(words[PAIR / 2], power2(TOP), PAIR % 2 ? 0x7371 : 0x7270),
                    excess<half, 0>(zeros));
    } else {
        constexpr int place = place_of(PAIR);
        u32 result;  // (word & mask) | exponent
        asm("lop3.b32 %0, %1, %2, %3, 0xEA;"
            : "=r"(result)
            : "r"(word_of(words, PAIR)), "r"(masks[place / BITS]), "n"(power2(TOP - place)));
        return less(result, excess<half, place>(zeros));
    }
}

__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

typedef float Sums[TILES][STRIPS][4];

template <int STEP>
__device__ __forceinline__ void step(Sums& total, Sums& group, const Weights& w,
                                     const u32 (&x)[STRIPS][4], const u32 (&masks)[PLACES]) {
    constexpr int STEPS = 8 / SUBS;  // to a group
    if (STEP % STEPS == 0)
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int n = 0; n < STRIPS; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) group[i][n][c] = 0;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const u32 zeros = w.zeros[i][STEP / STEPS];
        const u32 a[4] = {codes<4 * STEP>(w.words[i], zeros, masks),
                          codes<4 * STEP + 1>(w.words[i], zeros, masks),
                          codes<4 * STEP + 2>(w.words[i], zeros, masks),
                          codes<4 * STEP + 3>(w.words[i], zeros, masks)};
#pragma unroll
        for (int n = 0; n < STRIPS; n++)
            multiply(group[i][n], a, x[n][2 * (STEP % 2)], x[n][2 * (STEP % 2) + 1]);
        if (STEP % STEPS == STEPS - 1) {
            float scale[2];
            const u32* stored = w.scales[i][STEP / STEPS];
            scales_of(scale, stored[0], stored[SCALE == 2 ? 1 : 0]);
#pragma unroll
            for (int n = 0; n < STRIPS; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) total[i][n][c] += scale[c / 2] * group[i][n][c];
        }
    }
}

template <int HALF>  // two steps, whose x one ldmatrix brings
__device__ __forceinline__ void steps(Sums& total, Sums& group, const Weights& w,
                                      const u32 (&place)[STRIPS], u32 buffer,
                                      const u32 (&masks)[PLACES]) {
    u32 x[STRIPS][4];
#pragma unroll
    for (int n = 0; n < STRIPS; n++)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[n][0]), "=r"(x[n][1]), "=r"(x[n][2]), "=r"(x[n][3])
                     : "r"(buffer + place[n] + 64 * HALF));
    step<2 * HALF>(total, group, w, x, masks);
    step<2 * HALF + 1>(total, group, w, x, masks);
}

// A team's block of x into shared memory, zeros where `real` is false. A thread has one chunk of 8
// columns, of every 2 * HIGH-th token from its first.
__device__ __forceinline__ void stage(u32 to, const char* from, int tokens, u32 apart, int pitch,
                                      bool real) {
#pragma unroll
    for (int i = 0; i < (TOKENS + 2 * HIGH - 1) / (2 * HIGH); i++)
        if (2 * HIGH * i < tokens)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                         :: "r"(to + 2 * HIGH * pitch * i), "l"(from + apart * i),
                            "r"(real ? 16 : 0));
}

__device__ __forceinline__ void add(float4& to, const float4& more) {
    to.x += more.x, to.y += more.y, to.z += more.z, to.w += more.w;
}

// Grid (SPLIT, row blocks, strips of TOKENS tokens); x [tokens, columns] with rows `stride` apart,
// y [tokens, out].
extern "C" __global__ void
#if RESIDENT
__launch_bounds__(THREADS, RESIDENT)
#else
__launch_bounds__(THREADS)
#endif
mma(const char* x, const char* words, const char* scales, const char* zeros, u16* y, int tokens,
    int out, int columns, int stride, int groups) {
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, team = warp / HIGH;
    const int member = warp % HIGH, thread = threadIdx.x % (32 * HIGH);
    const int tiles = (out + 63) / 64 * 4, blocks = (columns + 127) / 128;
    const int tile = min(static_cast<int>(blockIdx.y * HIGH + member) * TILES, tiles - TILES);
    const int first_token = blockIdx.z * TOKENS, here = min(TOKENS, tokens - first_token);
    const int each = (blocks + SPLIT - 1) / SPLIT;
    const int pitch = 256 * (WHOLE ? each : 1) + 16;  // bytes of a token: 16 more, or banks collide
    const int size = here * pitch, x_bytes = WHOLE ? size : DEEP * STAGES * size;
    const int end = min(blocks, each * (static_cast<int>(blockIdx.x) + 1));
    const int first = each * static_cast<int>(blockIdx.x) + team;
#if SPLIT > 1
    // Each block of the cluster adds up a share of the sums, which the others send to its inbox,
    // [SPLIT][share] of four; `full` counts what has come. So nobody reads another's memory, and a
    // block leaves when its share is done.
    __shared__ __align__(8) u64 arrived;
    const u32 full = shared_address(&arrived);
    const int share = (here * (ROWS / 4) + SPLIT - 1) / SPLIT, begin = share * blockIdx.x;
    const u32 inbox =
        shared_address(shared) + max(x_bytes, 4 * DEEP * here * PITCH);
    if (threadIdx.x == 0) {
        const int all = 16 * (SPLIT - 1) * max(0, min(share, here * (ROWS / 4) - begin));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1; fence.mbarrier_init.release.cluster;"
                     :: "r"(full) : "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                     :: "r"(full), "r"(all) : "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");  // the wait is much later
#endif
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));

    Places at;
    at.next_words = blocks * BLOCK_BYTES;
    at.next_pairs = 8 * groups;
    const u32 pair = tile * at.next_pairs + (lane >> 2) + (STEADY ? 8 * first : 0);
    at.words = words + (tile * at.next_words + 16 * lane) + first * BLOCK_BYTES;
    at.narrow = at.words - 8 * lane;
    at.scales = scales + pair * PAIR_BYTES;
    at.zeros = zeros + pair * 2;
    Weights ring[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (first + i * DEEP < end) fetch(ring[i], at, i * DEEP, first + i * DEEP, groups, policy);
#if SM >= 90
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const int token = thread >> 4, column = 8 * (thread & 15);
    const int next_x = WHOLE ? 256 * DEEP : size;  // bytes from a team's block of x to its next
    const u32 buffers = shared_address(shared) + team * (WHOLE ? 256 : STAGES * size);
    const u32 to = kept(buffers + token * pitch + 2 * column);
    const char* from = x + 2 * ((first_token + token) * stride + column) + 256 * first;
    const int whole = kept((columns - column + 127) / 128);  // blocks whose x a thread finds
    const u32 apart = 4 * HIGH * stride;  // bytes between a thread's tokens
    const int left = kept(here - token);
    const u32 barrier = kept(team + 1);
    auto meet = [&] {  // the warps of a team
        if (HIGH == 1)
            __syncwarp();
        else
            asm volatile("bar.sync %0, %1;" :: "r"(barrier), "n"(32 * HIGH) : "memory");
    };
#pragma unroll
    for (int i = 0; WHOLE ? first + i * DEEP < end : i < STAGES - TOGETHER; i++) {
        const int block = first + i * DEEP;
        if (block < end)
            stage(to + i * next_x, from + 256 * i * DEEP, left, apart, pitch, block < whole);
        if (i % TOGETHER == TOGETHER - 1) asm volatile("cp.async.commit_group;");
    }
    if (WHOLE) {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        meet();
    }
    u32 place[STRIPS];  // tokens that are not there read one that is: their sums are not kept
#pragma unroll
    for (int n = 0; n < STRIPS; n++)
        place[n] = kept(min(8 * n + (lane & 7), here - 1) * pitch + 16 * (lane >> 3) + buffers);

    const u32 none = tokens & 0x80000000;  // 0, which the compiler does not know
    u32 masks[PLACES];
#pragma unroll
    for (int i = 0; i < PLACES; i++)
        masks[i] = kept(mask_of(i * BITS) | none);
    Sums total = {}, group;
    for (int base = first; base < end; base += ROUND * DEEP) {
#pragma unroll
        for (int i = 0; i < ROUND; i++) {
            const int block = base + i * DEEP;
            if (block < end) {
                Weights& w = ring[i % AHEAD];
                if (!WHOLE && i % TOGETHER == 0) {
                    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
                    meet();
#pragma unroll
                    for (int j = 0; j < TOGETHER; j++) {
                        const int next = i + j + STAGES - TOGETHER;
                        if (base + next * DEEP < end)
                            stage(to + next % ROUND * size, from + 256 * next * DEEP, left, apart,
                                  pitch, base + next * DEEP < whole);
                    }
                    asm volatile("cp.async.commit_group;");
                }
                steps<0>(total, group, w, place, i * next_x, masks);
                steps<1>(total, group, w, place, i * next_x, masks);
                steps<2>(total, group, w, place, i * next_x, masks);
                steps<3>(total, group, w, place, i * next_x, masks);
                const int ahead = (i + AHEAD) * DEEP;
                if (base + ahead < end) fetch(w, at, ahead, base + ahead, groups, policy);
            }
        }
        if (WHOLE)
#pragma unroll
            for (int n = 0; n < STRIPS; n++) place[n] += 256 * ROUND * DEEP;
        else
            from += 256 * ROUND * DEEP;
        at.words += ROUND * DEEP * BLOCK_BYTES;
        at.narrow += ROUND * DEEP * BLOCK_BYTES;
        if (STEADY) {
            at.scales += 8 * PAIR_BYTES * ROUND * DEEP;
            at.zeros += 16 * ROUND * DEEP;
        }
    }

    // The sums of the teams, then of the cluster: always in one order, four rows at once.
    float* sums = reinterpret_cast<float*>(shared);  // [DEEP][here][PITCH]
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int n = 0; n < STRIPS; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int token = 8 * n + 2 * (lane & 3) + (c & 1);
                int row = 16 * (member * TILES + i) + (lane >> 2) + 8 * (c >> 1);
                if (token < here) sums[(team * here + token) * PITCH + row] = total[i][n][c];
            }
    __syncthreads();
    constexpr int FOURS_HIGH = ROWS / 4;
    const int count = here * FOURS_HIGH, start = blockIdx.y * ROWS;
    auto mine = [&](int four) {
        const float* from = sums + four / FOURS_HIGH * PITCH + four % FOURS_HIGH * 4;
        float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll
        for (int t = 1; t < DEEP; t++)
            add(sum, *reinterpret_cast<const float4*>(from + t * here * PITCH));
        return sum;
    };
#if SPLIT > 1
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const int to = i / share;
        if (to == blockIdx.x) continue;
        const float4 sum = mine(i);
        const u32 at = inbox + 16 * (share * blockIdx.x + i - to * share);
        asm volatile("{.reg .b32 at, full;\n"
                     "mapa.shared::cluster.u32 at, %0, %6; mapa.shared::cluster.u32 full, %1, %6;\n"
                     "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
                     " [at], {%2, %3, %4, %5}, [full];}"
                     :: "r"(at), "r"(full), "f"(sum.x), "f"(sum.y), "f"(sum.z), "f"(sum.w), "r"(to)
                     : "memory");
    }
    if (begin + threadIdx.x < min(begin + share, count))
        asm volatile("{.reg .pred done;\n"
                     "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64"
                     " done, [%0], 0;\n"
                     "@!done bra again;}" :: "r"(full) : "memory");
#else
    const int begin = 0, share = count;
#endif
    for (int i = begin + threadIdx.x; i < min(begin + share, count); i += THREADS) {
        float4 sum = mine(i);
#if SPLIT > 1
        float4 own = sum;
        sum = {};
#pragma unroll
        for (int rank = 0; rank < SPLIT; rank++) {
            float4 part = own;
            if (rank != blockIdx.x)
                asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                             : "=f"(part.x), "=f"(part.y), "=f"(part.z), "=f"(part.w)
                             : "r"(inbox + 16 * (rank * share + i - begin)) : "memory");
            add(sum, part);
        }
#endif
        const int token = i / FOURS_HIGH, row = start + i % FOURS_HIGH * 4;
        u16* to = y + static_cast<u64>(first_token + token) * out + row;
        const u32 low = pack2(sum.x, sum.y);
        const u32 high = pack2(sum.z, sum.w);
        if (row + 4 <= out && out % 4 == 0) {
            *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
        } else {
            if (row < out) to[0] = low;
            if (row + 1 < out) to[1] = low >> 16;
            if (row + 2 < out) to[2] = high;
            if (row + 3 < out) to[3] = high >> 16;
        }
    }
}
