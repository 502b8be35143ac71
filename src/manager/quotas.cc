#include "manager/quotas.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <string_view>

namespace uffdkit {
namespace {

constexpr std::int64_t kSecondNs = 1'000'000'000;

// Whether a limit, where there is one, holds for this sum.
bool exceeds(std::uint64_t limit, std::uint64_t used, std::uint64_t reserved, std::uint64_t more) {
  if (limit == 0 || more == 0) return false;
  std::uint64_t sum = 0;
  return __builtin_add_overflow(used, reserved, &sum) || __builtin_add_overflow(sum, more, &sum) ||
         sum > limit;
}

}  // namespace

Usage& Usage::operator+=(const Usage& more) {
  sessions += more.sessions;
  regions += more.regions;
  memory_bytes += more.memory_bytes;
  return *this;
}

Usage& Usage::operator-=(const Usage& less) {
  sessions -= less.sessions;
  regions -= less.regions;
  memory_bytes -= less.memory_bytes;
  return *this;
}

Error Quotas::used_up(uid_t user, std::string_view what, std::uint64_t limit, const char* option) {
  ++refused_[user];
  return Error(fmt::format("user {} would have more than {} {}", user, limit, what), ENOSPC)
      .with_remedy(fmt::format("end a session, or have the manager run with a higher {}", option));
}

Result<void> Quotas::check(uid_t user, const Usage& used, const Usage& more) {
  const auto found = reserved_.find(user);
  const Usage reserved = found == reserved_.end() ? Usage() : found->second;
  if (exceeds(limits_.sessions, used.sessions, reserved.sessions, more.sessions))
    return Failure(used_up(user, "sessions", limits_.sessions, "--user-sessions"));
  if (exceeds(limits_.regions, used.regions, reserved.regions, more.regions))
    return Failure(used_up(user, "regions", limits_.regions, "--user-regions"));
  if (exceeds(limits_.memory_bytes, used.memory_bytes, reserved.memory_bytes, more.memory_bytes))
    return Failure(used_up(user, "bytes in its regions", limits_.memory_bytes, "--user-memory"));
  return {};
}

void Quotas::reserve(uid_t user, const Usage& more) {
  reserved_[user] += more;
}

void Quotas::release(uid_t user, const Usage& more) {
  const auto found = reserved_.find(user);
  if (found == reserved_.end()) return;
  found->second -= more;
  if (found->second == Usage()) reserved_.erase(found);
}

Result<void> Quotas::take_request(uid_t user, std::int64_t now_ns) {
  if (limits_.requests_per_second == 0) return {};
  const std::int64_t cost_ns = kSecondNs / static_cast<std::int64_t>(limits_.requests_per_second);
  const std::int64_t full_ns = cost_ns * static_cast<std::int64_t>(limits_.requests_per_second);
  Bucket& bucket = buckets_.try_emplace(user, Bucket{.left_ns = full_ns, .seen_ns = now_ns}).first->second;
  bucket.left_ns = std::min(full_ns, bucket.left_ns + (now_ns - bucket.seen_ns));
  bucket.seen_ns = now_ns;
  if (bucket.left_ns < cost_ns) {
    ++refused_[user];
    return Failure(
        Error(fmt::format("user {} makes more than {} requests a second", user, limits_.requests_per_second),
              ENOSPC)
            .with_remedy("ask again later, or have the manager run with a higher --user-requests"));
  }
  bucket.left_ns -= cost_ns;
  return {};
}

}  // namespace uffdkit
