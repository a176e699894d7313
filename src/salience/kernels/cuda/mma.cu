// y^T = W x^T for few tokens: weights of BITS bits come once from memory, straight into registers.
//
// A thread block has HIGH * DEEP warps. Each warp has 16 * TILES rows of W; HIGH warps, one above
// the other, share the x of a block of 128 columns, and DEEP such teams take every DEEP-th block of
// columns (a cluster of SPLIT thread blocks shares the columns once more). Their sums meet at the
// end. A warp has the weights of its next STAGES blocks under way while it multiplies the present
// ones: that keeps enough bytes in flight to fill the memory bus. Higher teams read x, which comes
// from the L2 cache, for more rows; deeper ones leave more teams for weights of few rows.
//
// Unpacking must cost little, or it takes longer than the memory. A code under the exponent of
// 2^10-b, b the place of its lowest bit, is the half-precision number 2^10-b + code: one mask, no
// conversion (bf16: 2^7-b). Rows g have their codes at b = 0 and rows g + 8 a bit higher, where
// they lie already, so one shift serves two registers. What the offset and the zero add to a sum is
// the same multiple of the sum of x, which a product by ones gives; so for each group, in fp32,
//
//     y += scale * (sum (offset + code) x - (offset + zero) sum x)
//
// and no weight is ever rounded. The offsets cost up to 7 of the 23 bits of fp32.
//
// Before the first touch of x the kernel waits for the one before it (griddepcontrol.wait); its
// first weights are by then under way, as they depend on nobody.
//
// Options, as macros: BITS 2, 3, 4, 8; SUBS groups to a block of 128 columns (1, 2, 4) or else
// GROUP_BLOCKS blocks to a group; TOKENS a multiple of 8; TILES 1, 2, 4; HIGH; DEEP; STAGES; SPLIT;
// BF16; SCALE 0 fp16, 1 bf16, 2 fp32; SM 90 for sm90.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr int LANE_WORDS = 2 * BITS;         // of a tile and a block
constexpr int TILE_WORDS = 32 * LANE_WORDS;  // of all lanes
constexpr int FOURS = LANE_WORDS / 4;
constexpr int STRIPS = TOKENS / 8;
constexpr int ROWS = 16 * TILES * HIGH;
constexpr int STRIDE = 272;  // bytes of a token in shared memory: 16 more, or banks collide
constexpr int THREADS = 32 * HIGH * DEEP;

struct Weights {
    u32 words[TILES][LANE_WORDS];
    u32 scales[TILES][SUBS][SCALE == 2 ? 2 : 1];  // of rows g and g + 8
    u16 zeros[TILES][SUBS];
};

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

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

// Where a lane's part of the first tile begins, in bytes, and how far the tiles are apart.
struct Places {
    u32 words, next_words, pairs, next_pairs;
};

constexpr int PAIR_BYTES = SCALE == 2 ? 8 : 4;  // of two scales

__device__ __forceinline__ void fetch(Weights& w, const char* words, const char* scales,
                                      const char* zeros, const Places& at, int block, int groups,
                                      u64 policy) {
    const u32 lane_words = at.words + block * (4 * TILE_WORDS);
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const char* from = words + (lane_words + i * at.next_words);
#pragma unroll
        for (int c = 0; c < FOURS; c++) load4(w.words[i] + 4 * c, from + 512 * c, policy);
        if (LANE_WORDS % 4)
            load2(w.words[i] + 4 * FOURS, from + 512 * FOURS - 8 * (threadIdx.x & 31), policy);
#pragma unroll
        for (int sub = 0; sub < SUBS; sub++) {
            const int group = min(block / GROUP_BLOCKS * SUBS + sub, groups - 1);
            const u32 pair = at.pairs + i * at.next_pairs + 8 * group;
            const char* scale = scales + pair * PAIR_BYTES;
            if (SCALE == 2) {
                const uint2 both = __ldg(reinterpret_cast<const uint2*>(scale));
                w.scales[i][sub][0] = both.x;
                w.scales[i][sub][SCALE == 2 ? 1 : 0] = both.y;
            } else {
                w.scales[i][sub][0] = __ldg(reinterpret_cast<const u32*>(scale));
            }
            w.zeros[i][sub] = __ldg(reinterpret_cast<const u16*>(zeros + pair * 2));
        }
    }
}

// Where the codes of rows g and g + 8 are put, what is put over them, and what that adds.
constexpr int PLACES[2] = {0, BITS == 4 ? (BF16 ? 0 : 4) : BITS == 8 ? 0 : BITS};
constexpr int TOP = BF16 ? 7 : 10;  // bits of the mantissa
__device__ constexpr u32 exponent(int place) {
    return BF16 ? 0x4300 - (place << 7) : 0x6400 - (place << 10);
}
constexpr bool BYTES = BF16 && BITS == 8;  // 255 needs all bits there are: no room for an offset
constexpr float OFFSETS[2] = {BYTES ? 0.f : static_cast<float>(1 << (TOP - PLACES[0])),
                              BYTES ? 0.f : static_cast<float>(1 << (TOP - PLACES[1]))};

template <int SHIFT>
__device__ __forceinline__ u32 shifted(u32 word) {
    if constexpr (SHIFT < 0) return word << -SHIFT;
    return word >> (SHIFT < 0 ? 0 : SHIFT);
}

// Two codes of a lane, pair 4 * step + register, each with its offset, in half precision.
template <int PAIR>
__device__ __forceinline__ u32 codes(const u32* words, const u32 (&masks)[2]) {
    constexpr int half = PAIR & 1, to = PLACES[half];
    constexpr u32 over = exponent(to) * 0x00010001u;
    if constexpr (BITS == 3 && PAIR >= 30) {
        constexpr int first = 3 * (PAIR - 30);
        return (shifted<15 - to>(words[first]) & 0x00010001u << to) |
               (shifted<14 - to>(words[first + 1]) & 0x00020002u << to) |
               (shifted<13 - to>(words[first + 2]) & 0x00040004u << to) | over;
    } else if constexpr (BYTES) {
        u32 result;
        float low = __uint_as_float(__byte_perm(words[PAIR / 2], 0x4B000000, 0x7650 + PAIR % 2));
        float high = __uint_as_float(__byte_perm(words[PAIR / 2], 0x4B000000, 0x7652 + PAIR % 2));
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high - 8388608.f), "f"(low - 8388608.f));
        return result;
    } else if constexpr (BITS == 8) {
        return __byte_perm(words[PAIR / 2], over, PAIR % 2 ? 0x7371 : 0x7270);
    } else {
        constexpr int each = BITS == 3 ? 5 : 16 / BITS;
        u32 result;  // (word & mask) | over
        asm("lop3.b32 %0, %1, %2, %3, 0xEA;"
            : "=r"(result)
            : "r"(shifted<BITS * (PAIR % each) - to>(words[PAIR / each])), "r"(masks[half]), "n"(over));
        return result;
    }
}

template <int STEP>
__device__ __forceinline__ void fragment(u32 (&a)[4], const u32* words, const u32 (&masks)[2]) {
    a[0] = codes<4 * STEP>(words, masks);
    a[1] = codes<4 * STEP + 1>(words, masks);
    a[2] = codes<4 * STEP + 2>(words, masks);
    a[3] = codes<4 * STEP + 3>(words, masks);
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

__device__ __forceinline__ void scale_of(float (&scale)[2], const u32* stored) {
    if constexpr (SCALE == 2) {
        scale[0] = __uint_as_float(stored[0]);
        scale[1] = __uint_as_float(stored[SCALE == 2 ? 1 : 0]);
    } else if constexpr (SCALE == 1) {
        scale[0] = __uint_as_float(stored[0] << 16);
        scale[1] = __uint_as_float(stored[0] & 0xFFFF0000);
    } else {
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
            : "=f"(scale[0]), "=f"(scale[1]) : "r"(stored[0]));
    }
}

typedef float Sums[TILES][STRIPS][4];

struct Group {
    Sums sums;
    float x[STRIPS][4];  // the sums of x, in the same places
};

template <int STEP>
__device__ __forceinline__ void step(Sums& total, Group& group, const Weights& w,
                                     const u32 (&x)[STRIPS][4], const u32 (&masks)[2]) {
    constexpr int EACH = 8 / SUBS;  // steps to a group
    constexpr u32 one = BF16 ? 0x3F803F80 : 0x3C003C00;
    constexpr u32 ones[4] = {one, one, one, one};
    if (STEP % EACH == 0) group = {};
#pragma unroll
    for (int n = 0; n < STRIPS; n++)
        multiply(group.x[n], ones, x[n][2 * (STEP % 2)], x[n][2 * (STEP % 2) + 1]);
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        u32 a[4];
        fragment<STEP>(a, w.words[i], masks);
#pragma unroll
        for (int n = 0; n < STRIPS; n++)
            multiply(group.sums[i][n], a, x[n][2 * (STEP % 2)], x[n][2 * (STEP % 2) + 1]);
        if (STEP % EACH == EACH - 1) {
            float scale[2];
            scale_of(scale, w.scales[i][STEP / EACH]);
            const u32 both = w.zeros[i][STEP / EACH];
            const float zero[2] = {OFFSETS[0] + __uint2float_rn(both & 0xFF),
                                   OFFSETS[1] + __uint2float_rn(both >> 8)};
#pragma unroll
            for (int n = 0; n < STRIPS; n++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    total[i][n][c] +=
                        scale[c / 2] * (group.sums[i][n][c] - zero[c / 2] * group.x[n][c]);
        }
    }
}

template <int HALF>  // two steps, whose x one ldmatrix brings
__device__ __forceinline__ void steps(Sums& total, Group& group, const Weights& w,
                                      const u32 (&place)[STRIPS], u32 buffer,
                                      const u32 (&masks)[2]) {
    u32 x[STRIPS][4];
#pragma unroll
    for (int n = 0; n < STRIPS; n++)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[n][0]), "=r"(x[n][1]), "=r"(x[n][2]), "=r"(x[n][3])
                     : "r"(buffer + place[n] + 64 * HALF));
    step<2 * HALF>(total, group, w, x, masks);
    step<2 * HALF + 1>(total, group, w, x, masks);
}

// A team's block of x into shared memory, zeros beyond the last column. A thread has one chunk of 8
// columns, of every 2 * HIGH-th token from its first.
__device__ __forceinline__ void stage(u32 to, const char* x, u32 from, int tokens, int column,
                                      int columns, u32 apart, int block) {
    const int bytes = 128 * block + column < columns ? 16 : 0;
    from += bytes ? 256 * block : 0;
#pragma unroll
    for (int i = 0; i < (TOKENS + 2 * HIGH - 1) / (2 * HIGH); i++)
        if (2 * HIGH * i < tokens)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                         :: "r"(to + 2 * HIGH * STRIDE * i), "l"(x + (from + apart * i)), "r"(bytes));
}

__device__ __forceinline__ u16 rounded(float value) {
    u16 result;
    if constexpr (BF16)
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
    else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return result;
}

// Grid (SPLIT, row blocks, strips of TOKENS tokens); x [tokens, columns] with rows `stride` apart,
// y [tokens, out].
extern "C" __global__ void __launch_bounds__(THREADS)
mma(const char* x, const char* words, const char* scales, const char* zeros, u16* y, int tokens, int out,
    int columns, int stride, int groups) {
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, team = warp / HIGH;
    const int member = warp % HIGH, thread = threadIdx.x % (32 * HIGH);
    const int tiles = (out + 63) / 64 * 4, blocks = (columns + 127) / 128;
    const int tile = min(static_cast<int>(blockIdx.y * HIGH + member) * TILES, tiles - TILES);
    const int first_token = blockIdx.z * TOKENS, here = min(TOKENS, tokens - first_token);
    const int each = (blocks + SPLIT - 1) / SPLIT;
    const int end = min(blocks, each * (static_cast<int>(blockIdx.x) + 1));
    const int first = each * static_cast<int>(blockIdx.x) + team;
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));

    Places at;
    at.next_words = blocks * (4 * TILE_WORDS);
    at.words = kept(tile * at.next_words + 16 * lane);
    at.next_pairs = 8 * groups;
    at.pairs = kept(tile * at.next_pairs + (lane >> 2));
    Weights ring[STAGES];
#pragma unroll
    for (int i = 0; i < STAGES; i++)
        if (first + i * DEEP < end)
            fetch(ring[i], words, scales, zeros, at, first + i * DEEP, groups, policy);
#if SM >= 90
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    const int size = here * STRIDE, token = thread >> 4, column = 8 * (thread & 15);
    const u32 buffers = shared_address(shared) + team * STAGES * size;
    const u32 to = kept(buffers + token * STRIDE + 2 * column);
    const u32 start_x = kept(2 * ((first_token + token) * stride + column));
    const u32 apart = 4 * HIGH * stride;  // bytes between a thread's tokens
    const int left = kept(here - token);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (first + i * DEEP < end)
            stage(to + i * size, x, start_x, left, column, columns, apart, first + i * DEEP);
        asm volatile("cp.async.commit_group;");
    }
    u32 place[STRIPS];  // tokens that are not there read one that is: their sums are not kept
#pragma unroll
    for (int n = 0; n < STRIPS; n++)
        place[n] = kept(min(8 * n + (lane & 7), here - 1) * STRIDE + 16 * (lane >> 3) + buffers);

    const u32 none = tokens & 0x80000000;  // 0, which the compiler does not know
    const u32 masks[2] = {kept(((1u << BITS) - 1 << PLACES[0]) * 0x00010001u | none),
                          kept(((1u << BITS) - 1 << PLACES[1]) * 0x00010001u | none)};
    Sums total = {};
    Group group;
    for (int base = first; base < end; base += STAGES * DEEP) {
#pragma unroll
        for (int i = 0; i < STAGES; i++) {
            const int block = base + i * DEEP;
            if (block < end) {
                asm volatile("cp.async.wait_group %0;" :: "n"(STAGES > 1 ? STAGES - 2 : 0) : "memory");
                if (HIGH == 1)
                    __syncwarp();
                else
                    asm volatile("bar.sync %0, %1;" :: "r"(team + 1), "n"(32 * HIGH) : "memory");
                const int next = block + (STAGES - 1) * DEEP;
                if (next < end)
                    stage(to + (i + STAGES - 1) % STAGES * size, x, start_x, left, column, columns,
                          apart, next);
                asm volatile("cp.async.commit_group;");
                steps<0>(total, group, ring[i], place, i * size, masks);
                steps<1>(total, group, ring[i], place, i * size, masks);
                steps<2>(total, group, ring[i], place, i * size, masks);
                steps<3>(total, group, ring[i], place, i * size, masks);
                if (block + STAGES * DEEP < end)
                    fetch(ring[i], words, scales, zeros, at, block + STAGES * DEEP, groups, policy);
            }
        }
    }

    // The sums of the teams, then of the cluster: always in one order.
    float* sums = reinterpret_cast<float*>(shared);  // [DEEP][here][ROWS]
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
                if (token < here) sums[(team * here + token) * ROWS + row] = total[i][n][c];
            }
    __syncthreads();
    const int count = here * ROWS, start = blockIdx.y * ROWS;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        float sum = 0;
#pragma unroll
        for (int t = 0; t < DEEP; t++) sum += sums[t * count + i];
#if SPLIT > 1
        sums[i] = sum;
    }
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
    for (int i = threadIdx.x + THREADS * blockIdx.x; i < count; i += THREADS * SPLIT) {
        float sum = 0;
#pragma unroll
        for (int rank = 0; rank < SPLIT; rank++) {
            u32 remote;
            float part;
            asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                         : "=r"(remote) : "r"(shared_address(sums + i)), "r"(rank));
            asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(part) : "r"(remote));
            sum += part;
        }
#endif
        int token = i / ROWS, row = i % ROWS;
        if (start + row < out)
            y[static_cast<u64>(first_token + token) * out + start + row] = rounded(sum);
    }
#if SPLIT > 1
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
#endif
}
