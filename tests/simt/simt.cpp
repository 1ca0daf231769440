// Runs a grid: which thread goes next, what it waits for, and what is wrong when nothing can move.
//
// A thread is a fiber that runs until it needs others: a barrier, a collective operation of its warp,
// the end. GENPERF_SIMT_SCHEDULE chooses among the orders that CUDA allows:
//
//   forward     blocks, warps and lanes in rising order; a warp runs as far as it can (the default)
//   reverse     the same in falling order
//   shuffle:N   random orders from seed N, four blocks at a time, changing threads at atomics too; of blocks
//               that wait for each other, one at a time is held back for some rounds
#include "simt.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

namespace simt {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuardBytes = 128;
constexpr size_t kStaticSharedLimit = 48 << 10;
constexpr size_t kSharedLimit = 227 << 10;
constexpr unsigned char kGuard = 0xA5;
constexpr unsigned char kPoison = 0xFF;  // a NaN in every floating-point format, -1 in integers
constexpr uint64_t kStackCanary = 0x5AFEC0DE5AFEC0DE;
constexpr int kSpinLimit = 1000;

enum class State { kReady, kYielded, kAtWarp, kAtBlock, kAtCluster, kAtGrid, kDone };

struct Thread {
  uint3 index;
  State state = State::kReady;
  std::unique_ptr<char[]> stack;
  Context context;
  // What it waits at, and what it brings there.
  const char* operation = "";
  Site site{"", 0};
  uint32_t mask = 0;
  uint64_t value = 0;
  Lanes received{};
  unsigned votes = 0;
};

// Shared memory of one block, poisoned, between two guards.
class SharedArray {
 public:
  explicit SharedArray(size_t bytes)
      : bytes_(bytes),
        memory_(static_cast<unsigned char*>(operator new(bytes + 2 * kGuardBytes, kAlignment))) {
    std::memset(memory_.get(), kGuard, bytes + 2 * kGuardBytes);
    std::memset(data(), kPoison, bytes);
  }
  unsigned char* data() const { return memory_.get() + kGuardBytes; }
  size_t bytes() const { return bytes_; }
  bool intact() const {
    auto is_guard = [](unsigned char byte) { return byte == kGuard; };
    return std::all_of(memory_.get(), data(), is_guard) &&
           std::all_of(data() + bytes_, data() + bytes_ + kGuardBytes, is_guard);
  }

 private:
  static constexpr std::align_val_t kAlignment{128};
  struct Free {
    void operator()(unsigned char* p) const { operator delete(p, kAlignment); }
  };
  size_t bytes_;
  std::unique_ptr<unsigned char[], Free> memory_;
};

struct Block {
  uint3 index;
  std::vector<Thread> threads;
  std::map<const void*, SharedArray> arrays;  // by variable; the dynamic one under nullptr
};

class Schedule {
 public:
  explicit Schedule(const std::string& name) {
    if (name == "reverse") {
      reverse_ = true;
    } else if (name.rfind("shuffle:", 0) == 0) {
      shuffled_ = true;
      random_.seed(std::stoul(name.substr(8)));
    } else if (name != "forward") {
      throw Error("GENPERF_SIMT_SCHEDULE is '" + name + "', expected forward, reverse or shuffle:SEED");
    }
  }
  bool shuffled() const { return shuffled_; }
  bool chance(unsigned n) { return shuffled_ && random_() % n == 0; }
  // Below n, for n > 0.
  size_t pick(size_t n) { return random_() % n; }
  std::vector<size_t> order(size_t n) {
    std::vector<size_t> out(n);
    std::iota(out.begin(), out.end(), size_t{0});
    if (reverse_) std::reverse(out.begin(), out.end());
    if (shuffled_) std::shuffle(out.begin(), out.end(), random_);
    return out;
  }

 private:
  bool reverse_ = false, shuffled_ = false;
  std::mt19937 random_;
};

const char* schedule_name() {
  const char* name = std::getenv("GENPERF_SIMT_SCHEDULE");
  return name && *name ? name : "forward";
}

std::string to_string(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string to_string(Site site) {
  std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

size_t volume(dim3 d) { return size_t{d.x} * d.y * d.z; }

uint3 unravel(size_t i, dim3 d) {
  return {static_cast<unsigned>(i % d.x), static_cast<unsigned>(i / d.x % d.y),
          static_cast<unsigned>(i / d.x / d.y)};
}

// How many threads of the block stand where.
std::string whereabouts(const Block& block) {
  std::map<std::string, int> places;
  for (const Thread& t : block.threads) {
    switch (t.state) {
      case State::kDone:
        ++places["returned"];
        break;
      case State::kReady:
        ++places["ready"];
        break;
      case State::kYielded:
        ++places["spinning"];
        break;
      default:
        ++places["waiting at " + std::string(t.operation) + " (" + to_string(t.site) + ")"];
    }
  }
  std::string text = "block " + to_string(block.index) + ":";
  const char* separator = " ";
  for (const auto& [place, count] : places) {
    text += separator + std::to_string(count) + (count == 1 ? " thread " : " threads ") + place;
    separator = ", ";
  }
  return text;
}

class Grid;
std::mutex one_launch_at_a_time;
Grid* grid = nullptr;
Block* current_block = nullptr;
Thread* current = nullptr;
Context scheduler;
std::string failure;

class Grid {
 public:
  Grid(dim3 shape, dim3 block_shape, size_t shared_bytes, bool cooperative, unsigned cluster,
       const std::function<void()>& body)
      : body(body),
        shape_(shape),
        block_shape_(block_shape),
        shared_bytes_(shared_bytes),
        cooperative_(cooperative),
        cluster_(cluster),
        schedule(schedule_name()) {
    bool fits =
        volume(shape) > 0 && shape.x <= INT_MAX && shape.y <= 65535 && shape.z <= 65535 &&
        volume(block_shape) > 0 && volume(block_shape) <= 1024 && block_shape.z <= 64 &&
        shared_bytes <= kSharedLimit &&
        (cluster == 0 || (cluster <= kClusterLimit && volume(shape) == shape.x && shape.x % cluster == 0));
    if (!fits) {
      throw Error("invalid launch: grid " + to_string(uint3{shape.x, shape.y, shape.z}) + ", block " +
                  to_string(uint3{block_shape.x, block_shape.y, block_shape.z}) + ", " +
                  std::to_string(shared_bytes) + " bytes of shared memory");
    }
  }

  void run() {
    std::vector<size_t> waiting = schedule.order(volume(shape_));
    std::reverse(waiting.begin(), waiting.end());
    size_t at_a_time = stays() ? waiting.size() : schedule.shuffled() ? 4 : 1;
    int idle_rounds = 0;
    while (!waiting.empty() || !resident_.empty()) {
      while (resident_.size() < at_a_time && !waiting.empty()) {
        resident_.push_back(make_block(waiting.back()));
        waiting.pop_back();
      }
      moved_ = spinning_ = false;
      if (stays() && schedule.chance(8)) held_ = schedule.pick(2 * resident_.size());
      for (size_t i : schedule.order(resident_.size()))
        if (i != held_) visit(*resident_[i]);
      release_grid_barrier();
      release_cluster_barriers();
      retire();
      if (!moved_ && held_ < resident_.size()) {
        held_ = SIZE_MAX;
        continue;
      }
      idle_rounds = moved_ ? 0 : idle_rounds + 1;
      if (!moved_ && !(spinning_ && idle_rounds < kSpinLimit)) {
        throw Error("deadlock in " + whereabouts(stuck_block()));
      }
    }
  }

  const std::function<void()>& body;

 private:
  std::unique_ptr<Block> make_block(size_t i) {
    auto block = std::make_unique<Block>();
    block->index = unravel(i, shape_);
    block->threads = std::vector<Thread>(volume(block_shape_));
    for (size_t t = 0; t < block->threads.size(); ++t) block->threads[t].index = unravel(t, block_shape_);
    block->arrays.emplace(nullptr, shared_bytes_);
    return block;
  }

  void visit(Block& block) {
    for (size_t warp : schedule.order((block.threads.size() + warpSize - 1) / warpSize)) {
      size_t first = warp * warpSize;
      size_t lanes = std::min<size_t>(warpSize, block.threads.size() - first);
      for (size_t i = 0; i < lanes; ++i) {
        Thread& thread = block.threads[first + i];
        if (thread.state == State::kYielded) thread.state = State::kReady;
      }
      bool again;
      do {
        again = false;
        for (size_t lane : schedule.order(lanes)) {
          Thread& thread = block.threads[first + lane];
          if (thread.state != State::kReady) continue;
          resume(block, thread);
          (thread.state == State::kYielded ? spinning_ : again) = true;
        }
        again |= complete_exchanges(&block.threads[first], lanes);
        moved_ |= again;
      } while (again && !schedule.shuffled());
    }
    release_block_barrier(block);
  }

  void resume(Block& block, Thread& thread) {
    current_block = &block;
    current = &thread;
    blockIdx = block.index;
    threadIdx = thread.index;
    if (!thread.stack) {
      if (stacks_.empty()) stacks_.emplace_back(new char[kStackBytes]);
      thread.stack = std::move(stacks_.back());
      stacks_.pop_back();
      std::memcpy(thread.stack.get(), &kStackCanary, sizeof kStackCanary);
      make_context(thread.context, thread.stack.get(), kStackBytes, [] {
        grid->body();
        current->state = State::kDone;
        switch_context(current->context, scheduler);
      });
    }
    switch_context(scheduler, thread.context);
    if (!failure.empty()) {
      throw Error(failure + " in block " + to_string(block.index) + ", thread " + to_string(thread.index));
    }
    if (std::memcmp(thread.stack.get(), &kStackCanary, sizeof kStackCanary) != 0) {
      throw Error("a thread overran its stack of " + std::to_string(kStackBytes) + " bytes");
    }
    if (thread.state == State::kDone) stacks_.push_back(std::move(thread.stack));
  }

  // An exchange is complete when each lane of its mask has come to it or returned.
  bool complete_exchanges(Thread* lanes, size_t count) {
    bool any = false;
    for (size_t i = 0; i < count; ++i) {
      if (lanes[i].state != State::kAtWarp) continue;
      uint32_t mask = lanes[i].mask;
      Lanes arrived{};
      bool complete = true;
      for (size_t j = 0; j < count; ++j) {
        if (!(mask >> j & 1) || lanes[j].state == State::kDone) continue;
        complete &= lanes[j].state == State::kAtWarp && lanes[j].mask == mask &&
                    std::strcmp(lanes[j].operation, lanes[i].operation) == 0;
        arrived.present |= 1u << j;
        arrived.value[j] = lanes[j].value;
      }
      if (!complete) continue;
      for (size_t j = 0; j < count; ++j) {
        if (!(arrived.present >> j & 1)) continue;
        lanes[j].received = arrived;
        lanes[j].state = State::kReady;
      }
      any = true;
    }
    return any;
  }

  // Throws where the barrier could only hang or is not one barrier: see README.md.
  void release_block_barrier(Block& block) {
    auto in = [&](State s) {
      return std::count_if(block.threads.begin(), block.threads.end(),
                           [s](const Thread& t) { return t.state == s; });
    };
    size_t waiting = in(State::kAtBlock), done = in(State::kDone), all = block.threads.size();
    if (waiting == 0 || waiting + done < all) return;
    auto first = std::find_if(block.threads.begin(), block.threads.end(),
                              [](const Thread& t) { return t.state == State::kAtBlock; });
    unsigned votes = 0;
    for (const Thread& t : block.threads) {
      bool same = t.state == State::kAtBlock && t.site.line == first->site.line &&
                  std::strcmp(t.operation, first->operation) == 0 &&
                  std::strcmp(t.site.file, first->site.file) == 0;
      if (!same) throw Error("divergent barrier in " + whereabouts(block));
      votes += static_cast<unsigned>(t.value);
    }
    for (Thread& t : block.threads) {
      t.votes = votes;
      t.state = State::kReady;
    }
    moved_ = true;
  }

  void release_grid_barrier() {
    for (const auto& block : resident_) {
      for (const Thread& t : block->threads) {
        if (t.state != State::kAtGrid) return;
      }
    }
    if (!cooperative_) throw Error("grid_sync outside a cooperative launch");
    for (const auto& block : resident_) {
      for (Thread& t : block->threads) t.state = State::kReady;
    }
    moved_ = true;
  }

  void release_cluster_barriers() {
    std::map<unsigned, bool> complete;  // by cluster: whether all threads are at a barrier
    if (cluster_ > 0) {
      for (const auto& block : resident_) {
        bool& all = complete.try_emplace(block->index.x / cluster_, true).first->second;
        for (const Thread& t : block->threads) all &= t.state == State::kAtCluster;
      }
    }
    for (const auto& block : resident_) {
      if (cluster_ > 0 && !complete[block->index.x / cluster_]) continue;
      for (Thread& t : block->threads) {
        if (t.state != State::kAtCluster) continue;
        if (cluster_ == 0) throw Error("cluster_sync outside a cluster launch");
        t.state = State::kReady;
        moved_ = true;
      }
    }
  }

  // Blocks that may wait for each other run together, and are kept until all have returned.
  bool stays() const { return cooperative_ || cluster_ > 0; }

  const Block& stuck_block() const {
    for (const auto& block : resident_) {
      for (const Thread& t : block->threads) {
        if (t.state != State::kDone) return *block;
      }
    }
    return *resident_.front();
  }

  void retire() {
    auto finished = [](const std::unique_ptr<Block>& block) {
      for (const Thread& t : block->threads) {
        if (t.state != State::kDone) return false;
      }
      size_t static_bytes = 0;
      for (const auto& [variable, array] : block->arrays) {
        if (!array.intact()) {
          throw Error(std::string(variable ? "static" : "dynamic") + " shared memory of " +
                      std::to_string(array.bytes()) + " bytes was overrun in block " +
                      to_string(block->index));
        }
        if (variable) static_bytes += array.bytes();
      }
      if (static_bytes > kStaticSharedLimit) {
        throw Error(std::to_string(static_bytes) + " bytes of static shared memory, at most " +
                    std::to_string(kStaticSharedLimit) + " fit");
      }
      return true;
    };
    // One that returned can never come to a barrier of its grid or cluster.
    bool keep = stays() && !std::all_of(resident_.begin(), resident_.end(), finished);
    if (!keep) resident_.erase(std::remove_if(resident_.begin(), resident_.end(), finished), resident_.end());
  }

  dim3 shape_, block_shape_;
  size_t shared_bytes_;
  bool cooperative_;
  unsigned cluster_;  // blocks of a cluster, 0 where there are none

 public:
  Schedule schedule;

 private:
  std::vector<std::unique_ptr<Block>> resident_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  bool moved_ = false, spinning_ = false;
  size_t held_ = SIZE_MAX;  // the block that is not visited for now
};

// Leaves the calling thread until the scheduler resumes it.
void wait(State state, const char* operation, Site site) {
  current->state = state;
  current->operation = operation;
  current->site = site;
  switch_context(current->context, scheduler);
}

}  // namespace

Lanes exchange(const char* operation, uint32_t mask, uint64_t value, Site site) {
  int lane = lane_id();
  if (!(mask >> lane & 1)) trap((std::string(operation) + " by a lane outside its mask").c_str(), site);
  current->mask = mask;
  current->value = value;
  wait(State::kAtWarp, operation, site);
  return current->received;
}

unsigned block_barrier(const char* operation, bool predicate, Site site) {
  current->value = predicate;
  wait(State::kAtBlock, operation, site);
  return current->votes;
}

void grid_barrier(Site site) { wait(State::kAtGrid, "grid_sync", site); }

void cluster_barrier(Site site) { wait(State::kAtCluster, "cluster_sync", site); }

void* static_shared(const void* variable, size_t bytes) {
  return current_block->arrays.try_emplace(variable, bytes).first->second.data();
}

void* dynamic_shared() { return current_block->arrays.at(nullptr).data(); }

void interleave() {
  if (grid->schedule.chance(4)) wait(State::kReady, "", {"", 0});
}

void yield() { wait(State::kYielded, "__nanosleep", {"", 0}); }

void trap(const char* message, Site site) {
  failure = std::string(message) + " (" + to_string(site) + ")";
  switch_context(current->context, scheduler);
  std::abort();
}

void run(dim3 shape, dim3 block, size_t shared_bytes, bool cooperative, unsigned cluster,
         const std::function<void()>& body) {
  std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  Grid launch(shape, block, shared_bytes, cooperative, cluster, body);
  grid = &launch;
  failure.clear();
  gridDim = shape;
  blockDim = block;
  launch.run();
}

}  // namespace simt
