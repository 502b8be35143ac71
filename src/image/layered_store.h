// The memory that an image shows, put together from the frames of its files.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>

#include <memory>
#include <string>
#include <vector>

#include "image/image_file.h"

namespace uffdkit::image {

// `layers` are the image's file, its parent and so on, the last one whole. Each page is resolved here, once:
// what is read later goes to the one file that has it. Errors: a page is said to be the parent's that it does
// not have. `layers` has at least one file, and at most kLayersMax and a stored set.
Result<std::shared_ptr<Store>> make_layered_store(std::string name,
                                                  std::vector<std::shared_ptr<ImageFile>> layers);

}  // namespace uffdkit::image
