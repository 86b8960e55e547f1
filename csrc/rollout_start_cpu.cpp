// The enhanced target of every row and the first step of its rollout, in one pass. Compiled once per instruction set.
#include <algorithm>

#include "scalar.h"

namespace twinflow {
namespace TWINFLOW_ISA {

namespace {

constexpr int64_t kChunk = 2048;  // elements per task; its arrays stay inside L2, and the scratch on any stack

template <class M>
void start_rows(const RolloutStart& p) {
    const int64_t chunks = (p.row_size + kChunk - 1) / kChunk, tasks = p.rows * chunks;
    const int threads = p.rows * p.row_size > 2 * kChunk ? p.threads : 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t row = task / chunks, begin = (task % chunks) * kChunk;
        const int64_t count = std::min(kChunk, p.row_size - begin), offset = row * p.row_size + begin;
        M scratch[4][kChunk];
        const M* v = widened<M>(p.v_target, p.v_target_dtype, offset, count, scratch[0]);
        const M* x = widened<M>(p.x_t, p.x_t_dtype, offset, count, scratch[1]);
        M* v_star = static_cast<M*>(p.v_star) + offset;
        M* x_m = static_cast<M*>(p.x_m) + offset;
        const M w = p.v_cond ? static_cast<const M*>(p.ratio)[row] : M(0), step = static_cast<const M*>(p.delta)[row];
        if (w != 0) {  // other rows do not read the teacher's velocities; a ratio of NaN does
            const M* cond = widened<M>(p.v_cond, p.v_cond_dtype, offset, count, scratch[2]);
            const M* uncond = widened<M>(p.v_uncond, p.v_uncond_dtype, offset, count, scratch[3]);
            // v* = v + w (v_cond - v_uncond)
            for (int64_t i = 0; i < count; ++i) v_star[i] = v[i] + w * (cond[i] - uncond[i]);
        } else {
            std::copy(v, v + count, v_star);
        }
        // x_m = x - delta v*
        for (int64_t i = 0; i < count; ++i) x_m[i] = x[i] - step * v_star[i];
    }
}

}  // namespace

void rollout_start(const RolloutStart& params) {
    params.dtype == DType::f64 ? start_rows<double>(params) : start_rows<float>(params);
}

}  // namespace TWINFLOW_ISA
}  // namespace twinflow
