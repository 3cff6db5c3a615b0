// Registers of AVX-512 (with VBMI, which maps bytes): 64 codes, 16 floats.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "problem.h"

namespace jaxquant {

struct Avx512 {
  static constexpr int kLanes = 16, kBlock = 64, kSums = 16, kDirect = 32, kWidest = 256;
  static constexpr bool kDivides = false;  // symbols into digits, or looks them up
  using Floats = __m512;
  using Bytes = __m512i;

  static Bytes load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static void store_bytes(uint8_t* to, Bytes bytes) { _mm512_storeu_si512(to, bytes); }
  static Bytes fill_bytes(uint8_t value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
  // Shifts move bits between neighbouring bytes.
  template <int n>
  static Bytes shift(Bytes bytes) {
    if constexpr (n > 0) return _mm512_srli_epi16(bytes, n);
    if constexpr (n < 0) return _mm512_slli_epi16(bytes, -n);
    return bytes;
  }
  static Bytes select(Bytes mask, Bytes set, Bytes clear) {
    return _mm512_ternarylogic_epi64(mask, set, clear, 0xca);
  }
  static void prefetch(const void* at) {
    _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1);
  }

  // Symbols as bytes of digits; of symbols of 7 bits or less, bit 7 is not read.
  template <int packs, bool small>
  class Split {
   public:
    explicit Split(const DigitTables& digit_tables) {
      for (int i = 0; i < packs; ++i) {
        for (int j = 0; j < kParts; ++j) {
          tables_[i][j] = load_bytes(digit_tables.packs[i] + kBlock * j);
        }
      }
    }
    Bytes get(Bytes symbols, int pack) const {
      const __m512i* parts = tables_[pack];
      const Bytes low = _mm512_permutex2var_epi8(parts[0], symbols, parts[1]);
      if constexpr (small) return low;
      const Bytes high = _mm512_permutex2var_epi8(parts[kParts - 2], symbols, parts[kParts - 1]);
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(symbols), low, high);
    }

   private:
    static constexpr int kParts = small ? 2 : 4;
    __m512i tables_[packs][kParts];
  };

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats fill(float value) { return _mm512_set1_ps(value); }
  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static Floats load_some(const float* from, int count) {
    return _mm512_maskz_loadu_ps(first(count), from);
  }
  static void store(float* to, Floats floats) { _mm512_storeu_ps(to, floats); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Floats floats) { return _mm512_reduce_add_ps(floats); }
  static Floats load_bfloat16(const uint16_t* from, int count) {
    const __m256i halves = _mm256_maskz_loadu_epi16(first(count), from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static Floats to_bfloat16(Floats floats) {  // to the nearest, ties to even; NaN stays NaN
    const __m512i bits = _mm512_castps_si512(floats);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i cut = _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    const __mmask16 nan = _mm512_cmp_ps_mask(floats, floats, _CMP_UNORD_Q);
    return _mm512_mask_mov_ps(_mm512_castsi512_ps(cut), nan, floats);
  }
  static Floats to_float16(Floats floats) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT));
  }

  // Tables of floats that stay in registers; of up to `width` entries.
  template <int width>
  struct Table {
    __m512 part[width / 16];
    explicit Table(const float* from) {
      for (int i = 0; i < width / 16; ++i) part[i] = load(from + 16 * i);
    }
    Table(const float* from, int count) {
      for (int i = 0; i < width / 16; ++i) {
        const int own = count - 16 * i;
        part[i] = load_some(from + 16 * i, own < 0 ? 0 : own > 16 ? 16 : own);
      }
    }
    Floats get(__m512i numbers) const { return pick<0, width>(numbers); }

   private:
    template <int first, int count>
    Floats pick(__m512i numbers) const {
      if constexpr (count == 16) {
        return _mm512_permutexvar_ps(numbers, part[first]);
      } else if constexpr (count == 32) {
        return _mm512_permutex2var_ps(part[first], numbers, part[first + 1]);
      } else {
        constexpr int half = count / 2;
        return _mm512_mask_blend_ps(_mm512_test_epi32_mask(numbers, _mm512_set1_epi32(half)),
                                    pick<first, half>(numbers),
                                    pick<first + half / 16, half>(numbers));
      }
    }
  };
  // Codes of 16 columns: those of columns `part`, `part` + 4, ... of a register of bytes, above so
  // many bits of each; what stands above them, a table does not read. And those side by side in
  // memory.
  template <int part, int above>
  static __m512i every_fourth(Bytes codes) {
    return part + above ? _mm512_srli_epi32(codes, 8 * part + above) : codes;
  }
  static __m512i side_by_side(const uint8_t* codes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  }

 private:
  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
};

}  // namespace jaxquant
