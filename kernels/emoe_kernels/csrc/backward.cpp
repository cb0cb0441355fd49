// The backward pass: three sweeps, each dividing its results among the threads so that no two write the same place.
//
//   1. per (expert, up to 256 of its pairs): dh = dy Wd, then with the saved pre-activations, elementwise: h again,
//      the gradients du, dg of the pre-activations and of the routing weights.
//   2. per chunk of columns of x: dx = du Wu + dg Wg for every expert in turn, added to an accumulator (N, chunk).
//   3. per (expert, chunk of columns): dWu = du^T x, dWg = dg^T x, dWd^T = h^T dy, written straight into the gradients.
// The weights are right operands here: fp32 blocks are copied, bf16 rows interleaved, an expert's share at a time.
#include "few_backward.h"
#include "passes.h"

namespace emoe {

namespace {

constexpr int64_t kPairs = 64;        // in one GEMM
constexpr int64_t kGroup = 256;       // pairs for which an expert's share of down is packed once
constexpr int64_t kDepth = 512;       // columns of dy, rows of the packed share of down
constexpr int64_t kPairDepth = kGroup;  // pairs summed in one GEMM of sweep 3

// A run of an expert's padded pairs, of 256, 128, 64, 32 or 16: the pieces of a number of pairs are those of its binary
// representation. Sweep 3 sums over a piece in one GEMM, whose depth and leading dimension are then one of five.
struct Piece {
  int64_t start, depth;
};

// The piece in which pair i of `padded` lies.
Piece piece_at(int64_t padded, int64_t i) {
  Piece piece{0, kPairDepth};
  while (true) {
    while (piece.depth > padded - piece.start) piece.depth /= 2;
    if (i < piece.start + piece.depth) return piece;
    piece.start += piece.depth;
  }
}

// What sweep 1 leaves for the other two.
template <typename T>
struct Hidden {
  T* du;  // (R, S), R padded by kPairs rows that nobody wrote and nobody uses
  T* dg;
  T* duT;  // per expert and piece (S, depth), starting at (columns[e] + start) * S; padding is zero
  T* dgT;
  T* hT;  // weighted
  std::vector<int64_t> columns;

  int64_t padded(int64_t e) const { return columns[e + 1] - columns[e]; }
};

constexpr int64_t kDirect = 8;  // pairs of an expert up to which outer products beat a GEMM of depth 16

struct Group {
  int64_t expert, first, count;
};

template <Activation A, typename T>
void hidden_gradients(const Call<T>& c, const Plan& plan, const Group& group, const float* dh, int64_t padded,
                      const T* up_pre, const T* gate_pre, const Hidden<T>& out, float* dweights) {
  const int64_t S = c.S, e = group.expert, first = group.first - plan.offsets[e];
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Piece piece = piece_at(out.padded(e), first + i);
    const int64_t column = (out.columns[e] + piece.start) * S + first + i - piece.start;
    const int64_t live = std::clamp<int64_t>(group.count - i, 0, kLanes);
    alignas(64) float dots[16] = {};
    for (int64_t s = 0; s < S; s += kLanes) {
      const Lanes lanes = first_lanes(S - s);
      Floats du[16], dg[16], h[16];
      for (int64_t j = 0; j < kLanes; j++) {
        du[j] = dg[j] = h[j] = zeros();
        if (j >= live) continue;
        const int64_t p = group.first + i + j;
        const float weight = c.weights ? c.weights[plan.slots[p]] : 1.f;
        const Floats grad = load(dh + (i + j) * S + s, lanes), up = load(up_pre + p * S + s, lanes);
        const Floats scaled = mul(grad, all(weight));
        Floats value;
        if (c.gate.data) {
          const Floats gate = load(gate_pre + p * S + s, lanes), active = activate<A>(gate);
          value = mul(active, up);
          du[j] = mul(active, scaled);
          dg[j] = mul(mul(derivative<A>(gate), up), scaled);
          if (out.dg) store(out.dg + p * S + s, dg[j], lanes);
        } else {
          value = activate<A>(up);
          du[j] = mul(derivative<A>(up), scaled);
        }
        if (out.du) store(out.du + p * S + s, du[j], lanes);
        if (dweights) dots[j] += sum_lanes(mul(grad, value));  // beyond the lanes grad is 0
        h[j] = mul(value, all(weight));
      }
      const int64_t rows = std::min(kLanes, S - s);
      const auto store_columns = [&](T* to, Floats block[16]) {
        if (!to) return;
        transpose_16x16(block);
        for (int64_t r = 0; r < rows; r++) store(to + column + (s + r) * piece.depth, block[r]);
      };
      store_columns(out.duT, du);
      store_columns(out.dgT, dg);
      store_columns(out.hT, h);
    }
    for (int64_t j = 0; dweights && j < live; j++) dweights[plan.slots[group.first + i + j]] = dots[j];
  }
}

// Row pointers, for the packing functions.
template <typename T>
const T** row_pointers(Scratch& scratch, const T* base, int64_t stride, int64_t count) {
  const T** rows = scratch.get<const T*>(count);
  for (int64_t i = 0; i < count; i++) rows[i] = base + i * stride;
  return rows;
}

// dh (count, S) = dy Wd, with few tokens.
template <typename T>
void hidden_few(const Call<T>& c, const Plan& plan, const Group& group, const T* dy, float* dh) {
  thread_local Scratch values, pointers, copy;
  const int64_t n = group.count, D = c.D;
  float* rows = values.get<float>(n * D);
  const float** x = pointers.get<const float*>(2 * n);
  float** out = const_cast<float**>(x + n);
  for (int64_t i = 0; i < n; i++) {
    x[i] = rows + i * D;
    out[i] = dh + i * c.S;
    const T* from = dy + plan.tokens[group.first + i] * D;
    for (int64_t d = 0; d < D; d += kLanes) store(rows + i * D + d, load(from + d, first_lanes(D - d)), first_lanes(D - d));
  }
  const Block<T> w(c.down, group.expert, 0, D, 0, c.S, copy);
  sum_of_rows(w.data, w.ld, D, c.S, x, out, n);
}

template <Activation A, typename T>
void sweep_hidden(const Call<T>& c, const Plan& plan, const Group& group, bool inner, const T* dy, const T* up_pre,
                  const T* gate_pre, const Hidden<T>& out, float* dweights) {
  thread_local Scratch sums, gathered, packed, pointers, copy;
  const int64_t S = c.S, D = c.D, padded = round_up(group.count, kLanes);
  float* dh = sums.get<float>(padded * S);
  if (!inner || few_tokens(plan, c.N)) {
    if (inner) {
      hidden_few(c, plan, group, dy, dh);
    } else {
      std::memset(dh, 0, padded * S * sizeof(float));  // h alone is wanted
    }
    return hidden_gradients<A>(c, plan, group, dh, padded, up_pre, gate_pre, out, dweights);
  }
  T* rows = gathered.get<T>(padded * kDepth);
  for (int64_t d = 0; d < D; d += kDepth) {
    const int64_t depth = std::min(kDepth, D - d);
    const Block<T> w(c.down, group.expert, d, depth, 0, S, copy);
    T* down = packed.get<T>(depth * S);
    pack_rows(row_pointers(pointers, w.data, w.ld, depth), depth, depth, S, down);
    for (int64_t i = 0; i < padded; i++) {
      if (i < group.count) {
        std::memcpy(rows + i * depth, dy + plan.tokens[group.first + i] * D + d, depth * sizeof(T));
      } else {
        std::memset(rows + i * depth, 0, depth * sizeof(T));
      }
    }
    for (int64_t i = 0; i < padded; i += kPairs) {
      const int64_t m = std::min(kPairs, padded - i);
      gemm<T>(m, S, depth, rows + i * depth, depth, down, S, dh + i * S, S, d > 0);
    }
  }
  hidden_gradients<A>(c, plan, group, dh, padded, up_pre, gate_pre, out, dweights);
}

template <typename T>
void sweep_input(const Call<T>& c, const Plan& plan, const Hidden<T>& hidden, int64_t d, int64_t width, T* dx) {
  thread_local Scratch accumulator, part, packed_up, packed_gate, pointers, copy;
  const int64_t S = c.S;
  float* sums = accumulator.get<float>(c.N * width);
  std::memset(sums, 0, c.N * width * sizeof(float));
  float* product = part.get<float>(kPairs * width);
  const auto pack = [&](const Weight<T>& weight, int64_t e, Scratch& scratch) {
    const Block<T> w(weight, e, 0, S, d, width, copy);
    T* packed = scratch.get<T>(S * width);
    pack_rows(row_pointers(pointers, w.data, w.ld, S), S, S, width, packed);
    return packed;
  };
  for (const int64_t e : plan.chosen) {
    if (few_tokens(plan, c.N)) {
      const int64_t first = plan.offsets[e], count = plan.offsets[e + 1] - first;
      const auto add = [&](const Weight<T>& weight, const T* h) {
        const Block<T> w(weight, e, 0, S, d, width, copy);
        add_weighted_rows(w.data, w.ld, S, width, h + first * S, plan.tokens.data() + first, count, sums);
      };
      add(c.up, hidden.du);
      if (c.gate.data) add(c.gate, hidden.dg);
      continue;
    }
    const T* up = pack(c.up, e, packed_up);
    const T* gate = c.gate.data ? pack(c.gate, e, packed_gate) : nullptr;
    for (int64_t p = plan.offsets[e]; p < plan.offsets[e + 1]; p += kPairs) {
      const int64_t count = std::min(kPairs, plan.offsets[e + 1] - p), m = round_up(count, kLanes);
      gemm<T>(m, width, S, hidden.du + p * S, S, up, width, product, width, false);
      if (gate) gemm<T>(m, width, S, hidden.dg + p * S, S, gate, width, product, width, true);
      add_rows(product, width, width, plan.tokens.data() + p, count, sums);
    }
  }
  write_columns(sums, c.N, width, dx, c.D, d);
}

// value (S, width) -> rows 0 .. S - 1 and columns d .. of a gradient (S, D) with any strides.
template <typename T>
void write_block(const float* value, int64_t S, int64_t width, T* to, int64_t row, int64_t col) {
  if (col == 1) {
    for (int64_t s = 0; s < S; s++) {
      for (int64_t j = 0; j < width; j += kLanes) {
        const Lanes lanes = first_lanes(width - j);
        store(to + s * row + j, load(value + s * width + j, lanes), lanes);
      }
    }
  } else if (row == 1) {
    store_transposed(value, width, S, width, to, col);
  } else {
    for (int64_t s = 0; s < S; s++) {
      for (int64_t j = 0; j < width; j++) to[s * row + j * col] = static_cast<T>(value[s * width + j]);
    }
  }
}

template <typename T>
void sweep_weights(const Call<T>& c, const Plan& plan, const Hidden<T>& hidden, const T* dy, int64_t e, int64_t d,
                   int64_t width, const Gradients<T>& grads) {
  thread_local Scratch sums, packed, pointers;
  const int64_t S = c.S, first = plan.offsets[e], n = plan.offsets[e + 1] - first, padded = hidden.padded(e);
  float* up = sums.get<float>(3 * S * width);
  float *gate = up + S * width, *down = gate + S * width;
  T* operand = packed.get<T>(kPairDepth * width);
  const T** rows = pointers.get<const T*>(kPairDepth);

  const bool direct = n <= kDirect;
  const auto pack = [&](const T* from, int64_t stride, int64_t p, int64_t depth) {
    const int64_t count = std::min(depth, n - p);
    for (int64_t i = 0; i < count; i++) rows[i] = from + plan.tokens[first + p + i] * stride + d;
    if (!direct) pack_rows(rows, count, depth, width, operand);
  };
  const auto add = [&](const T* left, float* sum, int64_t p, int64_t depth) {
    const T* from = left + (hidden.columns[e] + p) * S;
    if (direct) return outer_products(from, depth, S, rows, n, width, sum);
    for (int64_t s = 0; s < S; s += kRowTile) {
      const int64_t rows = std::min(kRowTile, S - s);
      gemm<T>(rows, width, depth, from + s * depth, depth, operand, width, sum + s * width, width, p > 0);
    }
  };
  for (int64_t p = 0; p < padded;) {
    const int64_t depth = piece_at(padded, p).depth;
    if (hidden.duT || hidden.dgT) {
      pack(c.x, c.x_row, p, depth);
      if (grads.up.data) add(hidden.duT, up, p, depth);
      if (grads.gate.data) add(hidden.dgT, gate, p, depth);
    }
    if (grads.down.data) {
      pack(dy, c.D, p, depth);
      add(hidden.hT, down, p, depth);
    }
    p += depth;
  }
  if (grads.up.data) write_block(up, S, width, grads.up.at(e, 0, d), grads.up.row, grads.up.col);
  if (grads.gate.data) write_block(gate, S, width, grads.gate.at(e, 0, d), grads.gate.row, grads.gate.col);
  if (grads.down.data) write_block(down, S, width, grads.down.at(e, d, 0), grads.down.col, grads.down.row);
}

// db[s] = sum of row s over an expert's pieces.
template <typename T>
void bias_gradient(const T* pieces, int64_t S, int64_t padded, T* bias) {
  for (int64_t s = 0; s < S; s++) {
    Floats sum = zeros();
    for (int64_t p = 0; p < padded;) {
      const int64_t depth = piece_at(padded, p).depth;
      for (int64_t i = 0; i < depth; i += kLanes) sum = add(sum, load(pieces + p * S + s * depth + i));
      p += depth;
    }
    bias[s] = static_cast<T>(sum_lanes(sum));
  }
}

// Rows r < rows of an expert that nobody chose.
template <typename T>
void zero_rows(const Weight<T>& gradient, int64_t e, int64_t rows, int64_t cols) {
  for (int64_t r = 0; gradient.data && r < rows; r++) {
    T* to = gradient.at(e, r, 0);
    if (gradient.col == 1) {
      std::memset(to, 0, cols * sizeof(T));
    } else {
      for (int64_t i = 0; i < cols; i++) to[i * gradient.col] = T(0);
    }
  }
}

template <typename T>
void zero_unchosen(const Call<T>& c, const Plan& plan, const Gradients<T>& grads) {
  parallel_dynamic(c.E, [&](int64_t e) {
    if (plan.offsets[e] < plan.offsets[e + 1]) return;
    zero_rows(grads.up, e, c.S, c.D);
    zero_rows(grads.gate, e, c.S, c.D);
    zero_rows(grads.down, e, c.D, c.S);
    for (T* bias : {grads.up_bias, grads.gate_bias}) {
      if (bias) std::fill_n(bias + e * c.S, c.S, T(0));
    }
  });
}

}  // namespace

template <typename T>
void backward(const Call<T>& c, const Plan& plan, Activation activation, const T* dy, const T* up_pre,
              const T* gate_pre, const Gradients<T>& grads) {
  const int64_t S = c.S, D = c.D, E = c.E;
  const bool gated = c.gate.data;
  Hidden<T> hidden{};
  hidden.columns.assign(E + 1, 0);
  std::vector<Group> groups;
  for (int64_t e = 0; e < E; e++) {
    const int64_t n = plan.offsets[e + 1] - plan.offsets[e];
    hidden.columns[e + 1] = hidden.columns[e] + round_up(n, kLanes);
    for (int64_t i = 0; i < n; i += kGroup) groups.push_back({e, plan.offsets[e] + i, std::min(kGroup, n - i)});
  }
  std::vector<Tensor> memory;
  const auto allocate = [&](bool wanted, int64_t rows) -> T* {
    if (!wanted) return nullptr;
    memory.push_back(empty_bytes(rows * S * int64_t(sizeof(T))));
    return static_cast<T*>(memory.back().data_ptr());
  };
  hidden.du = allocate(grads.x, plan.pairs() + kPairs);
  hidden.dg = allocate(grads.x && gated, plan.pairs() + kPairs);
  hidden.duT = allocate(grads.up.data || grads.up_bias, hidden.columns[E]);
  hidden.dgT = allocate(gated && (grads.gate.data || grads.gate_bias), hidden.columns[E]);
  hidden.hT = allocate(grads.down.data, hidden.columns[E]);

  const bool inner = grads.x || hidden.duT || hidden.dgT || grads.weights;  // anything before down
  if (inner || hidden.hT) with_activation(activation, [&](auto which) {
    parallel_dynamic(groups.size(), [&](int64_t i) {
      const GemmScope<T> scope;
      sweep_hidden<which()>(c, plan, groups[i], inner, dy, up_pre, gate_pre, hidden, grads.weights);
    });
  });
  if (grads.x) {
    // few tokens: long runs of a row, for the memory's sake
    const bool wide = few_tokens(plan, c.N) && c.N <= 256;
    const int64_t width = std::max<int64_t>(column_chunk(c.N, D), wide ? 512 : 0);
    parallel_dynamic((D + width - 1) / width, [&](int64_t i) {
      const GemmScope<T> scope;
      sweep_input(c, plan, hidden, i * width, std::min(width, D - i * width), grads.x);
    });
  }
  if (grads.up.data || grads.gate.data || grads.down.data) {
    const int64_t width = S > 1024 ? 64 : 256;  // three sums (S, width) a thread
    const int64_t parts = (D + width - 1) / width;
    parallel_dynamic(static_cast<int64_t>(plan.chosen.size()) * parts, [&](int64_t i) {
      const GemmScope<T> scope;
      const int64_t d = i % parts * width;
      sweep_weights(c, plan, hidden, dy, plan.chosen[i / parts], d, std::min(width, D - d), grads);
    });
  }
  if (int64_t(plan.chosen.size()) < E) zero_unchosen(c, plan, grads);
  if (grads.up_bias || grads.gate_bias) {
    parallel_dynamic(plan.chosen.size(), [&](int64_t i) {
      const int64_t e = plan.chosen[i], at = hidden.columns[e] * S;
      if (grads.up_bias) bias_gradient(hidden.duT + at, S, hidden.padded(e), grads.up_bias + e * S);
      if (grads.gate_bias) bias_gradient(hidden.dgT + at, S, hidden.padded(e), grads.gate_bias + e * S);
    });
  }
}

template void backward(const Call<float>&, const Plan&, Activation, const float*, const float*, const float*,
                       const Gradients<float>&);
template void backward(const Call<BFloat16>&, const Plan&, Activation, const BFloat16*, const BFloat16*,
                       const BFloat16*, const Gradients<BFloat16>&);

}  // namespace emoe
