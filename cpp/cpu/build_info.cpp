// SPDX-License-Identifier: Apache-2.0
// The only source that sees the build's own facts, so that a new commit rebuilds one file.
#include "fastkern/core.h"

namespace fastkern {

const BuildInfo& build_info() {
  static const BuildInfo info{
      .version = FASTKERN_VERSION,
      .commit = FASTKERN_COMMIT,
      .compiler = FASTKERN_COMPILER,
      .cuda = FASTKERN_HAS_CUDA != 0,
      .cuda_version = FASTKERN_CUDA_VERSION,
      .cuda_archs = FASTKERN_CUDA_ARCHS,
  };
  return info;
}

#if !FASTKERN_HAS_CUDA
namespace cuda {
int device_count() { return 0; }
int driver_version() { return 0; }
DeviceInfo device_info(int) {
  fail("fastkern: this build has no CUDA kernels (FASTKERN_CUDA=off)");
}
}  // namespace cuda
#endif

}  // namespace fastkern
