// Asks a running manager by its control socket.
#pragma once

#include <uffdkit/error.h>

#include <nlohmann/json.hpp>
#include <string>

#include "wire/control.h"

namespace uffdkit::tool {

// Sends one request and waits for its answer, some seconds. What only asks, or can be asked twice, is asked
// again when the worker that was asked has been replaced. Errors: nobody listens; no answer (is_lost(): the
// connection ended before it came); the manager's own.
Result<nlohmann::json> ask_manager(const std::string& socket, const control::Request& request);

}  // namespace uffdkit::tool
