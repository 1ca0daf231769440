// Convolutions as products of matrices: rows are cells and images, read where they lie.
//
// Each output value is the sum that program.h's Conv defines, in whichever tile it is computed. Panels of
// the weight are the outer loop, so that a weight is read from memory once for kRows rows; of a panel, the
// products of one block (8 KB) stay in the first-level cache for all rows.
#pragma once

#include "context.h"

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
  const float* const* from;  // null for zeros
  float* const* to;
  int64_t channel;  // of `from` and `to`
};

// to = from + the products of one block, which begins with `piece`, for kPanels panels of 16 channels.
template <int kTile, int kPanels>
void tile(const Piece* piece, const float* weight, int64_t panel_size, const Rows& rows) {
  constexpr int kVectors = kPanels * kParts;
  Nf sum[kTile][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Nf{};
  for (bool last = false; !last; ++piece) {
    const float* a[kTile];
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) a[r] = rows.taps[piece->tap * kRows + r] + piece->channel;
    const float* w = weight + piece->k * kPanel;
    for (int64_t c = 0; c < piece->length; ++c, w += kPanel) {
      Nf b[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        b[v] = load_native(w + v / kParts * panel_size + v % kParts * kNativeLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) {
        const Nf x = Nf{} + a[r][c];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sum[r][v] = fma_native(x, b[v], sum[r][v]);
      }
    }
    last = piece->last;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) {
    float* to = rows.to[r] + rows.channel;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      Nf y = sum[r][v];
      if (rows.from) y = load_native(rows.from[r] + rows.channel + v * kNativeLanes) + y;
      store_native(to + v * kNativeLanes, y);
    }
  }
}

using TileFunction = void (*)(const Piece*, const float*, int64_t, const Rows&);

template <int kTile, int kPanels>
TileFunction tile_function(int rows, int panels) {
  if constexpr (kTile > 1) {
    if (rows < kTile) return tile_function<kTile - 1, widest(kTile - 1)>(rows, panels);
  }
  if constexpr (kPanels > 1) {
    if (panels < kPanels) return tile_function<kTile, kPanels - 1>(rows, panels);
  }
  return tile<kTile, kPanels>;
}

// Up to kRows rows by panels [begin, end), all of them whole: tiles of nearly equal size.
inline void multiply(const Piece* pieces, int piece_count, const float* weight, int64_t panel_size, int begin,
                     int end, const Rows& rows, int count) {
  const int tiles = (count + kTileRows - 1) / kTileRows, small = count / tiles, larger = count % tiles;
  const int wide = widest(small + (larger > 0));
  const int groups = (end - begin + wide - 1) / wide;
  for (int g = 0; g < groups; ++g) {
    const int panel = begin + (end - begin) * g / groups;
    const int panels = begin + (end - begin) * (g + 1) / groups - panel;
    const TileFunction large_tile = tile_function<kTileRows, widest(kTileRows)>(small + 1, panels);
    const TileFunction small_tile = tile_function<kTileRows, widest(kTileRows)>(small, panels);
    const float* w = weight + panel * panel_size;
    Rows part = rows;
    part.channel += static_cast<int64_t>(panel - begin) * kPanel;
    for (const Piece* p = pieces; p < pieces + piece_count;) {
      for (int t = 0, r = 0; t < tiles; ++t) {
        Rows at = part;
        at.taps += r, at.to += r;
        if (at.from) at.from += r;
        (t < larger ? large_tile : small_tile)(p, w, panel_size, at);
        r += small + (t < larger);
      }
      while (!p->last) ++p;
      ++p;
      part.from = part.to;
    }
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
  int64_t cell = begin / c.images, image = begin % c.images;
  for (int r = 0; r < count; ++cell, image = 0)
    for (; image < c.images && r < count; ++r, ++image) f(r, cell, image);
}

// Panels [panel_begin, panel_end) of a convolution over the cells of a segment.
inline void convolve(const Context& c, const Conv& conv, const Product& product, const Segment& s,
                     int panel_begin, int panel_end) {
  const Source& source = c.plan.sources[conv.source];
  const Source* init = conv.init < 0 ? nullptr : c.plan.sources + conv.init;
  const Target& target = c.plan.targets[conv.out];
  const Tap* taps = c.plan.taps + conv.tap_begin;
  const int tap_count = static_cast<int>(conv.tap_end - conv.tap_begin);
  const int64_t rows = s.cols * c.images, panel_size = product.depth * kPanel;
  const int whole = static_cast<int>(conv.channels / kPanel);
  const int direct_end = panel_end < whole ? panel_end : whole;
  const float* from[kRows];
  float* to[kRows];

  for (int64_t begin = 0; begin < rows; begin += kRows) {
    const int count = static_cast<int>(rows - begin < kRows ? rows - begin : kRows);
    // Taps that are outside for all of these rows add nothing.
    const Piece* pieces = product.pieces;
    int piece_count = product.piece_count, skipped = 0, kept = 0;
    const Piece* piece = product.pieces;
    const Piece* const pieces_end = piece + piece_count;
    int block = 0;  // kept pieces of the blocks before
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
      if (!any && skipped == 0) {
        // From here on the pieces are listed anew.
        kept = static_cast<int>(piece - product.pieces);
        for (int i = 0; i < kept; ++i) c.pieces[i] = product.pieces[i];
        block = kept;
        while (block > 0 && !c.pieces[block - 1].last) --block;
        pieces = c.pieces;
      }
      skipped += !any;
      for (; piece < pieces_end && piece->tap == t; ++piece) {
        if (skipped == 0) continue;
        if (any) c.pieces[kept++] = *piece;
        if (piece->last) {
          if (kept > block) c.pieces[kept - 1].last = true;
          block = kept;
        }
      }
    }
    if (skipped > 0) piece_count = kept;

    int64_t at = -1;
    Cell cell{};
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

    if (piece_count == 0) {
      const int64_t n0 = static_cast<int64_t>(panel_begin) * kPanel;
      const int64_t n1 = static_cast<int64_t>(panel_end) * kPanel;
      for (int r = 0; r < count; ++r)
        for (int64_t n = n0; n < n1 && n < conv.channels; ++n) to[r][n] = init ? from[r][n] : 0.0f;
      continue;
    }
    if (panel_begin < direct_end) {
      const Rows all{c.pointers, init ? from : nullptr, to, static_cast<int64_t>(panel_begin) * kPanel};
      multiply(pieces, piece_count, product.weight, panel_size, panel_begin, direct_end, all, count);
    }
    if (panel_end > whole) {
      // The last, partial panel, by way of an array.
      float sums[kRows * kPanel];
      float* partial[kRows];
      const int64_t n0 = static_cast<int64_t>(whole) * kPanel, n = conv.channels - n0;
      for (int r = 0; r < count; ++r) {
        partial[r] = sums + r * kPanel;
        for (int64_t i = 0; i < kPanel; ++i) partial[r][i] = init && i < n ? from[r][n0 + i] : 0.0f;
      }
      const Rows all{c.pointers, partial, partial, 0};
      multiply(pieces, piece_count, product.weight, panel_size, whole, whole + 1, all, count);
      for (int r = 0; r < count; ++r)
        for (int64_t i = 0; i < n; ++i) to[r][n0 + i] = partial[r][i];
    }
  }
}

}  // namespace GENPERF_ISA
}  // namespace genperf::pixel
