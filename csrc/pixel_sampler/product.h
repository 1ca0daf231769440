// Convolutions as products of matrices: rows are cells and images, read where they lie.
//
// Each output value is the sum that program.h's Conv defines, in whichever tile it is computed. Panels of
// the weight are the outer loop, so that a weight is read from memory once for kRows rows; of a panel, the
// products of one block (8 KB) stay in the first-level cache for all rows.
#pragma once

#include <utility>

#include "sparse.h"

namespace genperf::pixel {
inline namespace GENPERF_ISA {

// Accumulators of a tile: as many as registers allow beside a row of weights, and at least the 8 to 10
// chains that hide the latency of a multiply-add.
#if defined(__AVX512F__)
inline constexpr int kAccumulators = 24, kTileRows = 12, kTilePanels = 8;
#elif defined(__AVX2__)
inline constexpr int kAccumulators = 12, kTileRows = 6, kTilePanels = 4;
#else
inline constexpr int kAccumulators = 12, kTileRows = 3, kTilePanels = 3;
#endif

constexpr int widest(int rows) {
  const int panels = kAccumulators / (rows * kParts);
  return panels < 1 ? 1 : panels < kTilePanels ? panels : kTilePanels;
}

// Rows of a tile: where their taps are, what is added to, where the sums go. Tap t of row r is at
// taps[t * kRows + r].
struct Rows {
  const float* const* taps;
  const float* const* from;
  float* const* to;
  int64_t channel;  // of `from` and `to`
};

// What to fetch meanwhile. Tiles of many rows take their time over a block, and fetch their share of the
// next one, `step` bytes of each panel for each product. Tiles of few rows wait for the weights: they fetch
// kDistance products ahead, and at the end of their panels go on with these; null: those that follow.
struct Ahead {
  const char* p;
  int64_t step;
  int64_t panel_size;  // in bytes
};

inline constexpr int kFewRows = 3;
inline constexpr int kDistance = 32;

// to = from + the products of one block, which begins with `piece`, for kPanels panels of 16 channels.
template <int kTile, int kPanels>
void tile(const Piece* piece, const float* weight, int64_t panel_size, const Rows& rows_at,
          const Ahead& ahead_at) {
  const Rows rows = rows_at;  // in registers: the stores below might alias it
  Ahead ahead = ahead_at;
  constexpr int kVectors = kPanels * kParts;
  Nf sum[kTile][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) __builtin_prefetch(rows.from[r] + rows.channel + p * kPanel);
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Nf{};
  for (bool last = false; !last; ++piece) {
    last = piece->last;
    const float* a[kTile];
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) a[r] = rows.taps[piece->tap * kRows + r] + piece->channel;
    const float* w = weight + piece->k * kPanel;
    auto add = [&](int64_t c) __attribute__((always_inline)) {
      Nf b[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        b[v] = load_native(w + v / kParts * panel_size + v % kParts * kNativeLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) {
        const Nf x = splat<Nf>(a[r][c]);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sum[r][v] = fma_native(x, b[v], sum[r][v]);
      }
      w += kPanel;
    };
    int64_t c = 0;
    if constexpr (kTile <= kFewRows) {
      const int64_t turn = piece->length - (last && ahead.p ? kDistance : 0);
      for (; c < turn; ++c) {
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) __builtin_prefetch(w + kDistance * kPanel + p * panel_size);
        add(c);
      }
    }
    for (; c < piece->length; ++c, ahead.p += ahead.step) {
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p)
        __builtin_prefetch(ahead.p + p * ahead.panel_size, 0, kTile <= kFewRows ? 3 : 2);
      add(c);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) {
    const float* from = rows.from[r] + rows.channel;
    float* to = rows.to[r] + rows.channel;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * kNativeLanes;
      store_native(to + at, load_native(from + at) + sum[r][v]);
    }
  }
}

using TileFunction = void (*)(const Piece*, const float*, int64_t, const Rows&, const Ahead&);

template <int kTile, int kPanels>
constexpr TileFunction tile_or_null() {
  if constexpr (kPanels <= widest(kTile)) {
    return tile<kTile, kPanels>;
  } else {
    return nullptr;
  }
}

// By rows - 1 and panels - 1.
struct TileTable {
  TileFunction at[kTileRows][kTilePanels];
};

template <int... kRow, int... kColumn>
constexpr TileTable tile_table(std::integer_sequence<int, kRow...>,
                               std::integer_sequence<int, kColumn...> columns) {
  TileTable table{};
  auto fill = [&](auto row) {
    constexpr int kTile = decltype(row)::value + 1;
    int unused[] = {(table.at[kTile - 1][kColumn] = tile_or_null<kTile, kColumn + 1>(), 0)...};
    (void)unused;
  };
  (void)columns;
  (fill(std::integral_constant<int, kRow>()), ...);
  return table;
}

inline constexpr TileTable kTiles =
    tile_table(std::make_integer_sequence<int, kTileRows>(), std::make_integer_sequence<int, kTilePanels>());

// Products that are summed, in order.
struct Pieces {
  const Piece* p;
  int count;
};

// Up to kRows rows by whole panels, `weight` being the first one's: tiles of nearly equal size, over which
// the fetching of the next weights is spread: the next block, the next panels or, at the end, what `c` says.
inline void multiply(const Context& c, const Pieces& pieces, const float* weight, int64_t panel_size,
                     int count_of_panels, const Rows& rows, int count) {
  const int tiles = (count + kTileRows - 1) / kTileRows, small = count / tiles, larger = count % tiles;
  const int wide = widest(small + (larger > 0));
  const int64_t line = kPanel * sizeof(float);
  Rows group = rows;
  for (int left = count_of_panels; left > 0;) {
    const int panels = left > wide && left < 2 * wide ? (left + 1) / 2 : left < wide ? left : wide;
    const TileFunction small_tile = kTiles.at[small - 1][panels - 1];
    const TileFunction large_tile = larger > 0 ? kTiles.at[small][panels - 1] : nullptr;
    const float* next_weight = weight + panels * panel_size;
    Rows part = group;
    for (const Piece* p = pieces.p; p < pieces.p + pieces.count;) {
      const Piece* next = p;
      while (!next->last) ++next;
      ++next;
      Ahead ahead{nullptr, line / tiles, panel_size * static_cast<int64_t>(sizeof(float))};
      if (next < pieces.p + pieces.count) {
        if (count > kFewRows) ahead.p = reinterpret_cast<const char*>(weight + next->k * kPanel);
      } else if (left > panels) {
        ahead.p = reinterpret_cast<const char*>(next_weight);
      } else {
        ahead.p = reinterpret_cast<const char*>(c.next_weight);
        ahead.panel_size = c.next_panel_size * static_cast<int64_t>(sizeof(float));
      }
      Rows at = part;
      for (int t = 0; t < tiles; ++t) {
        const int size = small + (t < larger);
        (t < larger ? large_tile : small_tile)(p, weight, panel_size, at, ahead);
        at.taps += size, at.from += size, at.to += size;
        ahead.p += kBlock * line / tiles;
      }
      p = next;
      part.from = part.to;
    }
    weight = next_weight;
    group.channel += panels * kPanel;
    left -= panels;
  }
}

// Where tap `t` of output cell (y, x) reads; `inside` tells whether that is in the window.
GENPERF_HD Cell tap_cell(const Context& c, const Conv& conv, const Tap& tap, const Source& s, int64_t y,
                         int64_t x, bool& inside) {
  y = y * conv.num + tap.dy, x = x * conv.num + tap.dx;
  inside = false;
  if (conv.den != 1) {
    // Shifted to be positive by a multiple of the divisor.
    const int64_t shift = conv.den << 32;
    if ((y + shift) % conv.den != 0 || (x + shift) % conv.den != 0) return {c.plan.zeros, 0};
    y = (y + shift) / conv.den - (int64_t{1} << 32), x = (x + shift) / conv.den - (int64_t{1} << 32);
  }
  y += s.dy, x += s.dx;
  inside = is_inside(s, y, x);
  return inside ? cell_at(c, s, y, x) : Cell{c.plan.zeros, 0};
}

// Calls f(row, cell, image) for rows [begin, begin + count) of cells times images.
template <class Function>
GENPERF_HD void for_rows(const Context& c, int64_t begin, int count, Function f) {
  int64_t cell = 0, image = begin;
  if (begin >= c.images) cell = begin / c.images, image = begin % c.images;
  for (int r = 0; r < count; ++cell, image = 0)
    for (; image < c.images && r < count; ++r, ++image) f(r, cell, image);
}

// Points to the taps of rows [begin, begin + count), and lists the products that they need: none of a tap
// that is outside for all of them.
inline Pieces find_taps(const Context& c, const Conv& conv, const Product& product, const Segment& s,
                        int64_t begin, int count) {
  const Source& source = c.plan.sources[conv.source];
  const Tap* taps = c.plan.taps + conv.tap_begin;
  const int tap_count = static_cast<int>(conv.tap_end - conv.tap_begin);
  bool all = true;
  for (int t = 0; t < tap_count; ++t) {
    const float** pointers = c.pointers + t * kRows;
    bool any = false;
    int64_t at = -1;
    Cell cell{};
    for_rows(c, begin, count, [&](int r, int64_t j, int64_t image) {
      if (j != at) {
        bool inside;
        cell = tap_cell(c, conv, taps[t], source, s.row, s.col + j, inside);
        any |= inside;
        at = j;
      }
      pointers[r] = cell.p + image * cell.stride;
    });
    c.needed[t] = any;
    all &= any;
  }
  if (all) return {product.pieces, product.piece_count};
  int kept = 0, block = 0;  // where the block begins
  for (int i = 0; i < product.piece_count; ++i) {
    const Piece& piece = product.pieces[i];
    if (c.needed[piece.tap]) c.pieces[kept++] = piece;
    if (piece.last) {
      if (kept > block) c.pieces[kept - 1].last = true;
      block = kept;
    }
  }
  return {c.pieces, kept};
}

// Panels [panel_begin, panel_end) of a convolution over the cells of a segment.
inline void convolve(const Context& c, const Conv& conv, const Product& product, const Segment& s,
                     int panel_begin, int panel_end) {
  const Source* init = conv.init < 0 ? nullptr : c.plan.sources + conv.init;
  const Target& target = c.plan.targets[conv.out];
  const int64_t rows = s.cols * c.images, panel_size = product.depth * kPanel;
  const int whole = static_cast<int>(conv.channels / kPanel);
  const int direct_end = panel_end < whole ? panel_end : whole;
  const float* from[kRows];
  float* to[kRows];

  for (int64_t begin = 0; begin < rows; begin += kRows) {
    const int count = static_cast<int>(rows - begin < kRows ? rows - begin : kRows);
    const Pieces pieces = find_taps(c, conv, product, s, begin, count);
    int64_t at = -1;
    Cell cell{c.plan.zeros, 0};
    float* out = nullptr;
    for_rows(c, begin, count, [&](int r, int64_t j, int64_t image) {
      if (j != at) {
        if (init) cell = read(c, *init, s.row, s.col + j);
        out = write(c, target, s.row, s.col + j) + conv.out_channel;
        at = j;
      }
      from[r] = cell.p + image * cell.stride;
      to[r] = out + image * target.channels;
    });

    if (pieces.count == 0) {
      const int64_t n0 = static_cast<int64_t>(panel_begin) * kPanel;
      const int64_t n1 = static_cast<int64_t>(panel_end) * kPanel;
      for (int r = 0; r < count; ++r)
        for (int64_t n = n0; n < n1 && n < conv.channels; ++n) to[r][n] = from[r][n];
      continue;
    }
    if (panel_begin < direct_end) {
      const Rows all{c.pointers, from, to, static_cast<int64_t>(panel_begin) * kPanel};
      multiply(c, pieces, product.weight + panel_begin * panel_size, panel_size, direct_end - panel_begin,
               all, count);
    }
    if (panel_end > whole) {
      // The last, partial panel, by way of an array.
      float sums[kRows * kPanel];
      float* partial[kRows];
      const int64_t n0 = static_cast<int64_t>(whole) * kPanel, n = conv.channels - n0;
      for (int r = 0; r < count; ++r) {
        partial[r] = sums + r * kPanel;
        for (int64_t i = 0; i < kPanel; ++i) partial[r][i] = i < n ? from[r][n0 + i] : 0.0f;
      }
      const Rows all{c.pointers, partial, partial, 0};
      multiply(c, pieces, product.weight + whole * panel_size, panel_size, 1, all, count);
      for (int r = 0; r < count; ++r)
        for (int64_t i = 0; i < n; ++i) to[r][n0 + i] = partial[r][i];
    }
  }
}

// The same for one cell of one image, without what many rows need. False where a tap is outside.
inline bool convolve_one(const Context& c, const Conv& conv, const Product& product, const Segment& s) {
  constexpr int kWide = widest(1);
  const Source& source = c.plan.sources[conv.source];
  const Tap* taps = c.plan.taps + conv.tap_begin;
  const int64_t tap_count = conv.tap_end - conv.tap_begin;
  bool all = true;
  for (int64_t t = 0; t < tap_count; ++t) {
    bool inside;
    c.pointers[t * kRows] = tap_cell(c, conv, taps[t], source, s.row, s.col, inside).p;
    all &= inside;
  }
  if (!all || conv.channels % (kWide * kPanel) != 0) return false;
  const int64_t panel_size = product.depth * kPanel;
  const float* from = conv.init < 0 ? c.plan.zeros : read(c, c.plan.sources[conv.init], s.row, s.col).p;
  float* to = write(c, c.plan.targets[conv.out], s.row, s.col) + conv.out_channel;
  if (is_sparse(c, product, static_cast<int>(tap_count), conv)) {
    convolve_sparse(c, product, conv.channels, from, to);
    for (int i = 0; i < kDistance; ++i)
#pragma GCC unroll 8
      for (int p = 0; p < kWide; ++p) __builtin_prefetch(c.next_weight + i * kPanel + p * c.next_panel_size);
    return true;
  }
  constexpr int64_t kFloat = sizeof(float);
  Rows rows{c.pointers, &from, &to, 0};
  const float* weight = product.weight;
  for (; rows.channel < conv.channels; rows.channel += kWide * kPanel, weight += kWide * panel_size) {
    rows.from = &from;
    const bool end = rows.channel + kWide * kPanel == conv.channels;
    const Ahead next{reinterpret_cast<const char*>(end ? c.next_weight : weight + kWide * panel_size),
                     kPanel * kFloat, (end ? c.next_panel_size : panel_size) * kFloat};
    for (const Piece *p = product.pieces, *pieces_end = p + product.piece_count; p < pieces_end;) {
      const Piece* block = p;
      while (!p->last) ++p;
      tile<1, kWide>(block, weight, panel_size, rows, ++p == pieces_end ? next : Ahead{});
      rows.from = &to;
    }
  }
  return true;
}

}  // namespace GENPERF_ISA
}  // namespace genperf::pixel
