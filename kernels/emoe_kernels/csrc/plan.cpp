#include "common.h"

namespace emoe {

namespace {

template <typename Id>
void sort_pairs(const Id* ids, int64_t row, int64_t col, int64_t N, int64_t K, int64_t E, Plan& plan) {
  std::vector<int64_t>& offsets = plan.offsets;
  for (int64_t n = 0; n < N; n++) {
    for (int64_t k = 0; k < K; k++) {
      const int64_t e = ids[n * row + k * col];
      TORCH_CHECK_VALUE(e >= -1 && e < E, "experts_NK holds ids outside -1 .. ", E - 1, " (num_experts=", E, ")");
      if (e >= 0) offsets[e + 1]++;
    }
  }
  for (int64_t e = 0; e < E; e++) {
    if (offsets[e + 1]) plan.chosen.push_back(static_cast<int32_t>(e));
    offsets[e + 1] += offsets[e];
  }
  plan.tokens.resize(offsets[E]);
  plan.slots.resize(offsets[E]);
  std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
  for (int64_t n = 0; n < N; n++) {
    for (int64_t k = 0; k < K; k++) {
      const int64_t e = ids[n * row + k * col];
      if (e < 0) continue;
      plan.tokens[next[e]] = static_cast<int32_t>(n);
      plan.slots[next[e]++] = n * K + k;
    }
  }
}

}  // namespace

Plan make_plan(const Tensor& experts_NK, int64_t num_experts) {
  Plan plan;
  plan.offsets.assign(num_experts + 1, 0);
  const int64_t N = experts_NK.size(0), K = experts_NK.size(1);
  const int64_t row = experts_NK.stride(0), col = experts_NK.stride(1);
  if (experts_NK.scalar_type() == at::kLong) {
    sort_pairs(experts_NK.const_data_ptr<int64_t>(), row, col, N, K, num_experts, plan);
  } else {
    sort_pairs(experts_NK.const_data_ptr<int32_t>(), row, col, N, K, num_experts, plan);
  }
  return plan;
}

std::vector<Chunk> make_chunks(const Plan& plan, int64_t largest) {
  std::vector<Chunk> chunks;
  int64_t start = 0;
  for (const int32_t e : plan.chosen) {
    const int64_t n = plan.offsets[e + 1] - plan.offsets[e];
    const int64_t parts = (n + largest - 1) / largest;
    const int64_t size = round_up((n + parts - 1) / parts, kLanes);
    for (int64_t first = 0; first < n; first += size) {
      const int64_t count = std::min(size, n - first), padded = round_up(count, kLanes);
      chunks.push_back({e, plan.offsets[e] + first, count, padded, start});
      start += padded;
    }
  }
  return chunks;
}

}  // namespace emoe
