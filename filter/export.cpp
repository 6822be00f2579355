#include "export.hpp"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <utility>

namespace qcowcache {

namespace {
constexpr std::ptrdiff_t most_with_clusters = 64;
} // namespace

Export::~Export() = default;

std::shared_ptr<Image> Export::make_image(const Capabilities& capabilities) {
  const bool shared = capabilities.can_multi_conn;
  Images& images = shared ? shared_ : own_;
  images.reserve(images.size() + 1); // nothing below a new image can fail
  auto image = std::make_shared<Image>(name_, settings_, ranges_, budget_);
  image->begin(
      capabilities, shared_from_this(),
      [this](const Image& by, const ByteRange& range) { changed_storage(by, range); },
      shared && look_at_all_,
      [this] {
        const std::lock_guard lock(mutex_);
        return has_one_writer();
      });
  images.insert(images.begin(), image);
  look_at_all_ = look_at_all_ && !shared;
  ++version_;
  return image;
}

void Export::remove(const std::shared_ptr<Image>& image) {
  image->end();
  const auto shared = std::ranges::find(shared_, image);
  // Last: the caller's reference may be the list's own.
  if (shared != shared_.end())
    shared_.erase(shared);
  else
    std::erase(own_, image);
  ++version_;
}

Export::Comparison Export::compare(Images candidates, Handle& handle,
                                   const std::shared_ptr<Image>& present,
                                   const Image::Request& request) {
  Comparison found;
  // The one that it uses already comes first.
  std::stable_partition(candidates.begin(), candidates.end(),
                        [&](const auto& each) { return each == present; });
  for (const std::shared_ptr<Image>& candidate : candidates) {
    handle.count_in(candidate->cache().counters());
    found.standing = candidate->standing(handle, request);
    if (found.standing != Image::Standing::stranger) {
      found.image = candidate;
      return found;
    }
    found.others.push_back(candidate);
  }
  return found;
}

std::shared_ptr<Image> Export::enter(const std::shared_ptr<Handle>& handle,
                                     const std::shared_ptr<Image>& present,
                                     const Image::Request& request) {
  const Capabilities& capabilities = handle->capabilities();
  for (;;) {
    Images candidates;
    std::uint64_t version = 0;
    if (capabilities.can_multi_conn) {
      const std::lock_guard lock(mutex_);
      candidates = shared_;
      version = version_;
    } else if (present) {
      return present;
    }
    Comparison found = compare(std::move(candidates), *handle, present, request);

    const std::lock_guard lock(mutex_);
    const bool outdated = capabilities.can_multi_conn && version_ != version;
    // Where it cannot be founded somebody has written meanwhile: there is something to compare now.
    const bool settled = !outdated && (found.standing != Image::Standing::founder ||
                                       found.image->cache().found_anew(handle->identity()));
    if (settled) {
      version_ += found.standing == Image::Standing::founder ? 1 : 0;
      for (const std::shared_ptr<Image>& other : found.others) {
        if (!other->is_used()) {
          other->report_lost(); // the disk that these bytes are for is gone
          remove(other);
        }
      }
      if (!found.image) {
        if (!found.others.empty() && !shared_.empty() && settings_.report_disk)
          settings_.report_disk(name_, "a connection sees another disk than others do that are "
                                       "still connected: it shares nothing with them");
        found.image = make_image(capabilities);
        found.standing = Image::Standing::trusted;
      }
      if (found.image != present) {
        // Who has compared himself with what is left has somebody to be compared with now.
        version_ += found.image->is_used() ? 0 : 1;
        try {
          found.image->join(handle);
        } catch (...) {
          leave_image(*handle, found.image); // the present one it still uses
          throw;
        }
        if (present)
          leave_image(*handle, present);
      }
      if (found.standing != Image::Standing::guest)
        found.image->cache().trust(handle->identity());
      return found.image;
    }
  }
}

std::optional<RangeLock::Owned> Export::arrive(const ByteRange& range, bool in_line_of_cache) {
  if (in_line_of_cache && arrivals_.idle())
    return std::nullopt;
  return arrivals_.ask(range);
}

void Export::wait_turn(const RangeLock::Owned& place) const {
  constexpr std::chrono::milliseconds between_questions{50};
  while (!place.wait_until(std::chrono::steady_clock::now() + between_questions)) {
    if (settings_.interrupted && settings_.interrupted())
      throw std::system_error(ESHUTDOWN, std::generic_category(), "the connection has ended");
  }
}

void Export::leave_image(const Handle& handle, const std::shared_ptr<Image>& image) {
  image->leave(handle);
  const bool shared = std::ranges::find(shared_, image) != shared_.end();
  if (image->is_used())
    return;
  if (!shared)
    image->report_lost_to_clients();
  if (!shared || image->owes() == Image::Debt::none)
    remove(image);
}

void Export::leave(const Handle& handle, const std::shared_ptr<Image>& present) {
  const std::lock_guard lock(mutex_);
  if (present)
    leave_image(handle, present);
}

void Export::changed_storage(const Image& by, const ByteRange& range) const {
  Images others;
  bool shares = false;
  {
    const std::lock_guard lock(mutex_);
    const Images& any = shared_.empty() ? own_ : shared_;
    if (shared_.size() + own_.size() == 1 && any.front().get() == &by)
      return;
    shares = std::ranges::any_of(shared_, [&](const auto& each) { return each.get() == &by; });
    others = shared_;
    others.insert(others.end(), own_.begin(), own_.end());
  }
  for (const std::shared_ptr<Image>& image : others) {
    if (image.get() != &by) {
      image->cache().forget(range);
      if (!shares)
        image->cache().forget_witnesses(range); // nobody has found that they are different disks
      if (const std::shared_ptr<Verifier> verifier = image->verifier())
        verifier->forget(range);
    }
  }
}

bool Export::has_one_writer() const {
  const auto may_write = [](const std::shared_ptr<Image>& image) {
    return image->is_used() || image->owes() == Image::Debt::bytes;
  };
  return std::ranges::count_if(shared_, may_write) + std::ranges::count_if(own_, may_write) <= 1;
}

Image::Debt Export::owes() const {
  const std::lock_guard lock(mutex_);
  Image::Debt most = Image::Debt::none;
  for (const std::shared_ptr<Image>& image : shared_)
    most = std::max(most, image->owes());
  return most;
}

void Export::forget() {
  const std::lock_guard lock(mutex_);
  while (!shared_.empty())
    remove(shared_.front());
}

void Export::report_left() const {
  const std::lock_guard lock(mutex_);
  for (const Images* const images : {&shared_, &own_}) {
    for (const std::shared_ptr<Image>& image : *images)
      image->report_lost();
  }
}

std::shared_ptr<Export> Exports::visit(const std::string& name) {
  const std::lock_guard lock(mutex_);
  auto found = exports_.find(name);
  if (found == exports_.end())
    found =
        exports_
            .emplace(name, Entry{std::make_shared<Export>(name, settings_, budget_, forgotten_)})
            .first;
  ++found->second.visitors;
  return found->second.of;
}

void Exports::leave(const std::shared_ptr<Export>& visited, const Handle& handle,
                    const std::shared_ptr<Image>& image) {
  const std::lock_guard lock(mutex_);
  visited->leave(handle, image);
  const auto entry =
      std::ranges::find_if(exports_, [&](const auto& each) { return each.second.of == visited; });
  --entry->second.visitors;
  if (entry->second.visitors > 0)
    return;
  const Image::Debt owed = visited->owes();
  const bool clusters = owed == Image::Debt::clusters;
  if (owed == Image::Debt::bytes || (clusters && may_keep_clusters()))
    return;
  visited->forget();
  if (clusters && !std::exchange(forgotten_, true))
    settings_.report_damage(
        entry->first, "too many exports have compressed clusters that cannot be read: from here on "
                      "all clusters of an export are checked whenever it is opened anew");
  exports_.erase(entry);
}

bool Exports::may_keep_clusters() const {
  const auto for_clusters_only = [](const auto& entry) {
    return entry.second.visitors == 0 && entry.second.of->owes() == Image::Debt::clusters;
  };
  return std::ranges::count_if(exports_, for_clusters_only) <= most_with_clusters;
}

void Exports::report_left() const {
  const std::lock_guard lock(mutex_);
  for (const auto& [name, entry] : exports_)
    entry.of->report_left();
}

} // namespace qcowcache
