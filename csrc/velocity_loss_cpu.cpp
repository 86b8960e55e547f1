// The velocity loss of every row and its gradient: two passes over a row, the second while the residual is in cache.
// Compiled once per instruction set (TWINFLOW_ISA).
#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

#include "scalar.h"

namespace twinflow {
namespace TWINFLOW_ISA {

namespace {

constexpr int64_t kChunk = 4096;  // elements per task and per partial sum; fixes the order of summation
constexpr int64_t kLanes = 64;    // partial sums within a chunk, the same at every instruction set

template <class M>
struct Row {
    M scale_pred, scale_path, clamp, weight;
};

// The inputs of one chunk in the dtype of the arithmetic; null where the row does not read them.
template <class M>
struct Chunk {
    const M *v_pred, *v_target, *x_start, *x_end;
};

// R = clamp(a v_pred - b (x_start - x_end) - v_target); NaN compares false both times and stays.
template <class M, bool kPred, bool kPath, bool kTarget>
inline M residual_at(const Chunk<M>& in, const Row<M>& row, int64_t i) {
    M r = 0;
    if constexpr (kPred) r = row.scale_pred * in.v_pred[i];
    if constexpr (kPath) r = r - row.scale_path * (in.x_start[i] - in.x_end[i]);
    if constexpr (kTarget) r = r - in.v_target[i];
    r = row.clamp < r ? row.clamp : r;
    return r < -row.clamp ? -row.clamp : r;
}

// Writes R where wanted and returns the sum of R^2, in an order that depends on `count` alone.
template <class M, bool kPred, bool kPath, bool kTarget, bool kWrite>
double residual_loop(const Chunk<M> in, const Row<M> row, int64_t count, M* __restrict out) {
    M sums[kLanes] = {};
    int64_t begin = 0;
    for (; begin + kLanes <= count; begin += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const M r = residual_at<M, kPred, kPath, kTarget>(in, row, begin + lane);
            if constexpr (kWrite) out[begin + lane] = r;
            sums[lane] = sums[lane] + r * r;
        }
    }
    for (int64_t lane = 0; begin + lane < count; ++lane) {
        const M r = residual_at<M, kPred, kPath, kTarget>(in, row, begin + lane);
        if constexpr (kWrite) out[begin + lane] = r;
        sums[lane] = sums[lane] + r * r;
    }
    double total = 0;
    for (M sum : sums) total += static_cast<double>(sum);
    return total;
}

template <class M, bool... kFlags>
double residual_dispatch(const Chunk<M>& in, const Row<M>& row, int64_t count, M* out) {
    if constexpr (sizeof...(kFlags) == 4) {
        return residual_loop<M, kFlags...>(in, row, count, out);
    } else {
        const void* given[] = {in.v_pred, in.x_start, in.v_target, out};
        return given[sizeof...(kFlags)] ? residual_dispatch<M, kFlags..., true>(in, row, count, out)
                                        : residual_dispatch<M, kFlags..., false>(in, row, count, out);
    }
}

// The first pass over one chunk: R into the gradient's place, its sum of squares returned.
template <class M>
double residual_chunk(const VelocityLoss& p, const Row<M>& row, int64_t offset, int64_t count) {
    M* out = p.gradient ? static_cast<M*>(p.gradient) + offset : nullptr;
    if (row.weight == 0) {
        if (out) std::fill_n(out, count, M(0));
        return 0;
    }
    M scratch[4][kChunk];
    Chunk<M> in = {};
    if (row.scale_pred != 0) in.v_pred = widened(p.v_pred, p.v_pred_dtype, offset, count, scratch[0]);
    if (p.v_target) in.v_target = widened(p.v_target, p.v_target_dtype, offset, count, scratch[1]);
    if (p.x_start && row.scale_path != 0) {
        in.x_start = widened(p.x_start, p.x_start_dtype, offset, count, scratch[2]);
        in.x_end = widened(p.x_end, p.x_end_dtype, offset, count, scratch[3]);
    }
    return residual_dispatch<M>(in, row, count, out);
}

// Writes the row's loss and factor and returns what turns R into its gradient; in float64, as it is one number per row.
template <class M>
M finish_row(const VelocityLoss& p, int64_t row, double sum) {
    const Row<M> coefficients = static_cast<const Row<M>*>(p.rows)[row];
    const double mse = sum / static_cast<double>(p.row_size), shape = p.alpha - 2;
    double barron = 1;
    if (std::fabs(shape) >= 1e-5) barron = std::pow(mse / (p.c * p.c + 1e-8) / std::fabs(shape) + 1, shape / 2);
    double weight = coefficients.weight;
    // A NaN clamp compares false with every residual: here it makes the row NaN.
    if (weight != 0 && coefficients.clamp != coefficients.clamp) weight = coefficients.clamp;
    static_cast<M*>(p.loss)[row] = static_cast<M>(weight * mse * barron / p.c);
    static_cast<M*>(p.factor)[row] = weight == 0 ? M(0) : M(1);
    return static_cast<M>(weight * barron / p.c * 2 / static_cast<double>(p.row_size));
}

// One row in chunks: residual(chunk) -> sum of squares, then scale(chunk, scale).
template <class M>
struct Rows {
    const VelocityLoss& p;
    const int64_t chunks = (p.row_size + kChunk - 1) / kChunk;

    int64_t offset(int64_t row, int64_t chunk) const { return row * p.row_size + chunk * kChunk; }
    int64_t size(int64_t chunk) const { return std::min(kChunk, p.row_size - chunk * kChunk); }

    double residual(int64_t row, int64_t chunk) const {
        return residual_chunk(p, static_cast<const Row<M>*>(p.rows)[row], offset(row, chunk), size(chunk));
    }

    void scale(int64_t row, int64_t chunk, M factor) const {
        if (!p.gradient || static_cast<const Row<M>*>(p.rows)[row].weight == 0) return;
        M* out = static_cast<M*>(p.gradient) + offset(row, chunk);
        for (int64_t i = 0, count = size(chunk); i < count; ++i) out[i] = out[i] * factor;
    }
};

// A thread takes whole rows: no thread waits for another until the end, which counts where the machine has other work.
template <class M>
void loss_by_rows(const VelocityLoss& p) {
    const Rows<M> rows{p};
    const int64_t batch = std::max<int64_t>(1, kChunk / p.row_size);
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, batch) if (p.row_count * p.row_size > kChunk)
    for (int64_t row = 0; row < p.row_count; ++row) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < rows.chunks; ++chunk) sum += rows.residual(row, chunk);
        const M factor = finish_row<M>(p, row, sum);
        for (int64_t chunk = 0; chunk < rows.chunks; ++chunk) rows.scale(row, chunk, factor);
    }
}

// Few large rows: all threads share each row, and wait for its sum once.
template <class M>
void loss_by_chunks(const VelocityLoss& p) {
    const Rows<M> rows{p};
    std::vector<double> partials(p.row_count * rows.chunks);
    std::vector<M> factors(p.row_count);
#pragma omp parallel num_threads(p.threads)
    for (int64_t row = 0; row < p.row_count; ++row) {
        double* sums = &partials[row * rows.chunks];
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < rows.chunks; ++chunk) sums[chunk] = rows.residual(row, chunk);
#pragma omp single
        factors[row] = finish_row<M>(p, row, std::accumulate(sums, sums + rows.chunks, 0.0));
#pragma omp for schedule(static) nowait  // the same schedule: each thread meets the chunks that are in its cache
        for (int64_t chunk = 0; chunk < rows.chunks; ++chunk) rows.scale(row, chunk, factors[row]);
    }
}

template <class M>
void loss_rows(const VelocityLoss& p) {
    // Whole rows keep every thread busy when they divide evenly, or when one more row matters little.
    const bool even = p.row_count % p.threads == 0 || p.row_count >= 4 * p.threads;
    even || p.row_size <= kChunk ? loss_by_rows<M>(p) : loss_by_chunks<M>(p);
}

template <class M, class V>
void backward_rows(const VelocityLossBackward& p) {
    const M *grad_loss = static_cast<const M*>(p.grad_loss), *factors = static_cast<const M*>(p.factor);
    const int64_t chunks = (p.row_size + kChunk - 1) / kChunk;
    // A row of weight 0 has factor 0: its gradient is 0 whatever arrives.
    const auto factor_of = [&](int64_t row) {
        return factors[row] == 0 ? M(0) : grad_loss[row * p.grad_loss_stride] * factors[row];
    };
    // In place, rows of factor 1 are ready, and so are rows of weight 0: all 0.
    const auto ready = [&](int64_t row) { return p.out == p.residual && (factor_of(row) == 1 || factors[row] == 0); };
    int64_t first = 0;
    while (first < p.row_count && ready(first)) ++first;
    if (first == p.row_count) return;
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.threads > 1 && p.row_count * p.row_size > kChunk)
    for (int64_t task = first * chunks; task < p.row_count * chunks; ++task) {
        const int64_t row = task / chunks, begin = task % chunks * kChunk, offset = row * p.row_size + begin;
        if (ready(row)) continue;
        const int64_t count = std::min(kChunk, p.row_size - begin);
        const M* residual = static_cast<const M*>(p.residual) + offset;
        V* out = static_cast<V*>(p.out) + offset;
        const M factor = factor_of(row);
        for (int64_t i = 0; i < count; ++i) out[i] = narrow<V>(factor * residual[i]);
    }
}

}  // namespace

void velocity_loss(const VelocityLoss& p) {
    p.dtype == DType::f64 ? loss_rows<double>(p) : loss_rows<float>(p);
}

void velocity_loss_backward(const VelocityLossBackward& p) {
    with_dtype(p.out_dtype, [&](auto type) {
        using V = decltype(type);
        p.dtype == DType::f64 ? backward_rows<double, V>(p) : backward_rows<float, V>(p);
    });
}

}  // namespace TWINFLOW_ISA
}  // namespace twinflow
