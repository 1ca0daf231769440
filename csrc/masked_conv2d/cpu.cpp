#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "../common/isa.h"
#include "masked_conv2d.h"
#include "plan.h"

namespace genperf {

GENPERF_ISA_TABLE(live_conv, LiveConv);
GENPERF_ISA_TABLE(live_conv_grad_weight, LiveConv);

namespace {

// Which pairs (input channel, tap) the mask keeps for which outputs, by classes of alike channels: outputs of
// one class have the same mask, and so have inputs. A causal mask has one class of each, a mask of an RGB
// model three.
struct Liveness {
  std::vector<int32_t> out_class, in_class;
  int64_t outs = 0, ins = 0, taps = 0;
  std::vector<uint8_t> live;  // [outs, ins, taps]

  Liveness(const View& mask, int64_t out_channels, int64_t in_channels) {
    taps = mask.shape[2] * mask.shape[3];
    const float* values = static_cast<const float*>(mask.data);
    const int64_t mask_outs = mask.shape[0], mask_ins = mask.shape[1], row = mask_ins * taps;
    std::vector<int64_t> kept;  // one output of each class
    for (int64_t o = 0; o < mask_outs; ++o) {
      auto alike = [&](int64_t k) {
        return std::memcmp(values + k * row, values + o * row, row * sizeof(float)) == 0;
      };
      auto found = std::find_if(kept.begin(), kept.end(), alike);
      out_class.push_back(static_cast<int32_t>(found - kept.begin()));
      if (found == kept.end()) kept.push_back(o);
    }
    outs = kept.size();
    std::vector<std::vector<uint8_t>> columns;  // of each class of inputs, [outs, taps]
    for (int64_t i = 0; i < mask_ins; ++i) {
      std::vector<uint8_t> column;
      for (int64_t k : kept)
        for (int64_t t = 0; t < taps; ++t) column.push_back(values[k * row + i * taps + t] != 0.0f);
      auto found = std::find(columns.begin(), columns.end(), column);
      in_class.push_back(static_cast<int32_t>(found - columns.begin()));
      if (found == columns.end()) columns.push_back(std::move(column));
    }
    ins = columns.size();
    live.resize(outs * ins * taps);
    for (int64_t o = 0; o < outs; ++o)
      for (int64_t i = 0; i < ins; ++i) std::copy_n(&columns[i][o * taps], taps, &live[(o * ins + i) * taps]);
    if (mask_outs == 1) out_class.assign(out_channels, 0);
    if (mask_ins == 1) in_class.assign(in_channels, 0);
  }
};

// A LiveConv and the lists that it points to.
class Planned {
 public:
  LiveConv conv{};

  // `transposed`: rows are the input channels, and `dy`, `dx` of each tap count from the other side.
  Planned(const Liveness& l, bool transposed, const MaskedConv2dArgs& a, int64_t kernel_w) {
    const std::vector<int32_t>& row_class = transposed ? l.in_class : l.out_class;
    const std::vector<int32_t>& channel_class = transposed ? l.out_class : l.in_class;
    const int64_t classes = transposed ? l.ins : l.outs;
    auto live = [&](int64_t row, int64_t channel, int64_t tap) {
      return l.live[((transposed ? channel * l.ins + row : row * l.ins + channel)) * l.taps + tap];
    };
    // Pairs that more classes of rows use come first: where the classes are nested, as in RGB models, each
    // then uses the first pairs up to some number.
    std::vector<std::vector<std::pair<int32_t, int32_t>>> by_uses(classes + 1);
    for (size_t c = 0; c < channel_class.size(); ++c) {
      for (int64_t t = 0; t < l.taps; ++t) {
        int64_t uses = 0;
        for (int64_t r = 0; r < classes; ++r) uses += live(r, channel_class[c], t);
        by_uses[uses].push_back({static_cast<int32_t>(c), static_cast<int32_t>(t)});
      }
    }
    std::vector<int32_t> first(classes, 0), last(classes, 0);
    for (int64_t uses = classes; uses > 0; --uses) {
      for (auto [c, t] : by_uses[uses]) {
        const int32_t k = static_cast<int32_t>(channel_.size());
        for (int64_t r = 0; r < classes; ++r) {
          if (!live(r, channel_class[c], t)) continue;
          if (last[r] == 0) first[r] = k;
          last[r] = k + 1;
        }
        const int64_t y = t / kernel_w * a.dilation[0] - a.padding[0];
        const int64_t x = t % kernel_w * a.dilation[1] - a.padding[1];
        channel_.push_back(c), tap_.push_back(t);
        dy_.push_back(transposed ? -y : y), dx_.push_back(transposed ? -x : x);
      }
    }
    row_.resize(row_class.size());
    std::iota(row_.begin(), row_.end(), 0);
    std::stable_sort(row_.begin(), row_.end(),
                     [&](int32_t i, int32_t j) { return row_class[i] < row_class[j]; });
    for (int32_t r : row_) begin_.push_back(first[row_class[r]]), end_.push_back(last[row_class[r]]);

    conv.rows = row_.size(), conv.channels = channel_class.size();
    conv.stride_h = a.stride[0], conv.stride_w = a.stride[1];
    conv.taps = l.taps;
    conv.row = row_.data(), conv.begin = begin_.data(), conv.end = end_.data();
    conv.pairs = channel_.size();
    conv.channel = channel_.data(), conv.tap = tap_.data(), conv.dy = dy_.data(), conv.dx = dx_.data();
    if (conv.pairs > 0) {
      auto [low_y, high_y] = std::minmax_element(dy_.begin(), dy_.end());
      auto [low_x, high_x] = std::minmax_element(dx_.begin(), dx_.end());
      conv.min_dy = *low_y, conv.max_dy = *high_y, conv.min_dx = *low_x, conv.max_dx = *high_x;
    }
    const int64_t out_stride = static_cast<int64_t>(l.in_class.size()) * l.taps;
    conv.row_stride = transposed ? l.taps : out_stride;
    conv.channel_stride = transposed ? out_stride : l.taps;
    const int64_t mask_out = a.mask.shape[0] == 1 ? 0 : a.mask.shape[1] * l.taps;
    const int64_t mask_in = a.mask.shape[1] == 1 ? 0 : l.taps;
    conv.mask = static_cast<const float*>(a.mask.data);
    conv.mask_row_stride = transposed ? mask_in : mask_out;
    conv.mask_channel_stride = transposed ? mask_out : mask_in;
  }
  Planned(const Planned&) = delete;

 private:
  std::vector<int32_t> row_, begin_, end_, channel_, tap_;
  std::vector<int64_t> dy_, dx_;
};

void set_sizes(LiveConv& conv, const View& src, const View& dst) {
  conv.batch = src.shape[0];
  conv.src_h = src.shape[2], conv.src_w = src.shape[3];
  conv.dst_h = dst.shape[2], conv.dst_w = dst.shape[3];
}

}  // namespace

void masked_conv2d_forward_cpu(const MaskedConv2dArgs& a) {
  Planned plan({a.mask, a.y.shape[1], a.x.shape[1]}, false, a, a.weight.shape[3]);
  set_sizes(plan.conv, a.x, a.y);
  plan.conv.src = static_cast<const float*>(a.x.data);
  plan.conv.weight = static_cast<const float*>(a.weight.data);
  plan.conv.bias = a.bias ? static_cast<const float*>(a.bias.data) : nullptr;
  plan.conv.dst = static_cast<float*>(a.y.data);
  live_conv_isas(plan.conv);
}

void masked_conv2d_grad_input_cpu(const MaskedConv2dArgs& a) {
  Planned plan({a.mask, a.grad_y.shape[1], a.grad_x.shape[1]}, true, a, a.weight.shape[3]);
  set_sizes(plan.conv, a.grad_y, a.grad_x);
  plan.conv.src = static_cast<const float*>(a.grad_y.data);
  plan.conv.weight = static_cast<const float*>(a.weight.data);
  plan.conv.dst = static_cast<float*>(a.grad_x.data);
  live_conv_isas(plan.conv);
}

void masked_conv2d_grad_weight_cpu(const MaskedConv2dArgs& a) {
  Planned plan({a.mask, a.grad_y.shape[1], a.x.shape[1]}, false, a, a.grad_weight.shape[3]);
  set_sizes(plan.conv, a.x, a.grad_y);
  plan.conv.src = static_cast<const float*>(a.x.data);
  plan.conv.grad_dst = static_cast<const float*>(a.grad_y.data);
  plan.conv.grad_weight = static_cast<float*>(a.grad_weight.data);
  plan.conv.grad_bias = a.grad_bias ? static_cast<float*>(a.grad_bias.data) : nullptr;
  live_conv_grad_weight_isas(plan.conv);
}

}  // namespace genperf
