#include "connection.hpp"

#include "cache/cached_image.hpp"
#include "reports/statistics.hpp"
#include "unclean_file.hpp"
#include "util/answer.hpp"
#include "verify/qcow2/header.hpp"
#include "verify/qcow2/new_image.hpp"

#include <cerrno>
#include <new>
#include <system_error>
#include <thread>
#include <tuple>

namespace qcowcache {

Export& Connection::visit() {
  std::call_once(visited_, [this] { export_ = exports_.visit(export_name_); });
  return *export_;
}

Image& Connection::enter(const Image::Request& request) {
  const std::lock_guard lock(entering_);
  const std::shared_ptr<Image> present = images_.empty() ? nullptr : images_.back();
  if (ended_)
    throw std::system_error(ESHUTDOWN, std::generic_category(), "the connection has ended");
  // Another request may have seen to it meanwhile.
  if (present && !handle_->is_guest())
    return *present;
  images_.reserve(images_.size() + 1);
  std::shared_ptr<Image> image = visit().enter(handle_, present, request);
  if (image != present) {
    images_.push_back(std::move(image));
    image_.store(images_.back().get(), std::memory_order_release);
  }
  return *images_.back();
}

Connection::InUse Connection::in_use(const Image::Request& request) {
  std::optional<Handle::Use> use = storage_if_any();
  if (!use)
    throw std::system_error(ESHUTDOWN, std::generic_category(), "the connection has ended");
  const auto has_to_enter = [&](const Image* image) {
    return image == nullptr || (handle_->is_guest() && !image->admits_guest(request));
  };
  const bool in_line_of_cache = capabilities().can_multi_conn && !has_to_enter(this->image());
  std::optional<RangeLock::Owned> place =
      request.changes ? visit().arrive(request.range, in_line_of_cache) : std::nullopt;
  if (place)
    visit().wait_turn(*place);
  Image* image = this->image();
  if (has_to_enter(image))
    image = &enter(request);
  if (request.changes)
    handle_->begins_to_change();
  return InUse{image->cache(), std::move(*use), image->verifier(), std::move(place)};
}

void Connection::before_request() const {
  if (settings().before_request)
    settings().before_request();
}

void Connection::refuse_if_lost() const {
  if (settings().unclean != nullptr)
    settings().unclean->refuse_if_lost(export_name_);
}

/// An export that has lost bytes takes no more, but for what may begin a new image.
void Connection::refuse_if_lost(std::uint64_t offset) const {
  if (offset >= qcow2::header_bytes)
    refuse_if_lost();
}

void Connection::begin_anew() const noexcept {
  if (settings().unclean != nullptr)
    settings().unclean->begin_anew(export_name_);
}

void Connection::read(std::uint64_t offset, std::span<std::byte> data) {
  const InUse in_use = this->in_use({false, {offset, offset + data.size()}});
  in_use.cache.read(in_use.use.storage(), offset, data);
  if (in_use.verifier != nullptr)
    in_use.verifier->client_read([&] { return in_use.cache.header().header; }, offset, data);
}

/// `work` changes the range on what it is given, and says what has come of it.
template <typename Work>
void Connection::change(const ByteRange& range, Work work) {
  refuse_if_lost(range.begin);
  const InUse in_use = this->in_use({true, range});
  CachedImage image(in_use.cache, in_use.use.storage());
  Verifier::Change change(in_use.verifier.get(), image, range);
  work(in_use.cache, in_use.use.storage(), change);
}

void Connection::write(std::uint64_t offset, std::span<const std::byte> data, bool fua) {
  before_request();
  change({offset, offset + data.size()},
         [&](WriteCache& cache, Storage& storage, Verifier::Change& change) {
           cache.write(storage, offset, data, fua);
           change.wrote(data);
           if (qcow2::begins_image(offset, data))
             begin_anew();
         });
}

void Connection::trim(const ByteRange& range, bool fua) {
  change(range, [&](WriteCache& cache, Storage& storage, Verifier::Change& /*what is there now*/) {
    cache.trim(storage, range, fua);
  });
}

void Connection::zero(const ByteRange& range, const Storage::ZeroOptions& options) {
  change(range, [&](WriteCache& cache, Storage& storage, Verifier::Change& change) {
    try {
      cache.zero(storage, range, options);
    } catch (const std::system_error& error) {
      const bool not_fast = error.code() == std::errc::not_supported ||
                            error.code() == std::errc::operation_not_supported;
      if (options.fast && not_fast)
        throw Answer(ENOTSUP, std::generic_category(), "no fast zero");
      throw;
    }
    change.zeroed();
    if (range.begin == 0 && range.size() >= sizeof qcow2::header_magic)
      begin_anew();
  });
}

Storage::Extents Connection::extents(const ByteRange& range, bool only_first) {
  const InUse in_use = this->in_use({false, range});
  return in_use.cache.extents(in_use.use.storage(), range, only_first);
}

void Connection::cache(const ByteRange& range) {
  const std::optional<Handle::Use> use = storage_if_any();
  if (use && use->storage().capabilities().can_cache)
    use->storage().cache(align_outward(range, use->storage().capabilities().minimum));
}

bool Connection::can_flush() const noexcept {
  // A flush of what nobody can write is a question for the image, where all of it is checked.
  return capabilities().can_write || capabilities().can_flush || settings().verify_everything;
}

void Connection::flush() {
  before_request();
  const InUse in_use = this->in_use({});
  in_use.cache.flush(in_use.use.storage());
  refuse_if_lost();
  if (check(in_use) == Verifier::Outcome::damaged && settings().damage_fails_flush)
    throw std::system_error(EIO, std::generic_category(),
                            "export \"" + printable(export_name_) +
                                "\": " + std::to_string(in_use.verifier->failing()) +
                                " compressed clusters cannot be read");
}

/// What cannot be checked because storage cannot be read is no better than damage, and worth no
/// more than a warning where damage is not.
Verifier::Outcome Connection::check(const InUse& in_use) const {
  try {
    return in_use.check();
  } catch (const Verifier::Interrupted&) {
    throw;
  } catch (const std::exception& error) {
    if (settings().damage_fails_flush)
      throw;
    settings().report_damage(
        export_name_, std::string("compressed clusters could not be checked: ") + error.what());
    return Verifier::Outcome::damaged;
  }
}

Verifier::Outcome Connection::InUse::check() const {
  if (verifier == nullptr)
    return Verifier::Outcome::clean;
  CachedImage image(cache, use.storage());
  return verifier->check(image);
}

/// There is nobody to tell but the operator.
void Connection::check_at_end(const InUse& storage) {
  try {
    std::ignore = storage.check();
  } catch (const std::exception& error) {
    storage.verifier->report_unchecked(error.what());
  }
}

void Connection::drain() noexcept {
  // What a connection wrote that is a guest now is on storage.
  if (ended_ || this->image() == nullptr || handle_->is_guest())
    return;
  Image& image = *this->image();
  // Storage is flushed for others as well, who could not.
  const bool recorded = image.cache().recorded();
  if (!handle_->ends_changing() && !recorded)
    return;
  const bool last = !image.is_changed_by_others(*handle_);
  const std::shared_ptr<Verifier> verifier = image.verifier();
  const auto write_all = [&]() noexcept {
    try {
      std::optional<Handle::Use> use = handle_->use();
      if (!use)
        return;
      const InUse in_use{image.cache(), std::move(*use), verifier};
      in_use.cache.drain(in_use.use.storage());
      check_at_end(in_use);
      if (last)
        in_use.cache.give_back_room(in_use.use.storage());
    } catch (const std::exception&) {
      // What is left is found, and reported, by whoever looks at the cache next.
    }
  };
  if (const std::optional<Handle::Use> use = handle_->use(); use && verifier)
    verifier->ends(&use->storage());
  const bool unchecked = verifier && verifier->has_work_at_end();
  const bool clean = image.cache().clean();
  const bool has_work =
      !clean || recorded || unchecked || (last && image.cache().may_have_reserved());
  // Who cannot write may flush what others wrote.
  const bool can = capabilities().can_write || (clean && recorded);
  if (!has_work || !can)
    return;
  // Filters that sleep refuse to do so in a thread that serves a client once the client is gone.
  try {
    std::thread(write_all).join();
  } catch (const std::exception&) { // no thread, or no memory for one
    write_all();
  }
}

void Connection::end() noexcept {
  if (!handle_ || ended_.exchange(true))
    return;
  handle_->retire();
  const std::lock_guard lock(entering_);
  if (!export_)
    return;
  try {
    exports_.leave(export_, *handle_, images_.empty() ? nullptr : images_.back());
  } catch (const std::bad_alloc&) {
    // The export keeps a connection that is of no use to anybody, and its bytes with it.
  }
}

} // namespace qcowcache
