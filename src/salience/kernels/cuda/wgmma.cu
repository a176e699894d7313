// y^T = W x^T for 32 tokens and more on Hopper: the weight goes from memory to registers, is
// unpacked there, and enters the matrix unit from there. Only x passes through shared memory.
//
// A block takes ROWS rows of the weight and TOKENS tokens. Each of its warpgroups has 64 of the
// rows at a time, each warp 16: its own tile of the layout of _fragments.py, so a lane's loads are
// its operands. One thread of one more warpgroup brings x: tiles of [TOKENS][64 columns], swizzled,
// two for each block of 128 columns, into a ring of STAGES; its other threads give their registers
// away. Where rows are few, the columns are shared: by PARTS of a block, each with its own
// warpgroups and ring, and by SPLIT blocks of a cluster, which read each other's sums. They are added
// up in one order always. (Parts keep a processor busy, and a large cluster finds no place in a GPU
// whose groups of processors it does not divide.)
//
// wgmma_cuda.py puts `wgmma(sums, a, b)` for TOKENS before this text, and defines
//   BITS            of the weight
//   GROUP           32, 64, or 128 for all that is more, in GROUP_BLOCKS blocks of 128 columns
//   BF16, SCALE     dtype of x and y; dtype of scales: 0 fp16, 1 bf16, 2 fp32
//   TOKENS, WARPGROUPS, ROW_TILES, PARTS, SPLIT     the shape of the work, as above
//   STAGES          blocks of x in the ring of a part
//   DEPTH           blocks of the weight in registers, on their way
//   BUFFERS         unpacked operands: one in use, the others being made
//   RESIDENT        blocks that a processor should hold at once
//   STREAM          1 if the weight is read once, and need not stay in the L2

#include "codes.cuh"

struct alignas(64) TensorMap { u64 opaque[16]; };

constexpr int ROWS = 64 * WARPGROUPS * ROW_TILES;
constexpr int CONSUMERS = 128 * WARPGROUPS * PARTS;  // threads
constexpr int THREADS = CONSUMERS + 128;
constexpr int HALF_STAGE = TOKENS * 128;  // bytes: 64 columns
constexpr int STAGE = 2 * HALF_STAGE;
constexpr int PITCH = ROWS + 4;  // of the sums in shared memory: no two lanes on one bank
constexpr int SUMS = TOKENS * PITCH * 4;  // bytes
constexpr int SCALES = GROUP < 128 ? 128 / GROUP : 1;  // groups in a block

// Registers of a thread come in eights. All start with the same; then the producers keep 40.
constexpr int EVEN = 65536 / (THREADS * RESIDENT) / 8 * 8;
constexpr int AT_ENTRY = EVEN > 248 ? 248 : EVEN;
constexpr int MOST = AT_ENTRY + (AT_ENTRY - 40) / (WARPGROUPS * PARTS) / 8 * 8;
constexpr int REGISTERS = MOST > 240 ? 240 : MOST;  // of a consumer

static_assert(TOKENS % 8 == 0 && TOKENS <= 256 && TOKENS % SPLIT == 0, "tokens");
static_assert(PARTS <= 4, "a warp for each brings x");
static_assert(STAGES >= 2, "a stage is free only when the next is in use");
static_assert(BUFFERS == 2 || BUFFERS == 4, "eight steps take the buffers in turn");

// ---- arithmetic on two halves of a register ------------------------------------------------

__device__ unsigned add2(unsigned a, unsigned b) {
  unsigned d;
  asm("add.rn." HALF2 " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ unsigned multiply2(unsigned a, unsigned b) {
  unsigned d;
  asm("mul.rn." HALF2 " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ unsigned fma2(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn." HALF2 " %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// ---- unpacking -----------------------------------------------------------------------------

// A code is 2^TOP + code, or, where it lies `place` bits up, 2^TOP + 2^place code; code - zero is
// exact, and times the scale is rounded once.

struct Group {  // of the rows g and g + 8: what their codes need
  unsigned scale[2];  // twice
  unsigned zero[2];   // -(2^TOP + zero), twice
  float scale32[2], zero32[2];
};

__device__ Group group_of(unsigned low, unsigned high, unsigned zeros) {
  Group group;
  float s[2];
  scales_of(s, low, high);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (SCALE == BF16)
      group.scale[h] = __byte_perm(low, 0, h ? 0x3232 : 0x1010);
    else
      group.scale[h] = pack2(s[h], s[h]);
    unsigned zero = (zeros >> (8 * h)) & 255;
    group.zero[h] = zero * 0x10001u | power2(TOP) | 0x80008000u;
    group.scale32[h] = s[h];
    group.zero32[h] = 8388608.f + float(zero);
  }
  return group;
}

// The pair of codes `pair` (0 to 31) of a lane's words, rows h of the group
__device__ unsigned unpack(const unsigned (&words)[LANE_WORDS], int pair, int h, const Group& group,
                           const unsigned (&masks)[PLACES]) {
#if BITS == 8
  unsigned word = words[pair / EACH];
  int at = pair % EACH;
#endif
#if BITS == 8 && BF16  // BYTES
  float low = widened(word, at ? 1 : 0), high = widened(word, at ? 3 : 2);
  return pack2((low - group.zero32[h]) * group.scale32[h],
               (high - group.zero32[h]) * group.scale32[h]);
#elif BITS == 8
  unsigned code = __byte_perm(word, power2(TOP), at ? 0x7371 : 0x7270);
  return multiply2(add2(code, group.zero[h]), group.scale[h]);
#else
  int place = place_of(pair);
  unsigned code = (word_of(words, pair) & masks[place / BITS]) | power2(TOP);
  if (place == 0) return multiply2(add2(code, group.zero[h]), group.scale[h]);
  unsigned zero = add2(group.zero[h], power2_less(place));
  return multiply2(fma2(code, power2(-place), zero), group.scale[h]);
#endif
}

// ---- loads of the weight -------------------------------------------------------------------

struct Block {  // what a lane needs of a tile and a block of 128 columns
  unsigned words[LANE_WORDS];
  unsigned low[SCALES], high[SCALES];  // scales: two of 16 bits in `low`, or one of 32 in each
  unsigned zeros[SCALES];
};

__device__ u64 weight_policy() {
  u64 policy;
#if STREAM
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#else
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

// Each load leaves its registers as they are unless `real`
__device__ void load4(unsigned* to, const void* from, u64 policy, int real) {
  asm volatile(
      "{.reg .pred p; setp.ne.s32 p, %6, 0;\n"
      "@p ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;}"
      : "+r"(to[0]), "+r"(to[1]), "+r"(to[2]), "+r"(to[3])
      : "l"(from), "l"(policy), "r"(real));
}

__device__ void load2(unsigned* to, const void* from, u64 policy, int real) {
  asm volatile(
      "{.reg .pred p; setp.ne.s32 p, %4, 0;\n"
      "@p ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;}"
      : "+r"(to[0]), "+r"(to[1]) : "l"(from), "l"(policy), "r"(real));
}

__device__ void load_scales(unsigned& low, unsigned& high, const void* from, int real) {
#if SCALE == 2
  asm volatile(
      "{.reg .pred p; setp.ne.s32 p, %3, 0; @p ld.global.nc.v2.u32 {%0, %1}, [%2];}"
      : "+r"(low), "+r"(high) : "l"(from), "r"(real));
#else
  asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.u32 %0, [%1];}"
               : "+r"(low) : "l"(from), "r"(real));
#endif
}

__device__ void load_zeros(unsigned& zeros, const void* from, int real) {
  asm volatile(
      "{.reg .pred p; .reg .u16 z; setp.ne.s32 p, %2, 0; cvt.u16.u32 z, %0;\n"
      "@p ld.global.nc.u16 z, [%1]; cvt.u32.u16 %0, z;}"
      : "+r"(zeros) : "l"(from), "r"(real));
}

struct Weight {  // where a lane finds its part of a tile
  const unsigned* words;
  const char* scales;
  const unsigned char* zeros;

  __device__ void load(Block& to, int block, int groups, u64 policy, int real) const {
    const unsigned* from = words + size_t(block) * (64 * BITS);
#pragma unroll
    for (int i = 0; i < LANE_WORDS / 4; i++) load4(to.words + 4 * i, from + 128 * i, policy, real);
#if BITS == 3
    int lane = threadIdx.x % 32;  // `words` is 4 lane words in, the last two are at 128 + 2 lane
    load2(to.words + 4, from + 128 - 2 * lane, policy, real);
#endif
#pragma unroll
    for (int i = 0; i < SCALES; i++) {
      int group = GROUP < 128 ? block * SCALES + i : block / GROUP_BLOCKS;
      group = min(group, groups - 1);  // the columns that pad a block meet an x of 0
      load_scales(to.low[i], to.high[i], scales + size_t(group) * (SCALE == 2 ? 64 : 32), real);
      load_zeros(to.zeros[i], zeros + size_t(group) * 16, real);
    }
  }
};

// ---- barriers and copies -------------------------------------------------------------------

__device__ void barrier_init(unsigned barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// At the same place in the shared memory of another block of the cluster
__device__ unsigned there(unsigned address, int rank) {
  unsigned found;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(address), "r"(rank));
  return found;
}

__device__ void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ void barrier_expect(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ void barrier_wait(unsigned barrier, int parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ void copy_tile(unsigned to, const TensorMap* x, int column, int token,
                          unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];"
      ::"r"(to), "l"(x), "r"(column), "r"(token), "r"(barrier) : "memory");
}

// K-major with a swizzle of 128 bytes: eight tokens are 1024 bytes
__device__ u64 descriptor(unsigned address) {
  return (u64(1) << 62) | (u64(1024 >> 4) << 32) | (u64(1) << 16) | ((address & 0x3ffff) >> 4);
}

__device__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Of all threads of the cluster that have not left. A warp must arrive as one: where a lane is late,
// it counts twice, and blocks leave while others still need them.
__device__ void cluster_sync() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

__device__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
}

__device__ float4 load_sums(unsigned address, int rank) {
  float4 v;
#if SPLIT > 1
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there(address, rank)) : "memory");
#else
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
#endif
  return v;
}

// ---- the kernel ----------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
multiply(const __grid_constant__ TensorMap x, const unsigned* words, const char* scales,
         const unsigned char* zeros, unsigned short* y, int tokens, int out, int tiles, int blocks,
         int groups, int token_tiles, int strip) {
  extern __shared__ unsigned char dynamic[];
  __shared__ alignas(8) u64 barriers[PARTS][2 * STAGES];

  // By the shuffle the compiler knows that all lanes agree: addresses stay in uniform registers
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const bool brings = warp >= CONSUMERS / 32;
  const int group = warp / 4 % WARPGROUPS;  // of warps, in its part
  const int part = brings ? warp % 4 % PARTS : warp / (4 * WARPGROUPS);
  const unsigned memory = (shared_address(dynamic) + 1023) & ~1023u;
  const unsigned stages = memory + part * (STAGES * STAGE);
  const unsigned full = shared_address(barriers[part]), empty = full + 8 * STAGES;

  const int rank = blockIdx.x % SPLIT;
  // Blocks that run at once should share x and the weight in the L2: so a strip of some tiles of
  // tokens goes down all rows, then the next
  const int work = blockIdx.x / SPLIT, high = gridDim.x / SPLIT / token_tiles;
  const int before = work / (high * strip) * strip, at = work % (high * strip);
  const int wide = min(strip, token_tiles - before);
  const int first_row = at / wide * ROWS;
  const int first_token = (before + at % wide) * TOKENS;
  const int chunks = (blocks + DEPTH - 1) / DEPTH;
  const int share = rank * PARTS + part;
  const int begin = chunks * share / (SPLIT * PARTS) * DEPTH;
  const int steps = chunks * (share + 1) / (SPLIT * PARTS) * DEPTH - begin;

  if (brings && lane == 0 && warp % 4 < PARTS) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 4 * WARPGROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  if (brings) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (lane == 0 && warp % 4 < PARTS) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
      int stage = 0, phase = 1;  // the first round finds its stages empty
      for (int i = 0; i < steps; i++) {
        barrier_wait(empty + 8 * stage, phase);
        const unsigned to = stages + stage * STAGE, barrier = full + 8 * stage;
        const int column = (begin + i) * 128;
        barrier_expect(barrier, STAGE);
        copy_tile(to, &x, column, first_token, barrier);
        copy_tile(to + HALF_STAGE, &x, column + 64, first_token, barrier);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
  } else {
    if (REGISTERS > AT_ENTRY) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
    const u64 policy = weight_policy();
    // Masks that the compiler does not know: it would make each anew at every use
    unsigned masks[PLACES];
#pragma unroll
    for (int i = 0; i < PLACES; i++)
      masks[i] = __shfl_sync(~0u, mask_of(i * BITS) | unsigned(tokens) >> 31, lane);
    Weight weight[ROW_TILES];
    Block ahead[DEPTH][ROW_TILES] = {};
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
      int mine = first_row / 16 + (group * ROW_TILES + r) * 4 + warp % 4;
      mine = min(mine, tiles - 1);  // rows past the end are computed again, and not stored
      weight[r].words = words + size_t(mine) * blocks * (64 * BITS) + 4 * lane;
      weight[r].scales = scales + size_t(mine) * groups * (SCALE == 2 ? 64 : 32) +
                         lane / 4 * (SCALE == 2 ? 8 : 4);
      weight[r].zeros = zeros + size_t(mine) * groups * 16 + lane / 4 * 2;
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
        weight[r].load(ahead[d][r], min(begin + d, blocks - 1), groups, policy, d < steps);

    float sums[ROW_TILES][TOKENS / 2];
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int i = 0; i < TOKENS / 2; i++) sums[r][i] = 0;

    unsigned a[BUFFERS][ROW_TILES][4];
    int stage = 0, phase = 0, last = STAGES - 1;  // `last`: the stage of the block before
    for (int done = 0; done < steps; done += DEPTH) {
#pragma unroll
      for (int d = 0; d < DEPTH; d++) {
        Group of[ROW_TILES];
        const u64 tile_x = descriptor(stages + stage * STAGE);
        barrier_wait(full + 8 * stage, phase);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          if (j % (8 / SCALES) == 0)
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
              constexpr int PER = 8 / SCALES;
              of[r] = group_of(ahead[d][r].low[j / PER], ahead[d][r].high[j / PER],
                               ahead[d][r].zeros[j / PER]);
            }
#pragma unroll
          for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int i = 0; i < 4; i++)
              a[j % BUFFERS][r][i] = unpack(ahead[d][r].words, 4 * j + i, i % 2, of[r], masks);
          wgmma_fence();
#pragma unroll
          for (int r = 0; r < ROW_TILES; r++)
            wgmma(sums[r], a[j % BUFFERS][r], tile_x + j / 4 * (HALF_STAGE >> 4) + j % 4 * 2);
          wgmma_commit();
          wgmma_wait<BUFFERS - 1>();
          // Now all of the block before is done with, and its stage may be filled again
          if (j == BUFFERS - 2 && done + d > 0 && lane == 0) barrier_arrive(empty + 8 * last);
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
          const int next = done + d + DEPTH;
          weight[r].load(ahead[d][r], min(begin + next, blocks - 1), groups, policy,
                         next < steps);
        }
        last = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
    wgmma_wait<0>();
    // The rings are free once all warpgroups are here: the sums go there, [PARTS][TOKENS][PITCH]
    consumers_sync();
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
      const int row = (group * ROW_TILES + r) * 64 + warp % 4 * 16 + lane / 4;
      const unsigned to = memory + part * SUMS + 4 * (lane % 4 * 2 * PITCH + row);
#pragma unroll
      for (int i = 0; i < TOKENS / 2; i++) {
        const int token = i / 4 * 8 + i % 2, h = i / 2 % 2;
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + 4 * (token * PITCH + 8 * h)),
                     "f"(sums[r][i]) : "memory");
      }
    }
#if SPLIT > 1
    cluster_sync();
#else
    consumers_sync();
#endif

    constexpr int MINE = TOKENS / SPLIT;  // tokens that this block adds up, of all that split
    constexpr int QUADS = ROWS / 4, TOTAL = MINE * QUADS, LOADS = (TOTAL + CONSUMERS - 1) / CONSUMERS;
    constexpr int BATCH = LOADS < 4 ? LOADS : 4;  // loads on their way
    for (int first = threadIdx.x; first < TOTAL; first += BATCH * CONSUMERS) {
      float4 found[BATCH];
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int i = min(first + b * CONSUMERS, TOTAL - 1);
        const unsigned from = memory + 4 * ((rank * MINE + i / QUADS) * PITCH + i % QUADS * 4);
        float4 sum = load_sums(from, 0);
#pragma unroll
        for (int other = 1; other < SPLIT * PARTS; other++) {
          const float4 more = load_sums(from + other % PARTS * SUMS, other / PARTS);
          sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        found[b] = sum;
      }
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int i = first + b * CONSUMERS;
        const int token = first_token + rank * MINE + i / QUADS, row = first_row + i % QUADS * 4;
        if (i >= TOTAL || token >= tokens || row >= out) continue;
        const unsigned low = pack2(found[b].x, found[b].y), high = pack2(found[b].z, found[b].w);
        unsigned short* to = y + size_t(token) * out + row;
        if (out % 4 == 0) {
          *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
        } else {
          const int left = out - row;
          to[0] = low & 0xffff;
          if (left > 1) to[1] = low >> 16;
          if (left > 2) to[2] = high & 0xffff;
          if (left > 3) to[3] = high >> 16;
        }
      }
    }
#if SPLIT > 1
    cluster_sync();  // no block leaves while another reads its sums
#endif
  }
}
