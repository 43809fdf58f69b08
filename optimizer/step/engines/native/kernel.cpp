// Adam-mini over a list of tensors in one pass (arXiv 2406.16793, Algorithm 1), for CPUs.
//
// The steps of all tensors are cut into chunks, and a free thread processes the next chunk. The cuts do not depend on
// the number of threads, so the results do not depend on it either.
//
// Every operation is rounded separately, as in torch; the build disables the contraction to fused multiply-adds.
// The library uses no header of torch, so it compiles in seconds and does not depend on torch's C++ interface.

#include <deque>

#include "dense.h"
#include "factored.h"
#include "low_bit_any.h"
#include "strided.h"

namespace {

using namespace adam_mini;

// The hyper-parameters of a group. unscale is the factor of the gradients.
struct Hyper { double lr, beta1, beta2, eps, weight_decay, unscale; };

// The numbers of a step in both precisions.
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

// The work of one call: the chunks of all tensors.
struct Plan {
  std::vector<Task> tasks;
  std::vector<std::pair<Task, void (*)(const Task&, int)>> shared;  // tensors that all threads share, one by one
  int64_t chunks = 0, elements = 0;

  void add(Task task, void (*process)(const Task&, int64_t), int64_t window, int64_t chunks_per_window) {
    task.process = process;
    task.window = window;
    task.first_chunk = chunks;
    task.chunks = chunks_per_window * task.windows();
    chunks += task.chunks;
    elements += task.layout.numel();
    tasks.push_back(task);
  }
};

// Returns the length of the longest run.
int64_t longest(const Layout& l) {
  int64_t out = 0;
  for (int64_t k = 0; k < l.segments; ++k) out = std::max(out, l.lengths[2 * k]);
  return out;
}

// Adds a tensor with a factored second moment to the plan: small matrices as chunks, large ones shared by all threads.
template <typename T, typename P, typename M, int R>
void plan_factored(Plan& out, const Task& task) {
  const Layout& l = task.layout;
  if (l.numel() / l.outer > kMatrix) out.shared.emplace_back(task, factored_shared<T, P, M, R>);
  else out.add(task, factored_matrix<T, P, M, R>, l.axis, l.outer);
}

// Adds a tensor with an unquantised first moment to the plan.
template <typename T, typename P, typename M, int R>
void plan(Plan& out, Task task, const Steps& steps) {
  const Layout& l = task.layout;
  task.step = steps.get(static_cast<const T*>(nullptr));
  if (l.form == kFactored) return plan_factored<T, P, M, R>(out, task);
  const int64_t across = l.between * l.inner;  // elements per index of the axis
  int64_t window = std::max<int64_t>(1, task.way->chunk / across);
  if (l.form == kStrided) return out.add(task, strided_chunk<T, P, M, R>, window, l.outer);
  if (l.between > 1) {
    if (l.inner == 1) window = std::max<int64_t>(task.way->strip, window);
    return out.add(task, columns_chunk<T, P, M, R>, window, l.outer);
  }
  out.add(task, rows_chunk<T, P, M, R>, window, 1);
  if (longest(l) * l.inner > kLong) out.shared.emplace_back(task, long_runs<T, P, M, R>);
}

// Adds a tensor with a quantised first moment to the plan.
template <typename T, typename P, typename Q, int R>
void plan_low_bit(Plan& out, Task task, const Steps& steps) {
  const Layout& l = task.layout;
  task.step = steps.get(static_cast<const T*>(nullptr));
  if (l.form == kFactored) return out.shared.emplace_back(task, factored_low_bit<T, P, Q, R>), void();
  task.window = std::max<int64_t>(1, task.way->chunk / (l.between * l.inner));
  if (l.between > 1 || l.inner % l.row != 0) {
    task.window = std::max<int64_t>(64, kChunk / (l.between * l.inner) / 64 * 64);
    out.shared.emplace_back(task, low_bit_any<T, P, Q, R>);
    return;
  }
  out.add(task, low_bit_rows_chunk<T, P, Q, R>, task.window, 1);
  if (longest(l) * l.inner > kLong) out.shared.emplace_back(task, low_bit_long_runs<T, P, Q, R>);
}

// Chooses the type of the first moment by its code: the bits of a quantised one, else the code of its dtype in step.py.
template <typename T, typename P, int R>
void plan_moment(Plan& out, const Task& task, const Steps& steps) {
  const int64_t moment = task.record->moment_dtype;
  if (moment == 8) plan_low_bit<T, P, Int8, R>(out, task, steps);
  else if (moment == 4) plan_low_bit<T, P, Int4, R>(out, task, steps);
  else if (moment == task.record->dtype) plan<T, P, P, R>(out, task, steps);
  else if (moment == 1) plan<T, P, float, R>(out, task, steps);
  else if constexpr (std::is_same_v<P, float>) plan<T, P, bfloat16, R>(out, task, steps);
}

// Chooses the types of the arithmetic and the parameter, and the rounding, by the codes in step.py.
void plan_tensor(Plan& out, const Task& task, const Steps& steps) {
  const Record& r = *task.record;
  if (r.dtype == 0) plan_moment<double, double, kNearest>(out, task, steps);
  else if (r.dtype == 1) plan_moment<float, float, kNearest>(out, task, steps);
  else if (r.dtype == 3) plan_moment<float, float16, kNearest>(out, task, steps);
  else if (r.rounding == kStochastic) plan_moment<float, bfloat16, kStochastic>(out, task, steps);
  else if (r.rounding == kKahan) plan_moment<float, bfloat16, kKahan>(out, task, steps);
  else plan_moment<float, bfloat16, kNearest>(out, task, steps);
}

// Processes the chunks of all tensors.
void process_chunks(const Plan& plan, int threads) {
  if (plan.elements <= kChunk || threads == 1) {
    for (const Task& task : plan.tasks)
      for (int64_t k = 0; k < task.chunks; ++k) task.process(task, k);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t k = 0; k < plan.chunks; ++k) {
    const auto after = std::upper_bound(plan.tasks.begin(), plan.tasks.end(), k,
                                        [](int64_t chunk, const Task& task) { return chunk < task.first_chunk; });
    const Task& task = *(after - 1);
    task.process(task, k - task.first_chunk);
  }
}

}  // namespace

extern "C" {

int64_t adam_mini_abi() { return 4; }

// Takes one step of n tensors and increments their counters. records: n of Record in tensors.h. grads: the address of
// each gradient. unscale: the factor of the gradients, 1 / grad scale, negative to ascend. way: the numbers of a Way.
void adam_mini_step(int64_t n, const int64_t* records, const int64_t* grads, double lr, double beta1, double beta2,
                    double eps, double weight_decay, double unscale, int64_t threads, const int64_t* way) {
  const Hyper hyper{lr, beta1, beta2, eps, weight_decay, unscale};
  std::deque<Steps> steps;
  const Way going{way[0], way[1], way[2], way[3]};
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
    task.way = &going;
    task.layout = layout_at(record->layout);
    if (task.layout.numel() != 0) plan_tensor(plan, task, steps.back());
  }
  process_chunks(plan, static_cast<int>(threads));
  for (const auto& [task, process] : plan.shared) process(task, static_cast<int>(threads));
}

}  // extern "C"
