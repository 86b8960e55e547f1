// The Euler step of a rollout: x <- x - dt v, one dt per row. Compiled once per instruction set (TWINFLOW_ISA).
#include <algorithm>

#include "scalar.h"

namespace twinflow {
namespace TWINFLOW_ISA {

namespace {

constexpr int64_t kChunk = 16384;  // elements per task: 64 KiB of float32 state, well inside L2

template <class X, class V>
void step_rows(X* x, const V* v, const X* dt, int64_t rows, int64_t row_size, int threads) {
    const int64_t chunks = (row_size + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * row_size > kChunk)
    for (int64_t task = 0; task < rows * chunks; ++task) {
        const int64_t row = task / chunks, begin = (task % chunks) * kChunk;
        const int64_t count = std::min(kChunk, row_size - begin);
        X* state = x + row * row_size + begin;
        const V* velocity = v + row * row_size + begin;
        const X step = dt[row];
        // x = x - dt * v
        for (int64_t i = 0; i < count; ++i) state[i] = state[i] - step * static_cast<X>(widen(velocity[i]));
    }
}

}  // namespace

void rollout_step(void* x, const void* v, const void* dt, int64_t rows, int64_t row_size, DType x_dtype,
                  DType v_dtype, int threads) {
    with_dtype(v_dtype, [&](auto v_type) {
        using V = decltype(v_type);
        if (x_dtype == DType::f64) {
            step_rows(static_cast<double*>(x), static_cast<const V*>(v), static_cast<const double*>(dt), rows,
                      row_size, threads);
        } else {
            step_rows(static_cast<float*>(x), static_cast<const V*>(v), static_cast<const float*>(dt), rows, row_size,
                      threads);
        }
    });
}

}  // namespace TWINFLOW_ISA
}  // namespace twinflow
