#include "../common/isa.h"
#include "plan.h"

namespace genperf {

GENPERF_ISA_TABLE(soft_forward, SoftAssignmentHead);
GENPERF_ISA_TABLE(soft_backward, SoftAssignmentHead);

namespace {

int64_t bytes(DType dtype) {
  constexpr int kBytes[] = {4, 2, 2, 8, 8};
  return kBytes[static_cast<int>(dtype)];
}

// Dimension 0 taken at `index`.
View at(const View& v, int64_t index) {
  View one = v;
  one.data = static_cast<char*>(v.data) + index * v.stride[0] * bytes(v.dtype);
  one.ndim = v.ndim - 1;
  for (int d = 0; d < one.ndim; ++d) one.shape[d] = v.shape[d + 1], one.stride[d] = v.stride[d + 1];
  return one;
}

// Of a contiguous tensor, where `count` elements of each head begin; null if absent.
template <class T>
T* part(const View& v, int64_t head, int64_t count) {
  return v ? reinterpret_cast<T*>(static_cast<char*>(v.data) + head * count * bytes(v.dtype)) : nullptr;
}

void each_head(const SoftAssignmentArgs& a, const IsaTable<SoftAssignmentHead>& run) {
  for (int64_t h = 0; h < a.x.shape[0]; ++h) {
    SoftAssignmentHead s{};
    s.x = at(a.x, h), s.codebook = at(a.codebook, h);
    s.codewords = s.codebook.shape[0], s.dim = s.codebook.shape[1], s.n = s.x.numel() / s.dim;
    s.targets = part<const int64_t>(a.targets, h, s.n);
    s.log_sum_exp = part<float>(a.log_sum_exp, h, s.n), s.entropy = part<float>(a.entropy, h, s.n);
    s.mean_prob = part<float>(a.mean_prob, h, s.codewords), s.nll = part<float>(a.nll, h, s.n);
    s.grad_x = part<void>(a.grad_x, h, s.n * s.dim);
    s.grad_codebook = part<void>(a.grad_codebook, h, s.codewords * s.dim);
    s.score = a.score, s.temperature = a.temperature;
    run(s);
  }
}

}  // namespace

void soft_assignment_forward_cpu(const SoftAssignmentArgs& args) { each_head(args, soft_forward_isas); }
void soft_assignment_backward_cpu(const SoftAssignmentArgs& args) { each_head(args, soft_backward_isas); }

}  // namespace genperf
