// Codes of BITS bits as they lie in a lane's words (_fragments.py), and the numbers of half precision
// that they become: fp16, or bf16 where BF16 is 1. What mma.cu and wgmma.cu have in common.
//
// A code is put under an exponent: one mask, no conversion. Under that of 2^TOP, TOP the bits of the
// mantissa, it becomes 2^TOP + code where it lies at the end of its half of a word. Where it lies
// `place` bits up, it becomes 2^TOP + 2^place code, or, under the exponent of 2^(TOP - place),
// 2^(TOP - place) + code. One shift brings down all codes that lie too high for that. All these
// numbers are exact, and so are their differences from the same number of the zero.

#include "common.cuh"

constexpr int LANE_WORDS = 2 * BITS;             // of a tile and a block of 128 columns
constexpr int TOP = BF16 ? 7 : 10;               // bits of the mantissa
constexpr bool BYTES = BF16 && BITS == 8;        // 255 does not fit under an exponent
constexpr int EACH = BITS == 3 ? 5 : 16 / BITS;  // pairs of codes in a word, one in each half
constexpr int TURN = BITS == 3 ? 9 : 8;          // bits to shift a word by, for its upper codes

// Where codes lie when they are masked: 0, BITS, ...
constexpr int PLACES = TOP / BITS == 0 ? 1 : TOP < TURN ? TOP / BITS : TURN / BITS;

__device__ constexpr int shift_of(int at) { return at % TURN + BITS <= TOP ? at - at % TURN : at; }

__device__ constexpr u32 mask_of(int place) { return ((1u << BITS) - 1 << place) * 0x00010001u; }

// 2^power, in both halves
__device__ constexpr u32 power2(int power) {
    return ((BF16 ? 127 : 15) + power << TOP) * 0x00010001u;
}

// 2^TOP - 2^(TOP - place), in both halves
__device__ constexpr u32 power2_less(int place) {
    return power2(TOP - 1) | ((1 << TOP) - (2 << TOP - place)) * 0x00010001u;
}

// Pairs 30 and 31 of three bits: each is in what five codes leave of three words, a bit at the end of
// each half. They are put together where the words' one shift brings the first; the others go one and
// two bits up by a multiplication, as shifts and logic, of which there is most, take turns.
constexpr int GATHERED = BF16 ? 3 : 6;  // their place

__device__ __forceinline__ u32 times(u32 a, u32 factor) {
    u32 result;  // not a shift, which it would become if the compiler saw it
    asm("mul.lo.u32 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(factor));
    return result;
}

__device__ __forceinline__ u32 choose(u32 a, u32 b, u32 mask) {  // a where the mask is 1, else b
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(result) : "r"(a), "r"(b), "r"(mask));
    return result;
}

__device__ __forceinline__ u32 gathered(const u32* words) {
    constexpr int down = 15 - GATHERED;
    const u32 two = choose(words[0] >> down, times(words[1] >> down, 2), 0x00010001u << GATHERED);
    return choose(two, times(words[2] >> down, 4), 0x00030003u << GATHERED);
}

// The word in which a pair of codes lies at `place_of(pair)`, among others.
__device__ constexpr bool is_gathered(int pair) { return BITS == 3 && pair >= 30; }

__device__ constexpr int place_of(int pair) {
    const int at = BITS * (pair % EACH);
    return is_gathered(pair) ? GATHERED : at - shift_of(at);
}

__device__ __forceinline__ u32 word_of(const u32* words, int pair) {
    if (is_gathered(pair)) return gathered(words + 3 * (pair - 30));
    return words[pair / EACH] >> shift_of(BITS * (pair % EACH));
}

// 2^23 and a byte of a word, in fp32
__device__ __forceinline__ float widened(u32 word, int byte) {
    return __uint_as_float(__byte_perm(word, 0x4B000000, 0x7650 + byte));
}

// Scales of rows g and g + 8, as they are stored: of 16 bits in `low`, of 32 in each
__device__ __forceinline__ void scales_of(float (&scale)[2], u32 low, u32 high) {
#if SCALE == 2
    scale[0] = __uint_as_float(low);
    scale[1] = __uint_as_float(high);
#elif SCALE == 1
    scale[0] = __uint_as_float(low << 16);
    scale[1] = __uint_as_float(low & 0xFFFF0000);
#else
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(scale[0]), "=f"(scale[1]) : "r"(low));
#endif
}
