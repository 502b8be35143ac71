// How much each user may have of a manager, so that one cannot use up what there is for all. Every user has
// the same limits, root and the manager's own too.
//
// What a user has is up to the caller, who knows its sessions; this knows the limits, what is on its way to
// become part of them, and how fast requests come. Time is the caller's. Threads: one.
#pragma once

#include <sys/types.h>
#include <uffdkit/error.h>

#include <cstdint>
#include <map>

namespace uffdkit {

// Of one user; 0: no limit.
struct UserLimits {
  std::uint64_t sessions = 0;
  std::uint64_t regions = 0;              // of all its sessions
  std::uint64_t memory_bytes = 0;         // in all its regions
  std::uint64_t requests_per_second = 0;  // connections, and requests on them; so many may come at once
  bool operator==(const UserLimits&) const = default;
};

// What a user has, or wants in addition.
struct Usage {
  std::uint64_t sessions = 0;
  std::uint64_t regions = 0;
  std::uint64_t memory_bytes = 0;
  Usage& operator+=(const Usage& more);
  Usage& operator-=(const Usage& less);
  bool operator==(const Usage&) const = default;
};

class Quotas {
 public:
  explicit Quotas(const UserLimits& limits) : limits_(limits) {}

  const UserLimits& limits() const { return limits_; }
  // Whether it matters what a user has.
  bool limits_usage() const {
    return limits_.sessions != 0 || limits_.regions != 0 || limits_.memory_bytes != 0;
  }

  // Whether the user, who has `used`, and what is reserved for it, may have `more`. Errors: ENOSPC, with the
  // limit; counted as refused.
  Result<void> check(uid_t user, const Usage& used, const Usage& more);
  // `more` was granted, and is not part of what the caller says that the user has until release().
  void reserve(uid_t user, const Usage& more);
  void release(uid_t user, const Usage& more);

  // The user makes a request at this time, of any clock that does not go back. Errors: ENOSPC, when it has
  // made too many; counted as refused.
  Result<void> take_request(uid_t user, std::int64_t now_ns);

  // How often each user was refused something.
  const std::map<uid_t, std::uint64_t>& refused() const { return refused_; }

 private:
  // Requests that may still come, counted in the nanoseconds in which so many come back.
  struct Bucket {
    std::int64_t left_ns;
    std::int64_t seen_ns;
  };
  Error used_up(uid_t user, std::string_view what, std::uint64_t limit, const char* option);

  const UserLimits limits_;
  std::map<uid_t, Usage> reserved_;
  std::map<uid_t, Bucket> buckets_;
  std::map<uid_t, std::uint64_t> refused_;
};

}  // namespace uffdkit
