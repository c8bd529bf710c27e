// Alignment losses on CUDA: a group of lanes takes a row and teacher. Terms that depend on
// directions need the sums of a first walk over its columns before a second one, which finds them
// in a cache, writes the gradient; without such terms both come from one walk.
#include "../alignment.h"

#include "../alignment_operators.h"
#include "common.cuh"

namespace mtkd::cuda {
namespace {

using alignment::Direction;
using alignment::Factors;
using alignment::Settings;
using alignment::Sums;

struct Tensors {
  View student, target, shift, scale, dispersion, mask, coefficient;
  View loss, grad;  // those not wanted have no data
};

template <class A>
struct Parameters : Tensors {
  Settings<A> settings;
  int terms;
  Plan plan;
};

// V columns of the student and of the standardised target; both are 0 past the end.
template <bool Vector, int V, class A>
MTKD_DEVICE void read(const Parameters<A>& p, const Unit& unit, const Columns& at, A (&student)[V],
                      A (&target)[V]) {
  const auto student_pack = load<V, Vector>(p.student, unit.row * p.student.row, at);
  const auto target_pack = load<V, Vector>(p.target, unit.row * p.target.row, at);
  Pack<V, Vector> shift_pack, scale_pack;
  if (p.shift) shift_pack = load<V, Vector>(p.shift, 0, at);
  if (p.scale) scale_pack = load<V, Vector>(p.scale, 0, at);
  convert(student_pack, p.student.dtype, student);
  convert(target_pack, p.target.dtype, target);
  A numbers[V];
  if (p.shift) {
    convert(shift_pack, p.shift.dtype, numbers);
    for (int k = 0; k < V; ++k) target[k] -= numbers[k];
  }
  if (p.scale) {
    convert(scale_pack, p.scale.dtype, numbers);
    for (int k = 0; k < V; ++k) target[k] *= numbers[k];
  }
}

// This lane's share of the sums, and with `Gradient` the gradient, which may overwrite the student;
// the sums of directions, which it depends on, then are 0.
template <bool Directional, bool Gradient, int V, bool Vector, class A>
MTKD_DEVICE Sums<A> walk(const Parameters<A>& p, const Unit& unit, const Factors<A>& factors) {
  Sums<A> sums = {};
  each_step<V, Vector>(unit, [&](const Columns& at) {
    A student[V], target[V], grad[V] = {};
    read<Vector>(p, unit, at, student, target);
    if constexpr (Directional && Gradient) {
      for (int k = 0; k < V; ++k)
        grad[k] = factors.target * target[k] + factors.student * student[k];
    } else if constexpr (Directional) {
      for (int k = 0; k < V; ++k) {
        sums.student += student[k] * student[k];
        sums.target += target[k] * target[k];
        sums.product += student[k] * target[k];
      }
    }
    if (p.terms & alignment::kHuber) {
      for (int k = 0; k < V; ++k) {
        const A error = student[k] - target[k];
        const auto h = alignment::huber(std::fabs(error), p.settings.beta, p.settings.inverse_beta);
        sums.huber += h.value;
        grad[k] += factors.huber * std::copysign(h.slope, error);
      }
    }
    if (p.terms & alignment::kSquare) {
      for (int k = 0; k < V; ++k) {
        const A error = student[k] - target[k];
        sums.square += error * error;
        grad[k] += factors.square * error;
      }
    }
    if constexpr (Gradient) store<A, V, Vector>(p.grad, unit.row * p.grad.row, at, grad);
  });
  return sums;
}

// What is not counted is not read, and its gradient is 0.
template <bool Directional, int V, bool Vector, class A>
MTKD_DEVICE Sums<A> gradient_walk(const Parameters<A>& p, const Unit& unit, bool counted,
                                  const Factors<A>& factors) {
  if (counted) return walk<Directional, true, V, Vector>(p, unit, factors);
  const A zeros[V] = {};
  each_step<V, Vector>(unit, [&](const Columns& at) {
    store<A, V, Vector>(p.grad, unit.row * p.grad.row, at, zeros);
  });
  return {};
}

template <bool Directional, int V, bool Vector, class A>
MTKD_DEVICE Sums<A> sums_walk(const Parameters<A>& p, const Unit& unit, bool counted) {
  return counted ? walk<Directional, false, V, Vector>(p, unit, Factors<A>{}) : Sums<A>{};
}

// What belongs to a row and teacher besides its columns.
template <class A>
struct Entry {
  const Parameters<A>& p;
  const Unit& unit;
  bool counted;
  A width, dispersion = 1;

  MTKD_DEVICE Entry(const Parameters<A>& p, const Unit& unit)
      : p(p), unit(unit), counted(counts(p.mask, unit)), width(static_cast<A>(unit.width)) {
    if (counted && p.dispersion) dispersion = get<A>(p.dispersion, 0, 0, unit.teacher);
  }
  MTKD_DEVICE Factors<A> factors(const Direction<A>& direction) const {
    return alignment::factors_of(direction, p.settings, width, dispersion,
                                 gradient_to<A>(p.coefficient, unit, counted));
  }
  // All of a block's lanes must come here.
  MTKD_DEVICE void write(Sums<A>& sums, const Direction<A>& direction) const {
    if (!p.loss) return;
    if (p.terms & alignment::kHuber) sums.huber = sum(sums.huber, unit.lanes);
    if (p.terms & alignment::kSquare) sums.square = sum(sums.square, unit.lanes);
    write_loss(p.loss, unit, counted,
               alignment::loss_of(sums, direction, p.settings, width, dispersion));
  }
};

template <class A, int V, bool Vector>
__global__ void __launch_bounds__(kThreads, Vector && sizeof(A) == 4 ? 3 : 2)
    directional(const __grid_constant__ Parameters<A> p) {
  const auto unit = unit_of(p.plan, blockIdx.x, threadIdx.x);
  const Entry<A> entry(p, unit);
  auto sums = sums_walk<true, V, Vector>(p, unit, entry.counted);
  sums.student = sum(sums.student, unit.lanes);
  sums.target = sum(sums.target, unit.lanes);
  sums.product = sum(sums.product, unit.lanes);
  const auto direction = alignment::direction_of(sums, p.settings.eps);
  entry.write(sums, direction);
  if (p.grad) gradient_walk<true, V, Vector>(p, unit, entry.counted, entry.factors(direction));
}

template <class A, int V, bool Vector>
__global__ void __launch_bounds__(kThreads, Vector && sizeof(A) == 4 ? 3 : 2)
    plain(const __grid_constant__ Parameters<A> p) {
  const auto unit = unit_of(p.plan, blockIdx.x, threadIdx.x);
  const Entry<A> entry(p, unit);
  const Direction<A> none = {};
  auto sums = p.grad ? gradient_walk<false, V, Vector>(p, unit, entry.counted, entry.factors(none))
                     : sums_walk<false, V, Vector>(p, unit, entry.counted);
  entry.write(sums, none);
}

template <class A, int V, bool Vector>
void run_as(Access<A, V, Vector>, const alignment::Arguments& arguments, const Tensors& tensors) {
  const auto settings = arguments.settings<A>();
  const Parameters<A> p = {tensors, settings, settings.terms(), {}};
  const Grouping grouping(V, arguments.rows * arguments.columns, 0);
  const bool directions = p.terms & alignment::kDirection;
  launch_plans(directions ? directional<A, V, Vector> : plain<A, V, Vector>, arguments, grouping,
               p);
}

void run(const alignment::Arguments& arguments, const OptionalTensor& coefficient,
         const alignment::Results& results) {
  const Tensors tensors = {
      View(arguments.student), View(arguments.target),     View(arguments.shift),
      View(arguments.scale),   View(arguments.dispersion), View(arguments.mask),
      View(coefficient),       View(results.loss),         View(results.student_grad)};
  with_access(arguments,
              {&tensors.student, &tensors.target, &tensors.shift, &tensors.scale, &tensors.grad},
              [&](auto access) { run_as(access, arguments, tensors); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtkd_cuda, CUDA, m) { alignment::register_operators<run>(m); }

}  // namespace mtkd::cuda
