// What the CUDA runtime linked into this module and the machine's driver offer.
#include <cuda_runtime.h>

#include "kernels.h"

namespace twinflow {
namespace cuda {

// Versions as CUDA writes them (13000 is 13.0); the driver's is 0 on a machine without one.
void versions(int* runtime, int* driver) {
    if (cudaRuntimeGetVersion(runtime) != cudaSuccess) *runtime = 0;
    if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
}

}  // namespace cuda
}  // namespace twinflow
