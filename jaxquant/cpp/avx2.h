// Registers of AVX2 with FMA and F16C: 32 codes, 8 floats.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "problem.h"

namespace jaxquant {

struct Avx2 {
  static constexpr int kLanes = 8, kBlock = 32, kSums = 8, kDirect = 32, kWidest = 32;
  static constexpr bool kDivides = true;  // symbols into digits, or looks them up
  using Floats = __m256;
  using Bytes = __m256i;

  static Bytes load_bytes(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static void store_bytes(uint8_t* to, Bytes bytes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
  }
  static Bytes fill_bytes(uint8_t value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static Bytes both(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
  // Shifts move bits between neighbouring bytes.
  template <int n>
  static Bytes shift(Bytes bytes) {
    if constexpr (n > 0) return _mm256_srli_epi16(bytes, n);
    if constexpr (n < 0) return _mm256_slli_epi16(bytes, -n);
    return bytes;
  }
  static Bytes select(Bytes mask, Bytes set, Bytes clear) {
    return _mm256_or_si256(_mm256_and_si256(mask, set), _mm256_andnot_si256(mask, clear));
  }
  static void prefetch(const void* at) {
    _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1);
  }

  // Symbols as bytes of digits: x / base is (x * ceil(2^16 / base)) >> 16 of all bytes x, for bases
  // up to 27.
  template <int packs, bool small>
  class Split {
   public:
    explicit Split(const DigitTables& digits)
        : inverse_(_mm256_set1_epi16(static_cast<short>((65536 + digits.base - 1) / digits.base))),
          base_(_mm256_set1_epi16(static_cast<short>(digits.base))),
          largest_(_mm256_set1_epi8(static_cast<char>(digits.base - 1))) {}
    Bytes get(Bytes symbols, int pack) const {
      if (small) symbols = _mm256_and_si256(symbols, _mm256_set1_epi8(127));
      for (int i = 0; i < pack; ++i) symbols = quotient(symbols);
      // No symbol that `pack` makes has a last digit above.
      if (pack == packs - 1) return _mm256_min_epu8(symbols, largest_);
      return _mm256_sub_epi8(symbols, _mm256_mullo_epi16(quotient(symbols), base_));
    }

   private:
    Bytes quotient(Bytes numbers) const {
      const __m256i even = _mm256_and_si256(numbers, _mm256_set1_epi16(0xff));
      const __m256i low = _mm256_mulhi_epu16(even, inverse_);
      const __m256i high = _mm256_mulhi_epu16(_mm256_srli_epi16(numbers, 8), inverse_);
      return _mm256_or_si256(low, _mm256_slli_epi16(high, 8));
    }
    __m256i inverse_, base_, largest_;
  };

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats fill(float value) { return _mm256_set1_ps(value); }
  static Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static Floats load_some(const float* from, int count) {
    return _mm256_maskload_ps(from, first(count));
  }
  static void store(float* to, Floats floats) { _mm256_storeu_ps(to, floats); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Floats floats) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(floats), _mm256_extractf128_ps(floats, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static Floats load_bfloat16(const uint16_t* from, int count) {
    uint16_t halves[8] = {};
    for (int i = 0; i < count; ++i) halves[i] = from[i];
    const __m128i own = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(own), 16));
  }
  static Floats to_bfloat16(Floats floats) {  // to the nearest, ties to even; NaN stays NaN
    const __m256i bits = _mm256_castps_si256(floats);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i cut = _mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    const __m256 nan = _mm256_cmp_ps(floats, floats, _CMP_UNORD_Q);
    return _mm256_blendv_ps(_mm256_castsi256_ps(cut), floats, nan);
  }
  static Floats to_float16(Floats floats) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT));
  }

  // Tables of floats that stay in registers; of up to `width` entries.
  template <int width>
  struct Table {
    __m256 part[width / 8];
    explicit Table(const float* from) {
      for (int i = 0; i < width / 8; ++i) part[i] = load(from + 8 * i);
    }
    Table(const float* from, int count) {
      for (int i = 0; i < width / 8; ++i) {
        const int own = count - 8 * i;
        part[i] = own > 0 ? load_some(from + 8 * i, own > 8 ? 8 : own) : zero();
      }
    }
    Floats get(__m256i numbers) const { return pick<0, width>(numbers); }

   private:
    template <int first, int count>
    Floats pick(__m256i numbers) const {
      if constexpr (count == 8) {
        return _mm256_permutevar8x32_ps(part[first], numbers);
      } else {  // the bit that tells the halves apart, as a sign
        constexpr int half = count / 2, bit = half == 8 ? 3 : half == 16 ? 4 : 5;
        return _mm256_blendv_ps(pick<first, half>(numbers), pick<first + half / 8, half>(numbers),
                                _mm256_castsi256_ps(_mm256_slli_epi32(numbers, 31 - bit)));
      }
    }
  };
  // Codes of 8 columns: those of columns `part`, `part` + 4, ... of a register of bytes, above so
  // many bits of each; what stands above them, a table does not read. And those side by side in
  // memory.
  template <int part, int above>
  static __m256i every_fourth(Bytes codes) {
    return part + above ? _mm256_srli_epi32(codes, 8 * part + above) : codes;
  }
  static __m256i side_by_side(const uint8_t* codes) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  }

 private:
  static __m256i first(int count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes);
  }
};

}  // namespace jaxquant
