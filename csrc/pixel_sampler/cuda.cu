#include "conv.cuh"
#include "draw.cuh"
#include "pixel_sampler_cuda.h"
#include "pointwise.cuh"
#include "team.cuh"

namespace genperf::pixel {
namespace {

// Weights that this member keeps, from global to shared memory.
__device__ __forceinline__ void load_resident(const SamplerArgs& a, const int32_t* offsets, int rank,
                                              float* resident) {
  const Step* steps = reinterpret_cast<const Step*>(a.steps);
  for (int i = 0; i < a.step_count; ++i) {
    if (offsets[i] < 0) continue;
    const Step& s = steps[i];
    const int quads = s.depth * kPanel / 4;
    float4* to = reinterpret_cast<float4*>(resident + offsets[i]);
    for (int panel = wrap(rank - s.first, a.team_size); panel < s.panels; panel += a.team_size, to += quads) {
      const float4* from = reinterpret_cast<const float4*>(s.table) + int64_t{panel} * quads;
      for (int q = threadIdx.x; q < quads; q += kThreads) to[q] = from[q];
    }
  }
}

__device__ __forceinline__ void run_entry(const Context& c, const Step& s, const Entry& e,
                                          float* head_scratch) {
  switch (s.kind) {
    case StepKind::kConv:
      return convolve(c, s, e);
    case StepKind::kPointwise:
      if (s.out.vectors) return run_pointwise<4>(c, s, e);
      return run_pointwise<1>(c, s, e);
    case StepKind::kAttention:
      return run_attention(c, s, e);
    case StepKind::kEmbed:
      if (s.out.vectors) return run_embed<4>(c, s, e);
      return run_embed<1>(c, s, e);
    case StepKind::kClear:
      return run_clear(c, s, e);
    case StepKind::kDraw:
      return run_draw(c, s, e, head_scratch);
  }
}

// Entries [begin, end). Shared memory has the step under way and the one after it, and the entries of two
// more, so that no step waits for its own description.
template <bool kCluster>
__global__ void __launch_bounds__(kThreads, 1) pixel_sampler_kernel(const SamplerArgs a) {
  GENPERF_DYNAMIC_SHARED(float, shared);
  const Layout layout(a);
  const int team = blockIdx.x / a.team_size, rank = blockIdx.x % a.team_size, t = threadIdx.x;
  uint4* steps = reinterpret_cast<uint4*>(shared);
  int32_t* entry_words = reinterpret_cast<int32_t*>(shared + 2 * 4 * kStepQuads);
  int2* taps = reinterpret_cast<int2*>(shared + layout.taps);
  const int32_t* offsets = a.resident + int64_t{rank} * a.step_count;
  const int32_t* all_entries = reinterpret_cast<const int32_t*>(a.entries);
  constexpr int kEntryWords = sizeof(Entry) / 4, kResidentWord = offsetof(Step, resident) / 4;

  const int image = team * a.team_images;
  const int images = a.batch - image < a.team_images ? a.batch - image : a.team_images;
  const Context c{a,
                  a.workspace + team * a.workspace_stride,
                  image,
                  images,
                  rank,
                  a.team_size,
                  shared + layout.taps - kThreads,
                  taps,
                  shared + layout.sources,
                  shared + layout.resident};
  float* head_scratch = a.head_in_shared
                            ? shared + layout.head + t / 32 * a.head_floats
                            : a.scratch + (int64_t{blockIdx.x} * kWarps + t / 32) * a.head_floats;
  unsigned* arrived = a.arrived + team * 32;

  for (int i = t; i < a.tap_count; i += kThreads) taps[i] = a.taps[i];
  load_resident(a, offsets, rank, c.resident);
  if (t < 2 * kEntryWords && a.begin + t / kEntryWords < a.end) {
    entry_words[(a.begin + t / kEntryWords) % 4 * kEntryWords + t % kEntryWords] =
        all_entries[int64_t{a.begin} * kEntryWords + t];
  }
  __syncthreads();
  const int first_step = entry_words[a.begin % 4 * kEntryWords];
  if (t < kStepQuads) steps[a.begin % 2 * kStepQuads + t] = a.steps[first_step * kStepQuads + t];
  __syncthreads();
  if (t == 0)
    reinterpret_cast<int32_t*>(steps)[a.begin % 2 * 4 * kStepQuads + kResidentWord] = offsets[first_step];
  __syncthreads();

  for (int i = a.begin; i < a.end; ++i) {
    const Entry& e = reinterpret_cast<const Entry*>(entry_words)[i % 4];
    const Step& s = reinterpret_cast<const Step*>(steps)[i % 2];
    // In registers until this step is done.
    uint4 next_step{};
    int32_t next_word = 0;
    if (i + 1 < a.end && t < kStepQuads) {
      const int step = entry_words[(i + 1) % 4 * kEntryWords];
      next_step = a.steps[step * kStepQuads + t];
      if (t == kResidentWord / 4) reinterpret_cast<int32_t*>(&next_step)[kResidentWord % 4] = offsets[step];
    }
    if (i + 2 < a.end && t >= 32 && t < 32 + kEntryWords)
      next_word = all_entries[int64_t{i + 2} * kEntryWords + t - 32];
    if (e.barrier) team_barrier<kCluster>(arrived, rank, a.team_size);
    run_entry(c, s, e, head_scratch);
    if (i + 1 < a.end && t < kStepQuads) steps[(i + 1) % 2 * kStepQuads + t] = next_step;
    if (i + 2 < a.end && t >= 32 && t < 32 + kEntryWords)
      entry_words[(i + 2) % 4 * kEntryWords + t - 32] = next_word;
    __syncthreads();
  }
  // No member leaves a cluster that others still use.
  team_barrier<kCluster>(arrived, rank, a.team_size);
}

template <class T>
T* data(const View& v) {
  return static_cast<T*>(v.data);
}

SamplerArgs arguments_of(const CudaRun& run) {
  SamplerArgs a{};
  a.entries = data<const Entry>(run.entries);
  a.steps = data<const uint4>(run.steps);
  a.resident = data<const int32_t>(run.resident);
  a.taps = data<const int2>(run.taps);
  a.workspace = data<float>(run.workspace);
  a.values = data<float>(run.values);
  a.noise = data<const float>(run.noise);
  a.key = data<const int64_t>(run.key);
  a.images = data<const int64_t>(run.images);
  a.known = data<const float>(run.known);
  a.mask = static_cast<const uint8_t*>(run.mask);
  a.scratch = data<float>(run.scratch);
  a.arrived = data<unsigned>(run.arrived);
  a.workspace_stride = run.workspace.shape[1];
  a.begin = static_cast<int32_t>(run.begin), a.end = static_cast<int32_t>(run.end);
  a.batch = static_cast<int32_t>(run.values.shape[0]);
  a.team_images = static_cast<int32_t>(run.team_images);
  a.team_size = static_cast<int32_t>(run.team_size);
  a.teams = static_cast<int32_t>(run.workspace.shape[0]);
  a.step_count = static_cast<int32_t>(run.resident.shape[1]);
  a.tap_count = static_cast<int32_t>(run.taps.shape[0]);
  a.source_floats = static_cast<int32_t>(run.source_floats);
  a.head_floats = static_cast<int32_t>(run.head_floats);
  a.head_in_shared = run.head_in_shared;
  a.resident_floats = static_cast<int32_t>(run.resident_floats);
  a.head = *static_cast<const Head*>(run.head.data);
  a.sampling = {run.temperature, run.top_k};
  return a;
}

}  // namespace

int pixel_sampler_cuda(const CudaRun& run, void* stream) {
  const SamplerArgs a = arguments_of(run);
  if (a.begin >= a.end || a.batch == 0) return cudaSuccess;
  const size_t shared = Layout(a).total * sizeof(float);
  const auto blocks = static_cast<unsigned>(a.teams * a.team_size);
  if (run.cluster) {
    GENPERF_LAUNCH_CLUSTER(pixel_sampler_kernel<true>, blocks, kThreads, static_cast<unsigned>(a.team_size),
                           shared, stream, a);
  } else {
    GENPERF_LAUNCH_COOPERATIVE(pixel_sampler_kernel<false>, blocks, kThreads, shared, stream, a);
  }
  return cudaGetLastError();
}

int pixel_sampler_cuda_clusters(int size, int64_t shared_bytes) {
  return max_clusters(pixel_sampler_kernel<true>, kThreads, static_cast<unsigned>(size),
                      static_cast<size_t>(shared_bytes));
}

}  // namespace genperf::pixel
