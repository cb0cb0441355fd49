// What the passes share.
//
// Legend: N tokens, D model width, E experts, S neurons per expert, K experts chosen per token, R <= N * K pairs
// (token, expert) sorted by expert, n pairs of one expert or of a chunk of it.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "simd.h"

namespace emoe {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Memory that a thread keeps from call to call, 64-byte aligned. One object per purpose: `thread_local` at its use.
class Scratch {
 public:
  template <typename T>
  T* get(int64_t count) {
    const size_t bytes = round_up(count * sizeof(T), 64);
    const bool wasteful = size_ > kKeep && bytes < size_ / 4;
    if (bytes > size_ || wasteful) {
      size_ = 0;
      memory_.reset();
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
      TORCH_CHECK(memory_, "emoe_kernels: out of memory for ", bytes, " bytes of scratch");
      size_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  static constexpr size_t kKeep = 4 << 20;  // more is given back by the next call that needs much less
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

// Asks the kernel for 2 MiB pages under fresh memory of some size: the gradient of a large weight is new at every step,
// and to fault it in by 4 KiB pages took longer than to compute it for few tokens. A hint: it changes no result. Very large
// memory goes without: on a virtual machine whose host takes free 2 MiB blocks back, faulting 540 MB in took 900 ms after
// others had freed much, against 190 by small pages (and 50 when nobody had).
inline void advise_huge_pages(const Tensor& t) {
  constexpr uintptr_t page = 4096, least = 4 << 20, most = 128 << 20;
  const auto start = reinterpret_cast<uintptr_t>(t.storage().data());
  const uintptr_t begin = (start + page - 1) / page * page, end = (start + t.storage().nbytes()) / page * page;
  if (begin + least < end && end - begin <= most) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

inline Tensor empty_bytes(int64_t bytes) {
  Tensor memory = at::empty({bytes}, at::kByte);
  advise_huge_pages(memory);
  return memory;
}

// f(i) for i in 0 .. count - 1, handed out one by one in ascending order: experts differ in their number of tokens.
// Every i writes its own part of the result, so who computes it does not matter to the bits.
template <typename F>
void parallel_dynamic(int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++) {
      for (int64_t i = next++; i < count; i = next++) f(i);
    }
  });
}

// C (M, N) fp32 = A (M, K) B (K, N), plus C if `add`. A is row-major; B is what `pack_rows` or `pack_transposed` write,
// with leading dimension ldb in dwords. oneDNN's kernel for the best instruction set of the machine (AMX, AVX-512, AVX2),
// generated once per thread for each (M, N, K, lda, ldb, ldc, add) and never forgotten: all of them must come from small
// sets, none may be the number of an expert's tokens.
template <typename T>
void gemm(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb, float* C, int64_t ldc,
          bool add) {
  constexpr int64_t step = 32;  // the depth of a bf16 tile of AMX
#if defined(__AMX_BF16__) || defined(EMOE_SPLIT_DEPTH)
  // oneDNN takes the largest even divisor of K up to 32 for all steps: for 172 that would be 4.
  if (kPerDword<T> == 2 && K > step && K % step) {
    const int64_t whole = K / step * step;
    gemm<T>(M, N, whole, A, lda, B, ldb, C, ldc, add);
    return gemm<T>(M, N, K - whole, A + whole, lda, B + whole * ldb, ldb, C, ldc, true);
  }
#endif
  TORCH_INTERNAL_ASSERT(lda * M * int64_t(sizeof(T)) <= INT32_MAX, "oneDNN addresses A with 32 bits");
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, A, B, C, /*is_vnni=*/kPerDword<T> == 2);
}

constexpr int64_t kRowTile = 256;  // rows of a weight in one GEMM: bounds generated code, scratch and offsets within A

// Gives the tile registers of AMX back at the end of a piece of work that called gemm.
template <typename T>
struct GemmScope {
  ~GemmScope() { at::native::cpublas::brgemm_release(kPerDword<T> == 2); }
};

// The pairs of a call, sorted by expert and by token within an expert.
struct Plan {
  std::vector<int64_t> offsets;  // E + 1: the pairs of expert e are offsets[e] .. offsets[e + 1] - 1
  std::vector<int32_t> tokens;   // R
  std::vector<int64_t> slots;    // R: n * K + k, the pair's place in the (N, K) tensors
  std::vector<int32_t> chosen;   // the experts that have pairs, ascending

  int64_t pairs() const { return static_cast<int64_t>(tokens.size()); }
};

Plan make_plan(const Tensor& experts_NK, int64_t num_experts);

// A chunk of an expert's pairs: first .. first + count - 1 of the plan, computed as `padded` columns or rows.
struct Chunk {
  int32_t expert;
  int64_t first, count, padded;
  int64_t start;  // sum of `padded` over the chunks before this one
};

// Cuts every expert's pairs into equal chunks of at most `largest` (a multiple of 16), padded to a multiple of 16.
std::vector<Chunk> make_chunks(const Plan& plan, int64_t largest);

// (E, rows, cols) with any strides.
template <typename T>
struct Weight {
  T* data = nullptr;
  int64_t expert = 0, row = 0, col = 0;

  // const_data_ptr, so that a lazily copied tensor is not copied for being read
  static Weight read(const Tensor& t) { return {const_cast<T*>(t.const_data_ptr<T>()), t.stride(0), t.stride(1), t.stride(2)}; }
  static Weight read(const OptionalTensor& t) { return t ? read(*t) : Weight{}; }
  static Weight write(const OptionalTensor& t) {
    return t ? Weight{t->mutable_data_ptr<T>(), t->stride(0), t->stride(1), t->stride(2)} : Weight{};
  }

  T* at(int64_t e, int64_t r, int64_t c) const { return data + e * expert + r * row + c * col; }
};

// Rows r0 .. r0 + rows - 1 and columns c0 .. c0 + cols - 1 of an expert, row-major: the weight itself where its columns
// are adjacent, otherwise (GPT-2 and ModuleFormer store their linear layers transposed) a copy in `scratch`.
template <typename T>
struct Block {
  const T* data;
  int64_t ld;

  Block(const Weight<T>& weight, int64_t e, int64_t r0, int64_t rows, int64_t c0, int64_t cols, Scratch& scratch)
      : data(weight.at(e, r0, c0)), ld(weight.row) {
    if (weight.col == 1) return;
    ld = round_up(cols, kLanes) | kLanes;  // rows an even number of lines apart would share sets of the L1 cache
    T* copy = scratch.get<T>(rows * ld);
    if (weight.row == 1) {
      store_transposed(data, weight.col, cols, rows, copy, ld);
    } else {
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < cols; c++) copy[r * ld + c] = data[r * weight.row + c * weight.col];
      }
    }
    data = copy;
  }
};

// Width of the column chunks over which the second half of a pass is divided: a chunk's fp32 accumulator (N, width)
// should stay in the L2 cache, and the chunks should divide evenly among the threads.
inline int64_t column_chunk(int64_t N, int64_t D) {
  constexpr int64_t bytes = 512 * 1024;
  if (D == 0) return kLanes;
  const int64_t widest = std::clamp<int64_t>(bytes / 4 / std::max<int64_t>(N, 1) / kLanes * kLanes, 32, 128);
  const int64_t threads = at::get_num_threads();
  const int64_t chunks = round_up((D + widest - 1) / widest, threads);
  return round_up((D + chunks - 1) / chunks, kLanes);
}

// sums (N, width)[tokens[i]] += part (count, ld)[i], row by row.
inline void add_rows(const float* part, int64_t ld, int64_t width, const int32_t* tokens, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; i++) {
    float* to = sums + tokens[i] * width;
    for (int64_t j = 0; j < width; j += kLanes) {
      const Lanes lanes = first_lanes(width - j);
      store(to + j, add(load(to + j, lanes), load(part + i * ld + j, lanes)), lanes);
    }
  }
}

// The fp32 accumulator (N, width) of output columns -> y (N, D), starting at column d.
template <typename T>
void write_columns(const float* sums, int64_t N, int64_t width, T* y, int64_t D, int64_t d) {
  for (int64_t n = 0; n < N; n++) {
    for (int64_t j = 0; j < width; j += kLanes) {
      const Lanes lanes = first_lanes(width - j);
      store(y + n * D + d + j, load(sums + n * width + j, lanes), lanes);
    }
  }
}

}  // namespace emoe
