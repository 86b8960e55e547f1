// Launchers of the native kernels: plain addresses, int64 sizes and a stream handle; nothing of torch.
// CPU launchers exist once per instruction set, in a namespace of that name; bindings.cpp picks one at run time.
#pragma once
#include <cstdint>

namespace twinflow {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// One target of an EMA with its source, and a copy of the new value or 0: addresses, elements, DType numbers.
struct EmaPair {
    int64_t target, source, copy, count;
    int16_t target_dtype, source_dtype, copy_dtype, unused;
};

struct EmaDecay {
    double keep, take;  // decay, 1 - decay
};

#define TWINFLOW_DECLARE_CPU(ISA)                                                                              \
    namespace ISA {                                                                                           \
    /* x (rows, row_size) -= dt (rows,) * v (rows, row_size); v has its own dtype, dt has x's. */             \
    void rollout_step(void* x, const void* v, const void* dt, int64_t rows, int64_t row_size, DType x_dtype,  \
                      DType v_dtype, int threads);                                                            \
    /* target <- keep * target + take * source over a table of contiguous tensors of any floating dtypes. */   \
    void ema_update(const EmaPair* pairs, int64_t count, EmaDecay decay, int threads);                        \
    }

TWINFLOW_DECLARE_CPU(baseline)
TWINFLOW_DECLARE_CPU(avx2)
TWINFLOW_DECLARE_CPU(avx512)

namespace cuda {
void versions(int* runtime, int* driver);
}  // namespace cuda

}  // namespace twinflow
