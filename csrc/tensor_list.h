// Reads Python lists of torch tensors through DLPack's C exchange table (`__dlpack_c_exchange_api__`, torch >= 2.10), a
// plain C interface with a version of its own: 2,000 tensors in the time of a few hundred Python attribute look-ups.
#pragma once
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "kernels.h"

namespace twinflow {

// Layouts of DLPack 1.x (dmlc/dlpack, include/dlpack/dlpack.h), as far as they are used here.
namespace dlpack {
struct Tensor {
    void* data;
    int32_t device_type, device_index;
    int32_t dimensions;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};
struct ExchangeTable {
    uint32_t major, minor;
    ExchangeTable* previous;
    void *allocate, *managed_from_object, *managed_to_object;
    int (*tensor_from_object)(void* object, Tensor* out);
    void* current_stream;
};
}  // namespace dlpack

class TensorReader {
public:
    // `tensor_type` and `parameter_type`: the exact Python types that it reads; objects of others are left to Python.
    TensorReader(PyObject* tensor_type, PyObject* parameter_type)
        : tensor_type_(tensor_type), parameter_type_(parameter_type) {
        PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
        if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
            auto* table = static_cast<dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
            while (table && table->major != 1) table = table->previous;
            if (table) read_ = table->tensor_from_object;
        }
        Py_XDECREF(capsule);
        PyErr_Clear();
    }

    // False where `object` is not a plain tensor that DLPack describes.
    bool read(PyObject* object, dlpack::Tensor* out) const {
        PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
        if (!read_ || (type != tensor_type_ && type != parameter_type_)) return false;
        if (read_(object, out) == 0) return true;
        PyErr_Clear();
        return false;
    }

private:
    PyObject *tensor_type_, *parameter_type_;
    int (*read_)(void*, dlpack::Tensor*) = nullptr;
};

inline std::optional<DType> dtype_of(const dlpack::Tensor& x) {
    if (x.lanes != 1) return {};
    if (x.code == 2 && x.bits == 32) return DType::f32;
    if (x.code == 2 && x.bits == 64) return DType::f64;
    if (x.code == 4 && x.bits == 16) return DType::bf16;
    if (x.code == 2 && x.bits == 16) return DType::f16;
    return {};
}

inline int64_t count_of(const dlpack::Tensor& x) {
    int64_t count = 1;
    for (int i = 0; i < x.dimensions; ++i) count *= x.shape[i];
    return count;
}

inline bool is_contiguous(const dlpack::Tensor& x) {
    int64_t stride = 1;
    for (int i = x.dimensions - 1; i >= 0; --i) {
        if (x.shape[i] != 1 && x.strides && x.strides[i] != stride) return false;
        stride *= x.shape[i];
    }
    return true;
}

inline bool same_device(const dlpack::Tensor& x, const dlpack::Tensor& y) {
    return x.device_type == y.device_type && x.device_index == y.device_index;
}

inline bool same_shape(const dlpack::Tensor& x, const dlpack::Tensor& y) {
    return x.dimensions == y.dimensions && std::equal(x.shape, x.shape + x.dimensions, y.shape);
}

}  // namespace twinflow
