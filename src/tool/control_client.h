// Asks a running manager by its control socket.
#pragma once

#include <uffdkit/error.h>

#include <nlohmann/json.hpp>
#include <string>

#include "wire/control.h"

namespace uffdkit::tool {

// Sends one request and waits for its answer, some seconds. Errors: nobody listens; no answer; the manager's
// own.
Result<nlohmann::json> ask_manager(const std::string& socket, const control::Request& request);

}  // namespace uffdkit::tool
