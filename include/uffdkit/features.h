// Layer: kernel
// Sets of features, register modes and ioctls. Bits that this library does not know are kept, never refused:
// a newer kernel has more of them.
#pragma once

#include <uffdkit/abi.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace uffdkit {

// A set of bits of one kind. `Tag` keeps features, modes and ioctls apart.
template <class Tag>
struct BitSet {
  std::uint64_t bits = 0;

  constexpr BitSet() = default;
  constexpr explicit BitSet(std::uint64_t raw) : bits(raw) {}
  constexpr bool has(BitSet other) const { return (bits & other.bits) == other.bits; }
  constexpr bool empty() const { return bits == 0; }
  friend constexpr BitSet operator|(BitSet a, BitSet b) { return BitSet(a.bits | b.bits); }
  friend constexpr BitSet operator&(BitSet a, BitSet b) { return BitSet(a.bits & b.bits); }
  // What is in `a` and not in `b`.
  friend constexpr BitSet operator-(BitSet a, BitSet b) { return BitSet(a.bits & ~b.bits); }
  friend constexpr bool operator==(BitSet, BitSet) = default;
};

// Features of UFFDIO_API: abi::kFeature...
using Features = BitSet<struct FeaturesTag>;
// Modes of UFFDIO_REGISTER: abi::kRegister...
using RegisterModes = BitSet<struct RegisterModesTag>;
// The ioctls that the kernel reports for a registered range: abi::kHas...
using RangeIoctls = BitSet<struct RangeIoctlsTag>;

inline constexpr RegisterModes kMissing{abi::kRegisterMissing};
inline constexpr RegisterModes kWriteProtect{abi::kRegisterWp};
inline constexpr RegisterModes kMinor{abi::kRegisterMinor};

// One feature as an operator knows it.
struct FeatureInfo {
  Features bit;
  std::string_view name;   // the kernel's, lower case and with dashes: "event-remove"
  std::string_view since;  // first kernel version
  std::string_view what;   // one line
};

// Every feature that this library knows, in bit order.
std::span<const FeatureInfo> known_features();
// The feature of this name; nothing if there is none.
std::optional<Features> feature_by_name(std::string_view name);
// "event-fork, poison, bit 40"; "none" for an empty set.
std::string to_string(Features features);
// "missing|wp"; "none" for an empty set.
std::string to_string(RegisterModes modes);
// "wake, copy, zeropage"; "none" for an empty set.
std::string to_string(RangeIoctls ioctls);

}  // namespace uffdkit
