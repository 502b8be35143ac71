// Who comes to the manager's sockets beside its clients: operators, who ask it for things, and strangers, who
// want nothing that they could have.
#pragma once

#include <uffdkit/unique_fd.h>

#include <string>
#include <vector>

#include "simulate/managers.h"
#include "simulate/story.h"
#include "wire/control.h"

namespace uffdkit::simulate {

// They share a connection, on which all they ask must be answered in order.
class Operators {
 public:
  Operators(Story& story, const Managers& managers) : story_(story), managers_(managers) {}
  void ask_something();
  void hear();
  // What was asked first of what is not answered; empty: all is.
  std::string unanswered() const { return asked_.empty() ? "" : asked_.front(); }

 private:
  void ask(const control::Request& request, std::string what);

  Story& story_;
  const Managers& managers_;
  UniqueFd connection_;
  std::vector<std::string> asked_;
  control::LineReader reader_{control::kAnswerBytesMax};
};

// They say nothing, half of something, or what nobody understands, and must be shown out.
class Strangers {
 public:
  Strangers(Story& story, const Managers& managers) : story_(story), managers_(managers) {}
  void add();
  void hear();
  bool are_gone() const { return connections_.empty(); }

 private:
  Story& story_;
  const Managers& managers_;
  std::vector<UniqueFd> connections_;
};

}  // namespace uffdkit::simulate
