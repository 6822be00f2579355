#pragma once

#include "memory/counted_memory.hpp"
#include "memory/memory_budget.hpp"
#include "reports/statistics.hpp"
#include "util/answer.hpp"
#include "util/byte_ranges.hpp"
#include "verify/decompressor_pool.hpp"
#include "verify/qcow2/decoded_streams.hpp"
#include "verify/qcow2/header.hpp"
#include "verify/qcow2/table_follower.hpp"
#include "verify/qcow2/verdicts.hpp"
#include "verify/upload.hpp"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <memory_resource>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace qcowcache {

/// Finds out whether the compressed clusters of one image can be read: at a flush, every one that
/// became reachable since the check before must decode strictly.
///
/// How: whoever changes the file says so, before (`Change`) and after.
///
/// - A write that may be one compressed stream is decoded when it has been absorbed, in the
///   background where there are writers, and where it decodes its place is remembered until
///   somebody writes there again.
/// - What is written to the L1 table and to L2 tables is followed (`qcow2::TableFollower`), so that
///   a check knows the entries that are new without reading tables, mostly. Before a table changes
///   for the first time its old content is read once, since its entries are not new. The header is
///   looked at in each check after a write to it.
/// - A check goes through the new entries. One whose stream is remembered is good; others are read,
///   through the cache, and decoded. What was good is not looked at again before bytes that it
///   names are written, zeroed or trimmed: then it is new again, in whatever table it stands. What
///   was not good stays new, so that every later check fails, too, until it is repaired; it is
///   decoded again only when something was written there.
///
/// QEMU publishes an entry before its data has arrived when many requests are in flight. So no
/// write is ever looked at for what is missing, held back or refused; and a check that finds
/// something bad first waits for writes there that had begun before it, and then a while for late
/// ones.
///
/// While an image is uploaded from front to back (`Upload`), what lies behind the front is awaited,
/// tables and data: it is not looked at, fails no flush, and nobody waits for it; with the last
/// client that uploads that is over.
///
/// The image is a client's, and may be made to cost work: so a stream, or a table, that many
/// entries name is looked at once in a check, decoding goes by turns with those of other images
/// (`DecompressorPool`), a write decodes only where nobody has to wait for that, and a check ends
/// as soon as nobody needs it.
///
/// Only the active L1 table is followed: what a snapshot's table names was reachable before. The
/// tables of an image with features that nobody knows are not followed: QEMU refuses to open it.
///
/// Copies of tables, remembered streams and data that waits to be decoded count in the memory
/// budget, up to an eighth of it for all verifiers together; with less, more is read again. Nothing
/// here fails a request but a check: should memory be lacking even to keep track, all tables are
/// looked at in the next one. Beside that a verifier remembers up to 256 failures (50 KiB), and
/// 4096 ranges that were changed (64 KiB, and twice that in a check; of more the closest become
/// one); a change of a table for the first time needs a cluster, and a check up to 1 MiB, a table,
/// and 1 MiB or two clusters, while they last.
///
/// Thread safe. Calls the image with no mutex held but that of checks.
class Verifier {
public:
  using Entry = qcow2::TableFollower::Entry;

  /// The file as clients see it. A caller brings its own, as it does with storage.
  class Image {
  public:
    Image() = default;
    Image(const Image&) = delete;
    Image& operator=(const Image&) = delete;
    virtual ~Image() = default;

    /// The header, if there is one. Throws std::system_error.
    virtual std::optional<qcow2::Header> header() = 0;
    /// Why nobody can open what has a header that says it is an image; nullptr: that is not so.
    /// Lives as long as the program. Throws std::system_error.
    virtual const char* header_fault() { return nullptr; }
    /// Of what the caller can read, in bytes.
    [[nodiscard]] virtual std::uint64_t size() const = 0;
    /// Of what anybody can read who shares the verifier: what lies behind `size` is left to them.
    [[nodiscard]] virtual std::uint64_t largest_size() const { return size(); }
    /// Stands for the client whose image this is.
    [[nodiscard]] virtual const void* client() const { return nullptr; }
    /// Reads what clients would read. The range lies within the size and is not empty. Throws
    /// std::system_error.
    virtual void read(std::uint64_t offset, std::span<std::byte> data) = 0;
  };

  /// What the next verifier of a file has to know of an earlier one.
  struct Left {
    /// These could not be read: as long as they are there they are checked.
    std::vector<Entry> failing;
    /// There were more, or a check came to no end: everything is to be looked at.
    bool more = false;
    /// How many are counted as unreadable.
    std::uint64_t counted = 0;

    [[nodiscard]] bool empty() const noexcept { return failing.empty() && !more; }
  };

  struct Settings {
    /// How long a check waits for bytes that may still arrive; 0 where requests cannot overtake
    /// each other.
    std::chrono::milliseconds patience{0};
    /// Told, a line each, what cannot be read, and why. Must not throw.
    std::function<void(const std::string& line)> report;
    /// Called when streams wait to be decoded, with their number and the mutex held, to wake those
    /// who call `decode_one`. Nothing: writes decode themselves.
    std::function<void(std::size_t waiting)> wake;
    /// What an earlier verifier of this file left.
    Left left;
    /// The first check looks at all that the image has, changed or not.
    bool everything = false;
    /// Who decodes; for all verifiers of the server. Not null.
    std::shared_ptr<DecompressorPool> decompressors = std::make_shared<DecompressorPool>();
    /// Their memory. Not null.
    std::shared_ptr<MemoryShare> memory = usual_memory();
    /// Whether nobody needs any more what the calling thread is doing: its client is gone, or the
    /// server ends. Called with no mutex held, every 10 ms or less often. Nothing: never.
    std::function<bool()> interrupted;
    /// Where clusters are counted that were found readable, and that were not.
    std::shared_ptr<Counters> counters = std::make_shared<Counters>();
  };

  /// An eighth of the budget.
  [[nodiscard]] static std::shared_ptr<MemoryShare> usual_memory() {
    return std::make_shared<MemoryShare>(8);
  }

  enum class Outcome { clean, damaged };

  /// A check came to no end because nobody needs it. ESHUTDOWN.
  class Interrupted : public Answer {
  public:
    Interrupted() : Answer(ESHUTDOWN, std::generic_category()) {}
    [[nodiscard]] const char* what() const noexcept override {
      return "interrupted by the end of the server or of the connection";
    }
  };

private:
  /// A change that has begun and has not ended.
  struct Progress {
    ByteRange range;
    std::uint64_t number = 0;
    const void* client = nullptr;
    /// Another one overlapped it, so that nobody knows which of their bytes are there now.
    bool crossed = false;
  };
  using InProgress = std::list<Progress>;
  /// A table whose old content is being read.
  struct Kept {
    ByteRange range;
    /// It was changed meanwhile, or may have been.
    bool changed = false;
  };

public:
  /// A change of the file, from before it begins until it has been made, or has failed. Does
  /// nothing when there is no verifier.
  class Change {
  public:
    /// `image` is used here only.
    Change(Verifier* verifier, Image& image, const ByteRange& range) noexcept
        : verifier_(verifier) {
      if (verifier_ != nullptr)
        begin(image, range);
    }
    Change(const Change&) = delete;
    Change& operator=(const Change&) = delete;
    /// Unless one of the two below was called, nobody knows what is in the range now.
    ~Change() {
      if (verifier_ != nullptr)
        end_unless_told();
    }

    /// The range has this content.
    void wrote(std::span<const std::byte> data) noexcept {
      if (entry_)
        end_written(data);
    }
    /// The range has zeros.
    void zeroed() noexcept;

  private:
    void begin(Image& image, const ByteRange& range) noexcept;
    void end_unless_told() noexcept;
    void end_written(std::span<const std::byte> data) noexcept;

    Verifier* verifier_;
    std::optional<InProgress::iterator> entry_;
    /// There was no memory to note it.
    bool unnoted_ = false;
  };

  /// The budget outlives the verifier.
  Verifier(Settings settings, MemoryBudget& budget);
  Verifier(const Verifier&) = delete;
  Verifier& operator=(const Verifier&) = delete;
  ~Verifier();

  /// Checks what became reachable by changes that have been made before the call. Throws
  /// std::system_error when some of the image cannot be read, or Interrupted; the next check then
  /// does the rest.
  ///
  /// Other clients delay it by what is being checked for them at the moment, and by writes that had
  /// begun before it; what they do after that delays it no longer than `patience`.
  Outcome check(Image& image);
  /// The client of this name (`Image::client`) is going to end, and what it has not written will
  /// not come: to be said before its last check.
  void ends(const void* client) noexcept;
  /// Whether a check has anything to do, or would fail.
  [[nodiscard]] bool has_work() const;
  /// Whether one is needed at the end of a connection: nobody asked for a look at everything then.
  [[nodiscard]] bool has_work_at_end() const;
  /// Others changed the range. What they did before the first change here counts as old, and is for
  /// their own verifier to look at.
  void forget(const ByteRange& range) noexcept;
  /// A client has read `data` at `offset`. Who opens an image reads its L1 table before anything is
  /// changed; then it need not be read once more. `header` says what is known of the image's, and
  /// is called when this could be the table.
  void client_read(const std::function<std::optional<qcow2::Header>()>& header,
                   std::uint64_t offset, std::span<const std::byte> data) noexcept;

  /// Decodes what has waited longest. Returns whether there was something.
  bool decode_one();
  /// How many streams wait to be decoded.
  [[nodiscard]] std::size_t waiting() const;
  /// Gives back memory that the budget no longer allows.
  void shrink() noexcept;

  /// How many clusters cannot be read, as of the last check.
  [[nodiscard]] std::size_t failing() const;
  /// For the next verifier of the file: what could not be read, or was not looked at since an
  /// earlier verifier left it.
  [[nodiscard]] Left left() const;
  /// Tells the operator, and nobody else is there to be told, that a check threw `why`; once, until
  /// a check comes to its end.
  void report_unchecked(const std::string& why);

private:
  using Lock = std::unique_lock<std::mutex>;
  using Place = std::pair<std::uint32_t, std::uint32_t>;

  /// A write that may be a stream.
  struct Job {
    std::uint64_t number;
    ByteRange range;
    qcow2::Compression compression;
    std::uint32_t cluster_size;
    std::pmr::vector<std::byte> data;
    bool taken = false;
    /// Somebody has written there since.
    bool outdated = false;
  };
  using Jobs = std::list<Job>;

  /// An entry that cannot be read.
  struct Failure {
    std::uint64_t value = 0;
    ByteRange data;
    /// Where that ended of it which the file had.
    std::uint64_t end = 0;
    /// As in `qcow2::Decoding`.
    const char* reason = "";
    /// The round in which it was last met.
    std::uint64_t round = 0;
    /// Something was written there since.
    bool touched = false;
    /// Nothing more is expected to arrive.
    bool settled = false;
    bool reported = false;
  };

  /// An entry that has to be read and decoded.
  struct Candidate {
    Entry entry;
    qcow2::CompressedCluster cluster;
    /// What of it the file has.
    ByteRange data;
  };

  /// What was found in a table.
  struct Tally {
    std::uint64_t good = 0;
    std::uint64_t good_bytes = 0;
    /// Entries that are not known to be good.
    std::size_t failed = 0;
    /// Those of them whose data is still to come.
    std::size_t awaited = 0;
    /// Those that cannot be read, and the first of these.
    std::size_t bad = 0;
    std::vector<Entry> some_bad;
  };
  /// A table that was looked at in this round, and has not changed since.
  struct Looked {
    /// Nothing: it has a copy, or is being looked at.
    std::optional<Tally> tally;
  };

  /// Finds out, not too often, whether the calling thread's work is still needed.
  class Interruption {
  public:
    explicit Interruption(const std::function<bool()>& interrupted);
    /// Whether it is time to ask again.
    [[nodiscard]] bool due() const;
    /// Asks if it is time to, and throws Interrupted. REQUIRES: no mutex is held.
    void confirm();

  private:
    const std::function<bool()>& interrupted_;
    std::chrono::steady_clock::time_point asked_;
  };
  /// The turn of one of those who check: the others wait.
  class Turn;
  enum class Decoder { background, writer, check };

  // Functions that take a Lock need it held, and return with it held; those that are not const may
  // have released it in between.
  InProgress::iterator begin(Image& image, const ByteRange& range);
  void end(InProgress::iterator entry, std::span<const std::byte> data);
  void end_zeroed(InProgress::iterator entry);
  void end_changed(InProgress::iterator entry);
  Progress end_progress(const Lock& lock, InProgress::iterator entry);
  void begin_unnoted() noexcept;
  void end_unnoted() noexcept;
  void give_up() noexcept;
  void give_up(const Lock&) noexcept;
  void shrink(const Lock&) noexcept;
  void forget_streams(const Lock&) noexcept;
  void read_table(Lock& lock, Image& image, std::uint64_t offset, std::span<std::byte> bytes);
  void open(Lock& lock, Image& image);
  void take_over_failing(Lock& lock, Image& image);
  void keep_old_tables(Lock& lock, Image& image, const ByteRange& range);
  void keep_old_table(Lock& lock, Image& image, std::uint32_t index, const ByteRange& whole);
  void outdate(const Lock&, const ByteRange& range) noexcept;
  void arrived(const Lock& lock, const ByteRange& range) noexcept;
  [[nodiscard]] bool may_be_stream(const Lock&, const ByteRange& range,
                                   std::span<const std::byte> data) const;
  void decode(Lock& lock, Jobs::iterator job, std::span<const std::byte> data, Decoder decoder);
  void finish_decoding(Lock& lock);
  using Time = std::chrono::steady_clock::time_point;
  void wait_for_change(Lock& lock, Interruption& interruption, std::optional<Time> until = {});
  void confirm(Lock& lock);
  [[nodiscard]] bool has_work(const Lock&) const;

  [[nodiscard]] bool being_changed(const Lock&, const ByteRange& range) const;
  void forget_looked(const Lock&, const ByteRange& range) noexcept;
  void note_table(const Lock&, std::uint64_t offset);
  void note_rewritten(const Lock&, const ByteRange& range) noexcept;
  [[nodiscard]] bool has_rewritten(const Lock&) const noexcept;
  void look(Lock& lock, Image& image);
  [[nodiscard]] bool awaits(const Lock&, const Image& image, const ByteRange& range) const;
  [[nodiscard]] bool awaits_table(const Lock& lock, const Image& image, std::uint32_t index) const;
  void renew(Lock& lock, Image& image);
  bool renew_unread(Lock& lock, Image& image, std::uint32_t index, std::span<std::byte> table);
  void refresh_header(Lock& lock, Image& image);
  void refresh_l1(Lock& lock, Image& image);
  void refresh_tables(Lock& lock, Image& image);
  void look_at_everything(Lock& lock, Image& image);
  void look_at_unchecked(Lock& lock, Image& image);
  void read_replaced(Lock& lock, Image& image, std::uint32_t index, std::span<std::byte> table);
  void refresh_table(Lock& lock, Image& image, std::uint32_t index, std::span<std::byte> table);
  std::size_t look_at_table(Lock& lock, Image& image, std::uint32_t l1_index, std::uint64_t offset,
                            std::span<const std::byte> table);
  std::size_t look_at_twin(Lock& lock, Image& image, std::uint32_t l1_index, const Tally& twin);
  void look_at(Lock& lock, Image& image, std::span<const Entry> entries, Tally& tally);
  void read_and_decode(Lock& lock, Image& image, std::span<const Candidate> candidates,
                       Tally& tally);
  void good(const Lock&, const Entry& entry, std::uint64_t size, Tally& tally);
  void count_good(const Lock&, std::uint64_t clusters, std::uint64_t bytes);
  void bad(const Lock&, const Candidate& candidate, const char* reason, bool touched, Tally& tally);
  static void note_bad(const Entry& entry, Tally& tally);
  bool wait_for_late(Lock& lock, Time deadline);
  void settle_and_report(const Lock&);
  void count_unreadable(const Lock&);

  const Settings settings_;
  DecompressorPool::Account account_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  /// Those who check, or wait for their turn: the first one does.
  std::list<char> turns_;
  /// Of the check that is running; only its thread uses it.
  std::optional<Interruption> interruption_;
  CountedMemory memory_;
  qcow2::DecodedStreams streams_;
  qcow2::TableFollower tables_;
  bool opened_ = false;
  bool opening_ = false;
  /// The L1 table as a client has read it before anything was changed, and where it is.
  ByteRange early_range_;
  std::vector<std::byte> early_;
  /// There are other caches of the file, whose clients change it.
  bool others_change_ = false;
  bool header_stale_ = false;
  /// Something that a check follows was changed since its round began.
  bool tables_changed_ = false;
  InProgress in_progress_;
  std::uint64_t last_change_ = 0;
  /// The last change that had begun when the check that is running was asked for.
  std::uint64_t last_before_ = 0;
  /// By L1 index.
  std::map<std::uint32_t, Kept> being_kept_;
  /// How many changes are in progress that could not be noted.
  std::size_t unnoted_ = 0;
  Jobs jobs_;
  std::uint64_t last_job_ = 0;
  std::size_t waiting_ = 0;
  /// What was changed since the last check began, and what that one has still to look for: entries
  /// that name bytes in there are new again.
  ByteRanges rewritten_;
  ByteRanges renewing_;
  /// What a check has read and is decoding, and where others have written meanwhile.
  ByteRange watched_;
  ByteRanges written_while_watched_;
  /// What the check that is running has found out, by streams, and by where tables are.
  qcow2::Verdicts verdicts_;
  std::map<std::uint64_t, Looked> looked_;
  std::map<Place, Failure> failures_;
  /// Failures of the last round beyond those.
  std::size_t more_failures_ = 0;
  /// How many of those the operator was told of.
  std::size_t more_reported_ = 0;
  Upload upload_;
  /// How many entries of the last round wait for it.
  std::size_t awaited_ = 0;
  /// Why nobody can open the image, and what the operator was told of that.
  const char* header_fault_ = nullptr;
  const char* told_fault_ = nullptr;
  /// How many are counted as unreadable.
  std::uint64_t counted_;
  /// Why clusters could not be read from storage in the last round, the first of them.
  std::exception_ptr unread_;
  /// The last check threw.
  bool cut_off_ = false;
  /// What the operator was told of why.
  std::string told_why_;
  /// It did not look at clusters that lie behind what its image could read.
  bool left_out_ = false;
  std::uint64_t round_ = 0;
  /// The check that is running has looked once more after its patience had ended.
  bool looked_last_ = false;
};

} // namespace qcowcache
