// Consensus of messages on the CPU, a tile of elements at a time: its messages, and the classes of
// class maps, are read once and stay in a cache while votes, mean shift and confidence go over
// them.
#include <algorithm>
#include <limits>
#include <tuple>

#include "consensus_loops.h"
#include "consensus_votes.h"
#include "nest.h"

namespace mtkd::cpu {
namespace {

struct Settings {
  int64_t count, classes;  // of messages; of classes, 1 where there are none
  bool with_classes, logits;
  double trim;
  int64_t kernel;
  double bandwidth;
  int64_t iterations;
};

struct Operands {
  std::vector<Operand> messages;
  Operand weight, start, low, unit, center, confidence, shares;

  std::vector<Operand*> present() {
    std::vector<Operand*> all;
    for (Operand& o : messages) all.push_back(&o);
    for (Operand* o : {&weight, &start, &low, &unit, &center, &confidence, &shares})
      if (*o) all.push_back(o);
    return all;
  }
};

// Elements of a tile: as many as a cache holds of all messages, their weights and classes.
int64_t tile_width(const Settings& s, bool weighted) {
  const int64_t rows = s.count * s.classes + s.count * (weighted + 2 * (s.kernel != kNone));
  const int64_t numbers = s.classes > 1 ? 1 << 17 : 1 << 12;  // measured: no larger
  const int64_t width = numbers / rows;
  return width < 16 ? std::max<int64_t>(4, width) : std::min<int64_t>(512, width / 16 * 16);
}

// One thread's votes. Rows of a tile: messages by class, weights by message.
template <class A>
class Voter {
 public:
  Voter(const Settings& s, const Operands& o, const Nest& nest, int64_t width)
      : s_(s),
        o_(o),
        nest_(nest),
        width_(width),
        values_(s.count * s.classes * width),
        base_(s.count * width, A(1)),
        shifted_(s.count * width),
        center_(s.classes * width),
        voted_(s.classes * width),
        sorting_((2 * s.count + 2) * width),
        spare_(3 * width),
        totals_(width),
        rows_(s.count * s.classes),
        weights_(s.count),
        shifts_(s.count) {
    for (int64_t p = 0; p < s.count; ++p) {
      weights_[p] = &base_[p * width];
      shifts_[p] = &shifted_[p * width];
    }
    const auto& strides = o.weight.strides;
    fixed_ = std::all_of(strides.begin(), strides.end(), [](int64_t x) { return x == 0; });
    for (int64_t p = 0; o.weight && fixed_ && p < s.count; ++p) {
      A value;
      read(o.weight.data + p * o.weight.across * o.weight.item, o.weight.dtype, 1, 1, &value);
      std::fill_n(&base_[p * width], width, value);
    }
  }

  void tile(int64_t outer, int64_t inner, int64_t n) {
    load(outer, inner, n);
    if (s_.kernel && o_.start) {
      for (int64_t k = 0; k < s_.classes; ++k) {
        const A* row = o_.start.load(at(o_.start, outer, inner, k), n, &center_[k * width_]);
        std::copy(row, row + n, &center_[k * width_]);
      }
    } else {
      vote_all(o_.weight ? weights_.data() : nullptr, n, center_.data());
    }
    for (int64_t step = 0; s_.kernel && step < s_.iterations; ++step) shift(outer, inner, n);
    s_.with_classes ? winner(n) : agreement(outer, inner, n);
    store(outer, inner, n);
  }

 private:
  int64_t at(const Operand& o, int64_t outer, int64_t inner, int64_t further = 0) const {
    return nest_.offset(o, outer, inner) + further * o.across;
  }

  void load(int64_t outer, int64_t inner, int64_t n) {
    for (int64_t p = 0; p < s_.count; ++p) {
      const Operand& message = o_.messages[p];
      const int64_t first = at(message, outer, inner), stride = s_.count * width_;
      for (int64_t k = 0; k < s_.classes; ++k) {
        A* slot = &values_[k * stride + p * width_];
        rows_[k * s_.count + p] = message.load(first + k * message.across, n, slot);
        if (!s_.with_classes || rows_[k * s_.count + p] == slot) continue;
        std::copy_n(rows_[k * s_.count + p], n, slot);
        rows_[k * s_.count + p] = slot;
      }
      A *slot = &values_[p * width_], *spare = spare_.data();
      if (s_.with_classes && s_.logits) {
        softmax(slot, s_.classes, stride, n, spare, spare + width_);
      } else if (s_.with_classes) {
        abstain(slot, s_.classes, stride, n, spare);
      }
      if (o_.weight && !fixed_)
        weights_[p] = o_.weight.load(at(o_.weight, outer, inner, p), n, &base_[p * width_]);
    }
  }

  // The vote of every class; without weights where all messages count alike.
  void vote_all(const A* const* weights, int64_t n, A* out) {
    const auto weighted = [&](int64_t k, double trim, A* row) {
      weighted_vote(&rows_[k * s_.count], weights ? weights : weights_.data(), s_.count, n, trim,
                    row, totals_.data(), sorting_.data());
    };
    for (int64_t k = 0; k < s_.classes; ++k) {
      A* row = out + k * width_;
      unanimous_ = !weights && vote(&rows_[k * s_.count], s_.count, n, s_.trim, row);
      if (!unanimous_) weighted(k, s_.trim, row);
      unanimous_ = unanimous_ && std::isinf(s_.bandwidth);
    }
    if (!s_.with_classes) return;
    A *total = spare_.data(), *mean = total + width_;
    sum_classes(out, n, total);
    const std::vector<A> votes(total, total + n);
    const auto lost = [&](int64_t i) { return votes[i] < A(kNoClass); };
    bool any = false;
    for (int64_t i = 0; i < n; ++i) any = any || lost(i);
    for (int64_t k = 0; any && s_.trim != 0 && k < s_.classes; ++k) {
      weighted(k, 0.0, mean);
      for (int64_t i = 0; i < n; ++i)
        if (lost(i)) out[k * width_ + i] = mean[i];
    }
    if (any) sum_classes(out, n, total);
    for (int64_t k = 0; k < s_.classes; ++k)
      for (int64_t i = 0; i < n; ++i) out[k * width_ + i] /= total[i];
  }

  void sum_classes(const A* rows, int64_t n, A* total) const {
    std::fill_n(total, n, A(0));
    for (int64_t k = 0; k < s_.classes; ++k)
      for (int64_t i = 0; i < n; ++i) total[i] += rows[k * width_ + i];
  }

  void distance(int64_t p, const A* low, const A* unit, int64_t n, A* far) const {
    std::fill_n(far, n, A(0));
    for (int64_t k = 0; k < s_.classes; ++k)
      add_distance(rows_[k * s_.count + p], &center_[k * width_], n,
                   s_.with_classes ? A(0.5) : A(1), far);
    if (low) scale(low, unit, n, far);
  }

  std::pair<const A*, const A*> scales(int64_t outer, int64_t inner, int64_t n) {
    if (!o_.low) return {nullptr, nullptr};
    A* spare = spare_.data();
    return {o_.low.load(at(o_.low, outer, inner), n, spare),
            o_.unit.load(at(o_.unit, outer, inner), n, spare + width_)};
  }

  void shift(int64_t outer, int64_t inner, int64_t n) {
    const auto [low, unit] = scales(outer, inner, n);
    const A bandwidth = static_cast<A>(s_.bandwidth);
    const A slope = s_.kernel != kLinear ? A(0) : o_.low ? A(1) : A(1) / bandwidth;
    for (int64_t p = 0; p < s_.count; ++p) {
      A* row = &shifted_[p * width_];
      distance(p, low, unit, n, row);
      similarity(weights_[p], n, s_.kernel, bandwidth, slope, row);
    }
    vote_all(shifts_.data(), n, voted_.data());
    for (int64_t k = 0; k < s_.classes; ++k)
      for (int64_t i = 0; i < n; ++i)
        if (totals_[i] > 0) center_[k * width_ + i] = voted_[k * width_ + i];
  }

  // The probability of the class that wins; 0 where nobody voted.
  void winner(int64_t n) {
    A* best = confidence();
    std::fill_n(best, n, A(0));
    for (int64_t k = 0; k < s_.classes; ++k)
      for (int64_t i = 0; i < n; ++i) best[i] = std::max(best[i], center_[k * width_ + i]);
  }

  // The share of the weight that is near.
  void agreement(int64_t outer, int64_t inner, int64_t n) {
    A *agreed = confidence(), *all = voted_.data(), *far = sorting_.data(), *zeros = far + width_;
    if (unanimous_) return std::fill_n(agreed, n, A(1)), void();
    const auto [low, unit] = scales(outer, inner, n);
    std::fill_n(agreed, n, A(0));
    std::fill_n(all, n, A(0));
    if (low) std::fill_n(zeros, n, A(0));
    for (int64_t p = 0; p < s_.count; ++p) {
      if (low) distance(p, low, unit, n, far);
      agree(low ? far : rows_[p], low ? zeros : center_.data(), weights_[p], n,
            static_cast<A>(s_.bandwidth), agreed, all);
    }
    ratio(agreed, all, n, agreed);
  }

  A* confidence() { return &spare_[2 * width_]; }

  void store(int64_t outer, int64_t inner, int64_t n) {
    for (int64_t k = 0; k < s_.classes; ++k)
      o_.center.store(at(o_.center, outer, inner, k), n, &center_[k * width_]);
    o_.confidence.store(at(o_.confidence, outer, inner), n, confidence());
    for (int64_t p = 0; s_.kernel && p < s_.count; ++p) {
      A* row = &shifted_[p * width_];
      ratio(row, totals_.data(), n, row);
      o_.shares.store(at(o_.shares, outer, inner, p), n, row);
    }
  }

  const Settings& s_;
  const Operands& o_;
  const Nest& nest_;
  const int64_t width_;
  bool fixed_;              // weights are the same for all elements
  bool unanimous_ = false;  // nobody abstained, and everybody is near
  std::vector<A> values_, base_, shifted_, center_, voted_, sorting_, spare_, totals_;
  std::vector<const A*> rows_, weights_, shifts_;
};

// make() gives a thread what it works with; its tile(outer, inner, n) is called for every tile.
template <class Make>
void for_each_tile(const Nest& nest, int64_t width, int64_t rows, const Make& make) {
  constexpr int64_t kThreadWork = 16384;  // numbers below which another thread does not pay
  const int64_t across = (nest.inner() + width - 1) / width;
  const int64_t work = std::max<int64_t>(1, std::min(width, nest.inner()) * rows);
  const int64_t grain = std::max<int64_t>(1, kThreadWork / work);
  torch::stable::parallel_for(0, nest.outer() * across, grain, [&](int64_t begin, int64_t end) {
    auto worker = make();
    for (int64_t t = begin; t < end; ++t) {
      const int64_t inner = t % across * width;
      worker.tile(t / across, inner, std::min(width, nest.inner() - inner));
    }
  });
}

std::vector<int64_t> shape_of(const Tensor& t, std::optional<int64_t> without) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (without != d) shape.push_back(t.size(d));
  return shape;
}

Operand operand(const OptionalTensor& t, std::optional<int64_t> further) {
  return t ? Operand(*t, further) : Operand();
}

void check(const std::vector<Tensor>& messages, const OptionalTensor& weight,
           const OptionalTensor& start, const OptionalTensor& low, const OptionalTensor& unit) {
  STD_TORCH_CHECK(!messages.empty(), "consensus: one message or more expected");
  for (const Tensor& message : messages)
    STD_TORCH_CHECK(
        message.is_cpu() && is_floating(message) && message.sizes().equals(messages[0].sizes()),
        "consensus: floating-point messages of one shape on the CPU expected");
  for (const OptionalTensor& t : {weight, start, low, unit})
    STD_TORCH_CHECK(!t || (t->is_cpu() && is_floating(*t)),
                    "consensus: floating-point tensors on the CPU expected");
  for (const OptionalTensor& t : {start, low, unit})
    STD_TORCH_CHECK(!t || t->sizes().equals(messages[0].sizes()),
                    "consensus: start, low and unit in the shape of a message expected");
}

std::tuple<Tensor, Tensor, Tensor> consensus(std::vector<Tensor> messages, OptionalTensor weight,
                                             OptionalTensor start, OptionalTensor low,
                                             OptionalTensor unit, std::optional<int64_t> class_dim,
                                             bool logits, double trim, int64_t kernel,
                                             double bandwidth, int64_t iterations) {
  check(messages, weight, start, low, unit);
  const Tensor& first = messages[0];
  const int64_t count = static_cast<int64_t>(messages.size());
  const Settings s{count,
                   class_dim ? first.size(*class_dim) : 1,
                   class_dim.has_value(),
                   logits,
                   trim,
                   kernel,
                   bandwidth,
                   iterations};
  const std::vector<int64_t> shape = shape_of(first, class_dim);
  std::vector<int64_t> every{count};
  every.insert(every.end(), shape.begin(), shape.end());
  STD_TORCH_CHECK(!weight || weight->sizes().equals(every),
                  "consensus: weight of messages and elements expected");
  const ScalarType dtype = accumulate_dtype(first, first);
  Tensor center = torch::stable::empty_like(first);
  advise_huge_pages(center.data_ptr(), center.numel() * center.element_size());
  Tensor confidence = empty(first, shape, dtype);
  Tensor shares = empty(first, kernel ? every : std::vector<int64_t>{0}, dtype);
  if (confidence.numel() == 0) return {center, confidence, shares};

  Operands o;
  for (const Tensor& message : messages) o.messages.emplace_back(message, class_dim);
  o.weight = operand(weight, 0);
  o.start = operand(start, class_dim);
  o.low = operand(low, std::nullopt);
  o.unit = operand(unit, std::nullopt);
  o.center = Operand(center, class_dim);
  o.confidence = Operand(confidence, std::nullopt);
  if (kernel) o.shares = Operand(shares, 0);
  const Nest nest(shape, o.present());
  const int64_t width = tile_width(s, weight.has_value());
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    for_each_tile(nest, width, count * s.classes, [&] { return Voter<A>(s, o, nest, width); });
  };
  dtype == ScalarType::Double ? run(double()) : run(float());
  return {center, confidence, shares};
}

template <class A>
struct Ranger {
  const std::vector<Operand>& messages;
  const Operand &center, &low, &high;
  const Nest& nest;
  std::vector<A> rows;
  int64_t width;

  void tile(int64_t outer, int64_t inner, int64_t n) {
    A *far = &rows[0], *spare = far + width, *least = spare + width, *most = least + width;
    const A* middle = center.load(nest.offset(center, outer, inner), n, most + width);
    std::fill_n(least, n, std::numeric_limits<A>::infinity());
    std::fill_n(most, n, A(0));
    for (const Operand& message : messages) {
      std::fill_n(far, n, A(0));
      const A* row = message.load(nest.offset(message, outer, inner), n, spare);
      add_distance(row, middle, n, A(1), far);
      range(far, n, least, most);
    }
    low.store(nest.offset(low, outer, inner), n, least);
    high.store(nest.offset(high, outer, inner), n, most);
  }
};

std::tuple<Tensor, Tensor> spread(std::vector<Tensor> messages, Tensor center) {
  check(messages, std::nullopt, center, std::nullopt, std::nullopt);
  const std::vector<int64_t> shape = shape_of(center, std::nullopt);
  const ScalarType dtype = accumulate_dtype(center, center);
  Tensor low = empty(center, shape, dtype), high = empty(center, shape, dtype);
  if (low.numel() == 0) return {low, high};
  std::vector<Operand> inputs;
  for (const Tensor& message : messages) inputs.emplace_back(message, std::nullopt);
  Operand middle(center, std::nullopt), least(low, std::nullopt), most(high, std::nullopt);
  std::vector<Operand*> all;
  for (Operand& input : inputs) all.push_back(&input);
  all.insert(all.end(), {&middle, &least, &most});
  const Nest nest(shape, all);
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    for_each_tile(nest, kBlock, static_cast<int64_t>(inputs.size()), [&] {
      return Ranger<A>{inputs, middle, least, most, nest, std::vector<A>(5 * kBlock), kBlock};
    });
  };
  dtype == ScalarType::Double ? run(double()) : run(float());
  return {low, high};
}

}  // namespace
}  // namespace mtkd::cpu

STABLE_TORCH_LIBRARY_IMPL(mtkd, CPU, m) {
  m.impl("consensus", TORCH_BOX(&mtkd::cpu::consensus));
  m.impl("consensus_spread", TORCH_BOX(&mtkd::cpu::spread));
}
