// EMA over a table of tensors on the GPU: target <- decay target + (1 - decay) source, about 1,000 tensors a launch.
//
// The table travels by value in the kernel's parameters, so that a launch needs no copy to the device, no host sync,
// and can be captured in a CUDA graph. Dtypes are read per tensor at run time (the same for a whole thread block): loads
// and stores switch on them, the arithmetic between is float32, or float64 for float64 targets.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "vector_cuda.h"

namespace twinflow {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kBlockElements = 16384;  // elements per thread block: 8 steps of kThreads * kVector
// sm_70 and later take 32,764 bytes of kernel parameters from CUDA 12.1 on, 4,096 before.
constexpr int kParameterBytes = CUDART_VERSION >= 12010 ? 32764 : 4096;
constexpr int kHeaderBytes = 48;

// Tensors of one launch. Tensor i owns the thread blocks [first_block[i], first_block[i + 1]).
template <bool kCopies>
struct Batch {
    static constexpr int kCapacity = (kParameterBytes - kHeaderBytes) / (kCopies ? 32 : 24);
    double keep, take;
    const void* decay;  // on the device, or null
    DType decay_dtype;
    int pairs;
    int64_t target[kCapacity], source[kCapacity], copy[kCopies ? kCapacity : 1];
    uint32_t first_block[kCapacity];
    uint16_t tail[kCapacity];    // elements of the last block, less one
    uint16_t dtypes[kCapacity];  // target | source << 4 | copy << 8
};
static_assert(sizeof(Batch<true>) <= kParameterBytes && sizeof(Batch<false>) <= kParameterBytes, "parameters too large");

// One thread block's piece of a tensor, begin a multiple of kBlockElements.
struct Piece {
    int64_t target, source, copy, begin, end;
    DType target_dtype, source_dtype, copy_dtype;
};

template <class A>
__device__ __forceinline__ A combine(A keep, A take, A old_value, A source, bool replace) {
    // new = decay * target + (1 - decay) * source
    return replace ? source : keep * old_value + take * source;
}

template <class A>
__device__ void update_piece(const Piece& p, double keep64, double take64) {
    const A keep = static_cast<A>(keep64), take = static_cast<A>(take64);
    const bool replace = keep64 == 0.0, stay = keep64 == 1.0;
    const bool aligned = ((p.target | p.source | p.copy) & 15) == 0;
    const int64_t vectors_end = aligned ? p.begin + (p.end - p.begin) / kVector * kVector : p.begin;
    for (int64_t i = p.begin + threadIdx.x * kVector; i < vectors_end; i += kThreads * kVector) {
        A x[kVector] = {}, s[kVector];
        if (!replace) load_vector(p.target, p.target_dtype, i, x);
        if (!stay) {
            load_vector(p.source, p.source_dtype, i, s);
#pragma unroll
            for (int k = 0; k < kVector; ++k)
                x[k] = rounded(combine(keep, take, x[k], s[k], replace), p.target_dtype);
            store_vector(p.target, p.target_dtype, i, x);
        }
        if (p.copy) store_vector(p.copy, p.copy_dtype, i, x);
    }
    for (int64_t i = vectors_end + threadIdx.x; i < p.end; i += kThreads) {
        A x = replace ? A(0) : load_one<A>(p.target, p.target_dtype, i);
        if (!stay) {
            const A s = load_one<A>(p.source, p.source_dtype, i);
            x = rounded(combine(keep, take, x, s, replace), p.target_dtype);
            store_one(p.target, p.target_dtype, i, x);
        }
        if (p.copy) store_one(p.copy, p.copy_dtype, i, x);
    }
}

template <bool kCopies>
__global__ void __launch_bounds__(kThreads) ema_kernel(const __grid_constant__ Batch<kCopies> batch) {
    // The last tensor whose first block is not past this one.
    int pair = 0;
    for (int high = batch.pairs; high - pair > 1;) {
        const int middle = (pair + high) / 2;
        (batch.first_block[middle] <= blockIdx.x ? pair : high) = middle;
    }
    const uint32_t blocks_end = pair + 1 < batch.pairs ? batch.first_block[pair + 1] : gridDim.x;
    const uint32_t dtypes = batch.dtypes[pair];
    Piece p;
    p.target = batch.target[pair], p.source = batch.source[pair], p.copy = kCopies ? batch.copy[pair] : 0;
    p.target_dtype = static_cast<DType>(dtypes & 15), p.source_dtype = static_cast<DType>(dtypes >> 4 & 15);
    p.copy_dtype = static_cast<DType>(dtypes >> 8 & 15);
    p.begin = static_cast<int64_t>(blockIdx.x - batch.first_block[pair]) * kBlockElements;
    p.end = p.begin + (blockIdx.x + 1 == blocks_end ? batch.tail[pair] + 1 : kBlockElements);
    double keep = batch.keep, take = batch.take;
    if (batch.decay) {
        keep = load_one<double>(reinterpret_cast<int64_t>(batch.decay), batch.decay_dtype, 0);
        if (!(keep >= 0.0 && keep <= 1.0)) keep = __longlong_as_double(0x7ff8000000000000ll);
        take = 1.0 - keep;
    }
    if (p.target_dtype == DType::f64)
        update_piece<double>(p, keep, take);
    else
        update_piece<float>(p, keep, take);
}

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("ema_update_: ") + what + ": " + cudaGetErrorString(error));
}

// The device of the tensors is current while this lives.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        changed_ = device != before_;
        if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);  // setting it needlessly would create a context there
    }

private:
    int before_ = 0;
    bool changed_ = false;
};

template <bool kCopies>
void launch(Batch<kCopies>& batch, uint32_t blocks, cudaStream_t stream) {
    void* arguments[] = {&batch};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(&ema_kernel<kCopies>), dim3(blocks), dim3(kThreads), arguments,
                           0, stream),
          "launch");
    check(cudaGetLastError(), "launch");
}

template <bool kCopies>
void launch_all(const EmaPair* pairs, int64_t count, const EmaDecay& decay, cudaStream_t stream) {
    constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
    Batch<kCopies> batch;
    batch.keep = decay.keep, batch.take = decay.take, batch.decay = decay.on_device, batch.decay_dtype = decay.dtype;
    batch.pairs = 0;
    int64_t blocks = 0;
    for (int64_t i = 0; i < count; ++i) {
        const EmaPair& pair = pairs[i];
        if (pair.count == 0) continue;
        const int64_t own_blocks = (pair.count + kBlockElements - 1) / kBlockElements;
        if (batch.pairs == Batch<kCopies>::kCapacity || blocks + own_blocks > kMaxBlocks) {
            launch(batch, static_cast<uint32_t>(blocks), stream);
            batch.pairs = 0, blocks = 0;
        }
        const int at = batch.pairs++;
        batch.target[at] = pair.target, batch.source[at] = pair.source;
        if (kCopies) batch.copy[at] = pair.copy;
        batch.first_block[at] = static_cast<uint32_t>(blocks);
        batch.tail[at] = static_cast<uint16_t>((pair.count - 1) % kBlockElements);
        batch.dtypes[at] = static_cast<uint16_t>(pair.target_dtype | pair.source_dtype << 4 | pair.copy_dtype << 8);
        blocks += own_blocks;
    }
    if (batch.pairs) launch(batch, static_cast<uint32_t>(blocks), stream);
}

}  // namespace

void ema_update(const EmaPair* pairs, int64_t count, EmaDecay decay, int device, void* stream) {
    const DeviceGuard guard(device);
    bool any_copy = false;
    for (int64_t i = 0; i < count; ++i) any_copy = any_copy || pairs[i].copy;
    if (any_copy)
        launch_all<true>(pairs, count, decay, static_cast<cudaStream_t>(stream));
    else
        launch_all<false>(pairs, count, decay, static_cast<cudaStream_t>(stream));
}

}  // namespace cuda
}  // namespace twinflow
