// uffdkit image create, diff, apply, convert and store-set: what writes images.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "image/output_file.h"
#include "image/process_memory.h"
#include "tool/command.h"
#include "tool/image.h"

namespace uffdkit::tool {
namespace {

struct Options {
  std::string raw;
  std::string parent;
  std::string core;
  pid_t pid = 0;
  bool zstd = false;
  std::string working_set;
  std::vector<std::string> inputs;
  OutputOptions output;
};

// `path` as the parent of an image that is written to `out`. Errors: it lies in another folder.
Result<image::Parent> as_parent(const image::OpenImage& opened, const std::string& path,
                                const std::string& out) {
  if (opened.is_raw())
    return Failure(Error(path + " is raw memory, and has no identity to be known by", EINVAL)
                       .with_remedy("make an image of it first: uffdkit image create --raw"));
  if (opened.layers.size() == image::kLayersMax)
    return Failure(
        Error(fmt::format("{} has {} layers, and no image has more", path, image::kLayersMax), EMLINK)
            .with_remedy("make a whole image of it: uffdkit image apply"));
  std::error_code error;
  for (const auto& layer : opened.layers)
    if (std::filesystem::equivalent(layer->name(), out, error))
      return Failure(Error(fmt::format("{} is part of {}, and would be lost", out, path), EEXIST)
                         .with_remedy("give OUT another name; a diff needs its parents"));
  const std::filesystem::path real = std::filesystem::canonical(path, error);
  const std::filesystem::path folder = std::filesystem::path(out).parent_path();
  if (error || !std::filesystem::equivalent(real.parent_path(), folder.empty() ? "." : folder, error))
    return Failure(Error(fmt::format("{} and its parent {} are to lie in the same folder", out, path), EXDEV)
                       .with_remedy("an image finds its parent by its name, beside itself"));
  return image::Parent{.name = real.filename().string(),
                       .identity = opened.layers.front()->record().identity};
}

Result<image::Written> write(image::MemorySource& source, const std::optional<image::Parent>& parent,
                             std::vector<image::Region> regions, const OutputOptions& output,
                             const std::string& what) {
  ProgressBar bar(what);
  return image::write_image(source, output.path, parent, std::move(regions), output.write_options(bar));
}

Result<image::Written> create_raw(const Options& options) {
  Result<std::shared_ptr<Store>> store = open_file_store(options.raw);
  if (!store) return Failure(std::move(store).error());
  std::error_code error;
  const std::uint64_t bytes = std::filesystem::file_size(options.raw, error);
  if (error) return Failure(Error::from_errno("find the length of " + options.raw, error.value()));
  const auto source = image::memory_of(std::move(*store), bytes);
  return write(*source, std::nullopt, {}, options.output, "create");
}

Result<image::Written> create_sparse(const Options& options) {
  Result<image::OpenImage> parent = make_opener().open(options.parent);
  if (!parent) return Failure(std::move(parent).error());
  Result<image::Parent> named = as_parent(*parent, options.parent, options.output.path);
  if (!named) return Failure(std::move(named).error());
  auto source = image::sparse_difference(parent->store, parent->raw_bytes, options.raw);
  if (!source) return Failure(std::move(source).error());
  return write(**source, *named, parent->layers.front()->record().regions, options.output, "create");
}

Result<image::Written> create_process(image::ProcessMemory memory, const Options& options) {
  const auto source = image::memory_of(memory.store, memory.store->size().value);
  return write(*source, std::nullopt, std::move(memory.regions), options.output, "create");
}

Result<image::Written> create(const Options& options) {
  if (!options.core.empty()) {
    Result<image::ProcessMemory> memory = image::memory_of_core(options.core);
    if (!memory) return Failure(std::move(memory).error());
    return create_process(std::move(*memory), options);
  }
  if (options.pid != 0) {
    const Result<image::StoppedProcess> process = image::StoppedProcess::stop(options.pid);
    if (!process) return Failure(process.error());
    Result<image::ProcessMemory> memory = image::private_memory_of(*process);
    if (!memory) return Failure(std::move(memory).error());
    return create_process(std::move(*memory), options);
  }
  return options.parent.empty() ? create_raw(options) : create_sparse(options);
}

Result<image::Written> diff(const Options& options) {
  image::ImageOpener opener = make_opener();
  Result<image::OpenImage> base = opener.open(options.inputs[0]);
  if (!base) return Failure(std::move(base).error());
  Result<image::Parent> parent = as_parent(*base, options.inputs[0], options.output.path);
  if (!parent) return Failure(std::move(parent).error());
  Result<image::OpenImage> memory = opener.open(options.inputs[1]);
  if (!memory) return Failure(std::move(memory).error());
  std::vector<image::Region> regions;
  if (!memory->is_raw()) regions = memory->layers.front()->record().regions;
  const auto source = image::difference(base->store, memory->store, memory->raw_bytes);
  return write(*source, *parent, std::move(regions), options.output, "diff");
}

// What was recorded of the memory that `opened` shows: of this image, or of a raw file. Errors: nothing, or
// of another.
Result<image::WorkingSet> recorded_of(const image::OpenImage& opened, const std::string& path) {
  Result<std::optional<image::WorkingSet>> own = working_set_of(opened, path);
  if (own) {
    std::optional<image::WorkingSet>& set = *own;
    if (set) return *std::move(set);
    return Failure(Error::from_open("the working set " + path, ENOENT)
                       .with_remedy("record one: uffdkit serve --record"));
  }
  Result<std::optional<image::WorkingSet>> read = image::read_working_set(path);
  if (!read) return Failure(std::move(read).error());
  std::optional<image::WorkingSet>& set = *read;
  const Result<image::Identity> of_raw = image::identity_of(*opened.store);
  if (!of_raw) return Failure(of_raw.error());
  if (!set || !image::check_recorded_of(*set, *of_raw, opened.store->size().value / image::kPageBytes, path))
    return Failure(std::move(own).error());
  set->identity = opened.layers.front()->record().identity;
  // Those are of sessions of the raw file.
  set->runs.clear();
  return *std::move(set);
}

// Whether nothing is lost when `path` is replaced: it is not there, or was stored of the image with this file
// name.
bool may_be_replaced(const std::string& path, const std::string& image_name) {
  std::error_code error;
  const std::uint64_t bytes = std::filesystem::file_size(path, error);
  if (error == std::errc::no_such_file_or_directory) return true;
  const Result<std::shared_ptr<Store>> file = open_file_store(path);
  if (error || !file) return false;
  const auto cache = std::make_shared<image::FrameCache>(ByteCount(0));
  const auto opened = image::ImageFile::open(**file, bytes, *file, cache);
  return opened && (*opened)->record().is_diff && (*opened)->record().parent_name == image_name;
}

// Sets output.path, too.
Result<image::Written> store_set(Options& options) {
  const std::string& path = options.inputs[0];
  Result<image::OpenImage> opened = make_opener().open(path);
  if (!opened) return Failure(std::move(opened).error());
  if (opened->is_raw())
    return Failure(Error(path + " is raw memory, of which any page can be read alone", EINVAL)
                       .with_remedy("nothing is to be gained here: serve it as it is"));
  std::error_code error;
  // It is looked for beside the file itself, whatever links lead there.
  const std::string own = std::filesystem::canonical(path, error).string();
  if (error) return Failure(Error::from_errno("find the folder of " + path, error.value()));
  const std::string own_set = own + image::kWorkingSetSuffix;
  Result<image::WorkingSet> set =
      recorded_of(*opened, options.working_set.empty() ? own_set : options.working_set);
  if (!set) return Failure(std::move(set).error());
  std::optional<image::OutputFile> set_file;
  if (!options.working_set.empty()) {
    Result<image::OutputFile> file = image::OutputFile::create(own_set, options.output.force);
    if (!file) return Failure(std::move(file).error());
    set_file.emplace(*std::move(file));
  }

  options.output.path = own + image::kStoredSetSuffix;
  options.output.force = options.output.force ||
                         may_be_replaced(options.output.path, std::filesystem::path(own).filename().string());
  const Result<image::Parent> parent = as_parent(*opened, own, options.output.path);
  if (!parent) return Failure(parent.error());
  std::vector<bool> kept(set->memory_pages);
  for (const std::uint32_t page : set->pages) kept[page] = true;
  const auto source = image::difference(opened->store, opened->store, opened->raw_bytes, std::move(kept));
  Result<image::Written> written = write(*source, *parent, {}, options.output, "store-set");
  if (written && set_file)
    if (auto named = image::write_working_set(*set, *std::move(set_file)); !named)
      return Failure(
          std::move(named).error().within(options.output.path + " is made, but not the working set"));
  return written;
}

Result<image::Written> apply(const Options& options) {
  Result<image::OpenImage> opened = make_opener().open(options.inputs[0]);
  if (!opened) return Failure(std::move(opened).error());
  std::vector<image::Region> regions;
  if (!opened->is_raw()) regions = opened->layers.front()->record().regions;
  const auto source = image::memory_of(opened->store, opened->raw_bytes);
  return write(*source, std::nullopt, std::move(regions), options.output, "apply");
}

Result<image::Written> convert(const Options& options) {
  const std::string& path = options.inputs[0];
  if (options.zstd) {
    auto source = image::memory_from_zstd(path);
    if (!source) return Failure(std::move(source).error());
    return write(**source, std::nullopt, {}, options.output, "convert");
  }
  Result<image::OpenImage> opened = make_opener().open(path);
  if (!opened) return Failure(std::move(opened).error());
  if (opened->is_raw() || !opened->layers.front()->record().is_diff) return apply(options);
  const image::Record& record = opened->layers.front()->record();
  Result<image::Parent> parent =
      as_parent({.store = opened->store, .layers = {opened->layers.begin() + 1, opened->layers.end()}},
                opened->layers[1]->name(), options.output.path);
  if (!parent) return Failure(std::move(parent).error());
  const auto source = image::memory_with_runs(opened->store, opened->raw_bytes, record.runs);
  return write(*source, *parent, record.regions, options.output, "convert");
}

// A subcommand whose work is `make`, with so many inputs before OUT.
CLI::App* add_command(CLI::App& image, const std::string& name, const std::string& description,
                      const std::vector<std::pair<std::string, std::string>>& inputs,
                      const std::shared_ptr<Options>& options,
                      const std::function<Result<image::Written>(const Options&)>& make, int& exit_code) {
  CLI::App* command = image.add_subcommand(name, description);
  options->inputs.resize(inputs.size());
  for (std::size_t i = 0; i < inputs.size(); ++i)
    command->add_option(inputs[i].first, options->inputs[i], inputs[i].second)->required();
  add_output_options(*command, options->output);
  command->callback(
      [options, make, &exit_code] { exit_code = report_written(make(*options), options->output); });
  return command;
}

}  // namespace

void add_image_create(CLI::App& image, int& exit_code) {
  const auto options = std::make_shared<Options>();
  CLI::App* command = add_command(image, "create", "Make an image of memory", {}, options, create, exit_code);
  CLI::App* source = command->add_option_group("source", "Where the memory is; one of");
  source->require_option(1);
  CLI::Option* raw =
      source->add_option("--raw", options->raw, "FILE: a raw memory file, such as Firecracker's");
  source->add_option("--core", options->core, "FILE: an ELF core file");
  source
      ->add_option("--pid", options->pid,
                   "PID: a process that runs; it stands still meanwhile, and goes on in any case")
      ->check(CLI::Range(1, 1 << 22));
  command
      ->add_option("--parent", options->parent,
                   "IMAGE: the FILE of --raw is a sparse diff, whose holes are this image's pages")
      ->needs(raw);
}

void add_image_diff(CLI::App& image, int& exit_code) {
  add_command(image, "diff", "Make an image of what differs between two",
              {{"BASE", "The image that it is a diff of; in the same folder as OUT"},
               {"MEMORY", "What OUT shows: an image or a raw memory file"}},
              std::make_shared<Options>(), diff, exit_code);
}

void add_image_store_set(CLI::App& image, int& exit_code) {
  CLI::App* command = image.add_subcommand(
      "store-set",
      "Store the pages of an image's working set for themselves, beside the image, for its sessions");
  const auto options = std::make_shared<Options>();
  options->inputs.resize(1);
  command->add_option("IMAGE", options->inputs[0], "The image, of which a working set was recorded")
      ->required();
  command->add_option("--working-set", options->working_set,
                      "SET: one that was recorded of a raw file with the same memory; it becomes IMAGE.ws");
  add_frame_options(*command, options->output);
  command->add_flag("--force", options->output.force,
                    "Replace IMAGE.ws.img also if it is something else, and IMAGE.ws by SET if it is there");
  command->callback(
      [options, &exit_code] { exit_code = report_written(store_set(*options), options->output); });
}

void add_image_apply(CLI::App& image, int& exit_code) {
  add_command(image, "apply", "Make a whole image of a diff and its parents",
              {{"IMAGE", "The diff; its parents lie in the same folder"}}, std::make_shared<Options>(), apply,
              exit_code);
}

void add_image_convert(CLI::App& image, int& exit_code) {
  const auto options = std::make_shared<Options>();
  CLI::App* command =
      add_command(image, "convert", "Make an image anew, with another frame size or level; a diff stays one",
                  {{"IMAGE", "An image, a raw memory file, or with --zstd one that zstd compressed"}},
                  options, convert, exit_code);
  command->add_flag("--zstd", options->zstd, "IMAGE is raw memory that zstd or another program compressed");
}

}  // namespace uffdkit::tool
