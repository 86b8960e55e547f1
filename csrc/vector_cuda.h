// Loads and stores of CUDA kernels whose element type is known at run time only: a branch that a whole thread block
// takes together, then 16 bytes an access. Values are in an accumulator type A, float or double.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"

namespace twinflow {
namespace cuda {

constexpr int kVector = 8;  // elements per access: 16 bytes of a 16-bit type

__device__ __forceinline__ void unpack(uint32_t bits, DType dtype, float& low, float& high) {
    if (dtype == DType::bf16) {
        low = __uint_as_float(bits << 16);
        high = __uint_as_float(bits & 0xffff0000u);
    } else {
        low = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
        high = __half2float(__ushort_as_half(static_cast<uint16_t>(bits >> 16)));
    }
}

__device__ __forceinline__ uint32_t pack(float low, float high, DType dtype) {
    if (dtype == DType::bf16)
        return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
               static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
    return __half_as_ushort(__float2half_rn(low)) | static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16;
}

template <class A>
__device__ __forceinline__ A load_one(int64_t address, DType dtype, int64_t i) {
    if (dtype == DType::f32) return static_cast<A>(reinterpret_cast<const float*>(address)[i]);
    if (dtype == DType::f64) return static_cast<A>(reinterpret_cast<const double*>(address)[i]);
    float low, high;
    unpack(reinterpret_cast<const uint16_t*>(address)[i], dtype, low, high);
    return static_cast<A>(low);
}

template <class A>
__device__ __forceinline__ void store_one(int64_t address, DType dtype, int64_t i, A value) {
    if (dtype == DType::f32)
        reinterpret_cast<float*>(address)[i] = static_cast<float>(value);
    else if (dtype == DType::f64)
        reinterpret_cast<double*>(address)[i] = static_cast<double>(value);
    else
        reinterpret_cast<uint16_t*>(address)[i] = static_cast<uint16_t>(pack(static_cast<float>(value), 0.f, dtype));
}

template <class A>
__device__ __forceinline__ void load_vector(int64_t address, DType dtype, int64_t i, A (&x)[kVector]) {
    if (dtype == DType::f32) {
        const float4* from = reinterpret_cast<const float4*>(reinterpret_cast<const float*>(address) + i);
        const float4 a = from[0], b = from[1];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else if (dtype == DType::f64) {
        const double2* from = reinterpret_cast<const double2*>(reinterpret_cast<const double*>(address) + i);
#pragma unroll
        for (int k = 0; k < kVector / 2; ++k) {
            const double2 a = from[k];
            x[2 * k] = static_cast<A>(a.x), x[2 * k + 1] = static_cast<A>(a.y);
        }
    } else {
        const uint4 a = *reinterpret_cast<const uint4*>(reinterpret_cast<const uint16_t*>(address) + i);
        const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int k = 0; k < kVector / 2; ++k) {
            float low, high;
            unpack(words[k], dtype, low, high);
            x[2 * k] = low, x[2 * k + 1] = high;
        }
    }
}

template <class A>
__device__ __forceinline__ void store_vector(int64_t address, DType dtype, int64_t i, const A (&x)[kVector]) {
    if (dtype == DType::f32) {
        float4* to = reinterpret_cast<float4*>(reinterpret_cast<float*>(address) + i);
#pragma unroll
        for (int k = 0; k < 2; ++k)
            to[k] = make_float4(static_cast<float>(x[4 * k]), static_cast<float>(x[4 * k + 1]),
                                static_cast<float>(x[4 * k + 2]), static_cast<float>(x[4 * k + 3]));
    } else if (dtype == DType::f64) {
        double2* to = reinterpret_cast<double2*>(reinterpret_cast<double*>(address) + i);
#pragma unroll
        for (int k = 0; k < kVector / 2; ++k) to[k] = make_double2(x[2 * k], x[2 * k + 1]);
    } else {
        uint32_t words[4];
#pragma unroll
        for (int k = 0; k < kVector / 2; ++k)
            words[k] = pack(static_cast<float>(x[2 * k]), static_cast<float>(x[2 * k + 1]), dtype);
        *reinterpret_cast<uint4*>(reinterpret_cast<uint16_t*>(address) + i) =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// What a store in `dtype` keeps of a value: copies hold the target's new value, not the one before its rounding.
template <class A>
__device__ __forceinline__ A rounded(A value, DType dtype) {
    if (dtype == DType::f32 || dtype == DType::f64) return value;
    float low, high;
    unpack(pack(static_cast<float>(value), 0.f, dtype), dtype, low, high);
    return static_cast<A>(low);
}

}  // namespace cuda
}  // namespace twinflow
