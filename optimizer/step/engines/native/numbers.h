// Element types and their rounding, the numbers of a step, and the counter-based random numbers.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace adam_mini {

struct bfloat16 { uint16_t bits; };
struct float16 { _Float16 value; };

inline uint32_t bits_of(float x) {
  uint32_t out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

inline float float_of(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline double load(const double* p) { return *p; }
inline float load(const float* p) { return *p; }
inline float load(const float16* p) { return static_cast<float>(p->value); }
inline float load(const bfloat16* p) { return float_of(static_cast<uint32_t>(p->bits) << 16); }

inline uint16_t nearest_bfloat16(uint32_t wide) {
  const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;  // ties to even
  const uint32_t nan = (wide >> 16) | 0x40u;
  return static_cast<uint16_t>((wide & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

inline void store(double* p, double x) { *p = x; }
inline void store(float* p, float x) { *p = x; }
inline void store(float16* p, float x) { p->value = static_cast<_Float16>(x); }
inline void store(bfloat16* p, float x) { p->bits = nearest_bfloat16(bits_of(x)); }

// Returns 32 random bits of element i; start is step * 0x85ebca6b + seed. The finaliser is Wellons' lowbias32.
inline uint32_t random_bits(uint32_t i, uint32_t start) {
  uint32_t x = i * 0x9e3779b9u + start;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// The numbers of a step, which are the same for every element of a tensor. T is float, or double for double parameters.
// They are computed in double precision.
template <typename T>
struct Step {
  T beta1, rest1, beta2, rest2;  // rest: 1 - beta
  T keep, decay;                 // 1 - lr * weight_decay, -lr * weight_decay
  T unscale;                     // the factor of the gradients: 1 / grad scale, negative to ascend
  T lr_corrected;                // lr / (1 - beta1^t)
  T root2;                       // sqrt(1 - beta2^t)
  T eps;
  uint32_t count;                // t, the number of steps taken, this one included

  T factor(T v) const { return lr_corrected / (std::sqrt(v) / root2 + eps); }
  T advance(T v, double mean) const { return beta2 * v + rest2 * static_cast<T>(mean) * unscale * unscale; }
};

enum Rounding { kNearest = 0, kStochastic = 1, kKahan = 2 };

// A parameter and the rounding of its new value, keep * old - change. The arguments of put are the offset in the
// parameter, the offset in its compensation, the row-major index of the element, the step and the change.
template <typename T, typename P, int R>
struct Target {
  P* p;
  bfloat16* compensation;
  uint32_t start;

  void put(int64_t at, int64_t, int64_t, const Step<T>& s, T change) const {
    store(p + at, s.keep * load(p + at) - change);
  }
};

template <typename T>
struct Target<T, bfloat16, kStochastic> {
  bfloat16* p;
  bfloat16* compensation;
  uint32_t start;

  void put(int64_t at, int64_t, int64_t index, const Step<T>& s, T change) const {
    const uint32_t exact = bits_of(s.keep * load(p + at) - change);
    const uint32_t moved = (exact + (random_bits(static_cast<uint32_t>(index), start) >> 16)) >> 16;
    p[at].bits = (exact & 0x7f800000u) == 0x7f800000u ? nearest_bfloat16(exact) : static_cast<uint16_t>(moved);
  }
};

template <typename T>
struct Target<T, bfloat16, kKahan> {
  bfloat16* p;
  bfloat16* compensation;
  uint32_t start;

  void put(int64_t at, int64_t compensation_at, int64_t, const Step<T>& s, T change) const {
    const T old = load(p + at), y = load(compensation + compensation_at) + (s.decay * old - change);
    store(p + at, old + y);
    store(compensation + compensation_at, y - (load(p + at) - old));
  }
};

}  // namespace adam_mini
