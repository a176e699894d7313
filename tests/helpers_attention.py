"""The attention kernel's own text, compiled by g++ and run on the CPU: a stand-in for a Hopper GPU.

Its section of instructions gets another body, in C++; all else is what NVRTC compiles. The threads
of a cluster are fibers, which give way where they meet. Shared memory begins as NaN, and the
position that is found before the wait can be another than after it.
"""

import ctypes
import hashlib
import subprocess
from importlib.resources import files
from pathlib import Path

from torch import Tensor

_BEFORE = r"""
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(n)
#define __align__(n)
using std::max;
using std::min;
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
float2 make_float2(float x, float y) { return {x, y}; }
uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  unsigned char from[8]; memcpy(from, &a, 4); memcpy(from + 4, &b, 4);
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= unsigned(from[selector >> 4 * i & 7]) << 8 * i;
  return result;
}

struct Index { unsigned x, y; };
struct Meeting { int count = 0; unsigned round = 0; };
struct Block { Meeting all; char* memory; };
struct Warp { Meeting all; unsigned box[32][8]; };
struct Fiber {
  ucontext_t context; Index thread, block; int waiting; unsigned round; bool done;
  Warp* warp; Block* home; int positions;
};
Fiber* now;
ucontext_t scheduler;
std::vector<Block>* cluster;
Meeting cluster_all;
long long stale;  // added to the position that is found first
#define threadIdx (now->thread)
#define blockIdx (now->block)

void give_way() { swapcontext(&now->context, &scheduler); }
unsigned arrive(Meeting& m, int of) {
  unsigned round = m.round;
  if (++m.count == of) m.count = 0, m.round++;
  return round;
}
void meet(Meeting& m, int of) {
  unsigned round = arrive(m, of);
  while (m.round == round) give_way();
}
void __syncwarp() { meet(now->warp->all, 32); }
template <class T> T from_lane(T value, int lane) {
  memcpy(now->warp->box[now->thread.x % 32], &value, sizeof value);
  __syncwarp();
  T result;
  memcpy(&result, now->warp->box[lane], sizeof result);
  __syncwarp();
  return result;
}
template <class T> T __shfl_sync(unsigned, T value, int lane) { return from_lane(value, lane & 31); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return from_lane(value, now->thread.x % 32 ^ mask);
}
"""

_INSTRUCTIONS = r"""
void __syncthreads() { meet(now->home->all, THREADS); }
void copy(u32* to, const u16* from, int bytes) {
  if (reinterpret_cast<size_t>(from) % bytes) { puts("not aligned"); abort(); }
  memcpy(to, from, bytes);
}
template <int AT> void load16(u32* to, const u16* from) { copy(to, from + AT / 2, 16); }
template <int AT> void load8(u32* to, const u16* from) { copy(to, from + AT / 2, 8); }
template <int AT> void load4(u32* to, const u16* from) { copy(to, from + AT / 2, 4); }
long long load_position(const void* from) {
  long long found = POSITION_BYTES == 8 ? *static_cast<const long long*>(from)
                                        : *static_cast<const int*>(from);
  return now->positions++ ? found : found + stale;
}
void prefetch(const u16* from, int bytes) {
  volatile u16 last = from[bytes / 2 - 1];
  (void)last;
  if (reinterpret_cast<size_t>(from) % 16 || bytes % 16) { puts("not aligned"); abort(); }
}
float half(u32 h) {
  if (BF16) return __uint_as_float(h << 16);
  _Float16 x; u16 s = h; memcpy(&x, &s, 2); return float(x);
}
u32 put(float f) {
  if (BF16) { u32 u = __float_as_uint(f); return (u + 0x7fff + (u >> 16 & 1)) >> 16; }
  _Float16 x = f; u16 s; memcpy(&s, &x, 2); return s;
}
u32 pack(float low, float high) { return put(low) | put(high) << 16; }
void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const int lane = now->thread.x % 32;
  u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  auto& box = now->warp->box;
  memcpy(box[lane], mine, sizeof mine);
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const u32 a = box[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2] >> 16 * (k % 2);
      const u32 b = box[column * 4 + k % 8 / 2][4 + k / 8] >> 16 * (k % 2);
      d[i] += half(a & 0xffff) * half(b & 0xffff);
    }
  }
  __syncwarp();
}
float power2(float x) { return exp2f(x); }
float quotient(float x, float y) { return x / y; }
float wide(u16 h, int kind) {
  if (kind == 2) return __uint_as_float(u32(h) << 16);
  _Float16 x; memcpy(&x, &h, 2); return float(x);
}
void launch_dependents() {}
void wait_for_inputs() {}
void cluster_arrive() { now->round = arrive(cluster_all, THREADS * SPLITS); }
void cluster_wait() { while (cluster_all.round == now->round) give_way(); }
void barrier_init(u64* barrier) { *barrier = 0; }
void barrier_expect(u64* barrier, int bytes) {
  int* at = reinterpret_cast<int*>(barrier);  // bytes to come, whether that is known
  at[0] += bytes, at[1]++;
}
void barrier_wait(u64* barrier) {
  volatile int* at = reinterpret_cast<int*>(barrier);
  while (at[0] != 0 || at[1] != 1) give_way();
}
template <class T> T* there(T* place, int rank) {
  return reinterpret_cast<T*>((*cluster)[rank].memory + (reinterpret_cast<char*>(place) - now->home->memory));
}
template <class T> void send(T* place, int rank, T x, u64* barrier) {
  *there(place, rank) = x;
  *reinterpret_cast<int*>(there(barrier, rank)) -= sizeof x;
}
"""

_AFTER = r"""
#define ARGUMENTS q, k, v, positions, sinks, out, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], \
    n[8], n[9], n[10], n[11], n[12], f[0], f[1]
struct Call {
  const u16 *q, *k, *v; const char *positions, *sinks; u16* out; const int* n; const float* f;
};
Call* call;
void start() {
  auto [q, k, v, positions, sinks, out, n, f] = *call;
  attend(ARGUMENTS);
  now->done = true;
  give_way();
}
extern "C" int run(const u16* q, const u16* k, const u16* v, const char* positions,
                   const char* sinks, u16* out, const int* n, const float* f, int pairs,
                   int strips, int bytes, long long first_position) {
  if (size_t(bytes) < sizeof(Shared) + 16) return 1;
  Call this_call = {q, k, v, positions, sinks, out, n, f};
  call = &this_call;
  stale = first_position;
  const int size = 128 * 1024, count = SPLITS * THREADS;
  std::vector<char> stacks(size_t(size) * count);
  for (int work = 0; work < pairs * strips; work++) {
    std::vector<Block> blocks(SPLITS);
    std::vector<Warp> warps(count / 32);
    std::vector<Fiber> fibers(count);
    cluster = &blocks;
    cluster_all = {};
    for (Block& block : blocks) {
      block.memory = static_cast<char*>(aligned_alloc(1024, (bytes + 1023) / 1024 * 1024));
      memset(block.memory, 0xff, bytes);
    }
    for (int i = 0; i < count; i++) {
      Fiber& fiber = fibers[i];
      fiber = {};
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = &stacks[size_t(size) * i];
      fiber.context.uc_stack.ss_size = size;
      makecontext(&fiber.context, start, 0);
      const unsigned rank = i / THREADS;
      fiber.thread = {unsigned(i % THREADS), 0};
      fiber.block = {work % pairs * SPLITS + rank, unsigned(work / pairs)};
      fiber.warp = &warps[i / 32];
      fiber.home = &blocks[rank];
    }
    for (int left = count; left;) {
      left = 0;
      for (Fiber& fiber : fibers) {
        if (fiber.done) continue;
        now = &fiber;
        swapcontext(&scheduler, &fiber.context);
        left += !fiber.done;
      }
    }
    for (Block& block : blocks) free(block.memory);
  }
  return 0;
}
"""


class Emulated:
    """In place of `cuda_program.kernel`: compiles for the CPU what it is asked for, and runs it.

    Args:
        folder: for what is compiled.
        stale: is added to the positions that are read before the kernel ahead has ended.
    """

    def __init__(self, folder: Path, stale: int = 0) -> None:
        self._folder, self._stale = folder, stale

    def __call__(self, source: str, name: str, macros: tuple, index: object) -> "Emulated":
        text = files("salience.kernels").joinpath("cuda", source).read_text()
        begin = text.index("// ---- instructions")
        end = text.index("// ---- the kernel")
        text = text[:begin] + _INSTRUCTIONS + text[end:]
        text = text.replace("extern __shared__  char dynamic[];", "")
        shared = "extern __shared__ __align__(16) char dynamic[];"
        assert shared in text
        text = text.replace(shared, "char* dynamic = now->home->memory;")
        text = (
            "".join(f"#define {key} {value}\n" for key, value in macros) + _BEFORE + text + _AFTER
        )
        made = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        if not made.exists():
            code = made.with_suffix(".cpp")
            code.write_text(text)
            flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing"]
            done = subprocess.run(
                ["g++", *flags, "-o", str(made), str(code)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[:3000]
        self._library, self._macros = ctypes.CDLL(str(made)), dict(macros)
        return self

    def launch(
        self,
        grid: tuple[int, ...],
        threads: int,
        arguments: tuple,
        *,
        shared: int,
        cluster: int,
        overlap: bool,
    ) -> None:
        assert threads == 32 * self._macros["WARPS"] and cluster == self._macros["SPLITS"]
        assert overlap
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in arguments if isinstance(x, Tensor)]
        numbers = [x for x in arguments[6:] if isinstance(x, int)]
        floats = [x for x in arguments[6:] if isinstance(x, float)]
        assert (len(pointers), len(numbers), len(floats)) == (6, 13, 2)
        status = self._library.run(
            *pointers,
            (ctypes.c_int * 13)(*numbers),
            (ctypes.c_float * 2)(*floats),
            grid[0],
            grid[1],
            shared,
            ctypes.c_longlong(self._stale),
        )
        assert status == 0, "less shared memory than the kernel takes"
