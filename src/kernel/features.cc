#include <uffdkit/features.h>

#include <fmt/format.h>

#include <array>
#include <utility>

namespace uffdkit {
namespace {

constexpr std::array kFeatures = {
    FeatureInfo{Features(abi::kFeaturePagefaultFlagWp), "pagefault-flag-wp", "5.7",
                "write-protect faults on anonymous memory"},
    FeatureInfo{Features(abi::kFeatureEventFork), "event-fork", "4.11",
                "follow forks; needs CAP_SYS_PTRACE to enable"},
    FeatureInfo{Features(abi::kFeatureEventRemap), "event-remap", "4.11", "follow mremap"},
    FeatureInfo{Features(abi::kFeatureEventRemove), "event-remove", "4.11",
                "hear of madvise DONTNEED, FREE and REMOVE"},
    FeatureInfo{Features(abi::kFeatureMissingHugetlbfs), "missing-hugetlbfs", "4.11",
                "missing faults on huge pages"},
    FeatureInfo{Features(abi::kFeatureMissingShmem), "missing-shmem", "4.11",
                "missing faults on shared memory"},
    FeatureInfo{Features(abi::kFeatureEventUnmap), "event-unmap", "4.11", "hear of munmap"},
    FeatureInfo{Features(abi::kFeatureSigbus), "sigbus", "4.14",
                "SIGBUS to the faulting thread instead of a message"},
    FeatureInfo{Features(abi::kFeatureThreadId), "thread-id", "4.14", "messages name the faulting thread"},
    FeatureInfo{Features(abi::kFeatureMinorHugetlbfs), "minor-hugetlbfs", "5.13",
                "minor faults on huge pages"},
    FeatureInfo{Features(abi::kFeatureMinorShmem), "minor-shmem", "5.14", "minor faults on shared memory"},
    FeatureInfo{Features(abi::kFeatureExactAddress), "exact-address", "5.18",
                "messages give the address to the byte"},
    FeatureInfo{Features(abi::kFeatureWpHugetlbfsShmem), "wp-hugetlbfs-shmem", "5.19",
                "write-protect faults on huge pages and shared memory"},
    FeatureInfo{Features(abi::kFeatureWpUnpopulated), "wp-unpopulated", "6.4",
                "write protection of empty anonymous pages"},
    FeatureInfo{Features(abi::kFeaturePoison), "poison", "6.6", "pages that answer with SIGBUS"},
    FeatureInfo{Features(abi::kFeatureWpAsync), "wp-async", "6.7",
                "write tracking without messages, by PAGEMAP_SCAN"},
    FeatureInfo{Features(abi::kFeatureMove), "move", "6.8", "move pages without copying"},
};

std::string join_bits(std::uint64_t unknown, std::string text, const char* separator) {
  for (unsigned bit = 0; bit < 64; ++bit) {
    if ((unknown >> bit & 1) == 0) continue;
    if (!text.empty()) text += separator;
    text += fmt::format("bit {}", bit);
  }
  return text.empty() ? "none" : text;
}

}  // namespace

std::span<const FeatureInfo> known_features() {
  return kFeatures;
}

std::optional<Features> feature_by_name(std::string_view name) {
  for (const FeatureInfo& info : kFeatures)
    if (info.name == name) return info.bit;
  return std::nullopt;
}

std::string to_string(Features features) {
  std::string text;
  for (const FeatureInfo& info : kFeatures) {
    if (!features.has(info.bit)) continue;
    if (!text.empty()) text += ", ";
    text += info.name;
  }
  return join_bits(features.bits & ~abi::kFeaturesKnown, std::move(text), ", ");
}

std::string to_string(RegisterModes modes) {
  std::string text;
  const auto add = [&](RegisterModes mode, const char* name) {
    if (!modes.has(mode)) return;
    if (!text.empty()) text += '|';
    text += name;
  };
  add(kMissing, "missing");
  add(kWriteProtect, "wp");
  add(kMinor, "minor");
  return join_bits(modes.bits & ~(kMissing | kWriteProtect | kMinor).bits, std::move(text), "|");
}

std::string to_string(RangeIoctls ioctls) {
  constexpr std::array<std::pair<std::uint64_t, const char*>, 7> kNames = {
      {{abi::kHasWake, "wake"},
       {abi::kHasCopy, "copy"},
       {abi::kHasZeropage, "zeropage"},
       {abi::kHasMove, "move"},
       {abi::kHasWriteprotect, "writeprotect"},
       {abi::kHasContinue, "continue"},
       {abi::kHasPoison, "poison"}}};
  std::string text;
  std::uint64_t unnamed = ioctls.bits;
  for (const auto& [bit, name] : kNames) {
    if (!ioctls.has(RangeIoctls(bit))) continue;
    unnamed &= ~bit;
    if (!text.empty()) text += ", ";
    text += name;
  }
  return join_bits(unnamed, std::move(text), ", ");
}

}  // namespace uffdkit
