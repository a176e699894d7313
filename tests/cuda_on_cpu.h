// What a kernel of CUDA C++ needs to run on a CPU: threads as fibers, and the instructions that our
// kernels name. cuda_on_cpu.py turns each `asm` into a call of the function of its name here.
//
// Fibers change only where threads wait for each other, and in an order that `seed` draws. Copies that
// are asynchronous arrive when they are waited for (LATE) or at once, which a GPU may do as well: what
// depends on either is a missing wait, or a buffer that is filled while it is read. Shared memory
// begins as NaN; what lies outside of it or of the arguments is an error.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <vector>
#include <ucontext.h>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

using std::max;
using std::min;

struct uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint3 { unsigned x, y, z; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

namespace gpu {

constexpr int STACK = 256 * 1024, GUARD = 1024, STATIC_BYTES = 64;

struct Copy { char* to; const char* from; int bytes, zeros; };
struct Barrier { int arrived = 0; unsigned generation = 0; };

struct Block;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    uint3 thread;
    Block* block;
    bool done = false;
    int arrivals = 0;                      // at the barrier of the cluster
    std::deque<std::vector<Copy>> groups;  // asynchronous copies, committed
    std::vector<Copy> open;
};

struct Warp {
    Barrier barrier;
    std::uint32_t given[32][8];
};

struct Block {
    uint3 index;
    int rank, threads;
    std::vector<char> memory;
    std::vector<Warp> warps;
    Barrier named[16];
    std::vector<Block>* cluster;
    long* cluster_arrivals;
};

struct Pending { Block* block; std::uint32_t offset; long count; long bytes; unsigned phase; };

inline Fiber* current;
inline ucontext_t scheduler;
inline bool late;
inline int shared_bytes;
inline std::vector<std::pair<const char*, std::size_t>> arguments;
inline std::vector<Pending> mbarriers;
inline long waits;
inline const char* fault;

// The thread goes no further, and nor does the launch
[[noreturn]] inline void fail(const char* what) {
    fault = what;
    swapcontext(&current->context, &scheduler);
    std::abort();
}

inline void pause() {
    waits++;
    swapcontext(&current->context, &scheduler);
}

inline void meet(Barrier& barrier, int all) {
    waits = 0;
    const unsigned mine = barrier.generation;
    if (++barrier.arrived == all) {
        barrier.arrived = 0;
        barrier.generation++;
    } else {
        while (barrier.generation == mine) pause();
    }
}

inline Warp& warp() { return current->block->warps[current->thread.x / 32]; }
inline int lane() { return current->thread.x % 32; }
inline void meet_warp() { meet(warp().barrier, 32); }

inline std::uint32_t static_memory() { return (shared_bytes + 15) / 16 * 16 + GUARD; }

inline char* shared_at(std::uint32_t address, int bytes) {
    Block* block = current->block;
    if (address >> 24) block = &(*block->cluster)[(address >> 24) - 1];
    const std::uint32_t offset = address & 0xFFFFFF;
    const bool is_static = offset >= static_memory() && offset + bytes <= block->memory.size();
    if (offset + bytes > static_cast<std::uint32_t>(shared_bytes) && !is_static) fail("outside of shared memory");
    if (offset % bytes) fail("shared memory: not aligned");
    return block->memory.data() + offset;
}

inline const char* global_at(const char* from, int bytes) {
    for (auto& [start, size] : arguments)
        if (from >= start && from + bytes <= start + size) {
            if (reinterpret_cast<std::uintptr_t>(from) % bytes) fail("global memory: not aligned");
            return from;
        }
    fail("outside of the arguments");
}

inline void land(const Copy& copy) {
    if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(copy.to + copy.bytes, 0, copy.zeros);
}

inline float half_to_float(std::uint16_t h) {
    _Float16 value;
    std::memcpy(&value, &h, 2);
    return value;
}

inline std::uint16_t float_to_half(float f) {
    const _Float16 value = static_cast<_Float16>(f);
    std::uint16_t h;
    std::memcpy(&h, &value, 2);
    return h;
}

inline float bf16_to_float(std::uint16_t h) {
    const std::uint32_t bits = static_cast<std::uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline std::uint16_t float_to_bf16(float f) {
    std::uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (f != f) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

template <class Make>
inline std::uint32_t of_both(Make make) {
    return make(0) | static_cast<std::uint32_t>(make(16)) << 16;
}

// d += a b: a 16 x 16 in four registers, b 16 x 8 in two, d 16 x 8 in four (PTX ISA, m16n8k16)
template <float (*VALUE)(std::uint16_t)>
inline void matrix(float& d0, float& d1, float& d2, float& d3, std::uint32_t a0, std::uint32_t a1,
                   std::uint32_t a2, std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
    const std::uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(warp().given[lane()], mine, sizeof mine);
    meet_warp();
    float* d[4] = {&d0, &d1, &d2, &d3};
    float sums[4];
    for (int c = 0; c < 4; c++) {
        const int row = lane() / 4 + c / 2 * 8, column = lane() % 4 * 2 + c % 2;
        double sum = *d[c];
        for (int k = 0; k < 16; k++) {
            const std::uint32_t* left = warp().given[row % 8 * 4 + k % 8 / 2];
            const std::uint32_t* right = warp().given[column * 4 + k % 8 / 2];
            const int shift = k % 2 * 16;
            sum += static_cast<double>(VALUE(left[row / 8 + k / 8 * 2] >> shift)) *
                   VALUE(right[4 + k / 8] >> shift);
        }
        sums[c] = static_cast<float>(sum);
    }
    meet_warp();
    for (int c = 0; c < 4; c++) *d[c] = sums[c];
}

inline Pending& mbarrier_at(Block* block, std::uint32_t offset) {
    for (auto& one : mbarriers)
        if (one.block == block && one.offset == offset) return one;
    fail("an mbarrier that was not initialized");
}

inline Pending& mbarrier_of(std::uint32_t address) {
    Block* block = current->block;
    if (address >> 24) block = &(*block->cluster)[(address >> 24) - 1];
    return mbarrier_at(block, address & 0xFFFFFF);
}

inline void settle(Pending& one) {
    if (one.count == 0 && one.bytes == 0) one.phase++, one.count = 1;
}

}  // namespace gpu

#define threadIdx (gpu::current->thread)
#define blockIdx (gpu::current->block->index)

// ---- functions of CUDA ---------------------------------------------------------------------------

inline unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
inline float __uint2float_rn(unsigned u) { return static_cast<float>(u); }

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const std::uint64_t both = a | static_cast<std::uint64_t>(b) << 32;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= static_cast<unsigned>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

inline std::size_t __cvta_generic_to_shared(const void* p) {
    const auto& memory = gpu::current->block->memory;
    const auto offset = static_cast<const char*>(p) - memory.data();
    if (offset < 0 || offset > static_cast<long>(memory.size())) gpu::fail("no shared memory");
    return offset;
}

template <class T>
inline T __ldg(const T* p) {
    T value;
    std::memcpy(&value, gpu::global_at(reinterpret_cast<const char*>(p), sizeof(T)), sizeof(T));
    return value;
}

inline void __syncthreads() { gpu::meet(gpu::current->block->named[0], gpu::current->block->threads); }
inline void __syncwarp() { gpu::meet_warp(); }

inline unsigned __shfl_sync(unsigned, unsigned value, int from) {
    gpu::warp().given[gpu::lane()][7] = value;
    gpu::meet_warp();
    const unsigned found = gpu::warp().given[from][7];
    gpu::meet_warp();
    return found;
}

// ---- instructions --------------------------------------------------------------------------------

namespace ptx {

using gpu::current;
typedef std::uint32_t u32;
typedef unsigned long long u64;
typedef std::uint16_t u16;

inline void createpolicy_fractional_L2_evict_first_b64(u64& policy, float) { policy = 0; }
inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() {}
inline void fence_mbarrier_init_release_cluster() {}

inline void ld_global_v4(u32& a, u32& b, u32& c, u32& d, const char* from, u64) {
    u32 v[4];
    std::memcpy(v, gpu::global_at(from, 16), 16);
    a = v[0], b = v[1], c = v[2], d = v[3];
}
inline void ld_global_v2(u32& a, u32& b, const char* from, u64) {
    u32 v[2];
    std::memcpy(v, gpu::global_at(from, 8), 8);
    a = v[0], b = v[1];
}
inline void ld_shared_v4_f32(float& a, float& b, float& c, float& d, u32 from) {
    float v[4];
    std::memcpy(v, gpu::shared_at(from, 16), 16);
    a = v[0], b = v[1], c = v[2], d = v[3];
}

inline void lop3_b32(u32& d, u32 a, u32 b, u32 c, int table) {
    d = 0;
    for (int i = 0; i < 32; i++)
        d |= static_cast<u32>(table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i;
}

inline void sub_rn_f16x2(u32& d, u32 a, u32 b) {
    d = gpu::of_both([&](int i) { return gpu::float_to_half(gpu::half_to_float(a >> i) - gpu::half_to_float(b >> i)); });
}
inline void fma_rn_bf16x2(u32& d, u32 a, u32 b, u32 c) {
    d = gpu::of_both([&](int i) {
        return gpu::float_to_bf16(std::fma(gpu::bf16_to_float(a >> i), gpu::bf16_to_float(b >> i), gpu::bf16_to_float(c >> i)));
    });
}
inline void cvt_rn_bf16x2_f32(u32& d, float high, float low) {
    d = gpu::float_to_bf16(low) | static_cast<u32>(gpu::float_to_bf16(high)) << 16;
}
inline void cvt_rn_bf16_f32(u16& d, float f) { d = gpu::float_to_bf16(f); }
inline void cvt_rn_f16_f32(u16& d, float f) { d = gpu::float_to_half(f); }
inline void two_halves(float& low, float& high, u32 both) {
    low = gpu::half_to_float(both), high = gpu::half_to_float(both >> 16);
}

inline void mma_f16(float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    gpu::matrix<gpu::half_to_float>(d0, d1, d2, d3, a0, a1, a2, a3, b0, b1);
}
inline void mma_bf16(float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    gpu::matrix<gpu::bf16_to_float>(d0, d1, d2, d3, a0, a1, a2, a3, b0, b1);
}

// Four matrices of 8 rows, whose addresses eight lanes give each
inline void ldmatrix_x4(u32& r0, u32& r1, u32& r2, u32& r3, u32 row) {
    gpu::warp().given[gpu::lane()][0] = row;
    gpu::meet_warp();
    u32* to[4] = {&r0, &r1, &r2, &r3};
    for (int i = 0; i < 4; i++)
        std::memcpy(to[i], gpu::shared_at(gpu::warp().given[8 * i + gpu::lane() / 4][0], 16) + gpu::lane() % 4 * 4, 4);
    gpu::meet_warp();
}

inline void cp_async_cg_shared_global(u32 to, const char* from, int, int bytes) {
    if (bytes) gpu::global_at(from, bytes);
    const gpu::Copy copy{gpu::shared_at(to, 16), from, bytes, 16 - bytes};
    if (gpu::late)
        current->open.push_back(copy);
    else
        gpu::land(copy);
}
inline void cp_async_commit_group() {
    current->groups.push_back(current->open);
    current->open.clear();
}
inline void cp_async_wait_group(int pending) {
    while (static_cast<int>(current->groups.size()) > pending) {
        for (auto& copy : current->groups.front()) gpu::land(copy);
        current->groups.pop_front();
    }
}
inline void cp_async_wait_all() {
    cp_async_commit_group();
    cp_async_wait_group(0);
}

inline void bar_sync(int barrier, int threads) { gpu::meet(current->block->named[barrier], threads); }

inline void barrier_cluster_arrive() {
    ++*current->block->cluster_arrivals;
    ++current->arrivals;
}
inline void barrier_cluster_wait() {
    const long all = static_cast<long>(current->block->cluster->size()) * current->block->threads;
    while (*current->block->cluster_arrivals < all * current->arrivals) gpu::pause();
    gpu::waits = 0;
}
inline void mbarrier_init(u32 barrier, int count) {
    gpu::mbarriers.push_back({current->block, barrier & 0xFFFFFF, count, 0, 0});
}
inline void mbarrier_arrive_expect_tx(u32 barrier, int bytes) {
    auto& one = gpu::mbarrier_of(barrier);
    one.bytes += bytes;
    one.count--;
    gpu::settle(one);
}
inline void mbarrier_wait(u32 barrier, u32 parity) {
    while ((gpu::mbarrier_of(barrier).phase & 1) == parity) gpu::pause();
    gpu::waits = 0;
}
// Four sums into the memory of another block of the cluster, whose mbarrier counts them
inline void push(u32 to, u32 barrier, float a, float b, float c, float d, int rank) {
    const float v[4] = {a, b, c, d};
    const u32 there = static_cast<u32>(rank + 1) << 24;
    std::memcpy(gpu::shared_at(to | there, 16), v, 16);
    auto& one = gpu::mbarrier_of(barrier | there);
    one.bytes -= 16;
    gpu::settle(one);
}

}  // namespace ptx

// ---- launch --------------------------------------------------------------------------------------

namespace gpu {

typedef void (*Body)();
inline Body body;

inline void start() {
    body();
    current->done = true;
    waits = 0;
    swapcontext(&current->context, &scheduler);
}

inline void run_cluster(std::vector<Block>& blocks, int threads, std::mt19937& random) {
    std::vector<Fiber> fibers(blocks.size() * threads);
    std::vector<Fiber*> alive;
    for (std::size_t i = 0; i < fibers.size(); i++) {
        Fiber& fiber = fibers[i];
        fiber.stack.resize(STACK);
        fiber.thread = {static_cast<unsigned>(i % threads), 0, 0};
        fiber.block = &blocks[i / threads];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, start, 0);
        alive.push_back(&fiber);
    }
    waits = 0;
    while (!alive.empty()) {
        std::shuffle(alive.begin(), alive.end(), random);
        for (Fiber* fiber : alive) {
            current = fiber;
            swapcontext(&scheduler, &fiber->context);
            if (fault) return;
        }
        alive.erase(std::remove_if(alive.begin(), alive.end(), [](Fiber* f) { return f->done; }), alive.end());
        if (waits > 1000 * static_cast<long>(fibers.size())) {
            fault = "all threads wait";
            return;
        }
    }
}

inline void launch(const int* grid, int cluster, int threads, int shared, int seed, bool copies_late, Body kernel) {
    body = kernel;
    late = copies_late;
    shared_bytes = shared;
    std::mt19937 random(seed);
    for (int z = 0; z < grid[2]; z++)
        for (int y = 0; y < grid[1]; y++)
            for (int x = 0; x < grid[0]; x += cluster) {
                std::vector<Block> blocks(cluster);
                long arrivals = 0;
                mbarriers.clear();
                for (int rank = 0; rank < cluster; rank++) {
                    Block& block = blocks[rank];
                    block.index = {static_cast<unsigned>(x + rank), static_cast<unsigned>(y), static_cast<unsigned>(z)};
                    block.rank = rank;
                    block.threads = threads;
                    block.memory.assign(static_memory() + STATIC_BYTES, static_cast<char>(0xFF));
                    block.warps.resize(threads / 32);
                    block.cluster = &blocks;
                    block.cluster_arrivals = &arrivals;
                }
                run_cluster(blocks, threads, random);
                for (auto& block : blocks)
                    for (std::uint32_t i = shared; i < static_memory(); i++)
                        if (block.memory[i] != static_cast<char>(0xFF)) fault = "written past shared memory";
                if (fault) return;
            }
}

template <class T>
inline T value(std::intptr_t given) {
    if constexpr (std::is_pointer_v<T>)
        return reinterpret_cast<T>(given);
    else
        return static_cast<T>(given);
}

template <auto KERNEL, class... T, std::size_t... I>
inline void call(void (*)(T...), const std::intptr_t* given, std::index_sequence<I...>) {
    KERNEL(value<T>(given[I])...);
}

template <class... T>
constexpr auto places(void (*)(T...)) { return std::index_sequence_for<T...>(); }

inline const std::intptr_t* values;

// Launch a kernel with arguments that are numbers, or pointers to so many bytes; what was wrong, or 0
template <auto KERNEL>
inline const char* run(const int* grid, int cluster, int threads, int shared, int seed, int late,
                       const std::intptr_t* given, const std::size_t* sizes, int count) {
    values = given;
    fault = nullptr;
    arguments.clear();
    for (int i = 0; i < count; i++)
        if (sizes[i]) arguments.push_back({reinterpret_cast<const char*>(given[i]), sizes[i]});
    launch(grid, cluster, threads, shared, seed, late, [] { call<KERNEL>(KERNEL, values, places(KERNEL)); });
    return fault;
}

}  // namespace gpu
