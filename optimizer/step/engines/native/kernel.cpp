// Adam-mini over a list of tensors in one pass (arXiv 2406.16793, Algorithm 1), for CPUs.
//
// The steps of all tensors are cut into pieces that threads take as they come free; how they are cut does not depend on
// the number of threads, and so neither does any result.
//
// Every operation rounds as torch's own would, one by one: the build switches contraction off.
// No header of torch is used: the library builds in seconds and does not depend on torch's C++ interface.

#include <deque>

#include "dense.h"
#include "low_bit.h"
#include "strided.h"

namespace {

using namespace adam_mini;

struct Hyper { double lr, beta1, beta2, eps, weight_decay, unscale; };

// The numbers of a step, in both precisions.
struct Steps {
  Step<float> single;
  Step<double> wide;

  Steps(const Hyper& h, double t) : single(of<float>(h, t)), wide(of<double>(h, t)) {}

  template <typename T>
  static Step<T> of(const Hyper& h, double t) {
    return {T(h.beta1), T(1 - h.beta1), T(h.beta2), T(1 - h.beta2), T(1 - h.lr * h.weight_decay),
            T(-h.lr * h.weight_decay), T(h.unscale), T(h.lr / (1 - std::pow(h.beta1, t))),
            T(std::sqrt(1 - std::pow(h.beta2, t))), T(h.eps), static_cast<uint32_t>(t)};
  }
  const void* get(const float*) const { return &single; }
  const void* get(const double*) const { return &wide; }
};

struct Plan {
  std::vector<Task> tasks;
  std::vector<std::pair<Task, void (*)(const Task&, int)>> whole;  // tensors that all threads share, one by one
  int64_t pieces = 0, elements = 0;

  void add(Task task, void (*piece)(const Task&, int64_t), int64_t window, int64_t pieces_each) {
    task.piece = piece;
    task.window = window;
    task.first = pieces;
    task.pieces = pieces_each * task.windows();
    pieces += task.pieces;
    elements += task.layout.numel();
    tasks.push_back(task);
  }
};

// Columns of a strip, at least. Wide ones read memory in long pieces, and the gradient's second time from further out:
// GPT-2 took 2.0 times fused AdamW's time in strips of 64, 1.1 of 512, 0.85 of 4096.
constexpr int64_t kStrip = 4096;

int64_t longest(const Layout& l) {
  int64_t out = 0;
  for (int64_t k = 0; k < l.segments; ++k) out = std::max(out, l.lengths[2 * k]);
  return out;
}

template <typename T, typename P, typename M, int R>
void plan(Plan& out, Task task, const Steps& steps) {
  const Layout& l = task.layout;
  task.step = steps.get(static_cast<const T*>(nullptr));
  const int64_t across = l.between * l.inner;  // elements of an index
  int64_t window = std::max<int64_t>(1, kChunk / across);
  if (l.form == kStrided) return out.add(task, strided_piece<T, P, M, R>, window, l.outer);
  if (l.between > 1) {
    if (l.inner == 1) window = std::max<int64_t>(kStrip, window);
    return out.add(task, columns_piece<T, P, M, R>, window, l.outer);
  }
  out.add(task, rows_piece<T, P, M, R>, window, 1);
  if (longest(l) * l.inner > kLong) out.whole.emplace_back(task, long_runs<T, P, M, R>);
}

template <typename T, typename P, typename Q, int R>
void plan_low_bit(Plan& out, Task task, const Steps& steps) {
  const Layout& l = task.layout;
  task.step = steps.get(static_cast<const T*>(nullptr));
  task.window = std::max<int64_t>(1, kChunk / (l.between * l.inner));
  if (l.between > 1 || l.inner % l.row != 0) {
    task.window = std::max<int64_t>(64, task.window / 64 * 64);
    out.whole.emplace_back(task, low_bit_any<T, P, Q, R>);
    return;
  }
  out.add(task, low_bit_rows_piece<T, P, Q, R>, task.window, 1);
  if (longest(l) * l.inner > kLong) out.whole.emplace_back(task, low_bit_long_runs<T, P, Q, R>);
}

template <typename T, typename P, int R>
void plan_moment(Plan& out, const Task& task, const Steps& steps) {
  const int64_t moment = task.record->moment_dtype;
  if (moment == 8) plan_low_bit<T, P, Int8, R>(out, task, steps);
  else if (moment == 4) plan_low_bit<T, P, Int4, R>(out, task, steps);
  else if (moment == task.record->dtype) plan<T, P, P, R>(out, task, steps);
  else if (moment == 1) plan<T, P, float, R>(out, task, steps);
  else if constexpr (std::is_same_v<P, float>) plan<T, P, bfloat16, R>(out, task, steps);
}

void plan_tensor(Plan& out, const Task& task, const Steps& steps) {
  const Record& r = *task.record;
  if (r.dtype == 0) plan_moment<double, double, kNearest>(out, task, steps);
  else if (r.dtype == 1) plan_moment<float, float, kNearest>(out, task, steps);
  else if (r.dtype == 3) plan_moment<float, float16, kNearest>(out, task, steps);
  else if (r.rounding == kStochastic) plan_moment<float, bfloat16, kStochastic>(out, task, steps);
  else if (r.rounding == kKahan) plan_moment<float, bfloat16, kKahan>(out, task, steps);
  else plan_moment<float, bfloat16, kNearest>(out, task, steps);
}

void take(const Plan& plan, int threads) {
  if (plan.elements <= kChunk || threads == 1) {
    for (const Task& task : plan.tasks)
      for (int64_t k = 0; k < task.pieces; ++k) task.piece(task, k);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t k = 0; k < plan.pieces; ++k) {
    const auto after = std::upper_bound(plan.tasks.begin(), plan.tasks.end(), k,
                                        [](int64_t piece, const Task& task) { return piece < task.first; });
    const Task& task = *(after - 1);
    task.piece(task, k - task.first);
  }
}

}  // namespace

extern "C" {

int64_t adam_mini_abi() { return 2; }

// One step of n tensors, their counters included. records: see tensors.h; grads: an address each.
// Gradients are multiplied by unscale: +-1 / grad scale.
void adam_mini_step(int64_t n, const int64_t* records, const int64_t* grads, double lr, double beta1, double beta2,
                    double eps, double weight_decay, double unscale, int64_t threads) {
  const Hyper hyper{lr, beta1, beta2, eps, weight_decay, unscale};
  std::deque<Steps> steps;
  double last = 0;
  Plan plan;
  plan.tasks.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    const Record* record = reinterpret_cast<const Record*>(records) + i;
    const double t = static_cast<double>(*reinterpret_cast<float*>(record->counter) += 1.0f);
    if (steps.empty() || t != last) steps.emplace_back(hyper, t);
    last = t;
    Task task{};
    task.record = record;
    task.grad = grads[i];
    task.layout = layout_at(record->layout);
    if (task.layout.numel() != 0) plan_tensor(plan, task, steps.back());
  }
  take(plan, static_cast<int>(threads));
  for (const auto& [task, all] : plan.whole) all(task, static_cast<int>(threads));
}

}  // extern "C"
