#include <pybind11/stl.h>

#include <cstring>
#include <memory>

#include "../common/binding.h"
#include "pixel_sampler.h"
#include "pixel_sampler_cuda.h"

namespace genperf::pixel {
namespace {

template <class T>
const T* data(const View& table) {
  return static_cast<const T*>(table.data);
}

// The tables of Program.tables(); `segments` is the address of int32 [S, 4].
std::unique_ptr<Plan> make_plan(View head, View buffers, View consts, View operands, View taps,
                                View instructions, intptr_t segments, int64_t segment_count, View slot_begin,
                                const std::vector<View>& tensors, const std::vector<View>& weights) {
  Tables t{};
  t.head = data<Head>(head);
  t.buffers = data<Buffer>(buffers);
  t.consts = data<Const>(consts);
  t.operands = data<Operand>(operands);
  t.taps = data<Tap>(taps);
  t.instructions = data<Instruction>(instructions);
  t.segments = reinterpret_cast<const Segment*>(segments);
  t.slot_begin = data<int64_t>(slot_begin);
  t.buffer_count = buffers.shape[0];
  t.operand_count = operands.shape[0];
  t.instruction_count = instructions.shape[0];
  t.segment_count = segment_count;
  for (const View& v : tensors) {
    t.tensors.push_back(v.data);
    t.tensor_sizes.push_back(v.numel());
  }
  for (const View& v : weights) t.weights.push_back(data<float>(v));
  return std::make_unique<Plan>(t);
}

// Addresses of tensors as RunArgs describes them; 0 for null.
void run(const Plan& plan, intptr_t workspace, intptr_t values, intptr_t noise, intptr_t known, intptr_t mask,
         intptr_t scratch, int64_t batch, int64_t begin, int64_t end, float temperature, int64_t top_k,
         int threads) {
  RunArgs args{};
  args.plan = &plan;
  args.workspace = reinterpret_cast<float*>(workspace);
  args.values = reinterpret_cast<float*>(values);
  args.noise = reinterpret_cast<const float*>(noise);
  args.known = reinterpret_cast<const float*>(known);
  args.mask = reinterpret_cast<const uint8_t*>(mask);
  args.scratch = reinterpret_cast<float*>(scratch);
  args.batch = batch, args.begin = begin, args.end = end;
  args.temperature = temperature, args.top_k = top_k;
  args.threads = threads;
  pixel_sampler_cpu(args);
}

CudaRun cuda_run(View entries, View steps, View resident, View taps, View workspace, View values, View noise,
                 View key, View images, View known, intptr_t mask, View scratch, View arrived, View head,
                 int64_t begin, int64_t end, int64_t team_images, int64_t team_size, bool cluster,
                 int64_t source_floats, int64_t head_floats, int64_t resident_floats, bool head_in_shared,
                 float temperature, int64_t top_k) {
  return {entries,        steps,
          resident,       taps,
          workspace,      values,
          noise,          key,
          images,         known,
          scratch,        arrived,
          head,           reinterpret_cast<const void*>(mask),
          begin,          end,
          team_images,    team_size,
          cluster,        source_floats,
          head_floats,    resident_floats,
          head_in_shared, temperature,
          top_k};
}

double sum_floats(View x) {
  double sum = 0.0;
  sum_floats_cpu({data<float>(x), x.numel(), &sum});
  return sum;
}

// Both halves of the product.
uint64_t folded_product(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// Of memory given as addresses and sizes in bytes: a change of any bit shows, but for about one case in 2^64.
// The step is wyhash's; in four chains, so that it reads as fast as it can.
uint64_t checksum(const std::vector<std::pair<intptr_t, int64_t>>& spans) {
  constexpr int kChains = 4;
  constexpr int64_t kStep = 2 * kChains * sizeof(uint64_t);
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;
  uint64_t sums[kChains] = {1, 2, 3, 4};
  auto add = [&](const uint64_t* words) {
    for (int i = 0; i < kChains; ++i)
      sums[i] = folded_product(words[2 * i] ^ sums[i], words[2 * i + 1] ^ kOdd);
  };
  for (const auto& [address, bytes] : spans) {
    const char* p = reinterpret_cast<const char*>(address);
    int64_t at = 0;
    uint64_t words[2 * kChains];
    for (; at + kStep <= bytes; at += kStep) {
      std::memcpy(words, p + at, kStep);
      add(words);
    }
    uint64_t rest[2 * kChains] = {}, size[2 * kChains] = {static_cast<uint64_t>(bytes)};
    std::memcpy(rest, p + at, bytes - at);
    add(rest);
    add(size);
  }
  uint64_t all = kOdd;
  for (const uint64_t sum : sums) all = folded_product(all ^ sum, kOdd);
  return all;
}

const RegisterBinder binder([](pybind11::module_& cpu, pybind11::module_* cuda) {
  pybind11::class_<Plan>(cpu, "PixelSampler", pybind11::module_local())
      .def(pybind11::init(&make_plan))
      .def_readonly("scratch", &Plan::scratch)
      .def("run", &run, pybind11::call_guard<pybind11::gil_scoped_release>());
  cpu.def("sum_floats", &sum_floats);
  cpu.def("checksum", &checksum, pybind11::call_guard<pybind11::gil_scoped_release>());
  if constexpr (kWithCuda) {
    cuda->def("pixel_sampler", on_cuda(cuda_run, pixel_sampler_cuda));
    cuda->def("pixel_sampler_clusters", &pixel_sampler_cuda_clusters);
  }
});

}  // namespace
}  // namespace genperf::pixel
