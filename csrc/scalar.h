// Element types of the CPU kernels and their conversions: bf16 and f16 as bit patterns, rounded to nearest even,
// written without branches so that loops over them vectorise at every instruction set.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace twinflow {
namespace TWINFLOW_ISA {  // inline functions too: one definition per instruction set, never merged by the linker

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bf16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(f16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
    // Rebias the exponent from 15 to 127 by a product, which also normalises subnormals; inf and NaN keep theirs.
    const float scaled = bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u);  // 2^112
    const uint32_t finite = bit_cast<uint32_t>(scaled);
    const uint32_t special = magnitude | 0x7f800000u;
    return bit_cast<float>(sign | ((value.bits & 0x7c00u) == 0x7c00u ? special : finite));
}

template <class T>
inline T narrow(double value);
template <class T>
inline T narrow(float value);
template <>
inline float narrow<float>(float value) { return value; }
template <>
inline double narrow<double>(double value) { return value; }
template <>
inline float narrow<float>(double value) { return static_cast<float>(value); }
template <>
inline bf16 narrow<bf16>(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const uint32_t quiet_nan = (bits >> 16) | 0x40u;
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded >> 16)};
}
template <>
inline f16 narrow<f16>(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal range: rebias and round to nearest even by an integer sum.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal range: adding 0.5 lets the float adder round at the right bit.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x47800000u ? 0x7c00u : result;  // 65536 and above: infinity
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return {static_cast<uint16_t>(sign | result)};
}
template <>
inline double narrow<double>(float value) { return static_cast<double>(value); }
// float64 reaches the 16-bit types by way of float32, as in torch.
template <>
inline bf16 narrow<bf16>(double value) { return narrow<bf16>(static_cast<float>(value)); }
template <>
inline f16 narrow<f16>(double value) { return narrow<f16>(static_cast<float>(value)); }

// Calls body(T{}) with the C++ type of a dtype.
template <class Body>
inline void with_dtype(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::f32: body(float{}); return;
        case DType::f64: body(double{}); return;
        case DType::bf16: body(bf16{}); return;
        case DType::f16: body(f16{}); return;
    }
}

// `count` elements from `offset` in the dtype of the arithmetic: the input itself, or widened into `scratch`.
template <class M>
const M* widened(const void* data, DType dtype, int64_t offset, int64_t count, M* scratch) {
    const M* result = scratch;
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const T* values = static_cast<const T*>(data) + offset;
        if constexpr (std::is_same_v<T, M>) {
            result = values;
        } else {
            for (int64_t i = 0; i < count; ++i) scratch[i] = static_cast<M>(widen(values[i]));
        }
    });
    return result;
}

}  // namespace TWINFLOW_ISA
}  // namespace twinflow
