// The bulk of `ema_update_`'s tensors, checked and turned into a table.
#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "tensor_list.h"

namespace twinflow {

namespace detail {

struct Range {
    int64_t begin, end;
    bool operator<(const Range& other) const { return begin < other.begin; }
};

// Whether a written range meets another written or a read one. Allocators hand out addresses mostly in order, so a list
// that is sorted already costs nothing.
inline bool any_shared(std::vector<Range>& written, std::vector<Range>& read) {
    for (auto* ranges : {&written, &read})
        if (!std::is_sorted(ranges->begin(), ranges->end())) std::sort(ranges->begin(), ranges->end());
    int64_t written_end = 0, read_end = 0;  // the furthest end of the ranges so far
    auto next = read.begin();
    const auto read_until = [&](int64_t address) {
        for (; next != read.end() && next->begin < address; ++next) {
            if (next->begin < written_end) return true;
            read_end = std::max(read_end, next->end);
        }
        return false;
    };
    for (const Range& range : written) {
        if (read_until(range.begin) || range.begin < std::max(written_end, read_end)) return true;
        written_end = range.end;
    }
    return read_until(written_end);
}

}  // namespace detail

// Fills pairs[len(targets)]; copies belong to the first len(copies) targets. False where anything is out of the
// ordinary: a type, dtype, shape or device that does not fit, a strided tensor, shared memory. Python then looks again,
// to name what is wrong or to copy what is strided.
inline bool ema_pairs(const TensorReader& reader, PyObject* targets, PyObject* sources, PyObject* copies,
                      EmaPair* pairs) {
    const Py_ssize_t count = PyList_GET_SIZE(targets), copy_count = PyList_GET_SIZE(copies);
    if (PyList_GET_SIZE(sources) != count || copy_count > count) return false;
    PyObject* const lists[] = {targets, sources, copies};
    std::array<std::vector<detail::Range>, 3> ranges;
    for (auto& list : ranges) list.reserve(count);
    dlpack::Tensor first{}, target{}, x{};
    for (Py_ssize_t i = 0; i < count; ++i) {
        int64_t address[3] = {};
        int16_t dtype[3] = {};
        for (int column = 0; column < (i < copy_count ? 3 : 2); ++column) {
            if (!reader.read(PyList_GET_ITEM(lists[column], i), &x)) return false;
            if (column == 0) target = x;
            if (i == 0 && column == 0) first = x;
            const auto found = dtype_of(x);
            if (!found || !same_device(x, first) || !same_shape(x, target) || !is_contiguous(x)) return false;
            address[column] = reinterpret_cast<int64_t>(x.data) + static_cast<int64_t>(x.byte_offset);
            dtype[column] = static_cast<int16_t>(*found);
            if (const int64_t bytes = count_of(x) * x.bits / 8)
                ranges[column].push_back({address[column], address[column] + bytes});
        }
        pairs[i] = {address[0], address[1], address[2], count_of(target), dtype[0], dtype[1], dtype[2], 0};
    }
    ranges[0].insert(ranges[0].end(), ranges[2].begin(), ranges[2].end());
    return !detail::any_shared(ranges[0], ranges[1]);
}

}  // namespace twinflow
