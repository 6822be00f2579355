#include "model_generator.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <initializer_list>
#include <random>

namespace {

constexpr std::uint64_t unit = 65536;
constexpr std::uint64_t header_size = 112;

// The distributions of the standard library differ from one implementation to the next.
std::function<std::uint64_t(std::uint64_t)> chance_from(std::uint64_t seed) {
  return [random = std::mt19937_64(seed)](std::uint64_t limit) mutable { return random() % limit; };
}

class Generator {
public:
  explicit Generator(ModelChoices choices) : choices_(std::move(choices)) {}

  ModelSequence make() {
    make_setup();
    connect_all();
    const std::uint64_t steps = 15 + below(90);
    for (std::uint64_t i = 0; i < steps && !choices_.ended(); ++i)
      add(make_step());
    return sequence_;
  }

  std::vector<ModelStep> make_steps(const ModelSetup& setup, std::size_t count) {
    sequence_.setup = setup;
    size_ = setup.size;
    while (sequence_.steps.size() < count)
      add(make_step());
    return sequence_.steps;
  }

private:
  std::uint64_t below(std::uint64_t limit) { return choices_.below(limit); }
  bool chance(std::uint64_t of_hundred) { return below(100) < of_hundred; }
  template <typename Value>
  Value one_of(std::initializer_list<Value> values) {
    return values.begin()[below(values.size())];
  }

  void make_setup() {
    ModelSetup& setup = sequence_.setup;
    setup.sharing = one_of({Sharing::cache, Sharing::cache, Sharing::disk, Sharing::nothing});
    setup.connections = 1 + below(4);
    setup.stripe = std::max(choices_.least_stripe,
                            one_of<std::uint64_t>({1, 37, 512, 700, 4096, 20000, 100000}));
    setup.background = chance(30);
    setup.memory = some_memory();
    setup.cluster = one_of<std::uint64_t>({0, 0, 0, 512, unit, unit});
    setup.max_write = one_of<std::uint64_t>({unit, 2 * unit, 16 * unit});
    setup.expire = chance(15);
    setup.hurried = chance(50);
    setup.retries = chance(30);
    setup.minimum = chance(70) ? 1 : one_of<std::uint64_t>({512, 4096, unit});
    setup.preferred =
        std::max(setup.minimum, one_of<std::uint64_t>({512, 4096, 2 * unit, 4 * unit}));
    if (chance(30))
      setup.maximum =
          std::max(setup.minimum, one_of<std::uint64_t>({512, 3000, 4096, 50000, unit, 2 * unit}));
    setup.maximum = setup.maximum / setup.minimum * setup.minimum;
    setup.size = some_size();
    size_ = setup.size;
    setup.can_flush = chance(85);
    setup.can_trim = chance(80);
    setup.can_zero = chance(85);
    setup.can_fast_zero = setup.can_zero && chance(70);
    setup.can_extents = chance(75);
    if (setup.can_extents && !setup.retries)
      setup.reserve = one_of<std::uint64_t>({4 * unit, 4 * unit, 2 * unit, 1024 * unit, 0});
    setup.can_cache = chance(70);
    setup.fua = one_of({ModelFua::none, ModelFua::native, ModelFua::native});
    if (setup.can_flush && chance(30))
      setup.fua = ModelFua::emulate;
    setup.grain = one_of<std::uint64_t>({512, 1000, 4096, unit});
    setup.shy = chance(30);
    setup.trims = one_of({Trims::zeros, Trims::zeros, Trims::keeps, Trims::garbage});
    setup.filled = chance(50);
    failing_ = chance(60);
    exchanging_ = sequence_.setup.sharing == Sharing::cache && chance(30);
    if (!exchanging_ && chance(30))
      setup.header = one_of<std::uint64_t>({16, 12, 21});
  }

  /// Without background writers that run, waiting for memory would take real time.
  std::uint64_t some_memory() {
    if (sequence_.setup.background)
      return one_of<std::uint64_t>({0, unit, 1024 * unit, 1024 * unit, 1024 * unit});
    return one_of<std::uint64_t>({0, unit, 2 * unit + 20000, 2 * unit + below(3 * unit), 4 * unit,
                                  8 * unit, 1024 * unit, 1024 * unit});
  }

  std::uint64_t some_size() {
    const std::uint64_t size =
        chance(10)   ? one_of<std::uint64_t>({0, 1, 71, 111, 112, 511, 512, 4095, 4097})
        : chance(50) ? (1 + below(6)) * unit
                     : 1 + below(6 * unit);
    return size / sequence_.setup.minimum * sequence_.setup.minimum;
  }

  void add(const ModelStep& step) { sequence_.steps.push_back(step); }

  void connect_all() {
    for (std::uint64_t i = 0; i < sequence_.setup.connections; ++i) {
      ModelStep step;
      if (i > 0 && chance(12)) {
        // The disk grows between two connections, so that they see different ends.
        size_ += below(2 * unit);
        step.kind = StepKind::size;
        step.length = size_;
        add(step);
      }
      step.kind = StepKind::connect;
      step.connection = i;
      add(step);
    }
    if (chance(85))
      add_header();
  }

  /// A header, or zeros in its place, in one or two pieces.
  void add_header() {
    ModelStep step;
    step.kind = StepKind::header;
    step.connection = sequence_.setup.sharing == Sharing::disk ? 0 : any_connection();
    step.length = header_size;
    step.value = chance(75) ? one_of<std::uint64_t>({16, 16, 9, 12, 17, 18, 21}) : 0;
    step.fua = chance(20);
    const std::uint64_t cut = chance(30) ? 1 + below(header_size - 1) : header_size;
    step.length = cut;
    add(with_fault(step));
    if (cut < header_size) {
      step.offset = cut;
      step.length = header_size - cut;
      add(with_fault(step));
    }
  }

  std::uint64_t any_connection() { return below(sequence_.setup.connections); }

  std::uint64_t some_length() {
    switch (below(8)) {
    case 0:
      return 1;
    case 1:
      return 1 + below(16);
    case 2:
      return 1 + below(700);
    case 3:
      return 4090 + below(12);
    case 4:
      return unit;
    case 5:
      return 1 + below(2 * unit + 5000);
    default:
      return 1 + below(30000);
    }
  }

  /// Where a request goes: on from the one before, beside a border, or anywhere.
  void place(ModelStep& step) {
    const ModelSetup& setup = sequence_.setup;
    const std::uint64_t size = std::max<std::uint64_t>(1, size_);
    step.length = some_length();
    if (chance(40)) {
      step.offset = position_;
    } else if (chance(40)) {
      const std::uint64_t grid = one_of<std::uint64_t>({512, 4096, unit, unit, size});
      const std::uint64_t border = (below(size / grid + 1)) * grid;
      step.offset = border + 3 - std::min(border + 3, below(7));
      if (chance(40))
        step.offset = border;
    } else {
      step.offset = below(size);
    }
    if (step.offset >= size)
      step.offset = chance(50) ? size - std::min(size, step.length) : below(size);
    if (setup.sharing == Sharing::disk && step.offset >= 512) {
      // Into the stripe of this connection that is nearest.
      const std::uint64_t number = step.offset / setup.stripe;
      const std::uint64_t mine = number - number % setup.connections + step.connection;
      step.offset = mine * setup.stripe + step.offset % setup.stripe;
      step.length = std::min(step.length, setup.stripe);
    }
    position_ = step.offset + step.length;
  }

  ModelStep with_fault(ModelStep step) {
    if (!failing_ || !chance(12))
      return step;
    step.fails = one_of({Fails::any, Fails::any, Fails::read, Fails::write, Fails::write,
                         Fails::write, Fails::flush, Fails::zero, Fails::trim, Fails::extents});
    step.nth = 1 + (chance(60) ? 0 : below(5));
    step.error = some_error();
    step.done = chance(50) ? Done::half : chance(20) ? Done::all : Done::none;
    return step;
  }

  std::uint64_t some_error() {
    return one_of<std::uint64_t>({EIO, ENOSPC, EPERM, ENOMEM, ENOTSUP});
  }

  /// A kind, as often as its weight says.
  StepKind some_kind() {
    struct Weight {
      StepKind kind;
      unsigned weight;
    };
    const bool background = sequence_.setup.background;
    const std::array weights{
        Weight{StepKind::write, 40},
        Weight{StepKind::read, 14},
        Weight{StepKind::zero, 8},
        Weight{StepKind::trim, 6},
        Weight{StepKind::flush, 7},
        Weight{StepKind::extents, 4},
        Weight{StepKind::cache, 1},
        Weight{StepKind::tick, 3},
        Weight{StepKind::queue, 3},
        Weight{StepKind::turn, background ? 12U : 0U},
        Weight{StepKind::budget, 3},
        Weight{StepKind::header, 4},
        Weight{StepKind::disconnect, 4},
        Weight{StepKind::vanish, 1},
        Weight{StepKind::connect, 6},
        Weight{StepKind::size, 2},
        Weight{StepKind::breaks, failing_ ? 2U : 0U},
        Weight{StepKind::heals, failing_ ? 4U : 0U},
        Weight{StepKind::look, 2},
        Weight{StepKind::exchange, exchanging_ ? 3U : 0U},
    };
    unsigned total = 0;
    for (const Weight& weight : weights)
      total += weight.weight;
    std::uint64_t rest = below(total);
    for (const Weight& weight : weights) {
      if (rest < weight.weight)
        return weight.kind;
      rest -= weight.weight;
    }
    return StepKind::flush;
  }

  ModelStep make_step() {
    ModelStep step;
    step.kind = some_kind();
    step.connection = any_connection();
    switch (step.kind) {
    case StepKind::header:
      add_header();
      step.kind = StepKind::read;
      [[fallthrough]];
    case StepKind::read:
    case StepKind::extents:
    case StepKind::cache:
    case StepKind::trim:
      place(step);
      step.first = step.kind == StepKind::extents && chance(50);
      step.fua = step.kind == StepKind::trim && chance(20);
      return with_fault(step);
    case StepKind::write:
      place(step);
      step.value = chance(7) ? 0 : 1 + below(250);
      step.fua = chance(12);
      return with_fault(step);
    case StepKind::zero:
      place(step);
      step.fua = chance(20);
      step.may_trim = chance(50);
      step.fast = chance(30);
      return with_fault(step);
    case StepKind::exchange:
      step.value = below(3);
      return step;
    case StepKind::turn:
      step.length = chance(30) ? 100 : 1;
      return with_fault(step);
    case StepKind::budget:
      step.length = some_memory();
      return step;
    case StepKind::size:
      step.length = some_size();
      if (chance(40))
        step.length = sequence_.setup.size;
      size_ = std::max(step.length, std::uint64_t{1});
      return step;
    case StepKind::connect:
      step.read_only = chance(15);
      return with_fault(step);
    case StepKind::breaks:
      step.fails = one_of({Fails::any, Fails::write, Fails::write, Fails::read, Fails::flush,
                           Fails::zero, Fails::trim});
      step.error = some_error();
      step.nth = 1 + (chance(60) ? 0 : below(8));
      step.once = chance(30);
      step.done = chance(30) ? Done::half : chance(20) ? Done::all : Done::none;
      return step;
    default:
      return with_fault(step);
    }
  }

  ModelChoices choices_;
  ModelSequence sequence_;
  std::uint64_t position_ = 512;
  std::uint64_t size_ = 0;
  bool failing_ = false;
  bool exchanging_ = false;
};

} // namespace

ModelSequence random_sequence(ModelChoices choices) {
  return Generator(std::move(choices)).make();
}

ModelSequence random_sequence(std::uint64_t seed) {
  return random_sequence({chance_from(seed)});
}

std::vector<ModelStep> random_steps(const ModelSetup& setup, std::uint64_t seed,
                                    std::size_t count) {
  return Generator({chance_from(seed)}).make_steps(setup, count);
}
