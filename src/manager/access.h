// Who may have which image, and who may control the manager: rules over what a socket tells of its peer.
//
// Root and the manager's own user may have everything; a rule adds somebody else. Rules say nothing of what
// the manager can open: that is up to the modes of files. Threads: any, once the rules are complete.
#pragma once

#include <sys/types.h>
#include <uffdkit/error.h>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "wire/unix_socket.h"

namespace uffdkit {

// One of those whom a rule names.
struct Subject {
  enum class Kind : std::uint8_t { anyone, user, group };
  Kind kind = Kind::anyone;
  id_t id = 0;  // of the user or group
  bool operator==(const Subject&) const = default;
};

// Whether names of users and groups are looked up. That may block, and load libraries.
enum class Names : std::uint8_t { look_up, refuse };

// WHO of the command line: "anyone", "user:NAME", "user:NUMBER", "group:NAME", "group:NUMBER", or several of
// them with commas between. Errors: anything else; a name that nobody has.
Result<std::vector<Subject>> parse_subjects(std::string_view who, Names names);
// The same with numbers, as parse_subjects() reads it.
std::string to_string(std::span<const Subject> subjects);
// Whether one of them is this peer: its user, or any of its groups.
bool has_peer(std::span<const Subject> subjects, const Peer& peer);

class AccessRules {
 public:
  // `manager`: the user that the manager runs as.
  explicit AccessRules(uid_t manager) : manager_(manager) {}

  // "WHO=IMAGES": they may have the images whose name matches the pattern IMAGES, of glob(7) but that `*`,
  // `?` and `[]` match "/" too. Errors: not of that form; see parse_subjects().
  Result<void> allow(std::string_view rule);
  // "WHO": they may use the control socket. Errors: see parse_subjects().
  Result<void> allow_control(std::string_view who);

  bool may_have(const Peer& peer, const std::string& image) const;
  // Whether there is any image, by its name, that the peer may have.
  bool may_have_some(const Peer& peer) const;
  bool may_control(const Peer& peer) const;

 private:
  struct Rule {
    std::vector<Subject> who;
    std::string images;
  };
  bool may_have_all(const Peer& peer) const { return peer.uid == 0 || peer.uid == manager_; }

  const uid_t manager_;
  std::vector<Rule> rules_;
  std::vector<Subject> controllers_;
};

}  // namespace uffdkit
