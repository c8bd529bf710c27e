// Gaussian negative log-likelihood on CUDA: a group of lanes takes a row and teacher. Without
// mixture modes value and gradients take one walk over its columns; with modes a first walk finds
// each mode's energy, a second one writes the gradients weighted by the posterior.
#include "../gaussian.h"

#include "../gaussian_operators.h"
#include "common.cuh"

namespace mtkd::cuda {
namespace {

struct Inputs {
  View mean, log_std, target, logits, mask, coefficient;
  double bound;
  int32_t modes;
  bool per_dim, full;
};

struct Outputs {
  View loss, mean_grad, log_std_grad, logits_grad;  // those not wanted have no data
};

struct Parameters {
  Inputs in;
  Outputs out;
  Plan plan;
};

// Columns of one row, mode and teacher, where tensors have it.
template <class A, int V, bool Vector>
struct Walk {
  const Parameters& p;
  const Unit& unit;
  int64_t mode;

  MTKD_DEVICE void store_if_wanted(const View& view, const Columns& at,
                                   const A (&values)[V]) const {
    if (view) store<A, V, Vector>(view, view.offset(unit.row, mode, 0), at, values);
  }

  MTKD_DEVICE void zero_gradients() const {
    const A zeros[V] = {};
    each_step<V, Vector>(unit, [&](const Columns& at) {
      store_if_wanted(p.out.mean_grad, at, zeros);
      store_if_wanted(p.out.log_std_grad, at, zeros);
    });
  }

  // This lane's share of the energy; the gradients, times `grad`, may overwrite mean and log_std.
  template <bool Bounded, bool Gradients>
  MTKD_DEVICE A energy(A grad) const {
    const A bound = Bounded ? static_cast<A>(p.in.bound) : A(0);
    const A inverse_bound = Bounded ? A(1) / bound : A(0);
    const int64_t mean_base = p.in.mean.offset(unit.row, mode, 0);
    const int64_t log_std_base = p.in.log_std.offset(unit.row, mode, 0);
    const int64_t target_base = p.in.target.offset(unit.row, 0, 0);
    A total = 0;
    each_step<V, Vector>(unit, [&](const Columns& at) {
      const auto mean_pack = load<V, Vector>(p.in.mean, mean_base, at);
      const auto log_std_pack = load<V, Vector>(p.in.log_std, log_std_base, at);
      const auto target_pack = load<V, Vector>(p.in.target, target_base, at);
      A mean[V], log_std[V], target[V];
      convert(mean_pack, p.in.mean.dtype, mean);
      convert(log_std_pack, p.in.log_std.dtype, log_std);
      convert(target_pack, p.in.target.dtype, target);
      for (int k = 0; k < V; ++k) {
        const auto e =
            gaussian::element<Bounded>(mean[k], log_std[k], target[k], bound, inverse_bound, grad);
        total += e.energy;  // columns past the end are zeros, whose energy is 0
        mean[k] = e.mean_grad, log_std[k] = e.log_std_grad;
      }
      if constexpr (Gradients) {
        store_if_wanted(p.out.mean_grad, at, mean);
        store_if_wanted(p.out.log_std_grad, at, log_std);
      }
    });
    return total;
  }
};

// What is not counted is not read, and its gradients are 0.
template <bool Gradients, int V, bool Vector, class A>
MTKD_DEVICE A walk(const Parameters& p, const Unit& unit, int64_t mode, bool counted, A grad) {
  const Walk<A, V, Vector> columns{p, unit, mode};
  if (counted)
    return p.in.bound > 0 ? columns.template energy<true, Gradients>(grad)
                          : columns.template energy<false, Gradients>(grad);
  if constexpr (Gradients) columns.zero_gradients();
  return 0;
}

// What belongs to a row and teacher besides its columns.
template <class A>
struct Entry {
  bool counted;
  A constant = 0, scale = 1, grad = 0;

  MTKD_DEVICE Entry(const Inputs& in, const Unit& unit) : counted(counts(in.mask, unit)) {
    if (in.full) constant = static_cast<A>(gaussian::kHalfLog2Pi) * static_cast<A>(unit.width);
    if (in.per_dim) scale = A(1) / static_cast<A>(unit.width);
    grad = scale * gradient_to<A>(in.coefficient, unit, counted);
  }
};

template <class A, int V, bool Vector>
__global__ void __launch_bounds__(kThreads, Vector && sizeof(A) == 4 ? 3 : 2)
    plain(const __grid_constant__ Parameters p) {
  const auto unit = unit_of(p.plan, blockIdx.x, threadIdx.x);
  const Entry<A> entry(p.in, unit);
  const A energy = p.in.coefficient ? walk<true, V, Vector>(p, unit, 0, entry.counted, entry.grad)
                                    : walk<false, V, Vector>(p, unit, 0, entry.counted, entry.grad);
  if (!p.out.loss) return;
  const A loss = sum(energy, unit.lanes) + entry.constant;
  write_loss(p.out.loss, unit, entry.counted, entry.scale * loss);
}

// The loss is log sum_m exp(logits_m) - log sum_m exp(joint_m), joint = logits - energy; lane m
// modulo the group's size keeps mode m.
template <class A, int V, bool Vector>
__global__ void __launch_bounds__(kThreads, 2) mixture(const __grid_constant__ Parameters p) {
  const auto unit = unit_of(p.plan, blockIdx.x, threadIdx.x);
  const Entry<A> entry(p.in, unit);
  const int modes = p.in.modes;
  A* joint = shared_of_group<A>(unit, modes);
  const auto logit = [&](int m) {
    return entry.counted ? get<A>(p.in.logits, unit.row, m, unit.teacher) : A(0);
  };
  for (int m = 0; m < modes; ++m) {
    const A share = walk<false, V, Vector>(p, unit, m, entry.counted, A(0));
    const A energy = sum(share, unit.lanes) + entry.constant;
    if (m % unit.lanes == unit.lane) joint[m] = logit(m) - energy;
  }
  const A normaliser = log_sum_exp<A>(unit, modes, logit);
  const A evidence = log_sum_exp<A>(unit, modes, [&](int m) { return joint[m]; });
  write_loss(p.out.loss, unit, entry.counted, entry.scale * (normaliser - evidence));
  if (!p.in.coefficient) return;
  synchronise(unit.lanes);  // every lane reads the joint of every mode from here on
  for (int m = unit.lane; p.out.logits_grad && unit.inside && m < modes; m += unit.lanes) {
    const A prior = exponential(logit(m) - normaliser),
            posterior = exponential(joint[m] - evidence);
    put(p.out.logits_grad, unit.row, m, unit.teacher,
        entry.counted ? entry.grad * (prior - posterior) : A(0));
  }
  if (!p.out.mean_grad && !p.out.log_std_grad) return;
  for (int m = 0; m < modes; ++m) {
    const A mode_grad = entry.grad * exponential(joint[m] - evidence);
    walk<true, V, Vector>(p, unit, m, entry.counted, mode_grad);
  }
}

template <class A, int V, bool Vector>
void run_as(Access<A, V, Vector>, const gaussian::Arguments& arguments, const Parameters& p) {
  const bool mixed = static_cast<bool>(p.in.logits);
  const int64_t per_group = mixed ? arguments.modes * static_cast<int64_t>(sizeof(A)) : 0;
  const Grouping grouping(V, arguments.rows * arguments.columns, per_group);
  launch_plans(mixed ? mixture<A, V, Vector> : plain<A, V, Vector>, arguments, grouping, p);
}

void run(const gaussian::Arguments& arguments, const OptionalTensor& coefficient,
         const gaussian::Results& results) {
  Parameters p = {};
  p.in = {View(arguments.mean),   View(arguments.log_std),
          View(arguments.target), View(arguments.mode_logits),
          View(arguments.mask),   View(coefficient),
          arguments.bound,        static_cast<int32_t>(arguments.modes),
          arguments.per_dim,      arguments.full};
  p.out = {View(results.loss), View(results.mean_grad), View(results.log_std_grad),
           View(results.logits_grad)};
  with_access(arguments,
              {&p.in.mean, &p.in.log_std, &p.in.target, &p.out.mean_grad, &p.out.log_std_grad},
              [&](auto access) { run_as(access, arguments, p); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtkd_cuda, CUDA, m) { gaussian::register_operators<run>(m); }

}  // namespace mtkd::cuda
