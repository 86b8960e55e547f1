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
    double keep, take;                // decay, 1 - decay
    const void* on_device = nullptr;  // where set, a CUDA kernel reads the decay there instead
    DType dtype = DType::f32;         // of on_device
};

// The first step of (rows, row_size) rollouts; v_cond and v_uncond are null where no row is enhanced.
struct RolloutStart {
    const void *v_target, *x_t, *v_cond, *v_uncond;
    const void *ratio, *delta;  // (rows,)
    void *v_star, *x_m;
    DType v_target_dtype, x_t_dtype, v_cond_dtype, v_uncond_dtype;
    DType dtype;  // of the arithmetic, ratio, delta and results: f32 or f64
    int64_t rows, row_size;
    int threads;
};

// The velocity loss of (row_count, row_size) tensors; null addresses for tensors that are absent.
struct VelocityLoss {
    const void *v_pred, *v_target, *x_start, *x_end;
    const void* rows;  // (row_count, 4): scale_pred, scale_path, clamp, weight
    void *loss, *factor;  // (row_count,)
    void* gradient;       // (row_count, row_size) or null; factor * gradient is the gradient of the loss
    DType v_pred_dtype, v_target_dtype, x_start_dtype, x_end_dtype;
    DType dtype;  // of the arithmetic, rows, loss and gradient: f32 or f64
    int64_t row_count, row_size;
    double alpha, c;
    int threads;
};

// out = grad_loss[row] * factor[row] * residual, rounded once; out may be residual where the dtypes agree.
struct VelocityLossBackward {
    const void *grad_loss, *factor, *residual;
    void* out;
    int64_t row_count, row_size;
    int64_t grad_loss_stride;  // 0 for one number expanded over the rows, as autograd hands out
    DType dtype, out_dtype;    // of the inputs (f32 or f64), of out
    int threads;
};

#define TWINFLOW_DECLARE_CPU(ISA)                                                                              \
    namespace ISA {                                                                                           \
    /* v_star = v_target + ratio (v_cond - v_uncond), x_m = x_t - delta v_star. */                             \
    void rollout_start(const RolloutStart& params);                                                           \
    /* x (rows, row_size) -= dt (rows,) * v (rows, row_size); v has its own dtype, dt has x's. */             \
    void rollout_step(void* x, const void* v, const void* dt, int64_t rows, int64_t row_size, DType x_dtype,  \
                      DType v_dtype, int threads);                                                            \
    /* target <- keep * target + take * source over a table of contiguous tensors of any floating dtypes. */   \
    void ema_update(const EmaPair* pairs, int64_t count, EmaDecay decay, int threads);                        \
    /* Losses per row, and the gradient at grad_loss = 1 where it has an address. */                          \
    void velocity_loss(const VelocityLoss& params);                                                           \
    void velocity_loss_backward(const VelocityLossBackward& params);                                          \
    }

TWINFLOW_DECLARE_CPU(baseline)
TWINFLOW_DECLARE_CPU(avx2)
TWINFLOW_DECLARE_CPU(avx512)

namespace cuda {
void versions(int* runtime, int* driver);
// As the CPU's ema_update, on a device and its stream; throws std::runtime_error where CUDA reports an error.
void ema_update(const EmaPair* pairs, int64_t count, EmaDecay decay, int device, void* stream);
}  // namespace cuda

}  // namespace twinflow
