// csrc/pixel_sampler/head.h for tests: one thread an image on the host (GENPERF_ISA), or one emulated
// warp an image (GENPERF_SIMT).
#include <vector>

#ifdef GENPERF_SIMT
#include "pixel_sampler/head.cuh"
#else
#include "pixel_sampler/head.h"
#endif

namespace {

using namespace genperf::pixel;

struct Batch {
  int64_t images, channels;
  int index;
  const float *params, *noise;
  Sampling sampling;
  const float* known;
  const uint8_t* mask;
  float *out, *scratch;
};

template <class Team>
GENPERF_HD void draw_image(const Team& team, const Head& head, const Batch& b, int64_t image, bool writes) {
  const float* known = b.mask ? b.known + image * head.values : nullptr;
  const uint8_t* mask = b.mask ? b.mask + image * head.values : nullptr;
  const Drawn drawn = draw(team, head, b.index, b.params + image * b.channels, b.noise + image * head.noises,
                           b.sampling, known, mask, b.scratch + image * head_scratch(head));
  const int64_t values = head.values / head.draws;
  for (int64_t v = 0; writes && v < values; ++v) b.out[image * values + v] = drawn.value[v];
}

#ifdef GENPERF_SIMT
__global__ void kernel(Head head, Batch batch) {
  draw_image(Warp{}, head, batch, blockIdx.x, threadIdx.x == 0);
}
#endif

}  // namespace

extern "C" const char* draw_batch(const Head* head, int64_t images, int64_t channels, int index,
                                  const float* params, const float* noise, float temperature, int64_t top_k,
                                  const float* known, const uint8_t* mask, float* out) {
  // Scratch memory is not initialised: here, to NaN.
  std::vector<float> scratch(images * head_scratch(*head) + 1, genperf::kNaN);
  Batch batch{images, channels, index, params, noise, {temperature, top_k}, known, mask, out, scratch.data()};
#ifdef GENPERF_SIMT
  return simt::catch_faults(
      [&] { GENPERF_LAUNCH(kernel, static_cast<unsigned>(images), 32, 0, nullptr, *head, batch); });
#else
  for (int64_t image = 0; image < images; ++image) draw_image(Serial{}, *head, batch, image, true);
  return nullptr;
#endif
}
