// EMA over a table of tensors: target <- decay target + (1 - decay) source. Compiled once per instruction set.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "scalar.h"

namespace twinflow {
namespace TWINFLOW_ISA {

namespace {

constexpr int64_t kTile = 1024;     // elements between conversions: the buffer stays in the first-level cache
constexpr int64_t kPiece = 262144;  // elements per task, counted through all tensors

template <class T>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};

template <class T, class A>
void combine(T* target, const A* source, int64_t count, const EmaDecay& decay) {
    if (decay.keep == 0.0) {
        for (int64_t i = 0; i < count; ++i) target[i] = narrow<T>(source[i]);
        return;
    }
    const A keep = static_cast<A>(decay.keep), take = static_cast<A>(decay.take);
    // new = decay * target + (1 - decay) * source
    for (int64_t i = 0; i < count; ++i)
        target[i] = narrow<T>(keep * static_cast<A>(widen(target[i])) + take * source[i]);
}

template <class T>
void copy_tile(const T* target, void* copy, int64_t begin, int64_t count, DType dtype) {
    with_dtype(dtype, [&](auto type) {
        using C = decltype(type);
        C* to = static_cast<C*>(copy) + begin;
        for (int64_t i = 0; i < count; ++i) to[i] = narrow<C>(widen(target[i]));
    });
}

// Elements [begin, end) of one pair.
void update_range(const EmaPair& pair, int64_t begin, int64_t end, const EmaDecay& decay) {
    with_dtype(static_cast<DType>(pair.target_dtype), [&](auto type) {
        using T = decltype(type);
        using A = typename Accumulator<T>::type;
        alignas(64) A buffer[kTile];
        T* target = reinterpret_cast<T*>(pair.target);
        for (int64_t at = begin; at < end; at += kTile) {
            const int64_t count = std::min(kTile, end - at);
            if (decay.keep != 1.0) {
                const A* source = widened(reinterpret_cast<const void*>(pair.source),
                                          static_cast<DType>(pair.source_dtype), at, count, buffer);
                combine(target + at, source, count, decay);
            }
            if (pair.copy)
                copy_tile(target + at, reinterpret_cast<void*>(pair.copy), at, count,
                          static_cast<DType>(pair.copy_dtype));
        }
    });
}

}  // namespace

void ema_update(const EmaPair* pairs, int64_t count, EmaDecay decay, int threads) {
    // Pieces of all tensors laid end to end, handed out as threads come free: a busy core delays nobody else.
    std::vector<int64_t> ends(count);
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) ends[i] = total += pairs[i].count;
    const int64_t pieces = (total + kPiece - 1) / kPiece;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1 && pieces > 1)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t first = piece * kPiece, last = std::min(total, first + kPiece);
        int64_t i = std::upper_bound(ends.begin(), ends.end(), first) - ends.begin();
        for (; i < count && ends[i] - pairs[i].count < last; ++i) {
            const int64_t offset = ends[i] - pairs[i].count;
            const int64_t begin = std::max<int64_t>(first - offset, 0), end = std::min(last - offset, pairs[i].count);
            if (begin < end) update_range(pairs[i], begin, end, decay);
        }
    }
}

}  // namespace TWINFLOW_ISA
}  // namespace twinflow
