// uffdkit status: what a manager is doing.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <ranges>
#include <string>
#include <vector>

#include "tool/command.h"
#include "tool/control_client.h"

namespace uffdkit::tool {
namespace {

std::string bytes_text(std::uint64_t bytes) {
  constexpr std::uint64_t kGiB = 1u << 30;
  constexpr std::uint64_t kMiB = 1u << 20;
  if (bytes >= kGiB) return fmt::format("{:.1f} GiB", static_cast<double>(bytes) / static_cast<double>(kGiB));
  return fmt::format("{:.1f} MiB", static_cast<double>(bytes) / static_cast<double>(kMiB));
}

std::uint64_t number(const nlohmann::json& object, const char* key) {
  return object.value(key, std::uint64_t{0});
}

// A line of the table: a session, below the one whose client has forked.
struct Line {
  const nlohmann::json* session;
  std::size_t depth;
};

// Children follow their parents. One whose parent has ended, or is not listed, is at the top.
std::vector<Line> as_tree(const nlohmann::json& sessions) {
  std::map<std::uint64_t, std::vector<const nlohmann::json*>> children;
  for (const auto& session : sessions) children.try_emplace(number(session, "id"));
  std::vector<Line> to_do;
  for (const auto& session : sessions) {
    const std::uint64_t parent = number(session, "parent");
    // A child's number is the higher one, so that nothing is its own ancestor.
    const bool is_below = parent < number(session, "id") && children.contains(parent);
    if (is_below) {
      children[parent].push_back(&session);
    } else {
      to_do.push_back({&session, 0});
    }
  }
  std::ranges::reverse(to_do);
  std::vector<Line> lines;
  while (!to_do.empty()) {
    const Line line = to_do.back();
    to_do.pop_back();
    lines.push_back(line);
    for (const nlohmann::json* child : children[number(*line.session, "id")] | std::views::reverse)
      to_do.push_back({child, line.depth + 1});
  }
  return lines;
}

// How far a child is moved in. From so many generations on the column would push the others off the screen.
std::string indented(std::uint64_t id, std::size_t depth) {
  constexpr std::size_t kDepthShown = 10;
  return std::string(2 * std::min(depth, kDepthShown), ' ') + std::to_string(id);
}

void print(const nlohmann::json& status) {
  fmt::print("manager pid {}, up {} s{}\n", number(status, "pid"), number(status, "uptime_ms") / 1000,
             status.value("ending", false) ? ", ending" : "");
  if (status.contains("keeper"))
    fmt::print("worker pid {}, after {} takeovers and {} upgrades\n", number(status.at("worker"), "pid"),
               number(status, "takeovers"), number(status, "upgrades"));
  for (const auto& listener : status.at("listeners"))
    fmt::print("listens {} {}{}\n", listener.value("kind", ""), listener.value("socket", ""),
               listener.contains("image") ? " image " + listener.value("image", "") : "");
  if (const auto& sandbox = status.at("sandbox"); !sandbox.value("system_calls_filtered", false))
    fmt::print("not sandboxed: its system calls are not filtered (--no-sandbox)\n");
  const auto& sessions = status.at("sessions");
  const std::uint64_t left_out = number(status, "sessions_left_out");
  fmt::print("sessions {}, ended {}, clients refused {}\n", sessions.size() + left_out,
             number(status, "sessions_ended"), number(status, "clients_refused"));
  if (const std::uint64_t waiting = number(status, "sessions_not_taken_up"); waiting != 0)
    fmt::print("{} more sessions cannot be taken up yet, and their clients wait; the log says why\n",
               waiting);
  for (const auto& image : status.at("shared_images"))
    fmt::print("shares {} of {} of {}\n", bytes_text(number(image, "filled_pages") * 4096),
               bytes_text(number(image, "bytes")), image.value("image", ""));
  if (const nlohmann::json& cache = status.at("image_cache"); number(cache, "decoded") != 0)
    fmt::print("keeps {} of {} of decompressed images: {} frames, {} hits, {} decompressed, {} damaged\n",
               bytes_text(number(cache, "bytes")), bytes_text(number(cache, "bytes_max")),
               number(cache, "frames"), number(cache, "hits"), number(cache, "decoded"),
               number(cache, "failed"));
  if (sessions.empty()) return;
  const std::vector<Line> lines = as_tree(sessions);
  std::size_t width = 6;
  for (const auto& [session, depth] : lines)
    width = std::max(width, indented(number(*session, "id"), depth).size());
  fmt::print("\n{:<{}} {:>8} {:12} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7} {:>10}  {}\n", "id",
             width, "pid", "kind", "memory", "faults", "copied", "shared", "zero", "removed", "failed",
             "pending", "oldest", "image");
  for (const auto& [line, depth] : lines) {
    const nlohmann::json& session = *line;
    fmt::print("{:<{}} {:>8} {:12} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7} {:>7} us  {}\n",
               indented(number(session, "id"), depth), width, number(session, "pid"),
               session.value("kind", ""), bytes_text(number(session, "memory_bytes")),
               number(session, "faults"), number(session, "pages_copied"), number(session, "pages_shared"),
               number(session, "pages_zeroed"), number(session, "pages_removed"),
               number(session, "pages_poisoned"), number(session, "pending"),
               number(session, "oldest_pending_us"), session.value("image", ""));
  }
  for (const auto& session : sessions)
    if (session.contains("oldest_pending") && session.at("oldest_pending").value("late", false))
      fmt::print("session {}: {}\n", number(session, "id"), session.at("oldest_pending").value("text", ""));
  for (const auto& session : sessions)
    if (session.contains("prefetch")) {
      const nlohmann::json& prefetch = session.at("prefetch");
      fmt::print(
          "session {}: {} pages of the working set brought, {} asked for before, {} that are not in it{}\n",
          number(session, "id"), number(prefetch, "pages"), number(prefetch, "late"),
          number(prefetch, "missed"),
          prefetch.value("given_up", false) ? "; rests for the sake of faults" : "");
    }
  for (const auto& session : sessions)
    if (session.value("paused", false))
      fmt::print(
          "session {}: its client is stopped over a page that cannot be read; when it can be, 'uffdkit "
          "resume {}' lets it go on\n",
          number(session, "id"), number(session, "id"));
  for (const auto& session : sessions)
    if (const std::uint64_t retries = number(session, "read_retries"); retries != 0)
      fmt::print("session {}: {} reads of its image were tried again, {} pages could not be read\n",
                 number(session, "id"), retries, number(session, "read_errors"));
  if (left_out != 0) fmt::print("{} more sessions are not listed\n", left_out);
}

}  // namespace

void add_status(CLI::App& app, int& exit_code) {
  CLI::App* command = app.add_subcommand("status", "Show a manager's sessions and what they were served");
  struct Options {
    std::string control = default_control_socket();
    bool json = false;
  };
  const auto options = std::make_shared<Options>();
  command->add_option("--control", options->control, "The manager's control socket")->capture_default_str();
  command->add_flag("--json", options->json, "Print all of it as JSON");
  command->callback([options, &exit_code] {
    const Result<nlohmann::json> status = ask_manager(options->control, control::Status{});
    if (!status) {
      exit_code = report(status.error());
    } else if (options->json) {
      fmt::print("{}\n", status->dump(2));
    } else {
      print(*status);
    }
  });
}

}  // namespace uffdkit::tool
