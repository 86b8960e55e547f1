// csrc/ema_update_cuda.cu as a host library: launches run here, and are counted.
#define TWINFLOW_ISA baseline
#include "ema_update_cuda.cu"

namespace {
int launches = 0;

template <bool kCopies>
bool run_if(const void* kernel, unsigned threads, void* batch) {
    if (kernel != reinterpret_cast<const void*>(&twinflow::cuda::ema_kernel<kCopies>)) return false;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
            twinflow::cuda::ema_kernel<kCopies>(*static_cast<twinflow::cuda::Batch<kCopies>*>(batch));
    return true;
}
}  // namespace

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
    ++launches;
    gridDim = grid;
    return run_if<true>(kernel, block.x, arguments[0]) || run_if<false>(kernel, block.x, arguments[0]) ? cudaSuccess : 1;
}

extern "C" int ema_update_on_host(int64_t pairs, int64_t count, double decay, int64_t on_device, int dtype) {
    launches = 0;
    const twinflow::EmaDecay numbers{decay, 1.0 - decay, reinterpret_cast<const void*>(on_device),
                                     static_cast<twinflow::DType>(dtype)};
    twinflow::cuda::ema_update(reinterpret_cast<const twinflow::EmaPair*>(pairs), count, numbers, 0, nullptr);
    return launches;
}
