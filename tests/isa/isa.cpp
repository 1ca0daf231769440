// Runs the CPU kernels under each instruction set that the machine has, on the same inputs, and compares
// what they write with the baseline's, byte by byte. NaNs are equal to each other, whatever their bits.
//
// One line a group of cases, with a hash of each instruction set's results; then the totals. Exits with 1
// where a byte differs. Standalone, so that an emulator of another machine can run it.
#include "compare.h"
#include "gaussian_sample/gaussian_sample.h"
#include "philox_random/philox_random.h"
#include "pixel_sampler.h"
#include "torch_normal/torch_normal.h"

namespace genperf {
namespace {

// `keys` keys of two words each, or, for 0 keys, one of shape [2].
Tensor keys_from(int keys, Random& random) {
  Tensor key(keys == 0 ? Shape{2} : Shape{keys, 2}, DType::kInt64, Layout::kContiguous);
  for (int64_t i = 0; i < key.size(); ++i) {
    uint64_t high = random.bits();
    key.set<uint64_t>(i, high << 32 | random.bits());
  }
  if (random.below(4) == 0) key.fill(0xff);
  return key;
}

void philox_random_cases(RandomKind kind, const char* name, Totals& totals) {
  Group group(name, totals);
  Random random(1);
  for (int64_t n : {1, 3, 4, 15, 16, 17, 63, 64, 65, 255, 511, 512, 513, 1000, 4096, 5003}) {
    for (int keys : {0, 1, 3, 8}) {
      Tensor key = keys_from(keys, random);
      Tensor out({keys == 0 ? 1 : keys, n}, kind == RandomKind::kBits ? DType::kInt64 : DType::kFloat32,
                 Layout::kContiguous);
      group.add({&out}, [&] { philox_random_cpu({out.view(), key.view(), kind}); });
    }
  }
}

void torch_normal_cases(Totals& totals) {
  Group group("torch_normal", totals);
  Random random(3);
  for (int64_t n : {16, 17, 31, 32, 47, 48, 511, 512, 513, 528, 624, 1000, 5003}) {
    for (int next : {0, 1, 600, 615, 624}) {
      int64_t words[632] = {0, 625 - next, next};
      for (int i = 3; i < 627; ++i) words[i] = random.bits();
      Tensor out({n}, DType::kFloat32, Layout::kContiguous), state({632}, DType::kInt64, Layout::kContiguous);
      group.add({&out, &state}, [&] {
        for (int i = 0; i < 632; ++i) state.set<int64_t>(i, words[i]);
        torch_normal_cpu({out.view(), state.view()});
      });
    }
  }
}

struct Parametrization {
  const char* name;
  Transform transform;
  float low, high, offset;
};

constexpr Parametrization kParametrizations[] = {
    {"logvar", Transform::kLogVariance, -kInfinity, kInfinity, 0.0f},
    {"logvar [-30, 20]", Transform::kLogVariance, -30.0f, 20.0f, 0.0f},
    {"logsigma", Transform::kLogSigma, -kInfinity, kInfinity, 0.0f},
    {"logsigma [-2, 1]", Transform::kLogSigma, -2.0f, 1.0f, 0.0f},
    {"std", Transform::kStandardDeviation, -kInfinity, kInfinity, 0.0f},
    {"softplus", Transform::kSoftplus, -kInfinity, kInfinity, 0.0f},
    {"softplus + 0.1", Transform::kSoftplus, -kInfinity, kInfinity, 0.1f},
    {"soft_clamp + 0.01", Transform::kSoftClamp, -kInfinity, kInfinity, 0.01f},
};

struct Kind {
  const Parametrization& parametrization;
  DType dtype;
  bool backward;
};

struct Variation {
  Shape shape;
  Layout layout;
  bool prior, reduce, wild;
};

// Which results or gradients there are, the source of the noise and the temperature are drawn at random.
void gaussian_sample_case(const Kind& kind, const Variation& variation, Random& random, Group& group) {
  const Parametrization& parametrization = kind.parametrization;
  const Shape& shape = variation.shape;
  const bool with_z = random.below(4) != 0, with_log_prob = random.below(2) != 0;
  const bool with_kl = random.below(4) != 0 || !(with_z || with_log_prob);
  const bool with_prior = variation.prior && with_kl;

  const auto full = [&](Layout layout) { return Tensor(shape, kind.dtype, layout); };
  const auto input = [&](float low, float high) {
    Tensor t = full(variation.layout);
    t.fill(random, low, high, variation.wild);
    return t;
  };
  const auto maybe_sum = [&] {
    Tensor t(variation.reduce ? Shape{shape[0]} : shape, DType::kFloat32, Layout::kContiguous);
    t.fill(random, -1.0f, 1.0f, variation.wild);
    return t;
  };
  const float lowest = parametrization.transform == Transform::kStandardDeviation ? 0.01f : -4.0f;
  Tensor mean = input(-4.0f, 4.0f), scale = input(lowest, 4.0f);
  Tensor prior_mean = input(-4.0f, 4.0f), prior_scale = input(lowest, 4.0f);
  Tensor noise = input(-3.0f, 3.0f);
  Tensor key = keys_from(random.below(2) * static_cast<int>(shape[0]), random);
  Tensor kl = maybe_sum(), log_prob = maybe_sum();

  GaussianArgs a{};
  a.mean = mean.view(), a.scale = scale.view();
  if (with_prior) a.prior_mean = prior_mean.view(), a.prior_scale = prior_scale.view();
  if (with_z || with_log_prob) {
    if (random.below(3) == 0) {
      a.noise = noise.view();
    } else {
      a.key = key.view();
    }
  }
  a.transform = parametrization.transform;
  a.low = parametrization.low, a.high = parametrization.high, a.offset = parametrization.offset;
  a.temperature = random.below(2) ? 1.0f : 0.7f;
  a.reduce = variation.reduce;

  const Layout dense = variation.layout == Layout::kBroadcast ? Layout::kContiguous : variation.layout;
  std::vector<Tensor*> outputs;
  const auto output = [&](Tensor& t) {
    outputs.push_back(&t);
    return t.view();
  };
  if (!kind.backward) {
    Tensor z = full(dense);
    if (with_z) a.z = output(z);
    if (with_kl) a.kl = output(kl);
    if (with_log_prob) a.log_prob = output(log_prob);
    group.add(outputs, [&] { gaussian_sample_forward_cpu(a); });
    return;
  }
  Tensor grad_z = input(-1.0f, 1.0f);
  Tensor grad_mean = full(dense), grad_scale = full(dense);
  Tensor grad_prior_mean = full(dense), grad_prior_scale = full(dense);
  if (with_z) a.grad_z = grad_z.view();
  if (with_kl) a.grad_kl = kl.view();
  if (with_log_prob) a.grad_log_prob = log_prob.view();
  a.grad_mean = output(grad_mean), a.grad_scale = output(grad_scale);
  if (with_prior) {
    a.grad_prior_mean = output(grad_prior_mean);
    a.grad_prior_scale = output(grad_prior_scale);
  }
  group.add(outputs, [&] { gaussian_sample_backward_cpu(a); });
}

void gaussian_sample_cases(const Kind& kind, Totals& totals) {
  const std::string name = std::string("gaussian_sample ") + (kind.backward ? "backward " : "forward ") +
                           kind.parametrization.name + " " + kDTypeNames[static_cast<int>(kind.dtype)];
  Group group(name, totals);
  Random random(2);
  const Shape shapes[] = {{1}, {5, 3}, {2, 7, 9}, {70, 17}, {1, 512}, {3, 517}, {2, 8, 65}};
  for (const Shape& shape : shapes)
    for (Layout layout : {Layout::kContiguous, Layout::kHalf, Layout::kReversed, Layout::kBroadcast})
      for (bool prior : {false, true})
        for (bool reduce : {false, true})
          for (bool wild : {false, true})
            gaussian_sample_case(kind, {shape, layout, prior, reduce, wild}, random, group);
}

int run_all() {
  Totals totals;
  philox_random_cases(RandomKind::kNormal, "philox_random normal", totals);
  philox_random_cases(RandomKind::kUniform, "philox_random uniform", totals);
  philox_random_cases(RandomKind::kBits, "philox_random bits", totals);
  torch_normal_cases(totals);
  for (bool backward : {false, true})
    for (const Parametrization& parametrization : kParametrizations)
      for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
        gaussian_sample_cases({parametrization, dtype, backward}, totals);
  pixel_sampler_cases(totals);
  std::printf("instruction sets:");
  for (Isa isa : kIsas)
    if (has_isa(isa)) std::printf(" %s", kIsaNames[static_cast<int>(isa)]);
  std::printf("\ntotal: %" PRId64 " cases, %" PRId64 " elements, %" PRId64 " bytes differ, %" PRId64
              " NaNs have other bits\n",
              totals.cases, totals.elements, totals.different_bytes, totals.different_nans);
  return totals.different_bytes != 0;
}

}  // namespace
}  // namespace genperf

int main() { return genperf::run_all(); }
