// Stick-breaking attention: what its passes share.
//
// Legend: B batch, H query heads, G key heads, S = H / G query heads a key head, T queries, L keys, A width of a head.
// The queries that share a key head are rows 0 .. T * S - 1 of a matrix: row r is query t = r / S of head r % S * G + g, so
// that rows side by side see almost the same keys. Keys come in tiles of kKeys, rows in tiles of at most kTileRows.
//
// Logits are computed transposed, (keys, rows): sixteen lanes hold one key for 16 queries, and what is left of 16 sticks
// are sixteen lanes that are multiplied on the way from the right to the left. No logarithm, no cumulative sum. Where a stick
// is shorter than the least normal float it counts as used up, and a tile of rows is done when all of its sticks are.
#pragma once

#include <cfloat>

#include "common.h"

namespace emoe {

constexpr int64_t kKeys = 64;
constexpr int64_t kTileRows = 64;

// (B, heads, positions, A), the last dimension adjacent.
template <typename T>
struct Heads {
  const T* data = nullptr;
  int64_t batch = 0, head = 0, position = 0;

  explicit Heads(const Tensor& t)
      : data(t.const_data_ptr<T>()), batch(t.stride(0)), head(t.stride(1)), position(t.stride(2)) {}
  const T* at(int64_t b, int64_t h, int64_t p) const { return data + b * batch + h * head + p * position; }
};

template <typename T>
struct Sticks {
  int64_t B, H, G, queries, L, A;
  Heads<T> q, k, v;
  const bool* key_mask;  // (B, L) or null
  bool attend_current;
  float scale;

  int64_t shared() const { return H / G; }
  int64_t rows() const { return queries * shared(); }
  int64_t key_tiles() const { return (L + kKeys - 1) / kKeys; }
  int64_t head(int64_t g, int64_t r) const { return r % shared() * G + g; }
  const T* query(const Heads<T>& of, int64_t b, int64_t g, int64_t r) const { return of.at(b, head(g, r), r / shared()); }
  // The place of a row in a contiguous (B, H, T).
  int64_t flat(int64_t b, int64_t g, int64_t r) const { return (b * H + head(g, r)) * queries + r / shared(); }
  // The last key that a row sees, -1 if none.
  int64_t last_key(int64_t r) const { return L - queries + r / shared() - !attend_current; }
  bool visible(int64_t b, int64_t key) const { return key < L && (!key_mask || key_mask[b * L + key]); }
  bool any_visible(int64_t b, int64_t tile) const {
    for (int64_t key = tile * kKeys; key < std::min(L, (tile + 1) * kKeys); key++) {
      if (visible(b, key)) return true;
    }
    return false;
  }
};

// exp(x) for x <= 0, to two units in the last place; NaN stays.
inline Floats exp_of_negative(Floats x) {
  x = max(all(-104.f), x);  // below, also at -inf, the result is zero
  const Floats n = nearest(mul(x, all(1.44269504f)));
  Floats r = fnma(n, all(0.693359375f), x);  // ln 2 in two parts: the first times n is exact
  r = fnma(n, all(-2.12194440e-4f), r);
  Floats p = all(1.f / 5040);  // Taylor's series: |r| <= ln 2 / 2, the next term is 5e-9
  for (const float term : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) {
    p = fma(p, r, all(term));
  }
  return times_power_of_2(p, n);
}

struct Share {
  Floats taken, left;  // sigmoid(z) and 1 - sigmoid(z), both without cancellation
};

inline Share share(Floats logit) {
  const Floats one = all(1.f);
  const Floats small = exp_of_negative(minus_abs(logit));
  const Floats large_part = divide(one, add(one, small)), small_part = mul(small, large_part);
  const Mask positive = at_least(logit, zeros());
  return {choose(positive, large_part, small_part), choose(positive, small_part, large_part)};
}

// A tile of rows: `count` of them from `first`, computed as `padded` lanes, a multiple of 16.
struct RowTile {
  int64_t first, count, padded;
  int64_t last_key, least_last;  // over its rows
  alignas(64) int32_t last[kTileRows];
  alignas(64) float stick[kTileRows];  // what is left of each; zero in padding

  template <typename T>
  RowTile(const Sticks<T>& c, int64_t index) : first(index * kTileRows), count(std::min(kTileRows, c.rows() - first)) {
    padded = round_up(count, kLanes);
    last_key = c.last_key(first + count - 1);
    least_last = c.last_key(first);
    for (int64_t i = 0; i < padded; i++) {
      last[i] = i < count ? int32_t(c.last_key(first + i)) : -1;
      stick[i] = i < count ? 1.f : 0.f;
    }
  }

  int64_t last_tile() const { return last_key < 0 ? -1 : last_key / kKeys; }
};

// Breaks the sticks of a tile of rows at the keys of one tile, from the right: logits (kKeys, GROUPS * 16) of which those
// of keys beyond the last or masked may hold anything. visit(j, at, taken, weight) sees everything, zeros for what a
// row does not see; `at` is the place of 16 rows among `padded`. False if nothing is left of any stick.
template <int GROUPS, typename T, typename F>
bool break_sticks(const Sticks<T>& c, int64_t b, int64_t tile, const float* logits, RowTile& rows, const F& visit) {
  constexpr int64_t width = GROUPS * kLanes;
  const Floats scale = all(c.scale), zero = zeros();
  const int64_t key0 = tile * kKeys;
  const bool all_see = rows.least_last >= key0 + kKeys - 1 && rows.count == width;
  Floats stick[GROUPS];
  Dwords last[GROUPS];
  for (int i = 0; i < GROUPS; i++) {
    stick[i] = load(rows.stick + i * kLanes);
    last[i] = load_dwords(rows.last + i * kLanes);
  }
  for (int64_t j = kKeys - 1; j >= 0; j--) {
    if (!c.visible(b, key0 + j)) {
      for (int i = 0; i < GROUPS; i++) visit(j, i * kLanes, zero, zero);
      continue;
    }
    const Dwords key = all_dwords(int32_t(key0 + j));
    for (int i = 0; i < GROUPS; i++) {
      const Share s = share(mul(load(logits + j * width + i * kLanes), scale));
      const Mask sees = all_see ? every_lane() : at_least(last[i], key);
      visit(j, i * kLanes, only(sees, s.taken), only(sees, mul(s.taken, stick[i])));
      stick[i] = choose(sees, mul(stick[i], s.left), stick[i]);
    }
  }
  bool any_left = false;
  for (int i = 0; i < GROUPS; i++) {
    const Mask left = not_less(stick[i], all(FLT_MIN));  // NaN is left
    store(rows.stick + i * kLanes, only(left, stick[i]));
    any_left = any_left || any(left);
  }
  return any_left;
}

// Calls f(std::integral_constant<int, padded / 16>).
template <typename F>
void with_groups(int64_t padded, F&& f) {
  switch (padded / kLanes) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
  }
  TORCH_INTERNAL_ASSERT(false, "a tile of ", padded, " rows");
}

// A tile of keys or values (kKeys, A), with zeros for what nobody may see: padding may hold anything, and 0 * NaN is NaN.
template <typename T>
void copy_tile(const Sticks<T>& c, const Heads<T>& from, int64_t b, int64_t g, int64_t tile, T* to) {
  for (int64_t j = 0; j < kKeys; j++, to += c.A) {
    const int64_t key = tile * kKeys + j;
    if (c.visible(b, key)) {
      std::memcpy(to, from.at(b, g, key), c.A * sizeof(T));
    } else {
      std::memset(to, 0, c.A * sizeof(T));
    }
  }
}

// `rows` rows of `width` elements, one after the other, as the right operand of a GEMM: themselves in fp32, in bf16 a copy.
template <typename T>
const T* operand(const T* from, int64_t rows, int64_t width, Scratch& scratch) {
  if constexpr (kPerDword<T> == 1) {
    return from;
  } else {
    const T* pointers[kTileRows];
    for (int64_t i = 0; i < rows; i++) pointers[i] = from + i * width;
    T* packed = scratch.get<T>(rows * width);
    pack_rows(pointers, rows, rows, width, packed);
    return packed;
  }
}
static_assert(kKeys <= kTileRows, "operand() takes keys and rows");

// `gemm` for a left operand of any height.
template <typename T>
void tall_gemm(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, float* C, int64_t ldc,
               bool add) {
  for (int64_t m = 0; m < M; m += kRowTile) {
    gemm<T>(std::min(kRowTile, M - m), N, K, A + m * lda, lda, B, ldb, C + m * ldc, ldc, add);
  }
}

// The columns of `sums` (A, padded) are rows of a contiguous (B, H, T, A).
template <typename T>
void write_rows(const Sticks<T>& c, int64_t b, int64_t g, const RowTile& rows, const float* sums, T* out) {
  thread_local Scratch scratch;
  T* turned = scratch.get<T>(rows.padded * c.A);
  store_transposed(sums, rows.padded, c.A, rows.padded, turned, c.A);
  for (int64_t i = 0; i < rows.count; i++) {
    std::memcpy(out + c.flat(b, g, rows.first + i) * c.A, turned + i * c.A, c.A * sizeof(T));
  }
}

// y (B, H, T, A) and remainder (B, H, T), contiguous.
template <typename T>
void sticks_forward(const Sticks<T>& call, T* y, T* remainder);
template <typename T>
void sticks_forward_few(const Sticks<T>& call, T* y, T* remainder);

// Up to so many rows a key head are multiplied with keys and values where they lie: the rows of one register.
constexpr int64_t kFewRows = kLanes;

// dq (B, H, T, A) contiguous; dkv (2, B * G, chunks, key tiles * kKeys, A) fp32 comes in filled with zeros: parts of dk and dv
// to be summed over chunks. d_remainder may be null.
template <typename T>
void sticks_backward(const Sticks<T>& call, const Heads<T>& dy, const T* d_remainder, T* dq, float* dkv, int64_t chunks);

}  // namespace emoe
