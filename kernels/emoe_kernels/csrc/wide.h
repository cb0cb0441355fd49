// Sixteen fp32 or dword lanes and what is done with them: one AVX-512 register, or two of AVX2.
//
// A file a processor family, with the same names. `Lanes` are the first of the sixteen, for loads and stores: what is beyond is
// neither read nor written, and loaded as zero. A `Mask` says yes or no for each lane.
#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace emoe {

using c10::BFloat16;

constexpr int64_t kLanes = 16;

}  // namespace emoe

#ifdef __AVX512F__
#include "wide_avx512.h"
#else
#include "wide_avx2.h"
#endif
