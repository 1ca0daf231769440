// Tiles of tensors [outer, classes, inner]: rows of classes where few positions lie side by side, else blocks
// of positions.
#pragma once

#include "../common/scratch.h"
#include "gumbel_softmax.h"
#include "steps.h"

namespace genperf {
namespace GENPERF_ISA {
namespace {

// Fewer positions than this are turned into rows: a block of noise is 64 elements.
constexpr int64_t kFewPositions = 32;

// Where elements lie, and which key makes their noise.
struct Layout {
  int64_t outer = 1, classes, inner = 1, outer_of_key;
  View key;

  Layout(const View& shape, int dim, const View& key) : classes(shape.shape[dim]), key(key) {
    for (int d = 0; d < dim; ++d) outer *= shape.shape[d];
    for (int d = dim + 1; d < shape.ndim; ++d) inner *= shape.shape[d];
    outer_of_key = key && key.ndim == 2 && shape.shape[0] ? outer / shape.shape[0] : outer;
  }

  bool by_rows() const { return inner < kFewPositions; }
  int64_t element(int64_t o) const { return o * classes * inner; }
  // The key of o, and the number of its first element there.
  PhiloxKey key_of(int64_t o) const { return philox_key(key, outer_of_key ? o / outer_of_key : 0); }
  int64_t element_of_key(int64_t o) const { return element(o % outer_of_key); }
};

inline int64_t padded_classes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The rows of a group, each readable up to a multiple of 16.
struct RowArray {
  Scratch<float> buffer;
  float* row[kChunk];

  explicit RowArray(int64_t n) : buffer(n) {}
};

// Groups of rows: several short ones, or those of the positions that lie side by side.
class Rows {
 public:
  explicit Rows(const Layout& layout)
      : l_(layout),
        pitch_(padded_classes(layout.classes) + kLanes),  // not a power of two
        several_(layout.inner == 1 && layout.outer_of_key == layout.outer && layout.classes <= kChunk / 2),
        most_(several_ ? kChunk / layout.classes : layout.inner) {}

  int64_t groups() const { return several_ ? (l_.outer + most_ - 1) / most_ : l_.outer; }
  int64_t floats() const { return most_ * pitch_; }
  int64_t pitch() const { return pitch_; }

  int rows(int64_t group) const {
    if (!several_) return static_cast<int>(most_);
    const int64_t left = l_.outer - group * most_;
    return static_cast<int>(left < most_ ? left : most_);
  }

  // In dimension `outer`, where the group begins.
  int64_t first(int64_t group) const { return several_ ? group * most_ : group; }

  // Rows of a collapsed view, with `pad` beyond the classes.
  void read(const View& v, int64_t group, float pad, RowArray& to) const {
    const int64_t start = l_.element(first(group)), n = l_.classes;
    Buffer buffer;
    if (l_.inner == 1) {
      for (int r = 0; r < rows(group); ++r) {
        if ((to.row[r] = in_place(v, start + r * n))) continue;
        to.row[r] = to.buffer.get() + r * pitch_;
        for (int64_t i = 0; i < n; i += kChunk) {
          const int count = static_cast<int>(n - i < kChunk ? n - i : kChunk);
          std::memcpy(to.row[r] + i, read_chunk(v, start + r * n + i, count, buffer), count * sizeof(float));
        }
        fill(to.row[r], pad);
      }
      return;
    }
    turn(to, pad, [&](int64_t i, int count) { return read_chunk(v, start + i, count, buffer); });
  }

  // Noise of a key in rows, unless each row makes its own.
  bool read_noise(GumbelForm form, int64_t group, PhiloxBuffer& chunk, RowArray& to) const {
    if (l_.inner == 1 && !several_) return false;
    const int64_t o = first(group), start = l_.element_of_key(o);
    const PhiloxKey key = l_.key_of(o);
    if (l_.inner == 1) {
      // Up to a multiple of 16 of the last row too.
      const int n = static_cast<int>(rows(group) * l_.classes) + kLanes;
      const float* from = gumbel_chunk(form, key, start, n, chunk);
      for (int r = 0; r < rows(group); ++r) to.row[r] = const_cast<float*>(from) + r * l_.classes;
      return true;
    }
    turn(to, 1.0f, [&](int64_t i, int count) { return gumbel_chunk(form, key, start + i, count, chunk); });
    return true;
  }

  // Where rows of a contiguous result are to be written.
  void open(const View& v, int64_t group, RowArray& to) const {
    const int64_t start = l_.element(first(group));
    for (int r = 0; r < rows(group); ++r) {
      to.row[r] = l_.inner == 1 ? in_place(v, start + r * l_.classes) : nullptr;
      if (!to.row[r]) to.row[r] = to.buffer.get() + r * pitch_;
    }
  }

  void close(const View& v, int64_t group, const RowArray& from) const {
    const int64_t start = l_.element(first(group)), n = l_.classes;
    if (l_.inner == 1) {
      for (int r = 0; r < rows(group); ++r)
        if (from.row[r] != in_place(v, start + r * n)) write(v, start + r * n, n, from.row[r]);
      return;
    }
    Buffer buffer;
    int64_t k = 0, p = 0;
    for (int64_t i = 0; i < n * l_.inner; i += kChunk) {
      const int64_t left = n * l_.inner - i, count = left < kChunk ? left : kChunk;
      for (int64_t j = 0; j < count; ++j) {
        buffer[j] = from.row[p][k];
        if (++p == l_.inner) p = 0, ++k;
      }
      write(v, start + i, count, buffer);
    }
  }

  // Of a contiguous tensor.
  static void write(const View& v, int64_t start, int64_t n, const float* from) {
    if (v.dtype == DType::kFloat32) {
      std::memcpy(static_cast<float*>(v.data) + start, from, n * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < n; i += kChunk) {
      const int count = static_cast<int>(n - i < kChunk ? n - i : kChunk);
      narrow(from + i, count, v.dtype, static_cast<uint16_t*>(v.data) + start + i, 1);
    }
  }

 private:
  // A row as it lies in memory, or null.
  float* in_place(const View& v, int64_t start) const {
    if (v.dtype != DType::kFloat32 || v.stride[v.ndim - 1] != 1 || l_.classes % kLanes != 0) return nullptr;
    const Position at(v, start);
    return at.run < l_.classes ? nullptr : static_cast<float*>(v.data) + at.offset;
  }

  void fill(float* row, float pad) const {
    for (int64_t k = l_.classes; k < padded_classes(l_.classes); ++k) row[k] = pad;
  }

  // Positions side by side to rows; chunk(i, count) gives elements from i on.
  template <class Chunk>
  void turn(RowArray& to, float pad, Chunk chunk) const {
    for (int64_t p = 0; p < l_.inner; ++p) {
      to.row[p] = to.buffer.get() + p * pitch_;
      fill(to.row[p], pad);
    }
    int64_t k = 0, p = 0;
    for (int64_t i = 0; i < l_.classes * l_.inner; i += kChunk) {
      const int64_t left = l_.classes * l_.inner - i;
      const int count = static_cast<int>(left < kChunk ? left : kChunk);
      const float* from = chunk(i, count);
      for (int j = 0; j < count; ++j) {
        to.row[p][k] = from[j];
        if (++p == l_.inner) p = 0, ++k;
      }
    }
  }

  const Layout& l_;
  const int64_t pitch_;
  const bool several_;
  const int64_t most_;  // rows of a group
};

// Noise of a row: as it is, or made as it is asked for.
struct RowNoise {
  const float* ready;  // or null
  GumbelForm form;
  PhiloxKey key;
  int64_t element, classes;
  PhiloxBuffer& buffer;

  // Of `count` steps from s on.
  const float* read(int64_t s, int& count) {
    const int64_t first = s * kLanes, left = classes - first;
    const int n = static_cast<int>(left < kChunk ? left : kChunk);
    count = (n + kLanes - 1) / kLanes;
    return ready ? ready + first : gumbel_chunk(form, key, element + first, n, buffer);
  }
};

// Noise of a block of positions.
struct BlockNoise {
  const View& noise;  // collapsed, or absent
  GumbelForm form;
  PhiloxKey key;
  int64_t at, element, inner;  // of the first in `noise`, and for the key
  int n;
  PhiloxBuffer& buffer;

  const float* read(int64_t s, int& count) {
    count = 1;
    if (noise) return read_chunk(noise, at + s * inner, n, reinterpret_cast<Buffer&>(buffer));
    return gumbel_chunk(form, key, element + s * inner, n, buffer);
  }
};

}  // namespace
}  // namespace GENPERF_ISA
}  // namespace genperf
