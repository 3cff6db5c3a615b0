// The same in C++ alone, for any processor; compilers make vectors of the loops.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "problem.h"

namespace jaxquant {

struct Plain {
  static constexpr int kLanes = 8, kBlock = 32, kSums = 8, kDirect = 0, kWidest = 256;
  static constexpr bool kDivides = false;  // symbols into digits, or looks them up
  struct Floats {
    float at[kLanes];
  };
  struct Bytes {
    uint8_t at[kBlock];
  };
  struct Codes {
    uint8_t at[kLanes];
  };

  static Bytes load_bytes(const uint8_t* from) {
    Bytes bytes;
    std::memcpy(bytes.at, from, kBlock);
    return bytes;
  }
  static void store_bytes(uint8_t* to, Bytes bytes) { std::memcpy(to, bytes.at, kBlock); }
  static Bytes fill_bytes(uint8_t value) {
    Bytes bytes;
    std::memset(bytes.at, value, kBlock);
    return bytes;
  }
  static Bytes both(Bytes a, Bytes b) {
    for (int i = 0; i < kBlock; ++i) a.at[i] &= b.at[i];
    return a;
  }
  template <int n>
  static Bytes shift(Bytes bytes) {
    constexpr int right = n > 0 ? n : 0, left = n < 0 ? -n : 0;
    for (int i = 0; i < kBlock; ++i) {
      bytes.at[i] = static_cast<uint8_t>(bytes.at[i] >> right << left);
    }
    return bytes;
  }
  static Bytes select(Bytes mask, Bytes set, Bytes clear) {
    for (int i = 0; i < kBlock; ++i) {
      set.at[i] = static_cast<uint8_t>((set.at[i] & mask.at[i]) | (clear.at[i] & ~mask.at[i]));
    }
    return set;
  }
  static void prefetch(const void*) {}

  // Symbols as bytes of digits.
  template <int packs, bool small>
  class Split {
   public:
    explicit Split(const DigitTables& digit_tables) : tables_(digit_tables.packs) {}
    Bytes get(Bytes symbols, int pack) const {
      for (int i = 0; i < kBlock; ++i) {
        symbols.at[i] = tables_[pack][symbols.at[i] & (small ? 127 : 255)];
      }
      return symbols;
    }

   private:
    const uint8_t (*tables_)[256];
  };

  static Floats zero() { return {}; }
  static Floats fill(float value) {
    Floats floats;
    for (int i = 0; i < kLanes; ++i) floats.at[i] = value;
    return floats;
  }
  static Floats load(const float* from) {
    Floats floats;
    std::memcpy(floats.at, from, sizeof floats.at);
    return floats;
  }
  static Floats load_some(const float* from, int count) {
    Floats floats = {};
    std::memcpy(floats.at, from, sizeof(float) * static_cast<size_t>(count));
    return floats;
  }
  static void store(float* to, Floats floats) { std::memcpy(to, floats.at, sizeof floats.at); }
  static Floats add(Floats a, Floats b) {
    for (int i = 0; i < kLanes; ++i) a.at[i] += b.at[i];
    return a;
  }
  static Floats multiply(Floats a, Floats b) {
    for (int i = 0; i < kLanes; ++i) a.at[i] *= b.at[i];
    return a;
  }
  static Floats multiply_add(Floats a, Floats b, Floats c) {
    for (int i = 0; i < kLanes; ++i) c.at[i] += a.at[i] * b.at[i];
    return c;
  }
  static float sum(Floats floats) {
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) floats.at[i] += floats.at[i + half];
    }
    return floats.at[0];
  }
  static Floats load_bfloat16(const uint16_t* from, int count) {
    Floats floats = {};
    for (int i = 0; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(&floats.at[i], &bits, sizeof bits);
    }
    return floats;
  }
  static Floats to_bfloat16(Floats floats) {  // to the nearest, ties to even; NaN stays NaN
    for (float& value : floats.at) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
      if (value == value) std::memcpy(&value, &bits, sizeof bits);
    }
    return floats;
  }
  static Floats to_float16(Floats floats) {
    for (float& value : floats.at) value = nearest_float16(value);
    return floats;
  }

  template <int width>
  struct Table {
    float entries[width];
    explicit Table(const float* from) { std::memcpy(entries, from, sizeof entries); }
    Table(const float* from, int count) {
      for (int i = 0; i < width; ++i) entries[i] = i < count ? from[i] : 0.0f;
    }
    Floats get(const Codes& codes) const {
      Floats floats;
      for (int i = 0; i < kLanes; ++i) floats.at[i] = entries[codes.at[i] & (width - 1)];
      return floats;
    }
  };
  // Codes of 8 columns: those of columns `part`, `part` + 4, ... of some bytes, above so many bits
  // of each; what stands above them, a table does not read. And those side by side in memory.
  template <int part, int above>
  static Codes every_fourth(Bytes bytes) {
    Codes codes;
    for (int i = 0; i < kLanes; ++i) {
      codes.at[i] = static_cast<uint8_t>(bytes.at[4 * i + part] >> above);
    }
    return codes;
  }
  static Codes side_by_side(const uint8_t* from) {
    Codes codes;
    std::memcpy(codes.at, from, kLanes);
    return codes;
  }

 private:
  // Steps of a half are 2^(e - 10) from 2^e, and 2^-24 below 2^-14; `nearbyint` rounds ties to even.
  static float nearest_float16(float value) {
    if (!std::isfinite(value) || value == 0.0f) return value;
    int exponent;
    std::frexp(value, &exponent);
    const float step = std::ldexp(1.0f, (exponent - 1 < -14 ? -14 : exponent - 1) - 10);
    const float rounded = std::nearbyint(value / step) * step;
    return std::fabs(rounded) > 65504.0f ? std::copysign(INFINITY, value) : rounded;
  }
};

}  // namespace jaxquant
