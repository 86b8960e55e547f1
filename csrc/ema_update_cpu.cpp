// EMA over a table of tensors: target <- decay target + (1 - decay) source. Compiled once per instruction set.
#include <algorithm>
#include <type_traits>

#include "scalar.h"

namespace twinflow {
namespace TWINFLOW_ISA {

namespace {

constexpr int64_t kTile = 1024;    // elements between conversions: the buffer stays in the first-level cache
constexpr int64_t kChunk = 65536;  // elements per task, counted through all tensors

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

// The source in the accumulator's type: in place where it has that type, else converted into `buffer`.
template <class A>
const A* widened(const void* source, int64_t begin, int64_t count, DType dtype, A* buffer) {
    const A* result = buffer;
    with_dtype(dtype, [&](auto type) {
        using S = decltype(type);
        const S* from = static_cast<const S*>(source) + begin;
        if constexpr (std::is_same_v<S, A>) {
            result = from;
        } else {
            for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<A>(widen(from[i]));
        }
    });
    return result;
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
                const A* source = widened(reinterpret_cast<const void*>(pair.source), at, count,
                                          static_cast<DType>(pair.source_dtype), buffer);
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
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += pairs[i].count;
    const int parts = static_cast<int>(std::min<int64_t>(threads, (total + kChunk - 1) / kChunk));
    // Threads share the elements, not the tensors: part p takes [p, p + 1) / parts of all tensors laid end to end.
#pragma omp parallel for num_threads(parts) schedule(static) if (parts > 1)
    for (int part = 0; part < parts; ++part) {
        const int64_t first = total * part / parts, last = total * (part + 1) / parts;
        int64_t offset = 0;
        for (int64_t i = 0; i < count && offset < last; offset += pairs[i].count, ++i) {
            const int64_t begin = std::max<int64_t>(first - offset, 0);
            const int64_t end = std::min(last - offset, pairs[i].count);
            if (begin < end) update_range(pairs[i], begin, end, decay);
        }
    }
}

}  // namespace TWINFLOW_ISA
}  // namespace twinflow
