// Stick-breaking attention, backward: everything recomputed from queries, keys and values.
//
// With g_j = dy . v_j and w the weights: dv_j = sum of w_j dy over the rows, and
//     dz_m = g_m w_m - sigmoid(z_m) * (sum of g_j w_j over the keys j <= m, + d_remainder * remainder).
// The sticks are broken from the right, but this sum starts at the left. It could be had from the right as the whole minus
// what is to the right, but where a stick is used up the truth is zero, and the difference of two roundings is not: it would
// be added up over all keys beyond. So a tile of rows goes through its keys twice, with g w and sigmoid(z) in between kept
// in a strip (keys, rows) a thread: memory L, not T * L.
#include "sticks.h"

namespace emoe {

template <typename T>
void sticks_backward(const Sticks<T>& c, const Heads<T>& dy, const T* d_remainder, T* dq, float* dkv, int64_t chunks) {
  const int64_t tiles = c.key_tiles(), tile_size = kKeys * c.A, heads = c.B * c.G;
  const Tensor packed = empty_bytes(3 * heads * tiles * tile_size * int64_t(sizeof(T)));
  T* keys = static_cast<T*>(packed.data_ptr());       // (B * G, tiles, kKeys, A)
  T* values = keys + heads * tiles * tile_size;       // the same
  T* turned_keys = values + heads * tiles * tile_size;  // (B * G, tiles, A, kKeys)
  at::parallel_for(0, heads * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / tiles / c.G, g = i / tiles % c.G, tile = i % tiles, at = i * tile_size;
      copy_tile(c, c.k, b, g, tile, keys + at);
      copy_tile(c, c.v, b, g, tile, values + at);
      store_transposed(keys + at, c.A, kKeys, c.A, turned_keys + at, kKeys);
    }
  });

  const int64_t row_tiles = (c.rows() + kTileRows - 1) / kTileRows;
  const auto one_tile = [&](int64_t head, int64_t index, float* dk, float* dv) {
    thread_local Scratch columns_of, rows_of, packed_q, packed_dy, packed_dz, logits_of, slopes_of, weights_of, strips_of, sums_of;
    const int64_t b = head / c.G, g = head % c.G;
    RowTile rows(c, index);
    const int64_t width = rows.padded, last = rows.last_tile();
    const T *queries[kTileRows], *grads[kTileRows];
    for (int64_t r = 0; r < rows.count; r++) {
      queries[r] = c.query(c.q, b, g, rows.first + r);
      grads[r] = c.query(dy, b, g, rows.first + r);
    }
    T* q_columns = columns_of.get<T>(2 * c.A * width);  // as the right operands of z and g
    T* dy_columns = q_columns + c.A * width;
    pack_transposed(queries, rows.count, width, c.A, reinterpret_cast<int32_t*>(q_columns));
    pack_transposed(grads, rows.count, width, c.A, reinterpret_cast<int32_t*>(dy_columns));
    T* q_rows = rows_of.get<T>(2 * c.A * width);  // as those of dk and dv
    T* dy_rows = q_rows + c.A * width;
    pack_rows(queries, rows.count, width, c.A, q_rows);
    pack_rows(grads, rows.count, width, c.A, dy_rows);

    float* logits = logits_of.get<float>(kKeys * width);
    float* slopes = slopes_of.get<float>(kKeys * width);
    T* tile_of_T = weights_of.get<T>(kKeys * width);
    float* taken = strips_of.get<float>(2 * (last + 1) * kKeys * width);
    float* dlog = taken + (last + 1) * kKeys * width;  // g w, the gradient of log w
    float* sums = sums_of.get<float>(c.A * width);
    std::memset(sums, 0, c.A * width * sizeof(float));

    with_groups(width, [&](auto groups) {
      int64_t stop = last;
      for (; stop >= 0; stop--) {
        if (!c.any_visible(b, stop)) continue;
        const int64_t at = (head * tiles + stop) * tile_size, strip = stop * kKeys * width;
        gemm<T>(kKeys, width, c.A, keys + at, c.A, q_columns, width, logits, width, false);
        gemm<T>(kKeys, width, c.A, values + at, c.A, dy_columns, width, slopes, width, false);
        const auto keep = [&](int64_t j, int64_t r, Floats share, Floats weight) {
          const int64_t place = j * width + r;
          store(tile_of_T + place, weight);
          store(taken + strip + place, share);
          store(dlog + strip + place, mul(weight, load(slopes + place)));
        };
        const bool left = break_sticks<groups()>(c, b, stop, logits, rows, keep);
        gemm<T>(kKeys, c.A, width, tile_of_T, width, dy_rows, c.A, dv + stop * tile_size, c.A, true);
        if (!left) break;
      }

      Floats before[groups()];
      for (int i = 0; i < groups(); i++) {
        alignas(64) float grad[kLanes] = {};
        for (int64_t r = 0; r < kLanes && i * kLanes + r < rows.count && d_remainder; r++) {
          grad[r] = d_remainder[c.flat(b, g, rows.first + i * kLanes + r)];
        }
        before[i] = mul(load(grad), load(rows.stick + i * kLanes));
      }
      const Floats scale = all(c.scale);
      for (int64_t tile = std::max<int64_t>(stop, 0); tile <= last; tile++) {
        if (!c.any_visible(b, tile)) continue;
        const int64_t at = (head * tiles + tile) * tile_size, strip = tile * kKeys * width;
        for (int64_t j = 0; j < kKeys; j++) {
          for (int i = 0; i < groups(); i++) {
            const int64_t place = j * width + i * kLanes;
            const Floats own = load(dlog + strip + place);
            before[i] = add(before[i], own);
            const Floats dz = fnma(load(taken + strip + place), before[i], own);
            store(tile_of_T + place, mul(dz, scale));
          }
        }
        const T* right = operand(tile_of_T, kKeys, width, packed_dz);
        tall_gemm<T>(c.A, width, kKeys, turned_keys + at, kKeys, right, width, sums, width, true);
        gemm<T>(kKeys, c.A, width, tile_of_T, width, q_rows, c.A, dk + tile * tile_size, c.A, true);
      }
    });
    write_rows(c, b, g, rows, sums, dq);
  };

  // A chunk takes every `chunks`-th tile of rows into a dk and dv of its own. Their number must not depend on that of threads:
  // it decides about the order of sums.
  const int64_t part = tiles * tile_size;
  parallel_dynamic(heads * chunks, [&](int64_t i) {
    for (int64_t index = row_tiles - 1 - i % chunks; index >= 0; index -= chunks) {
      one_tile(i / chunks, index, dkv + i * part, dkv + (heads * chunks + i) * part);
    }
    const GemmScope<T> scope;
  });
}

template void sticks_backward(const Sticks<float>&, const Heads<float>&, const float*, float*, float*, int64_t);
template void sticks_backward(const Sticks<BFloat16>&, const Heads<BFloat16>&, const BFloat16*, BFloat16*, float*, int64_t);

}  // namespace emoe
