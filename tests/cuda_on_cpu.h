// What a kernel of CUDA C++ needs to run on a CPU: threads as fibers, and the instructions that our
// kernels name. cuda_on_cpu.py turns each `asm` into a call of the function of its name here.
//
// Fibers change only where threads wait for each other, and in an order that a seed draws; now and
// then a warp sleeps until the others can go no further without it. What is asynchronous happens at
// once, or (late) when it is waited for, or when no thread can go on: a GPU may do either, and what
// depends on it is a missing wait, or memory that is changed while it is read. Shared memory begins as
// NaN; what lies outside of it or of the arguments is a fault.
//
// Kernels are many, so what does not depend on them is compiled once, with MACHINE defined.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>
#include <ucontext.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace gpu {

typedef std::uint16_t u16;
typedef std::uint32_t u32;
typedef unsigned long long u64;

struct Index { unsigned x, y, z; };

// ---- threads -------------------------------------------------------------------------------------

constexpr int STACK = 256 * 1024, GUARD = 1024, STATIC_BYTES = 4096, MEETINGS = 16;

struct Barrier { int arrived = 0; unsigned generation = 0; };
struct Copy { char* to; const char* from; int bytes, zeros; };
struct Wgmma { std::vector<float*> sums; std::array<const u32*, 4> a; u64 b; };
struct Block;

// What a thread has begun: it is done in groups, when they are waited for.
template <class Work>
struct Groups {
    std::deque<std::vector<Work>> committed;
    std::vector<Work> open;

    void add(const Work& work);
    void commit();
    void wait(int pending);
};

struct Fiber {
    ucontext_t context;
    Index thread;
    Block* block;
    int arrivals;  // at the barrier of the cluster
    bool waited;   // for the kernel before
    bool done;
    Groups<Copy> copies;
    Groups<Wgmma> products;
};

struct Warp {
    Barrier barrier;
    u32 given[32][8];
};

struct Block {
    Index index;
    int threads;
    std::vector<char> memory;
    std::vector<Warp> warps;
    Barrier named[16];
};

struct Mbarrier { Block* block; u32 offset; long all, count, bytes; unsigned phase; };

inline Fiber* current;
inline ucontext_t scheduler;
inline std::vector<std::unique_ptr<char[]>> stacks;  // of all kernels, one after the other
inline Index grid;
inline std::vector<Block> cluster;
inline std::array<long, MEETINGS> cluster_arrivals;
inline std::deque<Mbarrier> mbarriers;
inline std::deque<std::function<void()>> engine;  // what has not come yet, though nobody asks for it
inline std::vector<std::pair<const char*, std::size_t>> arguments;
inline int shared_bytes;
inline bool late;
inline long long stale;  // is added to what a kernel reads before it waits for the one before it
inline long waits;       // since something happened
inline const char* fault;

void pause();                              // let the others go on
[[noreturn]] void fail(const char* what);  // the thread goes no further, and nor does the launch
void meet(Barrier& barrier, int all);

inline int lane() { return current->thread.x % 32; }
inline Warp& warp() { return current->block->warps[current->thread.x / 32]; }
inline void meet_warp() { meet(warp().barrier, 32); }

// ---- memory --------------------------------------------------------------------------------------

// A shared address: the place, and above 24 bits one more than the rank of another block.
inline u32 static_memory() { return (shared_bytes + 15) / 16 * 16 + GUARD; }
inline Block* block_of(u32 address) { return address >> 24 ? &cluster[(address >> 24) - 1] : current->block; }

char* shared_at(u32 address, int bytes);
const char* global_at(const void* place, int bytes, int align);

template <class... T>
inline void load(const void* from, T&... to) {
    constexpr int size = (sizeof(T) + ...);
    const char* at = global_at(from, size, size);
    ((std::memcpy(&to, at, sizeof(T)), at += sizeof(T)), ...);
}

template <class... T>
inline void load_shared(u32 from, T&... to) {
    const char* at = shared_at(from, (sizeof(T) + ...));
    ((std::memcpy(&to, at, sizeof(T)), at += sizeof(T)), ...);
}

template <class... T>
inline void store_shared(u32 to, T... values) {
    char* at = shared_at(to, (sizeof(T) + ...));
    ((std::memcpy(at, &values, sizeof(T)), at += sizeof(T)), ...);
}

Mbarrier& mbarrier(u32 address);
void happen(std::function<void()> what);
void settle(Mbarrier& one);

// ---- numbers -------------------------------------------------------------------------------------

inline float of_f16(u16 h) { _Float16 x; std::memcpy(&x, &h, 2); return static_cast<float>(x); }
inline u16 to_f16(float f) { const _Float16 x = static_cast<_Float16>(f); u16 h; std::memcpy(&h, &x, 2); return h; }
inline float of_bf16(u16 h) { const u32 bits = static_cast<u32>(h) << 16; float f; std::memcpy(&f, &bits, 4); return f; }
inline u16 to_bf16(float f) {
    u32 bits;
    std::memcpy(&bits, &f, 4);
    return f != f ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline bool bf16;  // what the kernel's macro HALF is

struct F16 {
    static float of(u16 h) { return of_f16(h); }
    static u16 to(float f) { return to_f16(f); }
};
struct Bf16 {
    static float of(u16 h) { return of_bf16(h); }
    static u16 to(float f) { return to_bf16(f); }
};
struct Half {
    static float of(u16 h) { return bf16 ? of_bf16(h) : of_f16(h); }
    static u16 to(float f) { return bf16 ? to_bf16(f) : to_f16(f); }
};

template <class H, class F, class... T>
inline u32 of_both(F f, T... values) {
    return H::to(f(H::of(values)...)) | static_cast<u32>(H::to(f(H::of(values >> 16)...))) << 16;
}

// A row of what the lanes of a warp gave as a, times a column
template <class H, class Column>
inline void add_products(float& to, int row, Column column) {
    double sum = to;
    for (int k = 0; k < 16; k++) {
        const u32 left = warp().given[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2] >> k % 2 * 16;
        sum += static_cast<double>(H::of(left)) * H::of(column(k));
    }
    to = static_cast<float>(sum);
}

// d += a b: a 16 x 16 in four registers, b 16 x 8 in two, d 16 x 8 in four (PTX ISA, m16n8k16)
template <class H>
inline void matrix(float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(warp().given[lane()], mine, sizeof mine);
    meet_warp();
    float* d[4] = {&d0, &d1, &d2, &d3};
    for (int c = 0; c < 4; c++) {
        const int row = lane() / 4 + c / 2 * 8, column = lane() % 4 * 2 + c % 2;
        add_products<H>(*d[c], row, [&](int k) {
            return static_cast<u16>(warp().given[column * 4 + k % 8 / 2][4 + k / 8] >> k % 2 * 16);
        });
    }
    meet_warp();
}

// Columns of K in rows of 128 bytes, eight rows 1024 bytes, 16-byte pieces swizzled among each other
inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

}  // namespace gpu

#define threadIdx (gpu::current->thread)
#define blockIdx (gpu::current->block->index)
#define gridDim (gpu::grid)

// ---- functions of CUDA ---------------------------------------------------------------------------

inline unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
inline float __fdividef(float x, float y) { return x / y; }

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const std::uint64_t both = a | static_cast<std::uint64_t>(b) << 32;
    unsigned result = 0;
    for (int i = 0; i < 4; i++)
        result |= static_cast<unsigned>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
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
    std::memcpy(&value, gpu::global_at(p, sizeof(T), sizeof(T)), sizeof(T));
    return value;
}

inline void __syncthreads() { gpu::meet(gpu::current->block->named[0], gpu::current->block->threads); }
inline void __syncwarp() { gpu::meet_warp(); }

template <class T>
inline T __shfl_sync(unsigned, T value, int from) {
    std::memcpy(&gpu::warp().given[gpu::lane()][7], &value, 4);
    gpu::meet_warp();
    T found;
    std::memcpy(&found, &gpu::warp().given[from & 31][7], 4);
    gpu::meet_warp();
    return found;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int with) { return __shfl_sync(mask, value, gpu::lane() ^ with); }

// ---- instructions --------------------------------------------------------------------------------

namespace ptx {

using gpu::current;
using gpu::u16;
using gpu::u32;
using gpu::u64;

inline void createpolicy_fractional_L2_evict_first_b64(u64& policy, float) { policy = 0; }
inline void createpolicy_fractional_L2_evict_normal_b64(u64& policy, float) { policy = 0; }
inline void setmaxnreg(int) {}
inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() { current->waited = true; }

inline void load4(u32& a, u32& b, u32& c, u32& d, const void* from, u64) { gpu::load(from, a, b, c, d); }
inline void load2(u32& a, u32& b, const void* from, u64) { gpu::load(from, a, b); }
inline void load4_from(u32& a, u32& b, u32& c, u32& d, const void* from, int at) { gpu::load(static_cast<const char*>(from) + at, a, b, c, d); }
inline void load2_from(u32& a, u32& b, const void* from, int at) { gpu::load(static_cast<const char*>(from) + at, a, b); }
inline void load1_from(u32& a, const void* from, int at) { gpu::load(static_cast<const char*>(from) + at, a); }
inline void load4_if(u32& a, u32& b, u32& c, u32& d, const void* from, u64, int real) { if (real) gpu::load(from, a, b, c, d); }
inline void load2_if(u32& a, u32& b, const void* from, u64, int real) { if (real) gpu::load(from, a, b); }
inline void load_pair_if(u32& a, u32& b, const void* from, int real) { if (real) gpu::load(from, a, b); }
inline void load_word_if(u32& a, const void* from, int real) { if (real) gpu::load(from, a); }
inline void load_short(u32& a, const void* from) {
    u16 found;
    gpu::load(from, found);
    a = found;
}
inline void load_short_if(u32& a, const void* from, int real) {
    u16 found = static_cast<u16>(a);
    if (real) gpu::load(from, found);
    a = found;
}
template <class T>
inline void load_relaxed(T& a, const void* from) {
    gpu::load(from, a);
    if (!current->waited) a += static_cast<T>(gpu::stale);
}
inline void prefetch(const void* from, int bytes) {
    if (bytes % 16) gpu::fail("prefetch: not aligned");
    gpu::global_at(from, bytes, 16);
}
inline void load_shared4(float& a, float& b, float& c, float& d, u32 from) { gpu::load_shared(from, a, b, c, d); }
inline void st_shared_f32(u32 to, float a) { gpu::store_shared(to, a); }

inline void lop3_b32(u32& d, u32 a, u32 b, u32 c, int table) {
    d = 0;
    for (int i = 0; i < 32; i++)
        d |= static_cast<u32>(table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i;
}

inline void mul_lo_u32(u32& d, u32 a, u32 b) { d = a * b; }

inline float plus(float a, float b) { return a + b; }
inline float minus(float a, float b) { return a - b; }
inline float times(float a, float b) { return a * b; }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline void sub_rn_f16x2(u32& d, u32 a, u32 b) { d = gpu::of_both<gpu::F16>(minus, a, b); }
inline void fma_rn_bf16x2(u32& d, u32 a, u32 b, u32 c) { d = gpu::of_both<gpu::Bf16>(fused, a, b, c); }
inline void add_rn_HALF2(u32& d, u32 a, u32 b) { d = gpu::of_both<gpu::Half>(plus, a, b); }
inline void mul_rn_HALF2(u32& d, u32 a, u32 b) { d = gpu::of_both<gpu::Half>(times, a, b); }
inline void fma_rn_HALF2(u32& d, u32 a, u32 b, u32 c) { d = gpu::of_both<gpu::Half>(fused, a, b, c); }
template <class H>
inline void pack(u32& d, float high, float low) { d = H::to(low) | static_cast<u32>(H::to(high)) << 16; }
inline void cvt_rn_HALF2_f32(u32& d, float high, float low) { pack<gpu::Half>(d, high, low); }
inline void cvt_f32_f16(float& d, u16 h) { d = gpu::of_f16(h); }
inline void two_halves(float& low, float& high, u32 both) { low = gpu::of_f16(both), high = gpu::of_f16(both >> 16); }
inline void ex2_approx_ftz_f32(float& d, float x) { d = std::exp2(x); }

template <class... T>
inline void mma_f16(T&&... values) { gpu::matrix<gpu::F16>(values...); }
template <class... T>
inline void mma_bf16(T&&... values) { gpu::matrix<gpu::Bf16>(values...); }
template <class... T>
inline void mma_half(T&&... values) { gpu::matrix<gpu::Half>(values...); }

// Four matrices of 8 rows, whose addresses eight lanes give each
inline void ldmatrix_x4(u32& r0, u32& r1, u32& r2, u32& r3, u32 row) {
    gpu::warp().given[gpu::lane()][0] = row;
    gpu::meet_warp();
    u32* to[4] = {&r0, &r1, &r2, &r3};
    for (int i = 0; i < 4; i++)
        std::memcpy(to[i], gpu::shared_at(gpu::warp().given[8 * i + gpu::lane() / 4][0], 16) + gpu::lane() % 4 * 4, 4);
    gpu::meet_warp();
}

void wgmma(std::vector<float*> sums, std::array<const u32*, 4> a, u64 b);
inline void wgmma_fence() {}
void wgmma_commit_group();
void wgmma_wait_group(int pending);
void cp_async(u32 to, const void* from, int all, int bytes);
void cp_async_commit_group();
void cp_async_wait_group(int pending);
void cp_async_wait_all();

inline void bar_sync(int barrier, int threads) {
    if (barrier > 15) gpu::fail("bar.sync: there are 16");
    gpu::meet(current->block->named[barrier], threads);
}

inline void barrier_cluster_arrive() {
    gpu::waits = 0;
    gpu::cluster_arrivals[++current->arrivals % gpu::MEETINGS]++;
}
inline void barrier_cluster_wait() {
    const long all = static_cast<long>(gpu::cluster.size()) * current->block->threads;
    while (gpu::cluster_arrivals[current->arrivals % gpu::MEETINGS] < all) gpu::pause();
    gpu::waits = 0;
}

inline void mapa(u32& there, u32 address, int rank) { there = (address & 0xFFFFFF) | static_cast<u32>(rank + 1) << 24; }

inline void fence_mbarrier_init() {}
inline void mbarrier_init(u32 barrier, int count) {
    gpu::mbarriers.push_back({current->block, barrier & 0xFFFFFF, count, count, 0, 0});
}
inline void mbarrier_arrive_expect_tx(u32 barrier, int bytes) {
    auto& one = gpu::mbarrier(barrier);
    one.bytes += bytes, one.count--;
    gpu::settle(one);
}
inline void mbarrier_arrive(u32 barrier) { mbarrier_arrive_expect_tx(barrier, 0); }
inline void mbarrier_wait(u32 barrier, u32 parity) {
    while ((gpu::mbarrier(barrier).phase & 1) == parity) gpu::pause();
    gpu::waits = 0;
}

// Into the memory of another block of the cluster, whose mbarrier counts the bytes
template <class... T>
inline void send(u32 to, u32 barrier, T... values) {
    gpu::happen([=, &one = gpu::mbarrier(barrier), at = gpu::shared_at(to, (sizeof(T) + ...))]() mutable {
        ((std::memcpy(at, &values, sizeof(T)), at += sizeof(T)), ...);
        one.bytes -= (sizeof(T) + ...);
        gpu::settle(one);
    });
}
inline void send4(u32 to, float a, float b, float c, float d, u32 barrier) { send(to, barrier, a, b, c, d); }
inline void send2(u32 to, float a, float b, u32 barrier) { send(to, barrier, a, b); }
inline void send4_to(u32 to, u32 barrier, float a, float b, float c, float d, int rank) {
    mapa(to, to, rank);
    mapa(barrier, barrier, rank);
    send(to, barrier, a, b, c, d);
}

// A tile of a matrix by the copy engine, swizzled, zeros beyond its edges; the map as tensor_map of
// cuda_on_cpu.py makes it: address, rows, columns, rows of a tile
void copy_tile(u32 to, const void* map, int column, int row, u32 barrier);

}  // namespace ptx

// ---- launch --------------------------------------------------------------------------------------

namespace gpu {

inline void (*body)();
void launch(int splits, int threads, int seed);

// Pointers and numbers come as they are, fp32 as its bits, what is larger as the address of it.
template <class T>
inline T value(std::intptr_t given) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(given);
    } else if constexpr (std::is_integral_v<T>) {
        return static_cast<T>(given);
    } else if constexpr (std::is_floating_point_v<T>) {
        return __uint_as_float(static_cast<unsigned>(given));
    } else {
        T found;
        std::memcpy(&found, reinterpret_cast<const void*>(given), sizeof found);
        return found;
    }
}

template <auto KERNEL, class... T, std::size_t... I>
inline void call(void (*)(T...), const std::intptr_t* given, std::index_sequence<I...>) {
    KERNEL(value<T>(given[I])...);
}

template <class... T>
constexpr auto places(void (*)(T...)) { return std::index_sequence_for<T...>(); }

inline const std::intptr_t* values;

struct Launch { int grid[3], cluster, threads, shared, seed, late, bf16; long long stale; };

// Run a kernel; memory that it may read is `count` places of so many bytes. What was wrong, or null.
template <auto KERNEL>
inline const char* run(const Launch& how, const std::intptr_t* given, const char* const* places_read,
                       const std::size_t* sizes, int count) {
    values = given;
    fault = nullptr;
    late = how.late;
    bf16 = how.bf16;
    stale = how.stale;
    shared_bytes = how.shared;
    grid = {static_cast<unsigned>(how.grid[0]), static_cast<unsigned>(how.grid[1]), static_cast<unsigned>(how.grid[2])};
    arguments.clear();
    for (int i = 0; i < count; i++) arguments.push_back({places_read[i], sizes[i]});
    body = [] { call<KERNEL>(KERNEL, values, places(KERNEL)); };
    launch(how.cluster, how.threads, how.seed);
    return fault;
}

}  // namespace gpu

// ---- compiled once -------------------------------------------------------------------------------

#ifdef MACHINE
#include <random>

namespace gpu {

void pause() {
    waits++;
    swapcontext(&current->context, &scheduler);
}

void fail(const char* what) {
    fault = what;
    pause();
    std::abort();
}

void meet(Barrier& barrier, int all) {
    waits = 0;
    const unsigned mine = barrier.generation;
    if (++barrier.arrived == all) {
        barrier.arrived = 0;
        barrier.generation++;
    } else {
        while (barrier.generation == mine) pause();
    }
}

char* shared_at(u32 address, int bytes) {
    Block* block = block_of(address);
    const u32 offset = address & 0xFFFFFF;
    const bool is_static = offset >= static_memory() && offset + bytes <= block->memory.size();
    if (offset + bytes > static_cast<u32>(shared_bytes) && !is_static) fail("outside of shared memory");
    if (offset % bytes) fail("shared memory: not aligned");
    return block->memory.data() + offset;
}

const char* global_at(const void* place, int bytes, int align) {
    const char* from = static_cast<const char*>(place);
    if (reinterpret_cast<std::uintptr_t>(from) % align) fail("global memory: not aligned");
    for (auto& [start, size] : arguments)
        if (from >= start && from + bytes <= start + size) return from;
    fail("outside of the arguments");
}

void perform(const Copy& copy) {
    if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(copy.to + copy.bytes, 0, copy.zeros);
}

Mbarrier& mbarrier(u32 address) {
    for (auto& one : mbarriers)
        if (one.block == block_of(address) && one.offset == (address & 0xFFFFFF)) return one;
    fail("an mbarrier that is not there");
}

void happen(std::function<void()> what) {
    if (late)
        engine.push_back(std::move(what));
    else
        what();
}

void settle(Mbarrier& one) {
    waits = 0;
    if (one.count < 0) fail("an mbarrier with more arrivals than it has");
    if (one.count == 0 && one.bytes == 0) one.phase++, one.count = one.all;
}

// A warp's 16 rows of wgmma: as above, for as many columns as there are sums, b in shared memory
void perform(const Wgmma& work) {
    for (int i = 0; i < 4; i++) warp().given[lane()][i] = *work.a[i];
    meet_warp();
    if (work.b >> 62 != 1 || (work.b >> 32 & 0x3FFF) != 64) fail("wgmma: a descriptor of another kind");
    const u32 start = static_cast<u32>(work.b & 0x3FFF) << 4;
    for (std::size_t c = 0; c < work.sums.size(); c++) {
        const int row = lane() / 4 + c / 2 % 2 * 8, column = c / 4 * 8 + lane() % 4 * 2 + c % 2;
        add_products<Half>(*work.sums[c], row, [&](int k) {
            u16 right;
            load_shared(swizzled(start + column / 8 * 1024 + column % 8 * 128 + 2 * k), right);
            return right;
        });
    }
    meet_warp();
}

template <class Work>
void Groups<Work>::add(const Work& work) {
    if (late)
        open.push_back(work);
    else
        perform(work);
}

template <class Work>
void Groups<Work>::commit() {
    committed.push_back(std::move(open));
    open = {};
}

template <class Work>
void Groups<Work>::wait(int pending) {
    for (; static_cast<int>(committed.size()) > pending; committed.pop_front())
        for (auto& work : committed.front()) perform(work);
}

void start() {
    body();
    current->done = true;
    for (int i = current->arrivals + 1; i < MEETINGS; i++) cluster_arrivals[i]++;  // it counts as there
    waits = 0;
    swapcontext(&current->context, &scheduler);
}

void run_cluster(int threads, std::mt19937& random) {
    std::vector<Fiber> fibers(cluster.size() * threads);
    std::vector<Fiber*> alive;
    while (stacks.size() < fibers.size()) stacks.emplace_back(new char[STACK]);
    for (std::size_t i = 0; i < fibers.size(); i++) {
        Fiber& fiber = fibers[i];
        fiber.thread = {static_cast<unsigned>(i % threads), 0, 0};
        fiber.block = &cluster[i / threads];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks[i].get();
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, start, 0);
        alive.push_back(&fiber);
    }
    waits = 0;
    std::vector<bool> asleep(fibers.size() / 32);
    while (!alive.empty() && !fault) {
        std::shuffle(alive.begin(), alive.end(), random);
        for (std::size_t i = 0; i < asleep.size(); i++) asleep[i] = asleep[i] || random() % 32 == 0;
        long awake = 0;
        for (Fiber* fiber : alive) {
            if (asleep[(fiber - fibers.data()) / 32]) continue;
            current = fiber;
            swapcontext(&scheduler, &fiber->context);
            if (fault) return;
            awake++;
        }
        alive.erase(std::remove_if(alive.begin(), alive.end(), [](Fiber* f) { return f->done; }), alive.end());
        if (waits < awake) continue;
        if (alive.empty()) break;
        current = alive[0];
        if (std::count(asleep.begin(), asleep.end(), true)) {
            asleep.assign(asleep.size(), false);
        } else if (engine.empty()) {
            fault = "all threads wait";
        } else {
            engine.front()();
            engine.pop_front();
        }
    }
}

void launch(int splits, int threads, int seed) {
    std::mt19937 random(seed);
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x && !fault; x += splits) {
                cluster.assign(splits, {});
                cluster_arrivals = {};
                mbarriers.clear();
                engine.clear();
                for (int rank = 0; rank < splits; rank++) {
                    Block& block = cluster[rank];
                    block.index = {x + rank, y, z};
                    block.threads = threads;
                    block.memory.assign(static_memory() + STATIC_BYTES, static_cast<char>(0xFF));
                    block.warps.resize(threads / 32);
                }
                run_cluster(threads, random);
                for (auto& block : cluster)
                    for (u32 i = shared_bytes; i < static_memory(); i++)
                        if (block.memory[i] != static_cast<char>(0xFF)) fault = "written past shared memory";
            }
}

}  // namespace gpu

namespace ptx {

void wgmma(std::vector<float*> sums, std::array<const u32*, 4> a, u64 b) {
    current->products.add({std::move(sums), a, b});
}
void wgmma_commit_group() { current->products.commit(); }
void wgmma_wait_group(int pending) { current->products.wait(pending); }

void cp_async(u32 to, const void* from, int, int bytes) {
    if (bytes) gpu::global_at(from, bytes, 16);
    current->copies.add({gpu::shared_at(to, 16), static_cast<const char*>(from), bytes, 16 - bytes});
}
void cp_async_commit_group() { current->copies.commit(); }
void cp_async_wait_group(int pending) { current->copies.wait(pending); }
void cp_async_wait_all() {
    current->copies.commit();
    current->copies.wait(0);
}

void copy_tile(u32 to, const void* map, int column, int row, u32 barrier) {
    const u64* given = static_cast<const u64*>(map);
    const std::array<u64, 4> of = {given[0], given[1], given[2], given[3]};
    if (to % 1024) gpu::fail("a swizzled tile: not aligned");
    char* const memory = gpu::shared_at(to, 16) - to;
    gpu::shared_at(to + 128 * of[3] - 16, 16);
    gpu::happen([=, &one = gpu::mbarrier(barrier)] {
        const auto [address, rows, columns, box] = of;
        for (u64 r = 0; r < box; r++)
            for (u64 c = 0; c < 64; c++) {
                const u64 at = 2 * ((row + r) * columns + column + c);
                char* place = memory + gpu::swizzled(to + 128 * r + 2 * c);
                if (row + r < rows && column + c < columns)
                    std::memcpy(place, reinterpret_cast<const char*>(address) + at, 2);
                else
                    std::memset(place, 0, 2);
            }
        one.bytes -= 128 * box;
        gpu::settle(one);
    });
}

}  // namespace ptx
#endif
