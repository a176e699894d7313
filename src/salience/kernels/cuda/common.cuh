// What all kernels have in common. Halves are fp16, or bf16 where BF16 is 1.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#if BF16
#define HALF2 "bf16x2"
#else
#define HALF2 "f16x2"
#endif

__device__ __forceinline__ u32 pack2(float low, float high) {
    u32 both;
    asm("cvt.rn." HALF2 ".f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}
