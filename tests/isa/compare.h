// Inputs at random, and results under each instruction set compared byte by byte.
#pragma once

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "common/convert.h"
#include "common/isa.h"

namespace genperf {
namespace {

constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512};
const char* const kIsaNames[] = {"baseline", "avx2", "avx512"};
const char* const kDTypeNames[] = {"float32", "float16", "bfloat16"};

// A linear congruential generator.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) { bits(); }

  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  int below(int n) { return static_cast<int>(bits() % n); }
  float uniform(float low, float high) { return low + (high - low) * ((bits() >> 8) * 0x1p-24f); }

 private:
  uint64_t state_;
};

enum class Layout { kContiguous, kHalf, kReversed, kBroadcast };

using Shape = std::vector<int64_t>;

int64_t size_of(DType dtype) {
  if (dtype == DType::kInt64) return 8;
  return dtype == DType::kFloat32 ? 4 : 2;
}

// A tensor with its storage, which is larger than what its view shows.
class Tensor {
 public:
  Tensor(const Shape& shape, DType dtype, Layout layout) {
    view_.dtype = dtype;
    view_.ndim = static_cast<int>(shape.size());
    int64_t n = 1;
    for (int i = 0; i < view_.ndim; ++i) {
      int d = layout == Layout::kReversed ? i : view_.ndim - 1 - i;
      view_.shape[d] = shape[d];
      view_.stride[d] = n;
      n *= shape[d];
    }
    bytes_.resize((2 * n + 64) * size_of(dtype));
    if (layout == Layout::kBroadcast) view_.stride[0] = 0;
    if (layout == Layout::kHalf) {
      offset_ = view_.stride[0];
      view_.stride[0] *= 2;
    }
  }

  View view() {
    View v = view_;
    v.data = bytes_.data() + offset_ * size_of(v.dtype);
    return v;
  }

  void fill(unsigned char byte) { std::memset(bytes_.data(), byte, bytes_.size()); }

  // Numbers in [low, high); or, `wild`, a third of them any bits at all, NaNs and infinities included.
  void fill(Random& random, float low, float high, bool wild) {
    for (int64_t i = 0; i < size(); ++i) {
      const float x = random.uniform(low, high);
      const bool any = wild && random.below(3) == 0;
      if (view_.dtype == DType::kFloat32) {
        set<uint32_t>(i, any ? random.bits() : float_bits(x));
      } else {
        auto narrowed = view_.dtype == DType::kFloat16 ? float16_from_float(x) : bfloat16_from_float(x);
        set<uint16_t>(i, any ? static_cast<uint16_t>(random.bits() >> 16) : narrowed);
      }
    }
  }

  template <class T>
  void set(int64_t i, T x) {
    std::memcpy(bytes_.data() + i * sizeof x, &x, sizeof x);
  }

  int64_t numel() const { return view_.numel(); }
  // Of the storage.
  int64_t size() const { return static_cast<int64_t>(bytes_.size()) / size_of(view_.dtype); }

  bool is_nan(int64_t i) const {
    if (view_.dtype == DType::kInt64) return false;
    if (view_.dtype == DType::kFloat32) return (get<uint32_t>(i) & 0x7fffffffu) > 0x7f800000u;
    return (get<uint16_t>(i) & 0x7fffu) > (view_.dtype == DType::kFloat16 ? 0x7c00u : 0x7f80u);
  }

  DType dtype() const { return view_.dtype; }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

 private:
  template <class T>
  T get(int64_t i) const {
    T x;
    std::memcpy(&x, bytes_.data() + i * sizeof x, sizeof x);
    return x;
  }

  View view_;
  int64_t offset_ = 0;
  std::vector<unsigned char> bytes_;
};

// What all comparisons found.
struct Totals {
  int64_t cases = 0, elements = 0, different_bytes = 0, different_nans = 0;
};

// Cases with one hash an instruction set.
class Group {
 public:
  Group(std::string name, Totals& totals) : name_(std::move(name)), totals_(totals) {
    for (Isa isa : kIsas)
      if (has_isa(isa)) isas_.push_back(isa);
    hashes_.assign(isas_.size(), 0xcbf29ce484222325u);
  }

  // A case: `run` writes `outputs`, the same for every instruction set.
  template <class Run>
  void add(const std::vector<Tensor*>& outputs, Run run) {
    std::vector<Tensor> expected;
    const int64_t different_before = different_;
    for (size_t i = 0; i < isas_.size(); ++i) {
      for (Tensor* t : outputs) t->fill(0xa5);
      set_isa(isas_[i]);
      run();
      for (size_t j = 0; j < outputs.size(); ++j) {
        hash(*outputs[j], hashes_[i]);
        if (i == 0) {
          expected.push_back(*outputs[j]);
        } else {
          compare(expected[j], *outputs[j]);
        }
      }
    }
    for (const Tensor* t : outputs) elements_ += t->numel();
    if (different_ != different_before) std::printf("  case %d of this group differs\n", cases_);
    ++cases_;
  }

  ~Group() {
    std::printf("%s: %d cases, %" PRId64 " bytes differ;", name_.c_str(), cases_, different_);
    for (size_t i = 0; i < isas_.size(); ++i)
      std::printf(" %s %016" PRIx64, kIsaNames[static_cast<int>(isas_[i])], hashes_[i]);
    std::printf("\n");
    totals_.cases += cases_;
    totals_.elements += elements_;
    totals_.different_bytes += different_;
    totals_.different_nans += different_nans_;
  }

 private:
  // FNV-1a of everything but the bits of NaNs.
  static void hash(const Tensor& t, uint64_t& h) {
    const int64_t width = size_of(t.dtype());
    for (int64_t i = 0; i < t.size(); ++i) {
      const bool nan = t.is_nan(i);
      for (int64_t b = 0; b < width; ++b) h = (h ^ (nan ? 0xffu : t.bytes()[i * width + b])) * 0x100000001b3u;
    }
  }

  void compare(const Tensor& expected, const Tensor& actual) {
    const int64_t width = size_of(expected.dtype());
    for (int64_t i = 0; i < expected.size(); ++i) {
      int64_t different = 0;
      for (int64_t b = i * width; b < (i + 1) * width; ++b)
        different += expected.bytes()[b] != actual.bytes()[b];
      if (expected.is_nan(i) && actual.is_nan(i)) {
        different_nans_ += different != 0;
      } else {
        different_ += different;
      }
    }
  }

  std::string name_;
  Totals& totals_;
  std::vector<Isa> isas_;
  std::vector<uint64_t> hashes_;
  int cases_ = 0;
  int64_t elements_ = 0, different_ = 0, different_nans_ = 0;
};

}  // namespace
}  // namespace genperf
