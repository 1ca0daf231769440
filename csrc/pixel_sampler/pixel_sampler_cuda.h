// The CUDA executor of a program: one persistent launch runs all slots of a batch of images.
//
// Images are split among teams of blocks. Of the work of a team, the panels of convolutions and the heads
// of attention are shared out among its blocks; the rest is done by each of them, so that a barrier is
// needed only where one reads what another wrote, or writes what another reads. Two kinds of team: a
// thread-block cluster (from compute capability 9.0), or a part of a cooperative grid.
//
// Compiled and emulated; see docs/gpu_status.md for what has run on a device.
#pragma once

#include "../common/view.h"

namespace genperf::pixel {

struct CudaRun {
  View entries, steps, resident, taps;  // see step.cuh
  View workspace;                       // float32 [teams, workspace of a team]
  View values, noise, key, images, known;
  View scratch, arrived;
  View head;         // int64 [14], a Head
  const void* mask;  // bool, of the shape of `known`
  int64_t begin, end, team_images, team_size;
  bool cluster;
  int64_t source_floats, head_floats, resident_floats;
  bool head_in_shared;
  float temperature;
  int64_t top_k;
};

// A cudaError_t.
int pixel_sampler_cuda(const CudaRun& run, void* stream);

// How many clusters of `size` blocks with so much shared memory can run at once; 0: none.
int pixel_sampler_cuda_clusters(int size, int64_t shared_bytes);

}  // namespace genperf::pixel
