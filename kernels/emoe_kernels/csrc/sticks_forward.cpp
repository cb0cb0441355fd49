// Stick-breaking attention, forward: with GEMMs, and for a handful of queries (decoding) without.
#include "dots.h"
#include "sticks.h"

namespace emoe {

template <typename T>
void sticks_forward(const Sticks<T>& c, T* y, T* remainder) {
  const int64_t tiles = c.key_tiles(), tile_size = kKeys * c.A, heads = c.B * c.G;
  const Tensor packed = empty_bytes(2 * heads * tiles * tile_size * int64_t(sizeof(T)));
  T* keys = static_cast<T*>(packed.data_ptr());     // (B * G, tiles, kKeys, A)
  T* values = keys + heads * tiles * tile_size;     // (B * G, tiles, A, kKeys)
  at::parallel_for(0, heads * tiles, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    T* rows = scratch.get<T>(tile_size);
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / tiles / c.G, g = i / tiles % c.G, tile = i % tiles;
      copy_tile(c, c.k, b, g, tile, keys + i * tile_size);
      copy_tile(c, c.v, b, g, tile, rows);
      store_transposed(rows, c.A, kKeys, c.A, values + i * tile_size, kKeys);
    }
  });

  const int64_t row_tiles = (c.rows() + kTileRows - 1) / kTileRows;
  parallel_dynamic(heads * row_tiles, [&](int64_t i) {
    thread_local Scratch queries_of, logits_of, weights_of, packed_of, sums_of;
    const int64_t b = i % heads / c.G, g = i % heads % c.G;
    RowTile rows(c, row_tiles - 1 - i / heads);  // those with most keys first
    const int64_t width = rows.padded;
    const T* pointers[kTileRows];
    for (int64_t r = 0; r < rows.count; r++) pointers[r] = c.query(c.q, b, g, rows.first + r);
    T* queries = queries_of.get<T>(c.A * width);
    pack_transposed(pointers, rows.count, width, c.A, reinterpret_cast<int32_t*>(queries));
    float* logits = logits_of.get<float>(kKeys * width);
    T* weights = weights_of.get<T>(kKeys * width);
    float* sums = sums_of.get<float>(c.A * width);
    bool started = false;

    with_groups(width, [&](auto groups) {
      for (int64_t tile = rows.last_tile(); tile >= 0; tile--) {
        if (!c.any_visible(b, tile)) continue;
        const int64_t at = (i % heads * tiles + tile) * tile_size;
        gemm<T>(kKeys, width, c.A, keys + at, c.A, queries, width, logits, width, false);
        const bool left = break_sticks<groups()>(c, b, tile, logits, rows, [&](int64_t j, int64_t r, Floats, Floats weight) {
          store(weights + j * width + r, weight);
        });
        const T* right = operand(weights, kKeys, width, packed_of);
        tall_gemm<T>(c.A, width, kKeys, values + at, kKeys, right, width, sums, width, started);
        started = true;
        if (!left) break;
      }
    });
    const GemmScope<T> scope;
    if (!started) std::memset(sums, 0, c.A * width * sizeof(float));
    write_rows(c, b, g, rows, sums, y);
    for (int64_t r = 0; r < rows.count; r++) remainder[c.flat(b, g, rows.first + r)] = static_cast<T>(rows.stick[r]);
  });
}

namespace {

// sums (ROWS rows, A) += weights^T v for `count` keys from `key0`; weights (count, kLanes), columns from `row`.
template <int ROWS, typename T>
void add_values(const Sticks<T>& c, int64_t b, int64_t g, int64_t key0, int64_t count, const float* weights, float* sums) {
  constexpr int kVectors = kManyRegisters ? 4 : 2;
  for (int64_t a = 0; a < c.A; a += kVectors * kLanes) {
    Lanes lanes[kVectors];
    Floats acc[ROWS][kVectors];
    for (int i = 0; i < kVectors; i++) {
      lanes[i] = first_lanes(std::max<int64_t>(0, c.A - a - i * kLanes));
      for (int r = 0; r < ROWS; r++) acc[r][i] = load(sums + r * c.A + a + i * kLanes, lanes[i]);
    }
    for (int64_t j = 0; j < count; j++) {
      if (!c.visible(b, key0 + j)) continue;  // its value may be anything
      const T* from = c.v.at(b, g, key0 + j) + a;
      Floats value[kVectors];
      for (int i = 0; i < kVectors; i++) value[i] = load(from + i * kLanes, lanes[i]);
      for (int r = 0; r < ROWS; r++) {
        const Floats weight = all(weights[j * kLanes + r]);
        for (int i = 0; i < kVectors; i++) acc[r][i] = fma(weight, value[i], acc[r][i]);
      }
    }
    for (int r = 0; r < ROWS; r++) {
      for (int i = 0; i < kVectors; i++) store(sums + r * c.A + a + i * kLanes, acc[r][i], lanes[i]);
    }
  }
}

}  // namespace

template <typename T>
void sticks_forward_few(const Sticks<T>& c, T* y, T* remainder) {
  parallel_dynamic(c.B * c.G, [&](int64_t i) {
    thread_local Scratch sums_of;
    const int64_t b = i / c.G, g = i % c.G;
    RowTile rows(c, 0);
    const T* queries[kFewRows];
    for (int64_t r = 0; r < rows.count; r++) queries[r] = c.query(c.q, b, g, r);
    alignas(64) float logits[kKeys * kLanes] = {}, weights[kKeys * kLanes];
    float* sums = sums_of.get<float>(rows.count * c.A);
    std::memset(sums, 0, rows.count * c.A * sizeof(float));

    for (int64_t tile = rows.last_tile(); tile >= 0; tile--) {
      if (!c.any_visible(b, tile)) continue;
      const int64_t key0 = tile * kKeys, count = std::min(kKeys, rows.last_key + 1 - key0);
      dot_block(c.k.at(b, g, key0), c.k.position, count, queries, rows.count, c.A, logits, kLanes);
      const bool left = break_sticks<1>(c, b, tile, logits, rows, [&](int64_t j, int64_t, Floats, Floats weight) {
        store(weights + j * kLanes, weight);
      });
      constexpr int kTile = kManyRegisters ? 4 : 2;
      int64_t r = 0;
      for (; r + kTile <= rows.count; r += kTile) add_values<kTile>(c, b, g, key0, count, weights + r, sums + r * c.A);
      for (; r < rows.count; r++) add_values<1>(c, b, g, key0, count, weights + r, sums + r * c.A);
      if (!left) break;
    }
    for (int64_t r = 0; r < rows.count; r++) {
      const int64_t at = c.flat(b, g, r);
      for (int64_t a = 0; a < c.A; a += kLanes) {
        const Lanes lanes = first_lanes(c.A - a);
        store(y + at * c.A + a, load(sums + r * c.A + a, lanes), lanes);
      }
      remainder[at] = static_cast<T>(rows.stick[r]);
    }
  });
}

template void sticks_forward(const Sticks<float>&, float*, float*);
template void sticks_forward(const Sticks<BFloat16>&, BFloat16*, BFloat16*);
template void sticks_forward_few(const Sticks<float>&, float*, float*);
template void sticks_forward_few(const Sticks<BFloat16>&, BFloat16*, BFloat16*);

}  // namespace emoe
