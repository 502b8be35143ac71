// What the manager answers who asks about it: docs/protocol.md, "Control protocol".
#include "manager/manager_impl.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>

#include "manager/sandbox.h"

namespace uffdkit {
namespace {

// What the sessions take of an answer's bytes at most, which leaves as much again for some thousand
// listeners; one session but for its image's name; and a byte of that, written as JSON.
constexpr std::size_t kSessionsJsonBytesMax = control::kAnswerBytesMax / 2;
constexpr std::size_t kSessionJsonBytes = 1000;
constexpr std::size_t kEscapedBytes = 6;

std::string_view to_string(SharingMode mode) {
  switch (mode) {
    case SharingMode::none:
      return "none";
    case SharingMode::page_cache:
      return "page cache";
    case SharingMode::resolve:
      return "resolve";
  }
  return "?";
}

std::string_view to_string(SessionKind kind) {
  switch (kind) {
    case SessionKind::firecracker:
      return "firecracker";
    case SessionKind::native:
      return "native";
    case SessionKind::fork:
      return "fork";
  }
  return "?";
}

nlohmann::json cache_to_json(const image::FrameCache& cache) {
  const image::FrameCache::Statistics statistics = cache.statistics();
  return {{"bytes", statistics.bytes},   {"bytes_max", cache.bytes_max().value},
          {"frames", statistics.frames}, {"hits", statistics.hits},
          {"joined", statistics.joined}, {"decoded", statistics.decoded},
          {"failed", statistics.failed}};
}

}  // namespace

nlohmann::json counters_json(const SessionStatus& status) {
  return {{"faults", status.faults},
          {"faults_merged", status.faults_merged},
          {"events", status.events},
          {"pages_copied", status.pages_copied},
          {"pages_zeroed", status.pages_zeroed},
          {"pages_shared", status.pages_shared},
          {"pages_removed", status.pages_removed},
          {"pages_poisoned", status.pages_poisoned},
          {"pages_outside", status.pages_outside},
          {"bytes_read", status.bytes_read},
          {"fetches", status.fetches},
          {"retries", status.retries},
          {"read_retries", status.read_retries},
          {"read_errors", status.read_errors}};
}

void add_counters(nlohmann::json& total, const nlohmann::json& more) {
  for (const auto& [name, count] : more.items())
    total[name] = total.value(name, std::uint64_t{0}) + count.get<std::uint64_t>();
}

nlohmann::json Manager::Impl::listeners() {
  nlohmann::json list = nlohmann::json::array();
  for (const auto& [path, listener] : listeners_) {
    nlohmann::json entry = {{"socket", path}, {"kind", control::to_string(listener.kind)}};
    if (!listener.image.empty()) entry["image"] = listener.image;
    if (!listener.allowed.empty()) entry["allow"] = to_string(listener.allowed);
    list.push_back(std::move(entry));
  }
  return list;
}

std::vector<SessionStatus> Manager::Impl::statuses() {
  std::vector<SessionStatus> statuses = engine_->sessions();
  // Those that have left the engine meanwhile are not among the ended ones yet.
  const std::lock_guard lock(unheard_mutex_);
  for (const auto& [id, status] : unheard_)
    if (std::ranges::find(statuses, id, &SessionStatus::id) == statuses.end()) statuses.push_back(status);
  return statuses;
}

nlohmann::json Manager::Impl::users() {
  struct User {
    Usage usage;
    std::uint64_t refused = 0;
  };
  std::map<uid_t, User> users;
  for (const SessionStatus& status : statuses()) {
    const auto found = sessions_.find(status.id);
    if (found != sessions_.end())
      users[found->second.uid].usage +=
          {.sessions = 1, .regions = status.regions, .memory_bytes = status.memory_bytes};
  }
  for (const auto& [user, times] : quotas_.refused()) users[user].refused = times;
  nlohmann::json list = nlohmann::json::array();
  for (const auto& [id, user] : users)
    list.push_back({{"uid", id},
                    {"sessions", user.usage.sessions},
                    {"regions", user.usage.regions},
                    {"memory_bytes", user.usage.memory_bytes},
                    {"refused_by_quota", user.refused}});
  return list;
}

nlohmann::json Manager::Impl::status() {
  nlohmann::json sessions = nlohmann::json::array();
  nlohmann::json total = ended_counters_;
  std::size_t bytes = 0;
  std::uint64_t left_out = 0;
  for (const SessionStatus& status : statuses()) {
    const auto found = sessions_.find(status.id);
    if (found == sessions_.end()) continue;
    const SessionInfo& info = found->second;
    nlohmann::json entry = counters_json(status);
    add_counters(total, entry);
    bytes += kSessionJsonBytes + kEscapedBytes * info.image.size();
    if (bytes > kSessionsJsonBytesMax) {
      ++left_out;
      continue;
    }
    entry["id"] = status.id;
    if (status.parent != 0) entry["parent"] = status.parent;
    entry["pid"] = info.pid;
    entry["uid"] = info.uid;
    entry["image"] = info.image;
    entry["kind"] = to_string(info.kind);
    entry["draining"] = info.draining;
    entry["connected"] = info.connection != nullptr;
    entry["sharing"] = to_string(status.sharing);
    entry["memory_bytes"] = status.memory_bytes;
    entry["regions"] = status.regions;
    if (info.recording) entry["recorded"] = info.working_set->path();
    if (options_.background != Background::off) entry["pages_background"] = status.pages_background;
    if (info.prefetches)
      entry["prefetch"] = {{"pages", status.pages_prefetched},
                           {"late", status.prefetch_late},
                           {"missed", status.prefetch_missed},
                           {"left_out", status.prefetch_left_out},
                           {"left_out_used", status.prefetch_left_out_used},
                           {"given_up", status.prefetch_given_up}};
    entry["pending"] = status.pending;
    entry["paused"] = status.paused;
    if (status.oldest_pending_ns > 0) {
      nlohmann::json oldest = {
          {"address", fmt::format("{:#x}", status.oldest_page)},
          {"why", to_string(status.oldest_why)},
          {"late", options_.watchdog_ms > 0 && status.oldest_pending_ns > options_.watchdog_ms * 1'000'000}};
      if (status.oldest_offset != SessionWaiting::kNoOffset) oldest["offset"] = status.oldest_offset;
      oldest["text"] = describe_oldest(status);
      entry["oldest_pending"] = std::move(oldest);
    }
    entry["oldest_pending_us"] = status.oldest_pending_ns / 1000;
    sessions.push_back(std::move(entry));
  }
  nlohmann::json shared = nlohmann::json::array();
  for (const auto& image : images_->shared_memory())
    shared.push_back({{"image", image->lane()->store()->name()},
                      {"bytes", image->size().value},
                      {"filled_pages", image->filled_pages()}});
  nlohmann::json answer = {{"pid", ::getpid()}, {"worker", {{"pid", ::getpid()}}}};
  if (options_.records != nullptr) {
    const Records::Shared& kept = options_.records->shared();
    answer["pid"] = kept.keeper.load();
    answer["keeper"] = {{"pid", kept.keeper.load()}};
    answer["standby"] = {{"pid", kept.standby.load()}};
    answer["takeovers"] = kept.workers - 1;
    answer["upgrades"] = kept.upgrades.load();
    answer["upgrades_failed"] = kept.upgrades_failed.load();
  }
  answer.update({{"uptime_ms", (options_.threads.now_ns() - started_ns_) / 1'000'000},
                 {"ending", ending_},
                 {"draining",
                  std::ranges::count_if(sessions_, [](const auto& entry) { return entry.second.draining; })},
                 {"listeners", listeners()},
                 {"sessions", std::move(sessions)},
                 {"shared_images", std::move(shared)},
                 {"image_cache", cache_to_json(images_->cache())},
                 {"reads_by", options_.readers && options_.readers->has_any() ? "io_uring" : "threads"},
                 {"sessions_left_out", left_out},
                 {"late_faults", watchdog_.late_faults()},
                 {"sessions_not_taken_up", not_taken_up_.size()},
                 {"sandbox", confinement()},
                 {"users", users()},
                 {"user_limits",
                  {{"sessions", options_.user_limits.sessions},
                   {"regions", options_.user_limits.regions},
                   {"memory_bytes", options_.user_limits.memory_bytes},
                   {"requests_per_second", options_.user_limits.requests_per_second}}},
                 {"sessions_ended", sessions_ended_},
                 {"clients_refused", clients_refused_},
                 {"total", std::move(total)}});
  return answer;
}

}  // namespace uffdkit
