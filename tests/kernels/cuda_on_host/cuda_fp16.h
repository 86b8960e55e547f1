#pragma once
#include "scalar.h"  // csrc's own conversions stand in for the device's
#include "cuda_runtime.h"

using __half = twinflow::baseline::f16;
inline float __half2float(__half value) { return twinflow::baseline::widen(value); }
inline __half __float2half_rn(float value) { return twinflow::baseline::narrow<__half>(value); }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
