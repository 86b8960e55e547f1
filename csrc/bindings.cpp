// pybind11 module twinflow_kernels._C: addresses, int64 sizes and a stream handle in; nothing of torch.
// Callers (twinflow_kernels/<op>.py) have checked dtype, device, contiguity, shape and overlap.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "ema_update_pairs.h"
#include "kernels.h"

namespace py = pybind11;
using namespace twinflow;
using Address = std::uintptr_t;

namespace {

enum class Isa { baseline, avx2, avx512 };

Isa detect_isa() {
#if defined(TWINFLOW_ISA_AVX512)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::baseline;
}

const Isa kDetected = detect_isa();
Isa chosen = kDetected;

const char* isa_name(Isa isa) {
    return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

// For tests and benchmarks: run a lower instruction set than the machine offers.
void set_isa(const std::string& name) {
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
        if (name == isa_name(isa)) {
            if (isa > kDetected)
                throw std::invalid_argument("set_isa: name must be at most " + std::string(isa_name(kDetected)) +
                                            " on this machine, got " + name);
            chosen = isa;
            return;
        }
    throw std::invalid_argument("set_isa: name must be baseline, avx2 or avx512, got " + name);
}

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

#if defined(TWINFLOW_ISA_AVX512)
#define TWINFLOW_CPU(call)                            \
    switch (chosen) {                                 \
        case Isa::avx512: avx512::call; break;        \
        case Isa::avx2: avx2::call; break;            \
        case Isa::baseline: baseline::call; break;    \
    }
#else
#define TWINFLOW_CPU(call) baseline::call;
#endif

PYBIND11_MODULE(_C, m) {
    m.attr("has_cuda") = static_cast<bool>(TWINFLOW_CUDA);
    m.def("isa", [] { return isa_name(chosen); });
    m.def("detected_isa", [] { return isa_name(kDetected); });
    m.def("set_isa", &set_isa);

#if TWINFLOW_CUDA
    m.def("cuda_versions", [] {
        int runtime = 0, driver = 0;
        cuda::versions(&runtime, &driver);
        return py::make_tuple(runtime, driver);
    });
    m.def("ema_update_cuda", [](Address pairs, int64_t count, double decay, Address decay_on_device, int decay_dtype,
                                int device, Address stream) {
        py::gil_scoped_release release;
        const EmaDecay numbers{decay, 1.0 - decay, at<const void>(decay_on_device), static_cast<DType>(decay_dtype)};
        cuda::ema_update(at<const EmaPair>(pairs), count, numbers, device, at<void>(stream));
    });
#endif

    // inputs: v_target, x_t, v_cond, v_uncond (0: absent), ratio, delta; outputs: v_star, x_m; dtypes: of the first four
    // inputs and of the arithmetic.
    m.def("rollout_start_cpu", [](std::array<Address, 6> in, std::array<Address, 2> out, std::array<int, 5> dtypes,
                                  int64_t rows, int64_t row_size, int threads) {
        const auto dtype = [&](int i) { return static_cast<DType>(dtypes[i]); };
        const RolloutStart params{
            at<const void>(in[0]), at<const void>(in[1]), at<const void>(in[2]), at<const void>(in[3]),
            at<const void>(in[4]), at<const void>(in[5]), at<void>(out[0]), at<void>(out[1]),
            dtype(0), dtype(1), dtype(2), dtype(3), dtype(4), rows, row_size, threads};
        py::gil_scoped_release release;
        TWINFLOW_CPU(rollout_start(params))
    });

    m.def("rollout_step_cpu", [](Address x, Address v, Address dt, int64_t rows, int64_t row_size, int x_dtype,
                                 int v_dtype, int threads) {
        py::gil_scoped_release release;
        TWINFLOW_CPU(rollout_step(at<void>(x), at<const void>(v), at<const void>(dt), rows, row_size,
                                  static_cast<DType>(x_dtype), static_cast<DType>(v_dtype), threads))
    });

    // Reads lists of tensors without Python's attribute look-ups; made from torch.Tensor and torch.nn.Parameter.
    py::class_<TensorReader>(m, "TensorReader")
        .def(py::init([](py::object tensor_type, py::object parameter_type) {
            return TensorReader(tensor_type.ptr(), parameter_type.ptr());
        }), py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
        .def("ema_pairs", [](const TensorReader& reader, py::list targets, py::list sources, py::list copies,
                             Address pairs) {
            return ema_pairs(reader, targets.ptr(), sources.ptr(), copies.ptr(), at<EmaPair>(pairs));
        });

    m.def("ema_update_cpu", [](Address pairs, int64_t count, double decay, int threads) {
        py::gil_scoped_release release;
        TWINFLOW_CPU(ema_update(at<const EmaPair>(pairs), count, EmaDecay{decay, 1.0 - decay}, threads))
    });

    // inputs: v_pred, v_target, x_start, x_end (0: absent), rows; outputs: loss, factor, gradient (0: not wanted);
    // dtypes: of the first four inputs and of the arithmetic.
    m.def("velocity_loss_cpu", [](std::array<Address, 5> inputs, std::array<Address, 3> outputs,
                                  std::array<int, 5> dtypes, int64_t row_count, int64_t row_size, double alpha,
                                  double c, int threads) {
        const auto input = [&](int i) { return at<const void>(inputs[i]); };
        const auto output = [&](int i) { return at<void>(outputs[i]); };
        const auto dtype = [&](int i) { return static_cast<DType>(dtypes[i]); };
        const VelocityLoss params{input(0), input(1), input(2), input(3), input(4), output(0), output(1), output(2),
                                  dtype(0), dtype(1), dtype(2), dtype(3), dtype(4), row_count, row_size, alpha, c,
                                  threads};
        py::gil_scoped_release release;
        TWINFLOW_CPU(velocity_loss(params))
    });

    m.def("velocity_loss_backward_cpu", [](Address grad_loss, Address factor, Address residual, Address out,
                                           int64_t row_count, int64_t row_size, int64_t grad_loss_stride, int dtype,
                                           int out_dtype, int threads) {
        const VelocityLossBackward params{at<const void>(grad_loss), at<const void>(factor), at<const void>(residual),
                                          at<void>(out), row_count, row_size, grad_loss_stride,
                                          static_cast<DType>(dtype), static_cast<DType>(out_dtype), threads};
        py::gil_scoped_release release;
        TWINFLOW_CPU(velocity_loss_backward(params))
    });
}
