// Sums of products of floats without rounding.
#pragma once

#include <cstdint>
#include <cstring>

namespace genperf {

// A fixed-point number of 640 bits. A product of two float32, twice it at most, is a multiple of 2^-298 below
// 2^257; so sums of 2^60 of them fit. Digits of 32 bits are kept in 64, signed, and carried at the end.
class ExactSum {
 public:
  static constexpr int kDigits = 20;

  // `term` is a product of two float32, or twice it: a double without rounding.
  void add(double term) {
    uint64_t bits;
    std::memcpy(&bits, &term, sizeof bits);
    const int exponent = static_cast<int>(bits >> 52 & 0x7ff);
    if (exponent == 0) return;  // such a product is never subnormal
    const uint64_t mantissa = (bits & ((1ull << 52) - 1)) | 1ull << 52;
    // The unit of the last place of the mantissa is 2^(exponent - 1075), at least 2^(-298 - 52).
    const int place = exponent - 1075 + 350, digit = place >> 5;
    const unsigned __int128 shifted = static_cast<unsigned __int128>(mantissa) << (place & 31);
    const int64_t sign = static_cast<int64_t>(bits) < 0 ? -1 : 1;
    digit_[digit] += sign * static_cast<int64_t>(static_cast<uint32_t>(shifted));
    digit_[digit + 1] += sign * static_cast<int64_t>(static_cast<uint32_t>(shifted >> 32));
    digit_[digit + 2] += sign * static_cast<int64_t>(static_cast<uint32_t>(shifted >> 64));
  }

  // The sign of the sum. Afterwards its absolute value stands in digits below 2^32.
  int finish() {
    carry();
    int sign = digit_[kDigits - 1] < 0 ? -1 : 1;
    if (sign < 0) {
      for (int64_t& d : digit_) d = -d;
      carry();
    }
    for (int64_t d : digit_)
      if (d != 0) return sign;
    return 0;
  }

  uint64_t digit(int i) const { return static_cast<uint64_t>(digit_[i]); }

 private:
  void carry() {
    for (int i = 0; i + 1 < kDigits; ++i) {
      digit_[i + 1] += digit_[i] >> 32;
      digit_[i] &= 0xffffffff;
    }
  }

  int64_t digit_[kDigits] = {};
};

// A product of natural numbers in digits of 32 bits.
template <int kA, int kB>
struct Product {
  uint64_t digits[kA + kB] = {};

  template <class A, class B>
  Product(const A& a, const B& b) {
    for (int i = 0; i < kA; ++i) {
      uint64_t carried = 0;
      for (int j = 0; j < kB; ++j) {
        const uint64_t sum = digits[i + j] + a.digit(i) * b.digit(j) + carried;
        digits[i + j] = sum & 0xffffffff, carried = sum >> 32;
      }
      digits[i + kB] = carried;
    }
  }
  uint64_t digit(int i) const { return digits[i]; }

  int compare(const Product& other) const {
    for (int i = kA + kB - 1; i >= 0; --i)
      if (digits[i] != other.digits[i]) return digits[i] < other.digits[i] ? -1 : 1;
    return 0;
  }
};

}  // namespace genperf
