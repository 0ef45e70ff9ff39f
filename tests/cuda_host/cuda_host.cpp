// Runs the blocks of a launch: fibres for threads, and the rules of their meetings.
#include "cuda_host.h"

#include <sys/mman.h>

#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define GCONV_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GCONV_ASAN
#endif
#endif
#if defined(GCONV_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__))
#define GCONV_SWITCH_BY_HAND
#else
#include <ucontext.h>
#endif

namespace gconv::cuda::host {
namespace {

extern "C" void gconv_fibre_main();

// ---- contexts: what a fibre is when it does not run

#if defined(GCONV_SWITCH_BY_HAND)

using Context = void*;  // the stack pointer; the registers that a call preserves lie there

extern "C" void gconv_fibre_switch(Context* from, Context to);
#if defined(__x86_64__)
constexpr int SAVED_WORDS = 8, START_WORD = 6;
asm(R"(
.pushsection .text
.globl gconv_fibre_switch
.hidden gconv_fibre_switch
.type gconv_fibre_switch, @function
gconv_fibre_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size gconv_fibre_switch, .-gconv_fibre_switch
.popsection
)");
#else
constexpr int SAVED_WORDS = 20, START_WORD = 11;
asm(R"(
.macro gconv_saved_registers move
  \move x19, x20, [sp]
  \move x21, x22, [sp, #16]
  \move x23, x24, [sp, #32]
  \move x25, x26, [sp, #48]
  \move x27, x28, [sp, #64]
  \move x29, x30, [sp, #80]
  \move d8, d9, [sp, #96]
  \move d10, d11, [sp, #112]
  \move d12, d13, [sp, #128]
  \move d14, d15, [sp, #144]
.endm
.pushsection .text
.globl gconv_fibre_switch
.hidden gconv_fibre_switch
.type gconv_fibre_switch, %function
gconv_fibre_switch:
  sub sp, sp, #160
  gconv_saved_registers stp
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  gconv_saved_registers ldp
  add sp, sp, #160
  ret
.size gconv_fibre_switch, .-gconv_fibre_switch
.popsection
)");
#endif

void prepare(Context& context, char* stack, size_t size) {
  void** words = reinterpret_cast<void**>(stack + size) - SAVED_WORDS;
  std::fill_n(words, SAVED_WORDS, nullptr);
  words[START_WORD] = reinterpret_cast<void*>(&gconv_fibre_main);
  context = words;
}
void swap(Context& from, Context& to) { gconv_fibre_switch(&from, to); }

#else

using Context = ucontext_t;

void prepare(Context& context, char* stack, size_t size) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, gconv_fibre_main, 0);
}
void swap(Context& from, Context& to) { swapcontext(&from, &to); }

#endif

// ---- fibres

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int group;
};

struct Fibre {
  Context context{};
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  unsigned index = 0;          // threadIdx.x
  bool ended = false;
  // Where it waits.
  const char* verb = nullptr;
  void (*perform)(Lanes) = nullptr;  // null: the block's barrier
  void* mine = nullptr;
  const Site* site = nullptr;
  std::vector<Copy> copies;
  int groups = 0;  // closed
};

// A stride of stacks that is no multiple of a cache's ways: the tops of all stacks are in use at once.
constexpr size_t STACK = 128 * 1024, STACK_STRIDE = STACK + 2112;
constexpr int MOST_THREADS = 1024;
constexpr int64_t CANARY = 256;
constexpr unsigned char CANARY_BYTE = 0xa5, NAN_BYTE = 0xff;

struct Scheduler {
  Fibre home;  // what called run()
  std::vector<Fibre> fibres;
  char* stacks = nullptr;
  // The launch.
  const char* op = nullptr;
  const Site* launched = nullptr;
  const std::function<void()>* body = nullptr;
  unsigned char* shared = nullptr;
  int64_t shared_bytes = 0;
  bool running = false;
  // Where it is.
  Fibre* current = &home;
  Fibre* before = nullptr;  // who switched last
  int warp = 0, position = 0;
  int lanes[WARP] = {};  // in the order they run
  std::string fault;
};

Scheduler the_scheduler;
Scheduler& scheduler() { return the_scheduler; }

void arrived(Fibre& self) {
  scheduler().current = &self;
  threadIdx.x = self.index;
}

void switch_to(Fibre& to, bool for_good = false) {
  Scheduler& s = scheduler();
  Fibre& from = *s.current;
  if (&to == &from) return;
  s.before = &from;
#if defined(GCONV_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#endif
  swap(from.context, to.context);
#if defined(GCONV_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
  (void)for_good;
#endif
  arrived(from);
}

std::string place(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

std::string block_text() {
  const Scheduler& s = scheduler();
  return std::string(s.op) + " (" + place(*s.launched) + "): block " + std::to_string(blockIdx.x);
}

std::string warp_text() { return block_text() + ", warp " + std::to_string(scheduler().warp) + ": "; }

[[noreturn]] void stop(std::string text) {
  Scheduler& s = scheduler();
  s.fault = std::move(text);
  switch_to(s.home);
  std::abort();  // nobody switches back
}

std::string where(const Fibre& f) {
  return f.ended ? "has ended" : std::string("is at ") + f.verb + " (" + place(*f.site) + ")";
}

bool same_site(const Site& one, const Site& other) {
  return one.line() == other.line() &&
         (one.file_name() == other.file_name() || std::strcmp(one.file_name(), other.file_name()) == 0);
}

bool same_place(const Fibre& one, const Fibre& other) {
  return one.ended == other.ended &&
         (one.ended || (one.perform == other.perform && same_site(*one.site, *other.site)));
}

// All lanes of the warp wait or have ended.
void end_round() {
  Scheduler& s = scheduler();
  Fibre* const warp = &s.fibres[static_cast<size_t>(s.warp * WARP)];
  bool meets = false;
  for (int i = 0; i < WARP; ++i) meets |= !warp[i].ended && warp[i].perform;
  if (!meets) return switch_to(s.home, s.current->ended);
  void* mine[WARP];
  for (int i = 0; i < WARP; ++i) {
    if (!same_place(warp[0], warp[i]))
      stop(warp_text() + "lane 0 " + where(warp[0]) + ", lane " + std::to_string(i) + " " + where(warp[i]));
    mine[i] = warp[i].mine;
  }
  warp[0].perform(mine);
  s.position = 0;
  switch_to(warp[s.lanes[0]]);
}

void next_lane() {
  Scheduler& s = scheduler();
  if (++s.position == WARP) return end_round();
  switch_to(s.fibres[static_cast<size_t>(s.warp * WARP + s.lanes[s.position])], s.current->ended);
}

void wait(const char* verb, void (*perform)(Lanes), void* mine, const Site& site) {
  Fibre& f = *scheduler().current;
  f.verb = verb, f.perform = perform, f.mine = mine, f.site = &site;
  next_lane();
}

extern "C" void gconv_fibre_main() {
  Scheduler& s = scheduler();
  Fibre& self = s.fibres[static_cast<size_t>(s.warp * WARP + s.lanes[s.position])];
#if defined(GCONV_ASAN)
  const void* stack = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  if (s.before == &s.home) s.home.stack = stack, s.home.stack_size = size;
#endif
  arrived(self);
  try {
    (*s.body)();
  } catch (const std::exception& error) {
    stop(warp_text() + error.what());
  }
  self.ended = true;
  next_lane();
  std::abort();  // nobody switches back
}

// ---- blocks

// 0 .. n-1 in the order of the settings; `salt` tells one shuffle from another.
std::vector<int64_t> in_order(int64_t n, uint64_t salt) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  if (settings().order == Order::reversed) std::reverse(order.begin(), order.end());
  if (settings().order == Order::shuffled) {
    uint64_t state = (settings().seed + 1) * 0x9e3779b97f4a7c15u + salt;
    for (size_t i = order.size(); i > 1; --i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      std::swap(order[i - 1], order[(state >> 33) % i]);
    }
  }
  return order;
}

void start_fibres(int threads, bool clean) {
  Scheduler& s = scheduler();
  for (int i = 0; i < threads; ++i) {
    Fibre& f = s.fibres[static_cast<size_t>(i)];
    char* const stack = s.stacks + static_cast<size_t>(i) * STACK_STRIDE;
#if defined(GCONV_ASAN)
    // An abandoned fibre leaves all of its stack as it was, one that ended only its outermost frames.
    const size_t used = clean ? 8192 : STACK;
    ASAN_UNPOISON_MEMORY_REGION(stack + STACK - used, used);
#else
    (void)clean;
#endif
    f.stack = stack, f.stack_size = STACK, f.fake_stack = nullptr;
    f.index = static_cast<unsigned>(i), f.ended = false;
    f.copies.clear(), f.groups = 0;
    prepare(f.context, stack, STACK);
  }
}

void check_barrier(int threads) {
  const Scheduler& s = scheduler();
  for (int i = 1; i < threads; ++i) {
    const Fibre &first = s.fibres[0], &other = s.fibres[static_cast<size_t>(i)];
    if (!same_place(first, other))
      throw std::runtime_error(block_text() + ", warp " + std::to_string(i / WARP) + ": thread 0 " +
                               where(first) + ", thread " + std::to_string(i) + " " + where(other));
  }
}

void run_block(int threads, bool clean) {
  Scheduler& s = scheduler();
  std::memset(s.shared, NAN_BYTE, static_cast<size_t>(s.shared_bytes));
  start_fibres(threads, clean);
  for (uint64_t phase = 0; !s.fibres[0].ended || phase == 0; ++phase) {
    for (const int64_t warp : in_order(threads / WARP, phase + blockIdx.x)) {
      s.warp = static_cast<int>(warp), s.position = 0;
      const std::vector<int64_t> lanes = in_order(WARP, phase);
      std::copy(lanes.begin(), lanes.end(), s.lanes);
      switch_to(s.fibres[static_cast<size_t>(s.warp * WARP + s.lanes[0])]);
      if (!s.fault.empty()) throw std::runtime_error(s.fault);
    }
    check_barrier(threads);
  }
}

// Shared memory of exactly the launched size, and canaries around it where AddressSanitizer does not watch.
class SharedMemory {
 public:
  explicit SharedMemory(int64_t bytes) : bytes_(bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, 128, static_cast<size_t>(bytes + 2 * around())) != 0) throw std::bad_alloc();
    whole_ = static_cast<unsigned char*>(p);
    std::memset(whole_, CANARY_BYTE, static_cast<size_t>(bytes + 2 * around()));
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() { std::free(whole_); }
  unsigned char* data() const { return whole_ + around(); }
  void check() const {
    for (int64_t i = 0; i < around(); ++i)
      if (whole_[i] != CANARY_BYTE || data()[bytes_ + i] != CANARY_BYTE)
        throw std::runtime_error(block_text() + ": writes beyond the " + std::to_string(bytes_) +
                                 " bytes of its shared memory");
  }

 private:
#if defined(GCONV_ASAN)
  static constexpr int64_t around() { return 0; }
#else
  static constexpr int64_t around() { return CANARY; }
#endif
  int64_t bytes_;
  unsigned char* whole_;
};

void check_launch(const char* op, int64_t blocks, int threads, int64_t shared_bytes) {
  std::string wrong;
  if (blocks < 0 || blocks >= int64_t(1) << 31) wrong = "blocks: " + std::to_string(blocks);
  if (threads <= 0 || threads > MOST_THREADS || threads % WARP != 0)
    wrong = "threads of a block: want a multiple of 32 up to 1024, got " + std::to_string(threads);
  if (shared_bytes < 0 || shared_bytes > settings().device.shared_per_block)
    wrong = "shared memory: want at most " + std::to_string(settings().device.shared_per_block) +
            " bytes, got " + std::to_string(shared_bytes);
  if (scheduler().running) wrong = "a kernel does not launch another";
  if (!wrong.empty()) throw std::runtime_error(std::string(op) + ": CUDA: " + wrong);
}

// A barrier or a wait in the source.
struct Place {
  const char* verb;
  Site site;
  std::string text;
  bool left_out;
};
Settings the_settings;
std::vector<Place> places;

// Notes the place; false if the settings leave it out.
bool passes(const char* verb, const Site& site) {
  for (const Place& p : places)
    if (same_site(p.site, site)) return !p.left_out;
  const std::string text = place(site);
  places.push_back({verb, site, text, text == settings().without});
  return !places.back().left_out;
}

// Not running any more, however the launch ends.
struct Running {
  Running() { scheduler().running = true; }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;
  ~Running() {
    scheduler().running = false;
    scheduler().current = &scheduler().home;
  }
};

}  // namespace

const Settings& settings() { return the_settings; }

void set(const Settings& settings) {
  the_settings = settings;
  places.clear();
}

std::vector<std::string> passed() {
  std::vector<std::string> texts;
  for (const Place& p : places) texts.push_back(std::string(p.verb) + " " + p.text);
  return texts;
}

void run(const char* op, int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& body,
         const Site& site) {
  if (blocks == 0) return;
  check_launch(op, blocks, threads, shared_bytes);
  Scheduler& s = scheduler();
  if (!s.stacks) {
    void* const p = mmap(nullptr, MOST_THREADS * STACK_STRIDE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    s.stacks = static_cast<char*>(p);
    s.fibres.resize(MOST_THREADS);
  }
  const Running running;
  const bool clean = std::exchange(s.fault, {}).empty();
  const SharedMemory shared(shared_bytes);
  s.op = op, s.launched = &site, s.body = &body;
  s.shared = shared.data(), s.shared_bytes = shared_bytes;
  blockDim.x = static_cast<unsigned>(threads), gridDim.x = static_cast<unsigned>(blocks);
  bool first = true;
  for (const int64_t block : in_order(blocks, 0)) {
    blockIdx.x = static_cast<unsigned>(block);
    run_block(threads, clean || !first);
    shared.check();
    first = false;
  }
}

void fault(const char* verb, const Site& site, const std::string& what) {
  stop(warp_text() + verb + " (" + place(site) + "): " + what);
}

void meet(const char* verb, void (*perform)(Lanes), void* mine, const Site& site) {
  wait(verb, perform, mine, site);
}

void block_sync(const Site& site) {
  if (passes("block_sync", site)) wait("block_sync", nullptr, nullptr, site);
}

void warp_sync(const Site& site) {
  if (passes("warp_sync", site)) wait("warp_sync", [](Lanes) {}, nullptr, site);
}

unsigned char* shared_memory() { return scheduler().shared; }

void check_aligned(const char* verb, const void* p, const Site& site) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fault(verb, site, "its address is no multiple of 16");
}

void check_shared_address(const char* verb, const void* p, const Site& site) {
  const Scheduler& s = scheduler();
  const auto at = reinterpret_cast<uintptr_t>(p), base = reinterpret_cast<uintptr_t>(s.shared);
  if (at < base || at >= base + static_cast<uintptr_t>(s.shared_bytes))
    fault(verb, site, "its address is not in shared memory");
}

void check_shared_row(const char* verb, const void* p, const Site& site) {
  check_shared_address(verb, p, site);
  check_aligned(verb, p, site);
  check_shared_address(verb, static_cast<const char*>(p) + 15, site);
}

void copy_async(void* shared, const void* from, bool inside, const Site& site) {
  check_shared_row("copy_async", shared, site);
  check_aligned("copy_async", from, site);
  std::memset(shared, NAN_BYTE, 16);
  Fibre& f = *scheduler().current;
  f.copies.push_back({shared, inside ? from : nullptr, f.groups});
}

void copy_commit() { ++scheduler().current->groups; }

void copy_wait(int pending, const Site& site) {
  if (!passes("copy_wait", site)) return;
  Fibre& f = *scheduler().current;
  const int done = f.groups - pending;  // groups before this one
  size_t kept = 0;
  for (const Copy& c : f.copies)
    if (c.group >= done)
      f.copies[kept++] = c;
    else if (c.from)
      std::memcpy(c.to, c.from, 16);
    else
      std::memset(c.to, 0, 16);
  f.copies.resize(kept);
}

const float* f16_values() {
  static const std::vector<float> values = [] {
    std::vector<float> all(65536);
    for (size_t i = 0; i < all.size(); ++i) all[i] = portable::f16_value(static_cast<uint16_t>(i));
    return all;
  }();
  return values.data();
}

}  // namespace gconv::cuda::host
