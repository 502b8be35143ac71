#include "manager/access.h"

#include <fmt/format.h>
#include <fnmatch.h>
#include <grp.h>
#include <pwd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <optional>

namespace uffdkit {
namespace {

// Entries of users and groups with their strings; a group has its members' names in it.
constexpr std::size_t kEntryBytesMax = std::size_t{1} << 20;
// -1 stands for no user in the kernel's interface.
constexpr id_t kIdMax = 0xfffffffe;

Error not_a_subject(std::string_view text) {
  return Error(fmt::format("\"{}\" is neither anyone, nor user:NAME, nor group:NAME", text), EINVAL)
      .with_remedy("a number will do for NAME; several are separated by commas");
}

std::optional<id_t> number(std::string_view text) {
  id_t id = 0;
  const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), id);
  if (failed != std::errc() || end != text.data() + text.size() || id > kIdMax) return std::nullopt;
  return id;
}

// What getpwnam_r(3) or getgrnam_r(3) finds, with a buffer that grows as they ask for.
template <class Entry, class Find>
std::optional<Entry> find_entry(const std::string& name, Find find) {
  std::string buffer(1024, '\0');
  while (true) {
    Entry entry{};
    Entry* found = nullptr;
    const int failed = find(name.c_str(), &entry, buffer.data(), buffer.size(), &found);
    if (failed == ERANGE && buffer.size() < kEntryBytesMax) {
      buffer.resize(buffer.size() * 2);
      continue;
    }
    if (found == nullptr) return std::nullopt;
    return entry;
  }
}

std::optional<id_t> look_up(Subject::Kind kind, const std::string& name) {
  if (kind == Subject::Kind::user) {
    const auto entry = find_entry<passwd>(name, getpwnam_r);
    return entry ? std::optional<id_t>(entry->pw_uid) : std::nullopt;
  }
  const auto entry = find_entry<group>(name, getgrnam_r);
  return entry ? std::optional<id_t>(entry->gr_gid) : std::nullopt;
}

Result<Subject> parse_subject(std::string_view text, Names names) {
  if (text == "anyone") return Subject{};
  const std::size_t colon = text.find(':');
  const std::string_view kind_text = text.substr(0, colon);
  if (colon == std::string_view::npos || colon + 1 == text.size() ||
      (kind_text != "user" && kind_text != "group"))
    return Failure(not_a_subject(text));
  const Subject::Kind kind = kind_text == "user" ? Subject::Kind::user : Subject::Kind::group;
  const std::string name(text.substr(colon + 1));
  if (const std::optional<id_t> id = number(name)) return Subject{.kind = kind, .id = *id};
  if (names == Names::refuse) return Failure(Error(fmt::format("{} is not a number", text), EINVAL));
  if (const std::optional<id_t> id = look_up(kind, name)) return Subject{.kind = kind, .id = *id};
  return Failure(Error(fmt::format("there is no {} named {}", kind_text, name), ENOENT)
                     .with_remedy(fmt::format("'getent {}' lists them; a number will do, too",
                                              kind == Subject::Kind::user ? "passwd" : "group")));
}

}  // namespace

Result<std::vector<Subject>> parse_subjects(std::string_view who, Names names) {
  std::vector<Subject> subjects;
  while (true) {
    const std::size_t comma = who.find(',');
    Result<Subject> subject = parse_subject(who.substr(0, comma), names);
    if (!subject) return Failure(std::move(subject).error());
    subjects.push_back(*subject);
    if (comma == std::string_view::npos) return subjects;
    who.remove_prefix(comma + 1);
  }
}

std::string to_string(std::span<const Subject> subjects) {
  std::string text;
  for (const Subject& subject : subjects) {
    if (!text.empty()) text += ',';
    if (subject.kind == Subject::Kind::anyone) {
      text += "anyone";
    } else {
      text += fmt::format("{}:{}", subject.kind == Subject::Kind::user ? "user" : "group", subject.id);
    }
  }
  return text;
}

bool has_peer(std::span<const Subject> subjects, const Peer& peer) {
  return std::ranges::any_of(subjects, [&](const Subject& subject) {
    switch (subject.kind) {
      case Subject::Kind::anyone:
        return true;
      case Subject::Kind::user:
        return subject.id == peer.uid;
      case Subject::Kind::group:
        return subject.id == peer.gid || std::ranges::find(peer.groups, subject.id) != peer.groups.end();
    }
    return false;
  });
}

Result<void> AccessRules::allow(std::string_view rule) {
  const std::size_t equals = rule.find('=');
  if (equals == std::string_view::npos || equals + 1 == rule.size())
    return Failure(Error(fmt::format("the rule \"{}\" is not of the form WHO=IMAGES", rule), EINVAL));
  Result<std::vector<Subject>> who = parse_subjects(rule.substr(0, equals), Names::look_up);
  if (!who) return Failure(std::move(who).error().within(fmt::format("the rule \"{}\"", rule)));
  rules_.push_back({.who = std::move(*who), .images = std::string(rule.substr(equals + 1))});
  return {};
}

Result<void> AccessRules::allow_control(std::string_view who) {
  Result<std::vector<Subject>> subjects = parse_subjects(who, Names::look_up);
  if (!subjects) return Failure(std::move(subjects).error());
  controllers_.insert(controllers_.end(), subjects->begin(), subjects->end());
  return {};
}

bool AccessRules::may_have(const Peer& peer, const std::string& image) const {
  if (may_have_all(peer)) return true;
  return std::ranges::any_of(rules_, [&](const Rule& rule) {
    return ::fnmatch(rule.images.c_str(), image.c_str(), 0) == 0 && has_peer(rule.who, peer);
  });
}

bool AccessRules::may_have_some(const Peer& peer) const {
  return may_have_all(peer) ||
         std::ranges::any_of(rules_, [&](const Rule& rule) { return has_peer(rule.who, peer); });
}

bool AccessRules::may_control(const Peer& peer) const {
  return may_have_all(peer) || has_peer(controllers_, peer);
}

}  // namespace uffdkit
